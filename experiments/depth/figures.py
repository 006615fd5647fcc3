"""The figures of depth and gates; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.depth.measure import Row, t_interval
from experiments.depth.parameters import FEATURES, KINDS, PARTS, formula
from experiments.harness import plots

HATCHES = ("", "///", "...", "xxx")
"""The hatch of each part of the parameters; each has a colour too."""


def draw_results(rows: Sequence[Row], test_images: str, path: Path) -> None:
    """Draw test accuracy and time against the number of layers, a line per kind.

    Args:
        rows: the results of all models.
        test_images: a description of the test images.
        path: where to save the figure.
    """
    figure = plots.new_figure(10, 4)
    accuracy, milliseconds = figure.subplots(1, 2)
    layers = sorted({row.layers for row in rows})
    for k, kind in enumerate(KINDS):
        of_kind = [row for row in rows if row.kind == kind]
        intervals = [t_interval([*row.accuracies.values()]) for row in of_kind]
        means = 100 * np.array([interval.mean for interval in intervals])
        bounds = 100 * np.array([(i.mean - i.low, i.high - i.mean) for i in intervals]).T
        # Side by side, so that no interval hides another.
        positions = np.array([row.layers for row in of_kind]) + 0.08 * (k - 1)
        look = {"fmt": plots.STYLES[k], "color": plots.COLOURS[k], "label": kind}
        accuracy.errorbar(positions, means, bounds, capsize=4, **look)
        for row, position in zip(of_kind, positions, strict=True):
            dots = 100 * np.array([*row.accuracies.values()])
            accuracy.plot([position + 0.03] * len(dots), dots, ".", color=plots.COLOURS[k])
        _draw_times(milliseconds, of_kind, "scan_seconds", k, f"{kind}, scan")
    if native := [row for row in rows if row.seconds != row.scan_seconds]:
        _draw_times(milliseconds, native, "seconds", 3, f"{native[0].kind}, native kernel")
    seeds = len(rows[0].accuracies)
    accuracy.set_ylabel(f"test accuracy, % of {test_images}")
    accuracy.set_title(f"mean and 95% interval of {seeds} seeds (dots)")
    milliseconds.set_ylabel("milliseconds a train step")
    milliseconds.set_ylim(bottom=0)
    milliseconds.set_title("median time")
    for panel in (accuracy, milliseconds):
        panel.set_xticks(layers)
        panel.set_xlabel("layers")
        panel.legend()
        panel.grid(axis="y", alpha=0.3)
    plots.save(figure, path, result_columns(rows))


def _draw_times(panel, rows: Sequence[Row], field: str, look: int, label: str) -> None:
    milliseconds = [1000 * getattr(row, field) for row in rows]
    panel.plot(
        [row.layers for row in rows],
        milliseconds,
        plots.STYLES[look],
        color=plots.COLOURS[look],
        label=label,
    )


def result_columns(rows: Sequence[Row]) -> dict[str, list]:
    """Return the data of `draw_results` as columns, with a line per model."""
    intervals = [t_interval([*row.accuracies.values()]) for row in rows]
    columns: dict[str, list] = {
        "kind": [row.kind for row in rows],
        "layers": [row.layers for row in rows],
        "accuracy": [interval.mean for interval in intervals],
        "accuracy_low": [interval.low for interval in intervals],
        "accuracy_high": [interval.high for interval in intervals],
        "milliseconds_scan": [1000 * row.scan_seconds for row in rows],
        "milliseconds": [1000 * row.seconds for row in rows],
    }
    for seed in rows[0].accuracies:
        columns[f"accuracy_seed_{seed}"] = [row.accuracies[seed] for row in rows]
    return columns


def draw_parameters(
    rows: Sequence[Row], places: dict[str, dict[str, int]], hidden_size: int, path: Path
) -> None:
    """Draw the parameters of all models, and their places in the deepest LSTM.

    Args:
        rows: the results of all models.
        places: the LSTM's parameters, by place and by purpose.
        hidden_size: units of each layer.
        path: where to save the figure.
    """
    figure = plots.new_figure(11, 4)
    totals, bars = figure.subplots(1, 2, width_ratios=(2, 3))
    for k, kind in enumerate(KINDS):
        of_kind = [row for row in rows if row.kind == kind]
        layers = [row.layers for row in of_kind]
        marker, line = plots.STYLES[k][0], plots.STYLES[k][1:]
        by_formula = [formula(kind, n, hidden_size) / 1000 for n in layers]
        totals.plot(layers, by_formula, line, color=plots.COLOURS[k])
        counted = [row.parameters / 1000 for row in of_kind]
        totals.plot(layers, counted, marker, color=plots.COLOURS[k], label=kind)
    totals.set_xticks(sorted({row.layers for row in rows}))
    totals.set_ylim(bottom=0)
    totals.set_xlabel("layers")
    totals.set_ylabel("parameters, thousands")
    totals.set_title(f"{hidden_size} units (lines: the formula)")
    totals.grid(axis="y", alpha=0.3)
    totals.legend()

    names = [*PARTS.values(), "dense layer"]
    starts = dict.fromkeys(places, 0.0)
    everything = sum(sum(parts.values()) for parts in places.values())
    for part, colour, hatch in zip(names, plots.COLOURS, HATCHES, strict=False):
        counts = {place: parts.get(part, 0) for place, parts in places.items()}
        sizes = [count / 1000 for count in counts.values()]
        share = sum(counts.values()) / everything
        bars.barh(list(places), sizes, left=list(starts.values()), color=colour, hatch=hatch,
                  edgecolor="white", label=f"{part}: {share:.1%}")  # fmt: skip
        starts = {place: starts[place] + counts[place] / 1000 for place in places}
    for place, end in starts.items():
        count = sum(places[place].values())
        bars.annotate(f"{count:,}", (end, place), (4, 0), textcoords="offset points", va="center")
    bars.set_xlim(right=1.15 * max(starts.values()))
    bars.invert_yaxis()
    bars.set_xlabel("parameters, thousands")
    bars.set_title(
        f"LSTM of {len(places) - 1} layers: {everything:,} parameters "
        f"({FEATURES} inputs to layer 1)"
    )
    bars.legend(loc="lower right", ncols=2, fontsize=9)
    plots.save(figure, path, parameter_columns(rows, places, hidden_size))


def parameter_columns(
    rows: Sequence[Row], places: dict[str, dict[str, int]], hidden_size: int
) -> dict[str, list]:
    """Return the data of `draw_parameters` as columns: all models, then the parts of the LSTM."""
    lines: list[tuple] = [
        (
            row.kind,
            row.layers,
            "all",
            "all",
            row.parameters,
            formula(row.kind, row.layers, hidden_size),
        )
        for row in rows
    ]
    lines += [
        ("LSTM", len(places) - 1, place, part, count, "")
        for place, parts in places.items()
        for part, count in parts.items()
    ]
    header = ("kind", "layers", "place", "part", "parameters", "formula")
    return dict(zip(header, map(list, zip(*lines, strict=True)), strict=True))
