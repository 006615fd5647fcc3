"""Ratios, tables in Markdown, JSON values and a plot of what was measured."""

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark.cases import AXES, CENTRE, flops
from experiments.benchmark.measure import MODES, Measurement, Results
from experiments.benchmark.peers import OURS
from experiments.harness.markdown import table
from experiments.training_run import environment as machine

VERB = {"infer": "inference", "train": "a train step"}
MARKERS = "os^Dvx"  # a peer's, so that the plot reads in black and white
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "keras")


class Ratio(NamedTuple):
    """Speed of this project over a peer's in the same round; above one, this project is faster."""

    median: float
    low: float  # the lower quartile
    high: float  # the upper quartile

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compare the seconds of a call round by round; in a round, both met the same machine load."""
    low, median, high = np.percentile(np.divide(theirs, ours), (25, 50, 75))
    return Ratio(float(median), float(low), float(high))


def ratios(measurements: Sequence[Measurement]) -> dict[tuple, Ratio]:
    """Compare this project with each peer; returns ratios by `(case, mode, peer)`."""
    ours = {(m.case, m.mode): m for m in measurements if m.peer == OURS}
    return {
        (m.case, m.mode, m.peer): ratio(ours[m.case, m.mode].call_seconds, m.call_seconds)
        for m in measurements
        if m.peer != OURS and (m.case, m.mode) in ours
    }


def tables(results: Results, peers: Sequence[str]) -> str:
    """Return all tables, and a line for each peer that is missing somewhere."""
    modes = dict.fromkeys(m.mode for m in results.measurements)
    parts = [*(ratio_table(results, peers, mode) for mode in modes), detail_table(results)]
    notes = [f"- {where}: {why}" for where, why in results.notes.items()]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def ratio_table(results: Results, peers: Sequence[str], mode: str) -> str:
    """Return how many times as fast this project is: a row a case, a column a peer."""
    found = ratios(results.measurements)
    others = [peer for peer in peers if peer != OURS]
    rows = [
        [case.name, *[str(found.get((case, mode, peer), "not measured")) for peer in others]]
        for case in dict.fromkeys(m.case for m in results.measurements)
    ]
    titles = [_title(peer, results) for peer in others]
    return table([f"{VERB[mode]}: times as fast as", *titles], rows)


def detail_table(results: Results) -> str:
    """Return all numbers: a row a case, mode and peer."""
    # The fastest product of any peer: a single library may be slow on this processor.
    peak = max((m.peak_flops for m in results.measurements), default=0.0)
    rows = []
    for m in results.measurements:
        seconds = float(np.median(m.call_seconds))
        share = flops(m.case, m.mode) / seconds / peak  # of products in float32
        of_peak = "" if m.case.bfloat16 else f"{share:.1%}"
        slow = f"{1e3 * np.median([turn['slow'] for turn in m.rounds]):.2f}" if m.case.busy else ""
        rows.append(
            {
                "case": m.case.name,
                "mode": VERB[m.mode],
                "peer": _title(m.peer, results),
                "call, ms": f"{1e3 * seconds:.3f}",
                "95th percentile, ms": slow,
                "images/s": f"{m.case.batch / seconds:,.0f}",
                "of the peak": of_peak,
                "compile, s": f"{max(0.0, m.first_call_seconds - seconds):.2f}",
                "memory, MB": "" if m.peak_bytes is None else f"{m.peak_bytes / 1e6:,.0f}",
            }
        )
    # Without the columns that are empty throughout.
    header = [name for name in (rows[0] if rows else []) if any(row[name] for row in rows)]
    return table(header, [[row[name] for name in header] for row in rows], text_columns=3)


def as_values(results: Results) -> dict[str, Any]:
    """Return everything as JSON values: each raw timing, and the ratios that follow from them."""
    return {
        "peers": results.peers,
        "notes": results.notes,
        "measurements": [m._asdict() | {"case": m.case._asdict()} for m in results.measurements],
        "ratios": [
            {"case": case._asdict(), "mode": mode, "peer": peer} | found._asdict()
            for (case, mode, peer), found in ratios(results.measurements).items()
        ],
    }


def environment() -> dict[str, Any]:
    """Return what the measurements depend on, besides the code."""
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
    """Draw the ratios along each axis of the star, a line a peer and mode; needs matplotlib."""
    from experiments.harness import plots

    found = ratios(results.measurements)
    peers = list(dict.fromkeys(peer for _, _, peer in found))
    figure = plots.new_figure(10, 4.5)
    panels = figure.subplots(1, len(AXES), sharey=True)
    lines, points = {}, []
    for panel, (axis, cases) in zip(panels, AXES.items(), strict=True):
        sizes = sorted(getattr(case, axis) for case in cases)
        panel.set_xticks(range(len(sizes)), map(str, sizes))
        panel.set_xlabel(axis)
        panel.axhline(1, color="gray", linewidth=1)
        for (peer, colour, marker), (mode, style) in (
            (peer, mode)
            for peer in zip(peers, plots.COLOURS, MARKERS, strict=False)
            for mode in zip(MODES, ("--", "-"), strict=True)
        ):
            by_size = {getattr(c, axis): found.get((c, mode, peer)) for c in cases}
            line = {size: of for size in sizes if (of := by_size[size]) is not None}
            if line:
                label = f"{_title(peer, results)}, {VERB[mode]}"
                medians = [of.median for of in line.values()]
                places = [sizes.index(size) for size in line]
                look = {"marker": marker, "color": colour, "linestyle": style}
                (lines[label],) = panel.plot(places, medians, **look)
                points += [(axis, size, label, *of) for size, of in line.items()]
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("times as fast")
    figure.suptitle(f"lstm_flax beside others; where they cross: {CENTRE.name}")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    names = ("axis", "size", "peer", "times_as_fast", "lower_quartile", "upper_quartile")
    plots.save(figure, path, {name: [p[k] for p in points] for k, name in enumerate(names)})


def _title(peer: str, results: Results) -> str:
    version = results.peers.get(peer, {}).get("version")
    return f"{peer} {version}" if version and peer.partition(":")[0] != OURS else peer
