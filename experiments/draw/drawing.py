"""A drawing: the strokes of a pen, as a browser shows them and as a model reads them."""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

SIDE = 280
"""Height and width of the paper, in units that a browser scales as it likes."""

PEN = 24
"""Width of a stroke, in the same units: of a digit that fills the paper, as wide as MNIST's are."""

MOST_POINTS = 5_000
"""Of a drawing; a person's has some hundred, and there is no room for more on the paper."""

Point = tuple[float, float]
"""x from the left, y from the top."""


@dataclasses.dataclass
class Drawing:
    """Strokes, each a list of points; `is_down` while the pen is on the paper."""

    strokes: list[list[Point]] = dataclasses.field(default_factory=list)
    is_down: bool = False

    def draw_to(self, point: Point) -> None:
        """Go on to a point; put the pen down there, if it is not down. Full paper takes no more."""
        if sum(map(len, self.strokes)) >= MOST_POINTS:
            return
        if not self.is_down:
            self.strokes.append([])
            self.is_down = True
        self.strokes[-1].append(point)

    def lift(self) -> None:
        """Take the pen off the paper."""
        self.is_down = False

    def undo(self) -> None:
        """Take back the last stroke, if there is one."""
        self.lift()
        del self.strokes[-1:]

    def clear(self) -> None:
        """Take back all strokes."""
        self.lift()
        self.strokes.clear()

    def copy(self) -> "Drawing":
        """The strokes as they are now, which another thread may look at."""
        return Drawing([list(stroke) for stroke in self.strokes])

    def svg(self) -> str:
        """The strokes as elements of an SVG of `SIDE` x `SIDE`."""
        lines = "".join(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in [*stroke, stroke[-1]])}"/>'
            for stroke in self.strokes
        )
        pen = f'stroke-width="{PEN}" stroke-linecap="round" stroke-linejoin="round"'
        return f'<g fill="none" stroke="black" {pen}>{lines}</g>'

    def ink(self) -> np.ndarray:
        """The strokes as ink, float32 [SIDE, SIDE]: 0 paper, 1 stroke."""
        paper = Image.new("L", (SIDE, SIDE))
        pen = ImageDraw.Draw(paper)
        for stroke in self.strokes:
            pen.line(stroke, fill=255, width=PEN, joint="curve")
            for x, y in (stroke[0], stroke[-1]):
                pen.circle((x, y), PEN / 2, fill=255)
        return np.asarray(paper, np.float32) / 255
