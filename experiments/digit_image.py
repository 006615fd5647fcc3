"""A picture of one digit, made into an image as MNIST's are."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

SIZE = 28
"""Height and width of an image, in pixels."""

BOX = 20
"""Height and width of the square that the digit just fits into, in pixels."""

FAINTEST = 0.25
"""Paper is never quite even: ink that is fainter than this fraction of the darkest is none."""


class DigitImageError(Exception):
    """A picture can't be used; the message says which and why."""


def read_digit_image(path: Path) -> np.ndarray:
    """Read a picture file of one digit, whatever its size and colours, as MNIST's image of it.

    Args:
        path: of a PNG, a JPEG, or what else Pillow reads; dark on light, or light on dark.

    Returns:
        uint8 [28, 28], the strokes 255.

    Raises:
        DigitImageError: it is no picture, can't be read, or shows nothing.
    """
    image = as_mnist(_ink(_grey(path)))
    if not image.any():
        raise DigitImageError(f"{path} shows nothing: it has one shade")
    return image


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


def _grey(path: Path) -> np.ndarray:
    """A picture file as shades, float32 [height, width], 0 being black and 1 white."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except UnidentifiedImageError as error:
        raise DigitImageError(f"{path} is no picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DigitImageError(f"{path} can't be read ({reason})") from error
    paper = Image.new("RGBA", upright.size, "white")  # seen where the picture is transparent
    return np.asarray(Image.alpha_composite(paper, upright).convert("L"), np.float32) / 255


def _ink(grey: np.ndarray) -> np.ndarray:
    """How much each point differs from the ground, which is the shade of most of the border."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(border))
    return ink / max(ink.max(), 1e-6)
