"""The figures of a digit that is read; needs matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import plots
from experiments.read_digit.reading import Mistakes, unit_order

INK = "gray_r"
"""Colour map that shows digits dark on white."""

SHOWN = {
    "cell": "cell state c",
    "forget": "forget gate",
    "input": "input gate",
    "output": "output gate",
}
"""The rows of the figure of the gates, from the top."""

CELL_LIMIT = 2
"""The cell state at which the colours end; tanh is close to 1 beyond it."""


def draw_reading(
    image: np.ndarray,
    label: int,
    probabilities: np.ndarray,
    settled: int | None,
    title: str,
    path: Path,
) -> None:
    """Draw an image, and beside each of its rows the probabilities after that row.

    Args:
        image: uint8 [rows, pixels].
        label: its class.
        probabilities: [rows, classes].
        settled: the row from which the answer stays right; None: it ends wrong.
        title: a description of the image.
        path: where to save the figure.
    """
    rows, classes = probabilities.shape
    figure = plots.new_figure(10, 6)
    picture, belief = figure.subplots(1, 2, width_ratios=(5, 4), sharey=True)
    extent = (0.5, image.shape[1] + 0.5, rows + 0.5, 0.5)
    picture.imshow(image, cmap=INK, extent=extent, aspect="auto")
    picture.set_xlabel("column of pixels")
    picture.set_ylabel("row of pixels, read from the top")
    picture.set_title("what it reads")

    extent = (-0.5, classes - 0.5, rows + 0.5, 0.5)
    heat = belief.imshow(
        probabilities, cmap=plots.HEAT, vmin=0, vmax=1, extent=extent, aspect="auto"
    )
    for row, of_row in enumerate(probabilities, 1):
        answer = int(of_row.argmax())
        colour = "black" if of_row[answer] > 0.5 else "white"
        text = f"{100 * of_row[answer]:.0f}"
        belief.text(answer, row, text, color=colour, fontsize=8, ha="center", va="center")
    belief.set_xticks(range(classes))
    belief.get_xticklabels()[label].set_fontweight("bold")
    belief.set_xlabel("class (bold: the right one)")
    belief.set_title("what it believes after that row\n(number: the likeliest class, %)")
    figure.colorbar(heat, ax=belief, label="probability")

    picture.set_yticks([1, *range(4, rows + 1, 4)])
    for panel in (picture, belief):
        if settled:
            panel.axhline(settled - 0.5, color=plots.COLOURS[1], linestyle="--", linewidth=2)
    figure.suptitle(f"{title}: {f'right from row {settled} on' if settled else 'wrong at the end'}")
    by_class = {f"probability_{k}": probabilities[:, k] for k in range(classes)}
    plots.save(figure, path, {"row": range(1, rows + 1), **by_class})


def draw_gates(
    image: np.ndarray,
    layers: list[dict[str, np.ndarray]],
    settled: int | None,
    title: str,
    path: Path,
) -> None:
    """Draw gates and cell states over time, a column per layer, under the image on its side.

    Args:
        image: uint8 [rows, pixels].
        layers: for each layer, by name, [rows, hidden_size].
        settled: the row from which the answer stays right; None: it ends wrong.
        title: a description of the image.
        path: where to save the figure.
    """
    rows, pixels = image.shape
    orders = [unit_order(gates["cell"]) for gates in layers]
    figure = plots.new_figure(max(9, 1.5 + 4 * len(layers)), 9)
    panels = figure.subplots(
        1 + len(SHOWN), len(layers), sharex=True, squeeze=False, height_ratios=(1, 2, 2, 2, 2)
    )
    for layer, panel in enumerate(panels[0], 1):
        panel.imshow(image.T, cmap=INK, extent=(0.5, rows + 0.5, pixels + 0.5, 0.5), aspect="auto")
        panel.set_yticks([])
        panel.set_title(f"layer {layer}")
    panels[0, 0].set_ylabel("the picture\non its side")
    for line, name in zip(panels[1:], SHOWN, strict=True):
        limits = (-CELL_LIMIT, CELL_LIMIT) if name == "cell" else (0, 1)
        for panel, gates, order in zip(line, layers, orders, strict=True):
            heat = panel.imshow(
                gates[name][:, order].T,
                cmap=plots.HEAT,
                vmin=limits[0],
                vmax=limits[1],
                extent=(0.5, rows + 0.5, len(order) + 0.5, 0.5),
                aspect="auto",
            )
        line[0].set_ylabel(f"{SHOWN[name]}\nunit")
        if name == "cell":
            figure.colorbar(heat, ax=list(line), extend="both", label="value of c")
        else:
            figure.colorbar(heat, ax=list(line), label="0: shut, 1: open")
    for panel in panels.flat:
        if settled:
            panel.axvline(settled - 0.5, color=plots.COLOURS[1], linestyle="--", linewidth=2)
    for panel in panels[-1]:
        panel.set_xticks([1, *range(4, rows + 1, 4)])
        panel.set_xlabel("row of the picture (time step)")
    ordering = "in each layer by the sign of its largest cell state, then by when that is"
    dashed = "; dashed: right from there on" if settled else ""
    figure.suptitle(f"{title}: what each unit does\n({ordering}{dashed})", fontsize=11)
    plots.save(figure, path, gate_columns(layers, orders))


def gate_columns(
    layers: list[dict[str, np.ndarray]], orders: list[np.ndarray]
) -> dict[str, list[Any]]:
    """Return the data of `draw_gates` as columns, with a line per layer, quantity and unit."""
    lines = [
        (layer, name, int(unit), *np.round(gates[name][:, unit], 2))
        for layer, (gates, order) in enumerate(zip(layers, orders, strict=True), 1)
        for name in SHOWN
        for unit in order
    ]
    rows = [f"row_{row}" for row in range(1, len(layers[0]["cell"]) + 1)]
    columns = map(list, zip(*lines, strict=True))
    return dict(zip(("layer", "quantity", "unit", *rows), columns, strict=True))


def draw_mistakes(images: np.ndarray, mistakes: Mistakes, title: str, path: Path) -> None:
    """Draw mistakes: each image with its label, the answer and the answer's probability.

    Args:
        images: all images, uint8 [n, rows, pixels].
        mistakes: the mistakes to show.
        title: title of the figure.
        path: where to save the figure.
    """
    count = len(mistakes.image)
    columns = min(6, max(4, count))
    lines = -(-count // columns)
    figure = plots.new_figure(1.7 * columns, 0.5 + 2.1 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, mistake in zip(panels, zip(*mistakes, strict=True), strict=False):
        image, label, answer, probability, _ = mistake
        panel.imshow(images[image], cmap=INK)
        panel.set_title(f"a {label}, read as {answer}\n{probability:.2%} sure", fontsize=10)
    figure.suptitle(title)
    plots.save(figure, path, mistakes._asdict())
