"""What was measured, as ratios, tables in Markdown, JSON and a plot."""

import datetime
import itertools
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark.cases import AXES, CENTRE, as_json, flops
from experiments.benchmark.measure import MODES, Measurement, Results
from experiments.benchmark.peers import OURS
from experiments.harness.markdown import table
from experiments.training_run import environment as machine

VERB = {"infer": "inference", "train": "a train step"}
MARKERS = "os^Dvx"  # a peer's, so that the plot reads in black and white
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "keras")


class Ratio(NamedTuple):
    """This project's speed over a peer's, in the same round: above one, this project is faster."""

    median: float
    low: float  # the lower quartile
    high: float  # the upper quartile

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compare the seconds of a call, round by round, in both of which the machine was the same."""
    low, median, high = np.percentile(np.divide(theirs, ours), (25, 50, 75))
    return Ratio(float(median), float(low), float(high))


def ratios(measurements: Sequence[Measurement]) -> dict[tuple, Ratio]:
    """This project beside each peer, by `(case, mode, peer)`."""
    ours = {(m.case, m.mode): m for m in measurements if m.peer == OURS}
    return {
        (m.case, m.mode, m.peer): ratio(ours[m.case, m.mode].call_seconds, m.call_seconds)
        for m in measurements
        if m.peer != OURS and (m.case, m.mode) in ours
    }


def ratio_table(results: Results, peers: Sequence[str], mode: str) -> str:
    """How many times as fast as each peer: a row a case, a column a peer."""
    found = ratios(results.measurements)
    others = [peer for peer in peers if peer != OURS]
    cases = list(dict.fromkeys(m.case for m in results.measurements))
    rows = [
        [case.name, *[str(found.get((case, mode, peer), "not measured")) for peer in others]]
        for case in cases
    ]
    titles = [_title(peer, results) for peer in others]
    return table([f"{VERB[mode]}: times as fast as", *titles], rows)


def detail_table(results: Results) -> str:
    """All figures: a row a case, mode and peer."""
    header = ["", "", "", "call, ms", "images/s", "of the peak", "compile, s", "memory, MB"]
    rows = []
    # The best product of any of them: one library's own may be slow on this processor.
    peak = max((m.peak_flops for m in results.measurements), default=0.0)
    for m in results.measurements:
        seconds = float(np.median(m.call_seconds))
        megabytes = "not measured" if m.peak_bytes is None else f"{m.peak_bytes / 1e6:,.0f}"
        rows.append(
            [
                m.case.name,
                VERB[m.mode],
                _title(m.peer, results),
                f"{1e3 * seconds:.3f}",
                f"{m.case.batch / seconds:,.0f}",
                f"{flops(m.case, m.mode) / seconds / peak:.1%}",
                f"{compile_seconds(m):.2f}",
                megabytes,
            ]
        )
    return table(header, rows, text_columns=3)


def slow_table(results: Results) -> str:
    """Beside busy processes: the mean call and the 95th percentile of all."""
    rows = [
        [
            m.case.name,
            VERB[m.mode],
            _title(m.peer, results),
            f"{1e3 * float(np.median(m.call_seconds)):.2f}",
            f"{1e3 * float(np.median([turn['slow'] for turn in m.rounds])):.2f}",
        ]
        for m in results.measurements
        if m.case.busy
    ]
    return table(["", "", "", "mean, ms", "95th percentile, ms"], rows, text_columns=3)


def compile_seconds(m: Measurement) -> float:
    """By how much the first call took longer than the median one."""
    return max(0.0, m.first_call_seconds - float(np.median(m.call_seconds)))


def tables(results: Results, peers: Sequence[str]) -> str:
    """All tables, and a line for each peer that is missing somewhere."""
    notes = [f"- {where}: {why}" for where, why in results.notes.items()]
    modes = dict.fromkeys(m.mode for m in results.measurements)
    parts = [ratio_table(results, peers, mode) for mode in modes]
    if any(m.case.busy for m in results.measurements):
        parts.append(slow_table(results))
    return "\n\n".join([*parts, detail_table(results), *(["\n".join(notes)] if notes else [])])


def as_values(results: Results) -> dict[str, Any]:
    """Everything as JSON values: each raw timing, and the ratios that follow from them."""
    return {
        "peers": results.peers,
        "notes": results.notes,
        "measurements": [m._asdict() | {"case": as_json(m.case)} for m in results.measurements],
        "ratios": [
            {"case": as_json(case), "mode": mode, "peer": peer} | found._asdict()
            for (case, mode, peer), found in ratios(results.measurements).items()
        ],
    }


def environment() -> dict[str, Any]:
    """What the figures depend on, beside the code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": machine.processor(),
        "cores": cores,
        "versions": {name: machine.version(name) for name in VERSIONS},
    }


def plot(results: Results, path: Path) -> None:
    """Draw the ratios along each arm of the star, one line a peer and mode; needs matplotlib."""
    from experiments.harness import plots

    found = ratios(results.measurements)
    peers = list(dict.fromkeys(peer for _, _, peer in found))
    figure = plots.new_figure(10, 4.5)
    panels = figure.subplots(1, len(AXES), sharey=True)
    lines, points = {}, []
    for panel, (axis, cases) in zip(panels, AXES.items(), strict=True):
        cases = sorted(cases, key=lambda case: getattr(case, axis))
        panel.set_xticks(range(len(cases)), [str(getattr(case, axis)) for case in cases])
        panel.set_xlabel(axis)
        panel.axhline(1, color="gray", linewidth=1)
        for (peer, colour), (mode, style) in itertools.product(
            zip(peers, plots.COLOURS, strict=False), zip(MODES, ("--", "-"), strict=True)
        ):
            of_line = [(k, c) for k, c in enumerate(cases) if (c, mode, peer) in found]
            if not of_line:
                continue
            label = f"{_title(peer, results)}, {VERB[mode]}"
            times = [found[case, mode, peer] for _, case in of_line]
            marker = MARKERS[peers.index(peer) % len(MARKERS)]
            medians = [ratio.median for ratio in times]
            (lines[label],) = panel.plot(
                [k for k, _ in of_line], medians, style, marker=marker, color=colour
            )
            sizes = (getattr(case, axis) for _, case in of_line)
            points += [(axis, size, label, *t) for size, t in zip(sizes, times, strict=True)]
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("times as fast")
    figure.suptitle(f"lstm_flax beside others; where they cross: {CENTRE.name}")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    names = ("axis", "size", "peer", "times_as_fast", "lower_quartile", "upper_quartile")
    columns = {name: [point[k] for point in points] for k, name in enumerate(names)}
    plots.save(figure, path, columns)


def _title(peer: str, results: Results) -> str:
    version = results.peers.get(peer, {}).get("version")
    return f"{peer} {version}" if version and peer != OURS else peer
