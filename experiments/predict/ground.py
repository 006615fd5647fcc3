"""What is ink in a picture: how much each point differs from the ground around it."""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import filters, measure, morphology

COARSE = 256
"""Pixels of the longer side of the copy on which a page, its light and its ground are estimated."""

DARKEST_GROUND = 0.2
"""Contrast is relative to the ground, as light is; below this shade it would be that of noise."""

LIGHTEST_GROUND = 0.5
"""Beneath light ink; what is left of the shades above it would be noise."""


TWO_SHADES = 0.82
"""Where two shades explain so much of its variance, a page is lit well enough to have but two."""


class Contrast(NamedTuple):
    """How much each point of a page differs from the ground around it."""

    values: np.ndarray  # float32 [height, width], 0 the ground, 1 black ink on white
    noise: float  # standard deviation of the ground
    corner: tuple[int, int]  # of the page in the picture: its first row and column
    is_filled: bool  # whether the page is cropped to a digit's edge


def contrast_of(grey: np.ndarray) -> Contrast:
    """Estimate a picture's ground, and how much its points stand out from it.

    Shades are compared as light is: relative to the ground at each point, so that ink in a shadow
    counts as ink in the light. The ground is what a morphological closing leaves, which is wider
    than the strokes: it follows a shadow's edge and passes over ink.

    Args:
        grey: float32 [height, width] from 0, black, to 1, white; light ink or dark.
    """
    noise = _noise(grey)
    smooth = filters.gaussian(grey, 1, mode="nearest") if noise > 0.005 else grey
    rows, columns, on_page = page_of(smooth)
    page = smooth[rows, columns]
    page = np.where(on_page, page, np.median(page[on_page]))
    factor = _evenly_lit(page)
    page = np.minimum(page * factor, 1)
    dark, least = (page, DARKEST_GROUND) if is_ink_dark(page) else (1 - page, LIGHTEST_GROUND)
    is_filled = _is_filled(dark)
    ground = _lightest(dark) if is_filled else _ground(dark)
    values = (ground - dark) / np.maximum(ground, least)
    # Of the ground's contrast by its lower part, where there is no ink: the closing's ground is
    # where noise is lightest, and a normal distribution's 5% and 30% are 1.12 deviations apart.
    low, high = np.percentile(values[on_page], [5, 30])
    spread = (high - low) / 1.12
    bias = min(high + 0.52 * spread, 0.1)
    if is_filled:
        spread, bias = noise, 0
    values = np.clip(values - bias, 0, 1) * on_page
    spread *= np.max(factor) / np.median(factor)  # noise is multiplied as the light is
    return Contrast(
        values.astype(np.float32), float(spread), (rows.start, columns.start), is_filled
    )


def _separability(values: np.ndarray) -> float:
    """How much of the variance two classes explain (Otsu, 1979), from 0 to 1."""
    small = coarse(values)
    variance = small.var()
    if variance < 1e-6:
        return 0.0
    darker = small < filters.threshold_otsu(small)
    share = darker.mean()
    between = share * (1 - share) * (small[darker].mean() - small[~darker].mean()) ** 2
    return float(between / variance)


def _is_filled(dark: np.ndarray) -> bool:
    """Whether dark ink reaches all sides of a page, as where it is cropped to a digit's edge.

    Of the border such a digit has the smaller part, other than a frame; and where its outline is
    filled, it leaves more of the page's corners than a page does that a digit was written on.
    """
    if _separability(dark) < TWO_SHADES:
        return False
    ink = coarse(dark, 96)
    ink = ink < filters.threshold_otsu(ink)
    labels = measure.label(ink, connectivity=2)
    sides = [labels[:2], labels[-2:], labels[:, :2], labels[:, -2:]]
    everywhere = set.intersection(*(set(np.unique(side)) for side in sides)) - {0}
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    regions = [region for region in measure.regionprops(labels) if region.label in everywhere]
    return any(
        region.area > 0.1 * ink.size
        and region.area_filled < 0.88 * ink.size
        and (border == region.label).mean() < 0.45
        for region in regions
    )


def _lightest(values: np.ndarray) -> float:
    """The shade of the lighter class."""
    small = coarse(values)
    return float(np.median(small[small > filters.threshold_otsu(small)]))


def _noise(grey: np.ndarray) -> float:
    """The standard deviation of a picture's noise, by the median, so that edges count little."""
    rest = grey - filters.gaussian(grey, 2, mode="nearest")
    return float(np.median(np.abs(rest)) / 0.6745)


def coarse(values: np.ndarray, side: int = COARSE) -> np.ndarray:
    """Average a picture down until its longer side has so many pixels, at most."""
    factor = side / max(values.shape)
    return values if factor >= 1 else resize(values, [round(factor * n) for n in values.shape])


def resize(values: np.ndarray, shape: tuple[int, int] | list[int]) -> np.ndarray:
    """Resize float values with Pillow, whose filters average when they reduce."""
    height, width = (max(1, n) for n in shape)
    image = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def page_of(grey: np.ndarray) -> tuple[slice, slice, np.ndarray]:
    """Find a page that lies on something else, or stands in a frame.

    It is a region of one side of Otsu's threshold that does not touch the picture's border, and
    fills most of the smallest rectangle around it, at any angle. A digit does not: where its
    outline is filled, a 0 fills as much as an ellipse, 79%.

    Returns:
        The page's rows and columns, and within these a mask of what belongs to it; the whole
        picture where no such page is found.
    """
    whole = slice(0, grey.shape[0]), slice(0, grey.shape[1])
    small = coarse(grey)
    if np.ptp(small) < 0.1 or min(small.shape) < 20:
        return *whole, np.ones(grey.shape, bool)
    light = small > filters.threshold_otsu(small)
    for side in (light, ~light):
        for region in measure.regionprops(measure.label(side, connectivity=1)):
            top, left, bottom, right = region.bbox
            inside = top > 0 and left > 0 and bottom < small.shape[0] and right < small.shape[1]
            if not inside or region.area_filled < 0.15 * small.size:
                continue
            filled, sides = region.image_convex, _smallest_rectangle(region.image)
            rectangle = sides[0] * sides[1]
            is_page = region.area_filled > 0.88 * rectangle or (
                # A digit may run into its frame, and cut a notch into the page.
                region.area_convex > 0.93 * rectangle
                and region.area_convex > 0.5 * small.size
                and region.area_filled > 0.75 * region.area_convex
            )
            holes = region.area_convex - region.area
            if not is_page or (max(sides) > 2 * min(sides) and holes < 0.005 * region.area):
                continue  # a bar without anything on it may be a 1
            edge = max(2, round(0.015 * max(small.shape)))
            padded = np.pad(filled, 1)
            filled = morphology.erosion(padded, morphology.disk(edge))[1:-1, 1:-1]
            scale = [n / m for n, m in zip(grey.shape, small.shape, strict=True)]
            rows = slice(round(top * scale[0]), round(bottom * scale[0]))
            columns = slice(round(left * scale[1]), round(right * scale[1]))
            shape = rows.stop - rows.start, columns.stop - columns.start
            return rows, columns, resize(filled, shape) > 0.5
    return *whole, np.ones(grey.shape, bool)


def _smallest_rectangle(mask: np.ndarray) -> tuple[float, float]:
    """The sides of the rectangle of the least area, at any angle, around a mask."""
    rows = np.arange(len(mask))
    firsts, lasts = mask.argmax(1), mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    points = np.concatenate([np.stack([rows, firsts]), np.stack([rows, lasts])], 1)
    angles = np.deg2rad(np.arange(90))
    along = np.cos(angles)[:, None] * points[0] + np.sin(angles)[:, None] * points[1]
    across = np.cos(angles)[:, None] * points[1] - np.sin(angles)[:, None] * points[0]
    sides = np.ptp(along, axis=1) + 1, np.ptp(across, axis=1) + 1
    least = np.argmin(sides[0] * sides[1])
    return float(sides[0][least]), float(sides[1][least])


def _evenly_lit(page: np.ndarray) -> np.ndarray | float:
    """What to multiply a page with so that a light that falls off smoothly becomes even.

    The logarithm of the light is a quadratic surface, fitted to the least sum of absolute
    differences, to which ink and specks matter little. Where much of the page does not follow such
    a surface, as in a shadow, the factor is 1.
    """
    small = coarse(page, 64)
    y, x = (np.linspace(-1, 1, n) for n in small.shape)
    y, x = (part.ravel() for part in np.meshgrid(y, x, indexing="ij"))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 1)
    shades = np.log(np.maximum(small, 0.05)).ravel()
    weights = np.ones_like(shades)
    for _ in range(20):  # iteratively reweighted least squares
        scaled = terms * weights[:, None]
        factors = np.linalg.lstsq(scaled.T @ terms, scaled.T @ shades, rcond=None)[0]
        rest = np.abs(shades - terms @ factors)
        weights = 1 / np.maximum(rest, 0.01)
    surface = (terms @ factors).reshape(small.shape)
    follow = [
        (np.abs(shades - level) < 0.08).mean() for level in (surface.ravel(), np.median(shades))
    ]
    if follow[0] < max(0.55, follow[1] + 0.1):
        return 1.0
    return resize(np.exp(surface.max() - surface), page.shape)


def is_ink_dark(page: np.ndarray) -> bool:
    """Whether a page's ink is darker than its ground.

    The ground is the median of a window of most of the page, and ink is what differs from it most.
    Where a digit fills the page, that may be either; ink is then what less of the border shows.
    """
    small = coarse(page, 96)
    low, high = small.min(), small.max()
    if high - low < 1e-3:
        return True
    dark, light = _is_filled(page), _is_filled(1 - page)
    if dark != light:
        return dark
    shades = np.round(255 * (small - low) / (high - low)).astype(np.uint8)
    radius = max(1, round(0.3 * min(shades.shape)))
    padded = np.pad(shades, radius, mode="reflect" if min(shades.shape) > radius else "edge")
    median = filters.rank.median(padded, np.ones((2 * radius + 1, 2 * radius + 1)))
    rest = shades.astype(int) - median[radius:-radius, radius:-radius]
    level = 0.4 * np.abs(rest).max()
    masks = rest < -level, rest > level
    darker, lighter = _enclosed(*masks)
    enough = 0.3 * max(mask.sum() for mask in masks)
    if min(darker, lighter) < 0.3 * max(darker, lighter) and max(darker, lighter) > enough:
        return darker > lighter
    border = np.concatenate([shades[0], shades[-1], shades[:, 0], shades[:, -1]])
    return bool(np.median(border) > filters.threshold_otsu(shades))


def _enclosed(*masks: np.ndarray) -> list[int]:
    """How many points of each mask are in regions away from the border.

    Regions that stand inside of one at the border count as that one does, as the hole of a 0 does
    that fills the page.
    """
    height, width = masks[0].shape
    inside = np.ones((height, width), bool)
    regions = [measure.regionprops(measure.label(mask, connectivity=2)) for mask in masks]
    for region in (region for found in regions for region in found):
        box = region.bbox  # top, left, bottom, right
        if 0 in box[:2] or height in box[2:3] or width in box[3:]:
            inside[region.slice] &= ~region.image_filled
    return [int((mask & inside).sum()) for mask in masks]


def _ground(dark: np.ndarray) -> np.ndarray:
    """The shade of the ground under dark ink, at every point.

    First strokes of any width are looked for, then the ground is estimated with a square that is
    somewhat wider than these.
    """
    small = coarse(dark)
    shortest = min(small.shape)
    ground = _closed(small, 0.5 * shortest)
    contrast = (ground - small) / np.maximum(ground, DARKEST_GROUND)
    strokes = contrast > 0.6 * contrast.max()
    depth = ndimage.distance_transform_edt(strokes)
    width = 2 * np.percentile(depth[strokes], 98) if strokes.any() else 0
    side = np.clip(2 * width, 0.15 * shortest, 0.5 * shortest)
    return np.maximum(resize(_closed(small, side), dark.shape), dark)


def _closed(values: np.ndarray, side: float) -> np.ndarray:
    """Close with a square."""
    side = max(3, 2 * round(side / 2) + 1)
    square = morphology.footprint_rectangle((side, side), decomposition="separable")
    return morphology.closing(values, square)
