"""The figures, in the style of `experiments.harness.plots`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.gradient_flow.clipping import CLIP_NORM, Trace
from experiments.gradient_flow.flow import Flow
from experiments.gradient_flow.models import all_variants
from experiments.harness import plots

LABELS = [variant.label for variant in all_variants(hidden_size=1)]
"""The variants, in the order of their line styles in all figures."""

FLOAT32_EPSILON = float(np.finfo(np.float32).eps)

SEQUENCES = {
    "rows": ("28 rows", [1e-9, 1e-6, 1e-3, 1, 1e3]),
    "pixels": ("784 pixels", [1e-20, 1e-10, 1, 1e10, 1e20]),
}
"""By sequence: its title and the ticks of its axis; the CSV holds what lies outside."""

REACHES = [1e-20, 1e-15, 1e-10, 1e-5, 1]
"""Ticks of the axis of the gradient's reach."""

PATHS = {
    (False, "h"): r"RNN: $\|\partial L/\partial h_t\|$",
    (True, "h"): r"LSTM: $\|\partial L/\partial h_t\|$",
    (True, "c"): r"LSTM: $\|\partial L/\partial c_t\|$",
}
"""Titles of the states that a gradient flows through, by (is an LSTM, state)."""


def draw_flow(flows: Sequence[Flow], title: str, path: Path) -> None:
    """Draw gradient norms over time steps: a row of panels per sequence, a column per state.

    Args:
        flows: all variants and sequences, either at initialisation or after training.
        title: title of the figure.
        path: where to save the figure.
    """
    figure = plots.new_figure(11, 7)
    panels = figure.subplots(len(SEQUENCES), len(PATHS), sharex="row", sharey="row")
    lines: dict[str, Any] = {}
    shown = []
    for row, (sequence, (length, ticks)) in zip(panels, SEQUENCES.items(), strict=True):
        row[0].set(yscale="log", ylabel="norm, relative to\nthe last step's")
        row[0].set(yticks=ticks, ylim=(ticks[0], ticks[-1]))
        row[0].minorticks_off()
        for panel, ((is_lstm, state), name) in zip(row, PATHS.items(), strict=True):
            chosen = [f for f in flows if (f.sequence, "c" in f.norms) == (sequence, is_lstm)]
            for flow in chosen:
                lines[flow.label] = _draw_line(panel, flow, state)
                shown.append((flow, state))
            panel.axhline(FLOAT32_EPSILON, color="gray", linewidth=1, linestyle=":")
            panel.set_title(f"{name}, {length}{_accuracies(chosen)}", fontsize=11)
            panel.set_xlabel("time step t")
            panel.grid(alpha=0.3)
    panels[0, -1].text(28, FLOAT32_EPSILON, "float32's epsilon", ha="right", va="bottom")
    figure.suptitle(title)
    labels = [label for label in LABELS if label in lines]
    figure.legend(
        [lines[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=2,
        handlelength=4,
    )
    plots.save(figure, path, _flow_columns(shown))


def _draw_line(panel: Any, flow: Flow, state: str) -> Any:
    relative, look = flow.relative(state), LABELS.index(flow.label)
    if not np.isfinite(relative).all():
        reason = f"{flow.label}: NaN,\ntraining overflowed"
        panel.text(0.04, 0.94, reason, va="top", transform=panel.transAxes)
    time = len(relative)
    every = time // 7
    (line,) = panel.plot(
        np.arange(1, time + 1),
        relative,
        plots.STYLES[look],
        color=plots.COLOURS[look],
        markevery=(every - 1, every),
    )
    panel.set_xticks([1, *range(time // 4, time + 1, time // 4)])
    return line


def _accuracies(flows: Sequence[Flow]) -> str:
    """Return the second line of a title: the accuracies; empty before training."""
    trained = [flow.accuracy for flow in flows if flow.is_trained]
    return f"\ntest accuracy {min(trained):.0%} to {max(trained):.0%}" if trained else ""


def _flow_columns(shown: Sequence[tuple[Flow, str]]) -> dict[str, list[Any]]:
    rows = [
        (flow.sequence, flow.label, state, t, norm, relative)
        for flow, state in shown
        for t, (norm, relative) in enumerate(
            zip(flow.norms[state], flow.relative(state), strict=True), start=1
        )
    ]
    names = ("sequence", "model", "state", "t", "norm", "relative_norm")
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def draw_clipping(traces: Mapping[tuple[str, bool], Trace], path: Path) -> None:
    """Draw norm, loss and reach over the steps of trainings with and without clipping.

    Args:
        traces: by the variant's label, and whether it clips.
        path: where to save the figure.
    """
    labels = list(dict.fromkeys(label for label, _ in traces))
    figure = plots.new_figure(11, 6.5)
    panels = figure.subplots(len(labels), 3, sharex=True, sharey="col", squeeze=False)
    names = {
        "norm": "norm of the gradient\nof all parameters",
        "loss": "loss of the batch, nats",
        "reach": r"$\|\partial L/\partial h_1\|\;/\;\|\partial L/\partial h_T\|$",
    }
    columns: dict[str, list] = {"model": [], "clips": [], "step": [], **{n: [] for n in names}}
    lines: dict[bool, Any] = {}
    for (label, clips), trace in traces.items():
        steps = np.arange(len(trace.norm))
        for panel, name in zip(panels[labels.index(label)], names, strict=True):
            values = getattr(trace, name)
            (lines[clips],) = panel.plot(
                steps,
                values,
                plots.STYLES[clips],
                color=plots.COLOURS[clips],
                markersize=5,
                linewidth=1.2,
                markevery=(5 * clips, 10),
            )
            columns[name] += [*values]
        columns["model"] += [label] * len(steps)
        columns["clips"] += [int(clips)] * len(steps)
        columns["step"] += [*steps]
    _scale_clipping(panels, labels, names.values())
    figure.suptitle("Vanilla RNNs in plain gradient descent, 28 rows")
    figure.legend(
        [lines[False], lines[True]],
        ["without clipping", f"clipped to a norm of {CLIP_NORM:g}"],
        loc="outside lower center",
        ncols=2,
        handlelength=4,
    )
    plots.save(figure, path, columns)


def _scale_clipping(panels: np.ndarray, labels: Iterable[str], titles: Iterable[str]) -> None:
    """Scale and label the panels [labels, titles] of `draw_clipping`."""
    for label, row in zip(labels, panels, strict=True):
        row[0].set_ylabel(label, fontsize=12)
        row[0].axhline(CLIP_NORM, color="gray", linewidth=1, linestyle=":")
        for panel in row[:2]:
            panel.set_yscale("log", subs=(2, 5))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
        row[2].set_yscale("log")
        row[2].set(yticks=REACHES, ylim=(REACHES[0], 1e3))
        row[2].minorticks_off()
        for panel in row:
            panel.grid(alpha=0.3)
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=12)
    for panel in panels[-1]:
        panel.set_xlabel("train step")


def draw_memory(found: Mapping[int, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw test accuracy over the number of blank rows: mean, lowest and highest of the seeds.

    Args:
        found: the accuracies of all seeds, by the number of blank rows and the variant's label.
        path: where to save the figure.
    """
    figure = plots.new_figure(10, 4.5)
    panels = figure.subplots(1, 2, sharey=True)
    blanks = np.array(list(found))
    columns: dict[str, list] = {"model": [], "blank_rows": [], "seed": [], "accuracy": []}
    for label in found[blanks[0]]:
        look = LABELS.index(label)
        accuracies = np.array([found[blank][label] for blank in blanks])  # [blanks, seeds]
        mean = accuracies.mean(1)
        spread = np.abs(np.stack([accuracies.min(1), accuracies.max(1)]) - mean)
        panels[look // 3].errorbar(
            blanks + 1.5 * (look % 3 - 1),  # side by side, so that no bar hides another
            100 * mean,
            100 * spread,
            fmt=plots.STYLES[look],
            color=plots.COLOURS[look],
            capsize=4,
            label=label,
        )
        for (k, seed), accuracy in np.ndenumerate(accuracies):
            columns["model"].append(label)
            columns["blank_rows"].append(blanks[k])
            columns["seed"].append(seed)
            columns["accuracy"].append(accuracy)
    for panel in panels:
        panel.axhline(10, color="gray", linewidth=1, linestyle=":")
        panel.text(0, 8.5, "guessing", va="top", color="dimgray")
        panel.set(xticks=blanks, ylim=(0, 102), xlabel="blank rows after the digit's 28 rows")
        panel.grid(alpha=0.3)
        panel.legend(loc="upper right", handlelength=4)
    panels[0].set_ylabel("test accuracy, %")
    figure.suptitle("How long a digit is remembered: mean, lowest and highest of the seeds")
    plots.save(figure, path, columns)
