"""Whole jobs, from the command line to a result: this project's experiment beside the reference.

Both run as a user runs them, in turns and as processes of their own, on the same images. What they
print tells how far they are.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.markdown import table

READY = {"lstm_flax": "compiled", "torch": "first step"}
"""By side, how the line begins that ends a start. This project prints it after compiling, right
before its first step, and the reference after its first step."""

ACCURACIES = (0.99, 0.995)
"""Fractions of the test images that trainings are timed up to."""


class Way(NamedTuple):
    """A training that goes on until the highest of `ACCURACIES`, or to its end."""

    name: str
    side: str
    flags: tuple[str, ...]


WAYS = (
    Way("lstm_flax, `--recipe fast`", "lstm_flax", ("--recipe", "fast")),
    Way("lstm_flax, `--recipe standard`", "lstm_flax", ("--recipe", "standard")),
    # What a tutorial does, and what `fast` and `standard` do, written in PyTorch.
    Way("PyTorch, Adam at 1e-3", "torch", ("--epochs", "15")),
    Way("PyTorch, 3 epochs as `fast`", "torch", ("--epochs", "3", "--one-cycle")),
    Way("PyTorch, 10 epochs as `standard`", "torch", ("--epochs", "10", "--one-cycle")),
)


class JobError(Exception):
    """A run ended too early; it has said why on stderr."""


class Job(NamedTuple):
    """What to run."""

    dataset: str  # prepared already
    data_dir: Path | None  # tfds's, for the experiment
    idx_folder: Path  # the same images in unpacked IDX files, for the reference
    scratch: Path  # an empty folder
    rounds: int  # of one epoch each
    flags: str = ""  # further ones of the experiment, on each of its ways
    ways: tuple[Way, ...] = WAYS
    accuracies: tuple[float, ...] = ACCURACIES
    sizes: tuple[str, ...] = ("--hidden-size", "256", "--num-layers", "2", "--batch-size", "128")


class Timing(NamedTuple):
    """How long a process took until the end of an epoch."""

    ready: float  # seconds from its start to the line that `READY` describes
    epoch: int
    seconds: float  # of training and evaluation alone, in all epochs until then
    whole: float  # seconds from its start
    accuracy: float  # on the test images, after this epoch


def write_idx(folder: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write images uint8 [n, height, width] and labels [n] as MNIST's files, unpacked.

    Args:
        folder: where to write them.
        splits: by the names in MNIST's file names, "train" and "t10k".
    """
    for name, (images, labels) in splits.items():
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            path = folder / f"{name}-{kind}-ubyte"
            path.write_bytes(header + array.astype(np.uint8).tobytes())


def run(job: Job, sides: Sequence[str], advance: Callable[[str], Any]) -> dict[str, Any]:
    """Run all processes: one epoch of each side, in turns, then the ways of these sides.

    Args:
        job: what to run.
        sides: "lstm_flax" and, if PyTorch is installed, "torch".
        advance: called after each process, `count_runs` times, with what it did.

    Returns:
        `starts`: by side, a `Timing` of one epoch for each round. The first start finds an empty
        compilation cache, the later ones a full one. `ways`: by name, a `Timing` for each epoch.
    """
    results: dict[str, Any] = {"starts": {side: [] for side in sides}, "ways": {}}
    for index in range(job.rounds):
        for side in sides:
            flags = [*job.sizes, "--epochs", "1"]
            if side != "torch":
                flags += ["--learning-rate", "1e-3", "--no-augment"]
            (start,) = time_run(job, side, f"epoch{index}", flags, "compiled", until=0)
            results["starts"][side].append(start)
            advance(f"epoch with {side}")
    for number, way in enumerate(ways_of(job, sides)):
        flags = [*job.sizes, *way.flags]
        if way.side != "torch":
            flags += shlex.split(job.flags)
        # With a cache of its own, since this program starts for the first time.
        cache = f"compiled for way {number}"
        results["ways"][way.name] = time_run(
            job, way.side, f"way{number}", flags, cache, max(job.accuracies)
        )
        advance(way.name)
    return results


def ways_of(job: Job, sides: Sequence[str]) -> list[Way]:
    """Return the ways that these sides can take."""
    return [way for way in job.ways if way.side in sides]


def count_runs(job: Job, sides: Sequence[str]) -> int:
    """Return how many processes `run` runs."""
    return job.rounds * len(sides) + len(ways_of(job, sides))


def time_run(
    job: Job, side: str, workdir: str, flags: Sequence[str], cache: str, until: float
) -> list[Timing]:
    """Run a side in a process, until an epoch reaches this test accuracy or to the end.

    Returns a timing for each epoch.

    Args:
        job: what to run.
        side: "lstm_flax" or "torch".
        workdir: name of the run's folder in `job.scratch`.
        flags: of the side's command, besides those for the data.
        cache: name of JAX's compilation cache in `job.scratch`.
        until: a fraction of the test images.

    Raises:
        JobError: it ended before its first epoch did.
    """
    if side == "torch":
        command = ["experiments.benchmark.torch_reference", str(job.idx_folder), *flags]
    else:
        command = ["experiments.mnist_lstm", "--workdir", str(job.scratch / workdir), *flags]
        command += ["--dataset", job.dataset]
        command += [] if job.data_dir is None else ["--data-dir", str(job.data_dir)]
    command = [sys.executable, "-m", *command]
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(job.scratch / cache),
    }
    timings: list[Timing] = []
    ready = trained = 0.0
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                now = time.perf_counter() - started
                if line.startswith(READY[side]):
                    ready = now
                elif line.startswith("{" if side == "torch" else "epoch "):
                    metrics = job.scratch / workdir / "metrics.jsonl"
                    last = line if side == "torch" else metrics.read_text().splitlines()[-1]
                    record = json.loads(last)
                    trained += record["seconds"]
                    accuracy = record["test_accuracy"]
                    timings.append(Timing(ready, record["epoch"], trained, now, accuracy))
                    if accuracy >= until:
                        break
        finally:
            process.kill()  # nobody needs what it would do next
    if not timings:
        raise JobError(f"it ended before its first epoch did: {shlex.join(command)}")
    return timings


def start_table(results: dict[str, Any], job: Job) -> str:
    """Return the times of one epoch in Markdown: the median, and the range if there are several."""

    def cells(name: str, rounds: slice) -> list[str]:
        starts = results["starts"]
        return [
            _spread([getattr(timing, name) for timing in starts[side][rounds]])
            if side in starts
            else "not measured"
            for side in READY
        ]

    rows = [
        ["start, nothing compiled before", *cells("ready", slice(1))],
        ["start, compiled before", *cells("ready", slice(1, None))],
        ["one epoch and the test set", *cells("seconds", slice(None))],
        ["start to the end of that epoch", *cells("whole", slice(None))],
    ]
    ends = ", ".join(f"{side} at its line `{line}`" for side, line in READY.items())
    return f"{table([f'seconds, {job.dataset}', *READY], rows)}\n\n- a start ends for {ends}"


def way_table(results: dict[str, Any], job: Job) -> str:
    """Return in Markdown when each way reached each accuracy, its start included."""

    def cell(timings: Sequence[Timing], accuracy: float) -> str:
        for timing in timings:
            if timing.accuracy >= accuracy:
                return f"{timing.whole:.0f} (epoch {timing.epoch})"
        return "not reached"

    rows = [
        [name]
        + [cell(timings, accuracy) for accuracy in job.accuracies]
        + [f"{timings[-1].accuracy:.2%} after epoch {timings[-1].epoch}, {timings[-1].whole:.0f}"]
        for name, timings in results["ways"].items()
    ]
    columns = [f"to {accuracy:.1%}" for accuracy in job.accuracies]
    return table([f"seconds, {job.dataset}", *columns, "to its end"], rows)


def _spread(seconds: Sequence[float]) -> str:
    if len(seconds) < 2:
        return f"{seconds[0]:.1f}" if seconds else "not measured"
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
