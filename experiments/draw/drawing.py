"""A drawing: the strokes of a pen, as SVG for a browser and as pixels for a model."""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

SIDE = 280
"""Height and width of the paper, in units that a browser may scale."""

PEN = 24
"""Width of a stroke, in the same units: for a digit that fills the paper, that of MNIST."""

MAX_POINTS = 5_000
"""Largest number of points of a drawing; a person's drawing has some hundred."""

Point = tuple[float, float]
"""x from the left, y from the top."""


@dataclasses.dataclass
class Drawing:
    """Strokes, each a list of points; `is_down` is True while the pen is on the paper."""

    strokes: list[list[Point]] = dataclasses.field(default_factory=list)
    is_down: bool = False

    def draw_to(self, point: Point) -> None:
        """Draw to a point, or start a stroke there; does nothing when the drawing is full."""
        if sum(map(len, self.strokes)) >= MAX_POINTS:
            return
        if not self.is_down:
            self.strokes.append([])
            self.is_down = True
        self.strokes[-1].append(point)

    def lift(self) -> None:
        """Take the pen off the paper."""
        self.is_down = False

    def undo(self) -> None:
        """Remove the last stroke, if there is one."""
        self.lift()
        del self.strokes[-1:]

    def clear(self) -> None:
        """Remove all strokes."""
        self.lift()
        self.strokes.clear()

    def copy(self) -> "Drawing":
        """Return a copy that another thread can read."""
        return Drawing([list(stroke) for stroke in self.strokes])

    def svg(self) -> str:
        """Return the strokes as elements of an SVG of `SIDE` x `SIDE`."""
        lines = "".join(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in [*stroke, stroke[-1]])}"/>'
            for stroke in self.strokes
        )
        pen = f'stroke-width="{PEN}" stroke-linecap="round" stroke-linejoin="round"'
        return f'<g fill="none" stroke="black" {pen}>{lines}</g>'

    def ink(self) -> np.ndarray:
        """Return the strokes as ink, float32 [SIDE, SIDE]: 0 is paper, 1 is stroke."""
        paper = Image.new("L", (SIDE, SIDE))
        pen = ImageDraw.Draw(paper)
        for stroke in self.strokes:
            pen.line(stroke, fill=255, width=PEN, joint="curve")
            for x, y in (stroke[0], stroke[-1]):
                pen.circle((x, y), PEN / 2, fill=255)
        return np.asarray(paper, np.float32) / 255
