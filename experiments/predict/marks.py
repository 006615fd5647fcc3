"""The marks of a pen on a page: which are digits, and which digits stand in a row."""

from typing import NamedTuple

import numpy as np
from skimage import measure, morphology

from experiments.predict.ground import Contrast

FAINTEST = 0.12
"""Marks of less contrast are none; a soft pencil's has 0.25."""

NOISE = 5.0
"""Marks stand out by so many standard deviations of the noise, at least."""

MOST_LEVELS = 6
"""How often marks are put aside, and fainter ones looked for."""

SMALLEST = 0.025
"""Height of a digit, at least, as a part of the page's shorter side."""


SOFT = 2
"""Pixels beyond the threshold that a stroke's soft edge may have."""


class Digit(NamedTuple):
    """Where a digit is in a picture, and its ink."""

    box: tuple[int, int, int, int]  # left, top, right, bottom
    ink: np.ndarray  # float32 [height, width] of the box; 0 is paper, 1 the darkest stroke


class Mark(NamedTuple):
    """A connected mark: a digit, or a part of one."""

    label: int
    top: int
    left: int
    bottom: int
    right: int
    area: int
    border: int  # how many points of the page's border it has
    solidity: float  # part of its convex hull that it fills

    @property
    def height(self) -> int:
        """Of the box around it."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Of the box around it."""
        return self.right - self.left

    @property
    def side(self) -> int:
        """The longer one of the box around it."""
        return max(self.height, self.width)


def find_digits(page: Contrast, single: bool = False) -> list[Digit]:
    """Find the digits in a row on a page, from left to right; none on a blank page.

    The strongest contrast may be that of a scanner's edge, beside which a pencil is pale. So marks
    are taken strongest first, and what is no digit (what runs across the page, touches its border
    or is a speck) is put aside, until some are left.

    Args:
        page: from `ground.contrast_of`.
        single: take all marks that are left as one digit.
    """
    values = page.values.copy()
    faintest = max(FAINTEST, NOISE * page.noise)
    for _ in range(MOST_LEVELS):
        strongest = _strongest(values)
        if strongest < faintest:
            break
        mask = values > 0.5 * strongest
        lines = lines_of(mask)
        labels = measure.label(mask & ~lines, connectivity=2)
        marks = [mark for mark in marks_of(labels) if _stands_out(values, labels, mark)]
        marks = _digits_among(marks, values.shape, page.is_filled)
        if marks:
            row = [marks] if single else rows_of(marks)
            return [_cut(page.corner, values, labels, parts) for parts in row]
        # Their soft edges go with them, and where light falls off, all that is connected.
        soft = measure.label(values > 0.25 * strongest, connectivity=2)
        aside = np.isin(soft, np.unique(soft[mask])) & (soft > 0)
        values[morphology.dilation(aside, _square(_margin(values.shape)))] = 0
    return []


def _strongest(values: np.ndarray) -> float:
    """The contrast of the strongest ink; a few points are none."""
    count = max(1, round(0.0003 * values.size))
    return float(np.partition(values.ravel(), -count)[-count])


def marks_of(labels: np.ndarray) -> list[Mark]:
    """Describe every labelled region."""
    border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    touching = np.bincount(border, minlength=labels.max() + 1)
    smallest = 0.0001 * labels.size  # of less, nothing else is worth its time
    return [
        Mark._make(
            (
                region.label,
                *(int(at) for at in region.bbox),
                int(region.area),
                int(touching[region.label]),
                float(region.solidity) if region.area > 3 * smallest else 1.0,
            )
        )
        for region in measure.regionprops(labels)
        if region.area > smallest
    ]


def lines_of(mask: np.ndarray) -> np.ndarray:
    """Find straight lines that run across the page, where nothing crosses them.

    They are rows and columns of which most is ink. What a stroke has of such a line is left alone:
    it goes on above or below it, further than the line is wide.
    """
    lines = np.zeros_like(mask)
    for axis in (0, 1):
        across = mask if axis == 0 else mask.T
        end = max(1, round(0.02 * across.shape[1]))
        full = (across.mean(1) > 0.7) & across[:, :end].any(1) & across[:, -end:].any(1)
        starts = np.flatnonzero(np.diff(np.pad(full, 1).astype(int)))
        if not full.any() or min(mask.shape) < 60:
            continue
        width = int(np.median(starts[1::2] - starts[::2])) + 2
        if width > 0.03 * min(mask.shape) + 2:
            continue
        upright = np.ones((2 * width + 1, 1), bool)
        strokes = morphology.opening(np.pad(across, ((2 * width, 2 * width), (0, 0))), upright)
        rows = morphology.dilation(full[:, None], np.ones((3, 1), bool))
        found = across & rows & ~strokes[2 * width : -2 * width]
        lines |= found if axis == 0 else found.T
    return lines


def _margin(shape: tuple[int, ...]) -> int:
    """A distance on a page that is short beside a digit, and long beside a stroke's soft edge."""
    return max(2, round(0.025 * min(shape)))


def _square(radius: int) -> np.ndarray:
    return morphology.footprint_rectangle((2 * radius + 1,) * 2, decomposition="separable")


def _stands_out(values: np.ndarray, labels: np.ndarray, mark: Mark) -> bool:
    """Whether a mark ends where it ends: the light that falls off on a page does not."""
    away = _margin(values.shape)
    rows = slice(max(0, mark.top - away), mark.bottom + away)
    columns = slice(max(0, mark.left - away), mark.right + away)
    own = labels[rows, columns] == mark.label
    others = morphology.dilation(labels[rows, columns] > 0, morphology.disk(away // 2 + 1))
    ring = morphology.dilation(own, _square(away)) & ~others
    part = values[rows, columns]
    return not ring.any() or bool(part[ring].mean() < 0.4 * part[own].mean())


def _digits_among(marks: list[Mark], shape: tuple[int, ...], is_filled: bool) -> list[Mark]:
    """Leave out specks, and what touches the border, unless that is by far the largest."""
    inside = _without_specks([mark for mark in marks if not mark.border], shape)
    cropped = [mark for mark in marks if _is_cropped(mark, shape, is_filled)]
    largest = max((mark.area for mark in inside), default=0)
    if cropped and max(mark.area for mark in cropped) > 3 * largest:
        return _without_specks(inside + cropped, shape)
    return inside


def _without_specks(marks: list[Mark], shape: tuple[int, ...]) -> list[Mark]:
    """Leave out what is small, beside the page or beside the largest mark, and blots."""
    least = max(6.0, SMALLEST * min(shape))
    if not marks or max(mark.side for mark in marks) < least:
        return []
    tallest = max(mark.height for mark in marks)
    largest = max(mark.area for mark in marks)
    kept = [m for m in marks if m.side > 0.2 * tallest or m.area > 0.1 * largest]
    blots = max(mark.side for mark in kept) < 0.06 * min(shape) and all(
        mark.solidity > 0.85 and mark.side < 1.6 * min(mark.height, mark.width) for mark in kept
    )
    return [] if blots else kept


def _is_cropped(mark: Mark, shape: tuple[int, ...], is_filled: bool) -> bool:
    """Whether a mark is a digit that the page's border touches, or cuts.

    Such a digit is large. A frame, an edge and a shadow have more of the border than of anything
    else; a digit has less, unless the page is cropped to its edge.
    """
    is_edge = min(mark.height, mark.width) < 0.1 * min(shape) and mark.border > 0.5 * mark.side
    is_little = mark.border < 0.5 * (mark.height + mark.width) and not is_edge
    return mark.border > 0 and mark.height > 0.3 * shape[0] and (is_filled or is_little)


def rows_of(marks: list[Mark]) -> list[list[Mark]]:
    """Join the parts of digits, and keep the row of the largest digit, from left to right.

    Neighbours in a row stand side by side. So parts belong to one digit where one is above the
    other, or where one is much smaller than a digit and near.
    """
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: -mark.area):
        own = next((group for group in groups if _is_part(mark, group)), None)
        if own is None:
            groups.append([mark])
        else:
            own.append(mark)
    tallest = max(_extent(group).height for group in groups)
    digits = [group for group in groups if _extent(group).height > 0.45 * tallest]
    for group in (group for group in groups if _extent(group).height <= 0.45 * tallest):
        distances = [max(_gaps(_extent(group), _extent(digit))) for digit in digits]
        nearest = int(np.argmin(distances))
        if distances[nearest] < 0.15 * tallest:
            digits[nearest] = digits[nearest] + group
    largest = _extent(max(digits, key=lambda group: sum(mark.area for mark in group)))
    row = [
        group
        for group in digits
        if -_gaps(_extent(group), largest)[0] > 0.3 * min(_extent(group).height, largest.height)
    ]
    return sorted(row, key=lambda group: _extent(group).left)


def _is_part(mark: Mark, group: list[Mark]) -> bool:
    """Whether a mark belongs to the same digit as others."""
    digit = _extent(group)
    below, beside = _gaps(mark, digit)
    if -beside > 0.3 * min(mark.width, digit.width):
        return below < 0.5 * digit.height
    shorter, taller = sorted((mark.height, digit.height))
    return -below < 0.3 * shorter and max(below, beside) < 0.15 * taller


def _extent(group: list[Mark]) -> Mark:
    """What marks are together."""
    return Mark(
        label=group[0].label,
        top=min(mark.top for mark in group),
        left=min(mark.left for mark in group),
        bottom=max(mark.bottom for mark in group),
        right=max(mark.right for mark in group),
        area=sum(mark.area for mark in group),
        border=sum(mark.border for mark in group),
        solidity=min(mark.solidity for mark in group),
    )


def _gaps(one: Mark, other: Mark) -> tuple[int, int]:
    """How far marks are from each other vertically and horizontally; negative: they overlap."""
    return (
        max(one.top, other.top) - min(one.bottom, other.bottom),
        max(one.left, other.left) - min(one.right, other.right),
    )


def _cut(
    corner: tuple[int, int], values: np.ndarray, labels: np.ndarray, parts: list[Mark]
) -> Digit:
    """Cut a digit out of a page, with the soft edges of its strokes."""
    digit = _extent(parts)
    rows = slice(max(0, digit.top - SOFT), digit.bottom + SOFT)
    columns = slice(max(0, digit.left - SOFT), digit.right + SOFT)
    own = np.isin(labels[rows, columns], [mark.label for mark in parts])
    dark = np.percentile(values[rows, columns][own], 75)
    around = morphology.dilation(own, morphology.disk(SOFT))
    ink = np.clip(values[rows, columns] / dark, 0, 1) * around
    y, x = corner
    box = (digit.left + x, digit.top + y, digit.right + x, digit.bottom + y)
    return Digit(box, ink.astype(np.float32))
