"""How the experiments' figures look, and how they are saved: a picture with its data beside it.

Lines and markers differ as well as colours, so a figure can be read in black and white.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.harness.output_files import replacing

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
"""Okabe and Ito's colours, which people with any colour vision can tell apart."""

STYLES = ("o-", "s--", "^:", "D-.", "v-", "x--")
"""A marker and a line style for each colour."""

HEAT = "cividis"
"""A perceptually uniform colour map for any colour vision."""


def new_figure(width: float = 8, height: float = 3.5) -> Figure:
    """Return an empty figure of this size in inches, without a window."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Save a figure, and its data as a CSV file of the same name.

    Args:
        figure: the figure to save.
        path: path of the picture, such as gradients.png; its folder is created if missing.
        columns: the data by column name, all of one length.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as picture:
        figure.savefig(picture, dpi=130, metadata={"Software": None})
    with replacing(path.with_suffix(".csv")) as table, table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{v:.6g}" if isinstance(v, float | np.floating) else v for v in row])
