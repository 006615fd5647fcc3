"""A picture of what a model saw: beside each picture given, its digits and how they were read."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.predict.digit_image import Picture

HEIGHT = 224
"""Of a line of the picture, in pixels."""

MOST_SHOWN = 100
"""Pictures; beyond these the picture would be larger than what can be looked at."""

MARGIN = 8
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")


class Seen(NamedTuple):
    """A picture that was given, and what was read in it."""

    picture: Picture
    name: str
    readings: Sequence[str]  # of each digit


def draw(seen: Sequence[Seen]) -> Image.Image:
    """Draw a line for every picture: what was given with its digits boxed, and what they became.

    The digits are dark on light here, as people write.
    """
    lines = [_line(each) for each in seen]
    sheet = Image.new("RGB", (max(line.width for line in lines), len(lines) * HEIGHT), "#777777")
    for k, line in enumerate(lines):
        sheet.paste(line, (0, k * HEIGHT))
    return sheet


def _line(seen: Seen) -> Image.Image:
    picture, font = seen.picture, ImageFont.load_default(14)
    side = HEIGHT - 2 * MARGIN - 20
    given = Image.fromarray(np.uint8(255 * picture.grey)).convert("RGB")
    scale = min(side / given.height, 3 * side / given.width)
    given = given.resize([max(1, round(scale * n)) for n in given.size], Image.Resampling.BILINEAR)
    left = max(given.width, side) + 2 * MARGIN
    line = Image.new("RGB", (left + max(1, len(picture.digits)) * (side + MARGIN), HEIGHT), "white")
    line.paste(given, (MARGIN, MARGIN))
    pen = ImageDraw.Draw(line)
    pen.text((MARGIN, HEIGHT - 22), seen.name, "black", font)
    across, down = (n / m for n, m in zip(given.size, picture.size, strict=True))
    for k, (digit, reading) in enumerate(zip(picture.digits, seen.readings, strict=True)):
        colour = COLOURS[k % len(COLOURS)]
        box = [at * by for at, by in zip(digit.box, (across, down) * 2, strict=True)]
        pen.rectangle([MARGIN + at for at in box], outline=colour, width=2)
        image = Image.fromarray(255 - digit.image).resize((side, side), Image.Resampling.NEAREST)
        x = left + k * (side + MARGIN)
        line.paste(image, (x, MARGIN))
        pen.rectangle((x, MARGIN, x + side, MARGIN + side), outline=colour, width=2)
        pen.text((x, HEIGHT - 22), reading, "black", font)
    if not picture.digits:
        pen.text((left, HEIGHT // 2), "no digit", "black", font)
    return line
