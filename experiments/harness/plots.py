"""How the experiments' figures look, and how they are kept: a picture with its data beside it.

Lines and markers differ too, not colour alone, so that a figure reads in black and white.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.harness.output_files import replacing

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
"""Okabe and Ito's, which people with any colour vision can tell apart."""

STYLES = ("o-", "s--", "^:", "D-.", "v-", "x--")
"""A marker and a line for each colour."""

HEAT = "cividis"
"""A colour map that is even in lightness, for any colour vision."""


def new_figure(width: float = 8, height: float = 3.5) -> Figure:
    """An empty figure, in inches, that no window will show."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Write a figure, and what it shows as a CSV file of the same name.

    Args:
        figure: to draw.
        path: of the picture, such as gradients.png; its folder is made where there is none.
        columns: by name, all of one length.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as picture:
        figure.savefig(picture, dpi=130, metadata={"Software": None})
    with replacing(path.with_suffix(".csv")) as table, table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{v:.6g}" if isinstance(v, float | np.floating) else v for v in row])
