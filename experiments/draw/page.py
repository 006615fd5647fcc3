"""The page: paper to draw on, and how the model reads the drawing."""

import base64
import io
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from nicegui import events, run, ui
from PIL import Image

from experiments.draw.drawing import SIDE, Drawing
from experiments.harness import plots
from experiments.predict.calibration import UNSURE, calibrated, temperature_for
from experiments.predict.digit_image import as_mnist, digits_of
from experiments.read_digit.figures import CELL_LIMIT, SHOWN
from experiments.read_digit.reading import answers, gates_by_row, probabilities_by_row, unit_order
from experiments.training_run.restored import RestoredRun

NOTHING = "nothing yet"
"""The answer while the paper is blank."""

READ_EVERY = 0.05
"""Seconds between checks for something new to read."""

KEY_STEP = 10.0
"""How far an arrow key moves the pen, in the units of `SIDE`."""

ARROWS = {"ArrowLeft": (-1, 0), "ArrowRight": (1, 0), "ArrowUp": (0, -1), "ArrowDown": (0, 1)}

SEND_ARROWS = """(event) => {
    if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    emit({key: event.key, shift: event.shiftKey});
}"""
"""In the browser, an arrow key moves the pen instead of the page; other keys work as usual."""

STYLE = f"""
.nicegui-content {{ max-width: 64rem; margin: auto; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0; }}
h2 {{ font-size: 1.1rem; line-height: 1.2; margin: 0; }}
p {{ margin: 0; max-width: 40rem; }}
.panels {{ display: flex; flex-wrap: wrap; gap: 1.5rem; }}
.panel {{ display: flex; flex-direction: column; gap: .4rem; width: {SIDE}px; }}
.square {{ width: 100%; aspect-ratio: 1 !important; min-height: 0; }}
.square, .gate {{ background: white; outline: 2px solid #767676; }}
.paper {{ touch-action: none; cursor: crosshair; }}
.paper:focus-visible {{ outline: 3px solid #0072b2; }}
.pixels img {{ image-rendering: pixelated; }}
.gates {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; }}
.gate {{ height: 6rem; aspect-ratio: auto !important; }}
.layer {{ width: 100%; }}
.classes {{ display: grid; grid-template-columns: repeat(10, 1fr); text-align: center; }}
.answer {{ font-size: 2rem; line-height: 1.2; min-height: 2.4rem; }}
.runner-up {{ min-height: 1.5rem; }}
.legend {{ display: flex; gap: .5rem; align-items: center; width: min(100%, 40rem); }}
.legend img {{ flex: 1; min-width: 4rem; height: .8rem; }}
@media (max-width: 40rem) {{ .panels, .panel {{ width: 100%; }} }}
"""


class Watched(NamedTuple):
    """What a model sees, its probabilities and its gates while it reads a drawing."""

    image: np.ndarray  # uint8 [28, 28]
    probabilities: np.ndarray  # float32 [28, classes], after each row
    layers: list[dict[str, np.ndarray]]  # of each layer, the gates by name, [28, hidden_size]


def watch(trained: RestoredRun, drawing: Drawing) -> Watched:
    """Read a drawing with a model."""
    image = seen_image(drawing.ink())
    temperature = temperature_for(trained.config.label_smoothing)
    return Watched(
        image,
        calibrated(probabilities_by_row(trained.model, trained.params, image), temperature),
        gates_by_row(trained.model, trained.params, image),
    )


def seen_image(ink: np.ndarray) -> np.ndarray:
    """Return what a model sees of a drawing: what it would see of a picture of that drawing.

    A first dot is no digit in a picture, and is shown all the same.

    Args:
        ink: float32 [height, width] from 0, paper, to 1, stroke.

    Returns:
        uint8 [28, 28].
    """
    digits = digits_of(1 - ink, single=True)
    return digits[0].image if digits else as_mnist(ink)


class Page:
    """The page of one browser tab."""

    def __init__(self, trained: RestoredRun):
        self.trained = trained
        self.drawing = Drawing()
        self.pen = (SIDE / 2, SIDE / 2)  # where the arrow keys have moved it
        self.is_read = True

    def build(self) -> None:
        """Lay the page out."""
        ui.add_css(STYLE)
        ui.colors(primary=plots.COLOURS[0])  # white text on it is easy to read
        ui.html("<h1>Draw a digit</h1>", sanitize=False)
        ui.label("A trained LSTM reads it row by row, from the top, while you draw.")
        with ui.element("main").classes("panels"):
            self._build_paper()
            self._build_seen()
            self._build_belief()
        ui.label(
            "The model sees the drawing as MNIST's digits were prepared: scaled to 20 x 20 pixels, "
            "its centre of mass in the middle of 28 x 28. Beside each row is how likely each "
            "class was after the model had read that row. The drawing is sent only to the machine "
            "that serves this page."
        )
        ui.html("<h2>What its units do, row by row</h2>", sanitize=False)
        ui.label(
            "Time goes from left to right, one row of the image per step. Every line is a unit, "
            "ordered by the step at which its cell state is largest."
        )
        legend(f"gate shut, cell state -{CELL_LIMIT}", f"gate open, cell state {CELL_LIMIT}")
        self.gates = [self._build_gates(k) for k in range(self.trained.model.core.num_layers)]
        ui.timer(READ_EVERY, self.read)

    def _build_paper(self) -> None:
        with ui.element("section").classes("panel").props('aria-label="Your drawing"'):
            ui.html("<h2>Your drawing</h2>", sanitize=False)
            with ui.element("div").props("role=status aria-live=polite"):
                self.answer = ui.label(NOTHING).classes("answer")
                self.runner_up = ui.label().classes("runner-up")
            self.paper = (
                ui.interactive_image(
                    size=(SIDE, SIDE),
                    events=["pointerdown", "pointermove", "pointerup", "pointerleave"],
                    sanitize=False,  # this page writes all of it: numbers in polylines
                )
                .classes("square paper")
                .props('tabindex=0 role=application aria-label="Paper"')
                .props('aria-describedby="how-to-draw"')
                .on("mouse", self.on_pointer)
                .on("keydown", self.on_key, js_handler=SEND_ARROWS)
            )
            with ui.element("div").props("id=how-to-draw"):
                ui.label("Mouse, finger or pen. With the keyboard, arrows move, Shift draws.")
            with ui.row():
                ui.button("Clear", on_click=self.on_clear)
                ui.button("Undo", on_click=self.on_undo)

    def _build_seen(self) -> None:
        with ui.element("section").classes("panel").props('aria-label="What the model sees"'):
            ui.html("<h2>What the model sees</h2>", sanitize=False)
            self.seen = picture("square", "the drawing, as the model sees it")

    def _build_belief(self) -> None:
        with ui.element("section").classes("panel").props('aria-label="Belief after each row"'):
            ui.html("<h2>What it believes after each row</h2>", sanitize=False)
            self.belief = picture("square", NOTHING)
            with ui.element("div").classes("classes").props("aria-hidden=true"):
                for label in range(10):
                    ui.label(str(label))
            legend("0%", "100%")
            self.stretches = ui.label()

    def _build_gates(self, layer: int) -> dict[str, ui.interactive_image]:
        name = f"Layer {layer + 1}"
        with ui.element("section").classes("layer").props(f'aria-label="{name}"'):
            ui.html(f"<h2>{name}</h2>", sanitize=False)
            pictures = {}
            with ui.element("div").classes("gates"):
                for quantity, text in SHOWN.items():
                    with ui.element("div"):
                        ui.label(text)
                        pictures[quantity] = picture("gate", f"{text} of {name}, by row and unit")
        return pictures

    def on_pointer(self, event: events.GenericEventArguments) -> None:
        """Draw while the pen, a finger or the mouse's first button is down."""
        match event.args:
            case {
                "mouse_event_type": "pointerdown" | "pointermove",
                "buttons": int(buttons),
                "image_x": x,
                "image_y": y,
            } if buttons & 1 and is_near(x) and is_near(y):
                self.draw_to(x, y)
            case _:
                self.drawing.lift()

    def on_key(self, event: events.GenericEventArguments) -> None:
        """Move the pen, and draw with Shift."""
        match event.args:
            case {"key": str(key), "shift": bool(shift)} if key in ARROWS:
                self.move_pen(ARROWS[key], shift)

    def move_pen(self, direction: tuple[int, int], is_down: bool) -> None:
        """Move the pen a step, on the paper or above it."""
        if not is_down:
            self.drawing.lift()
        elif not self.drawing.is_down:
            self.drawing.draw_to(self.pen)
        x, y = (of + KEY_STEP * step for of, step in zip(self.pen, direction, strict=True))
        self.pen = (min(max(x, 0.0), SIDE), min(max(y, 0.0), SIDE))
        if is_down:
            self.draw_to(*self.pen)
        self.show_drawing(with_pen=True)

    def draw_to(self, x: float, y: float) -> None:
        """Go on to a point."""
        self.drawing.draw_to((x, y))
        self.pen = (x, y)
        self.show_drawing()
        self.is_read = False

    def on_clear(self) -> None:
        """Start again."""
        self.drawing.clear()
        self.show_drawing()
        self.is_read = False

    def on_undo(self) -> None:
        """Remove the last stroke."""
        self.drawing.undo()
        self.show_drawing()
        self.is_read = False

    def show_drawing(self, with_pen: bool = False) -> None:
        """Show the strokes, and with `with_pen` a ring where the arrow keys moved the pen."""
        x, y = self.pen
        ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="white" stroke="#0072b2"/>'
        self.paper.set_content(self.drawing.svg() + (ring if with_pen else ""))

    async def read(self) -> None:
        """Read the drawing with the model, if it has changed."""
        if self.is_read:
            return
        self.is_read = True
        if not self.drawing.strokes:
            self.show_nothing()
            return
        # In a thread, so that the page accepts strokes meanwhile.
        watched = await run.io_bound(watch, self.trained, self.drawing.copy())
        if watched is not None:  # None if the server is shutting down
            self.show(watched)

    def show_nothing(self) -> None:
        """Show that there is no drawing."""
        for shown in (self.seen, self.belief, *(p for gates in self.gates for p in gates.values())):
            shown.set_source("")
        self.answer.set_text(NOTHING)
        self.runner_up.set_text("")
        self.tell_stretches("")

    def show(self, watched: Watched) -> None:
        """Show what the model sees, its probabilities and its gates."""
        probabilities = watched.probabilities
        runner_up, answer = np.argsort(probabilities[-1])[-2:]
        likely = probabilities[-1, answer]
        self.answer.set_text(
            f"{answer}, {likely:.1%}" + (" unsure" if likely < UNSURE else " sure")
        )
        self.runner_up.set_text(f"or {runner_up}, {probabilities[-1, runner_up]:.1%}")
        self.tell_stretches(
            "Likeliest after "
            + "; ".join(
                f"{f'row {first}' if first == last else f'rows {first} to {last}'}: {label}"
                for first, last, label in answers(probabilities)
            )
        )
        self.seen.set_source(data_url(Image.fromarray(255 - watched.image)))
        self.belief.set_source(heat_map(probabilities, 0, 1))
        for pictures, gates in zip(self.gates, watched.layers, strict=True):
            order = unit_order(gates["cell"])
            for quantity, shown in pictures.items():
                low, high = (-CELL_LIMIT, CELL_LIMIT) if quantity == "cell" else (0, 1)
                shown.set_source(heat_map(gates[quantity][:, order].T, low, high))

    def tell_stretches(self, text: str) -> None:
        """Show in words which answer was the likeliest after which rows."""
        self.stretches.set_text(text)
        self.belief.props(f'aria-label="{text or NOTHING}"')


def is_near(coordinate: object) -> bool:
    """Whether a coordinate is on or near the paper; a browser may send anything."""
    is_number = isinstance(coordinate, int | float) and not isinstance(coordinate, bool)
    return is_number and -SIDE <= coordinate <= 2 * SIDE  # type: ignore[operator]


def legend(low: str, high: str) -> None:
    """Add a legend of the colours of a heat map."""
    with ui.element("div").classes("legend"):
        ui.label(low)
        colours = heat_map(np.linspace(0, 1, 256)[None], 0, 1)
        ui.element("img").props(f'src="{colours}" alt="to"')
        ui.label(high)


def picture(shape: str, description: str) -> ui.interactive_image:
    """Add a place for a small picture, whose pixels appear as squares."""
    element = ui.interactive_image(size=(SIDE, SIDE)).classes(f"{shape} pixels")
    return element.props(f'role=img aria-label="{description}"')


def heat_map(values: np.ndarray, low: float, high: float) -> str:
    """Return values [height, width] from `low` to `high` as a data URL, one pixel each."""
    colours = mpl.colormaps[plots.HEAT]((values - low) / (high - low), bytes=True)
    return data_url(Image.fromarray(colours))


def data_url(image: Image.Image) -> str:
    """Return a picture as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
