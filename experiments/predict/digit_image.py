"""The digits in a picture file, made into images as MNIST's are."""

import io
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from scipy import ndimage

from experiments.predict.ground import contrast_of, resize
from experiments.predict.marks import find_digits
from lstm_flax.files import MIB, read_regular_file

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it also raises what it logs as errors

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What pictures may be: Pillow reads much more, some of it by starting other programs."""

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""How the names of such files end."""

MOST_BYTES = 256 * MIB
"""Of a picture file; a scanner's TIFF without compression is that large."""

MOST_PIXELS = 80_000_000
"""Of a picture that is decoded as a whole: in colour, so many take 320 MB."""

MOST_JPEG_PIXELS = 160_000_000
"""Of a JPEG, which is decoded at an eighth of its height and width."""

ENOUGH = 1024
"""Pixels of a larger picture's longer side after its pixels were averaged, at least."""

FEWEST = 112
"""Pixels of a smaller picture's longer side after it was enlarged: strokes then have several."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation, how a picture comes to stand upright."""

SIZE = 28
"""Height and width of an image, in pixels."""

BOX = 20
"""Height and width of the square that the digit just fits into, in pixels."""

FAINTEST = 0.25
"""Paper is never quite even: ink that is fainter than this fraction of the darkest is none."""


class DigitImageError(Exception):
    """A picture can't be used; the message says which and why."""


class DigitImage(NamedTuple):
    """A digit in a picture."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in the upright picture, in pixels
    image: np.ndarray  # uint8 [28, 28], as MNIST's, the strokes 255


class Picture(NamedTuple):
    """A picture, upright, and the digits that it shows from left to right."""

    grey: np.ndarray  # float32 [height, width], from 0, black, to 1, white; reduced if it was large
    size: tuple[int, int]  # width and height of the picture itself, in pixels
    digits: list[DigitImage]


def read_picture(path: Path, single: bool = False) -> Picture:
    """Read a picture file and find the digits in it, whatever its size, colours and light.

    Args:
        path: of a picture in one of `FORMATS`; dark on light, or light on dark.
        single: take everything that the picture shows as one digit.

    Returns:
        The picture; without digits where it shows none.

    Raises:
        DigitImageError: it is no picture, is too large or can't be read.
    """
    try:
        image, size = _decode(read_regular_file(path, MOST_BYTES, follow=True))
        grey = _shades(image)
        del image
        return Picture(grey, size, digits_of(grey, size, single))
    except UnidentifiedImageError as error:
        raise DigitImageError(f"{path} is no picture ({', '.join(FORMATS)} are read)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DigitImageError(
            f"{path} has more than {MOST_PIXELS / 1e6:.0f} million pixels, "
            f"or as a JPEG {MOST_JPEG_PIXELS / 1e6:.0f} million"
        ) from error
    except Exception as error:  # decoders of damaged files raise all sorts, MemoryError too
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DigitImageError(f"{path} can't be read ({reason})") from error


def read_digit_image(path: Path) -> np.ndarray:
    """Read a picture file of one digit as MNIST's image of it, uint8 [28, 28].

    Raises:
        DigitImageError: as in `read_picture`, or the picture shows no digit.
    """
    digits = read_picture(path, single=True).digits
    if not digits:
        raise DigitImageError(f"{path} shows no digit")
    return digits[0].image


def digits_of(
    grey: np.ndarray, size: tuple[int, int] | None = None, single: bool = False
) -> list[DigitImage]:
    """Find the digits in a picture that is decoded.

    Args:
        grey: float [height, width] from 0, black, to 1, white.
        size: width and height of the picture that the boxes refer to; of `grey` by default.
        single: take everything that the picture shows as one digit.
    """
    height, width = grey.shape
    times = -(-FEWEST // max(grey.shape))
    if times > 1:
        grey = resize(grey, (times * height, times * width))
    across, down = (n / m for n, m in zip(size or (width, height), grey.shape[::-1], strict=True))
    return [
        DigitImage(
            (
                int(left * across),
                int(top * down),
                int(np.ceil(right * across)),
                int(np.ceil(bottom * down)),
            ),
            as_mnist(digit.ink),
        )
        for digit in find_digits(contrast_of(grey), single)
        for left, top, right, bottom in [digit.box]
    ]


def as_mnist(ink: np.ndarray) -> np.ndarray:
    """Scale and centre a digit as MNIST's were.

    The digit is scaled, its proportions kept, to fit a box of 20 x 20 pixels, and its centre of
    mass comes into the centre of 28 x 28 (LeCun et al., "Gradient-Based Learning Applied to
    Document Recognition", 1998, section III.A). A model that saw only such digits needs it so.

    Args:
        ink: float [height, width] from 0, paper, to 1, the darkest stroke.

    Returns:
        uint8 [28, 28]; all zero where there is no ink.
    """
    strokes = np.where(ink > FAINTEST, ink, 0).astype(np.float32)
    rows, columns = np.flatnonzero(strokes.any(1)), np.flatnonzero(strokes.any(0))
    if not rows.size:
        return np.zeros((SIZE, SIZE), np.uint8)
    digit = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(BOX * side / max(digit.shape))) for side in digit.shape)
    small = np.asarray(Image.fromarray(digit).resize((width, height), Image.Resampling.BILINEAR))
    cornered = np.pad(small, ((0, SIZE - height), (0, SIZE - width)))
    # By whole pixels, as in MNIST, where the centres of mass lie between 13.5 and 14.5.
    move = [round(SIZE / 2 - centre) for centre in ndimage.center_of_mass(small)]
    centred = ndimage.shift(cornered, move, order=0)
    return np.round(255 * centred / max(centred.max(), 1e-6)).astype(np.uint8)


def _decode(content: bytes) -> tuple[Image.Image, tuple[int, int]]:
    """A picture file's first picture, upright, and the size that it has there.

    A large one is reduced. The size is the picture's own, as it stands upright.

    Raises:
        Image.DecompressionBombError, Image.DecompressionBombWarning: it has too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which are not used; sizes are checked
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        if _pixels(image) > (MOST_JPEG_PIXELS if image.format == "JPEG" else MOST_PIXELS):
            raise Image.DecompressionBombError
        size = image.size
        image.draft("L", (ENOUGH, ENOUGH))  # a large JPEG is decoded at a fraction of its size
        image.load()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # damaged EXIF data say nothing about how it was held
            orientation = None
    if image.mode in ("RGB", "L", "RGBA"):
        image = _smaller(image)  # before anything else copies it
    if orientation not in UPRIGHT:
        return image, size
    return image.transpose(UPRIGHT[orientation]), size if orientation < 5 else size[::-1]


def _pixels(image: Image.Image) -> int:
    """How many pixels are decoded at once, as the headers say; nothing is decoded for it."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than the picture
    tile = tags.get(TiffImagePlugin.TILEWIDTH, 0) * tags.get(TiffImagePlugin.TILELENGTH, 0)
    return max(image.width * image.height, tile)


def _shades(image: Image.Image) -> np.ndarray:
    """A picture as shades, float32 [height, width], 0 being black and 1 white.

    Of a scanner's 16 bits the lowest value is black and the highest is white.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(_smaller(image.convert("F")), np.float64)
        is_number = np.isfinite(values)
        ground = np.median(values[is_number]) if is_number.any() else 0.0
        values = np.where(is_number, values, ground)
        low, high = values.min(), values.max()
        return ((values - low) / ((high - low) or 1)).astype(np.float32)
    if not image.has_transparency_data:
        return np.asarray(_smaller(image.convert("L")), np.float32) / 255
    seen = _smaller(image.convert("RGBA"))
    paper = Image.new("RGBA", seen.size, _paper(seen))
    return np.asarray(Image.alpha_composite(paper, seen).convert("L"), np.float32) / 255


def _paper(seen: Image.Image) -> str:
    """The colour of the paper under a transparent picture: that which its ink stands out from."""
    alpha = np.asarray(seen.getchannel("A"))
    shades = np.asarray(seen.convert("L"))[alpha > 127]
    return "black" if shades.size and np.median(shades) > 127 else "white"


def _smaller(image: Image.Image) -> Image.Image:
    """Average squares of pixels, where a picture has more than can be of use."""
    side = max(image.size) // ENOUGH
    return image.reduce(side) if side > 1 else image
