"""The report's pictures, as data URIs embedded in the page; needs matplotlib.

Each curve is drawn twice, for light and dark pages, without a background. Runs are labelled by
their numbers, which the page explains, so that no name of a workdir can break matplotlib.
"""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from experiments.harness import plots

Record = dict[str, Any]

INKS = {"light": "#1f2328", "dark": "#e6e9ed"}
"""Colour of axes and text on light and dark pages."""

LARGE_RATIO = 4
"""An axis is logarithmic from this ratio of its largest to its smallest value."""


class Curve(NamedTuple):
    """A quantity that each epoch has."""

    name: str
    value: Callable[[Record], float]
    form: str  # format of a value, as in "{:.1f} %"
    scale: str  # "log": logarithmic if positive and of large range; "zero": starts at zero


CURVES = (
    Curve("Training loss", lambda record: record["train_loss"], "{:.3g}", "log"),
    Curve("Test loss", lambda record: record["test_loss"], "{:.3g}", "log"),
    Curve("Training error", lambda record: 100 * (1 - record["train_accuracy"]), "{:.3g}%", "log"),
    Curve("Test error", lambda record: 100 * (1 - record["test_accuracy"]), "{:.3g}%", "log"),
)
"""Quantities to compare runs by; each pair, training and test, shares an axis."""

THROUGHPUT = Curve(
    "Training images a second", lambda record: record["images_per_second"], "{:,.0f}", "zero"
)


class Picture(NamedTuple):
    """A picture as data URIs, and a description of it."""

    title: str
    light: str
    dark: str
    alt: str


def colour(number: int, ink: str) -> str:
    """Return the colour of a run by its number, from 0; black becomes the colour of the ink."""
    hue = plots.COLOURS[number % len(plots.COLOURS)]
    return ink if hue == "#000000" else hue


def style(number: int) -> str:
    """Return the marker and line of a run; runs that share a colour differ in it."""
    return plots.STYLES[(number + number // len(plots.COLOURS)) % len(plots.STYLES)]


def draw_comparison(runs: Sequence[list[Record]]) -> list[Picture]:
    """Draw losses and errors of several runs, by epoch; return [] if no epoch is finished.

    Args:
        runs: the records of each run.
    """
    pairs = (CURVES[:2], CURVES[2:])
    return [draw(runs, curve, shared=pair) for pair in pairs for curve in pair if any(runs)]


def draw_throughput(runs: Sequence[list[Record]]) -> list[Picture]:
    """Draw how fast the runs trained, by epoch; return [] if no epoch is finished."""
    return [draw(runs, THROUGHPUT, shared=(THROUGHPUT,))] if any(runs) else []


def draw(runs: Sequence[list[Record]], curve: Curve, shared: Sequence[Curve]) -> Picture:
    """Draw a curve of each run on an axis that fits all curves in `shared`."""
    values = np.array([c.value(record) for c in shared for run in runs for record in run])
    values = values[np.isfinite(values)]
    light, dark = (_draw(runs, curve, values, INKS[page]) for page in ("light", "dark"))
    return Picture(curve.name, light, dark, describe(runs, curve))


def describe(runs: Sequence[list[Record]], curve: Curve) -> str:
    """Describe a curve in words."""
    parts = []
    for number, run in enumerate(runs, 1):
        if run:
            first, last = (curve.form.format(curve.value(run[k])) for k in (0, -1))
            epochs = f"{run[0]['epoch']} to {run[-1]['epoch']}"
            parts.append(f"run {number} from {first} to {last} over epochs {epochs}")
    return f"{curve.name} by epoch: {'; '.join(parts)}."


def _draw(runs: Sequence[list[Record]], curve: Curve, values: np.ndarray, ink: str) -> str:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(dict.fromkeys(names, ink) | {"svg.hashsalt": "report"}):
        figure = plots.new_figure(4.2, 2.9)
        panel = figure.subplots()
        for number, run in enumerate(runs):
            if run:
                panel.plot(
                    [record["epoch"] for record in run],
                    [curve.value(record) for record in run],
                    style(number),
                    color=colour(number, ink),
                    markersize=4,
                    label=f"run {number + 1}",
                )
        _scale(panel, curve, values)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if len(runs) > 1:
            panel.legend(framealpha=0)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return data_uri(file.getvalue(), "svg+xml")


def _scale(panel, curve: Curve, values: np.ndarray) -> None:
    low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
    if curve.scale == "zero" and high > 0:
        panel.set_ylim(0, 1.1 * high)
    elif 0 < LARGE_RATIO * low <= high:
        panel.set_yscale("log")
        panel.set_ylim(low / 1.2, high * 1.2)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
    elif low <= high:
        margin = 0.05 * (high - low) or 0.05 * high or 1
        panel.set_ylim(low - margin, high + margin)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: curve.form.format(value)))


def image_uri(image: np.ndarray) -> str:
    """Return a test image, uint8 [rows, pixels], as a data URI, black on white."""
    file = io.BytesIO()
    imsave(file, image, cmap="gray_r", vmin=0, vmax=255, format="png")
    return data_uri(file.getvalue(), "png")


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
