"""Whole jobs, from the command line to a result: this project's experiment beside the reference.

Both run as a user runs them, as processes of their own and in turn, on the same images. What they
print says how far they are.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.markdown import table

READY = {"lstm_flax": "compiled", "torch": "first step"}
"""How the line begins that ends a start. This project prints it before its first step, right after
compiling it, the reference after its first step."""


class JobError(Exception):
    """A run ended too early; it has said why on stderr."""


class Job(NamedTuple):
    """What to run."""

    dataset: str  # prepared already
    data_dir: Path | None  # tfds's, as of the experiment
    idx_folder: Path  # the same images in unpacked IDX files
    scratch: Path  # an empty folder
    rounds: int = 3  # of one epoch each
    max_epochs: int = 20  # of the reference, on its way to the accuracy
    recipe: str = ""  # further flags of the experiment, on its way there
    accuracy: float = 0.99  # fraction of the test images
    sizes: tuple[str, ...] = ("--hidden-size", "256", "--num-layers", "2", "--batch-size", "128")


class Start(NamedTuple):
    """One process that trained and evaluated for one epoch; all in seconds."""

    ready: float  # from the start of the process to the line that `READY` describes
    epoch: float  # training and evaluation alone
    whole: float  # from the start of the process to the end of the epoch


class Reached(NamedTuple):
    """How an accuracy was reached, or was not."""

    accuracy: float  # after the last epoch that was run
    epochs: int
    seconds: float  # training and evaluation alone
    whole: float  # seconds from the start of the process


def write_idx(folder: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write images uint8 [n, height, width] and labels [n] as MNIST's files, unpacked.

    Args:
        folder: where to.
        splits: by the names of MNIST's files, "train" and "t10k".
    """
    for name, (images, labels) in splits.items():
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            path = folder / f"{name}-{kind}-ubyte"
            path.write_bytes(header + array.astype(np.uint8).tobytes())


def run(job: Job, with_torch: bool, advance: Callable[[str], Any]) -> dict[str, Any]:
    """Run everything, in turn.

    Args:
        job: what.
        with_torch: whether there is PyTorch to compare with.
        advance: called with what was just done, once each `turns`.

    Returns:
        By side, "lstm_flax" and "torch": `starts`, a list of `Start`, of which this project's
        first one found an empty compilation cache, and `reached`, a `Reached`.
    """
    sides = ["lstm_flax", "torch"] if with_torch else ["lstm_flax"]
    starts: dict[str, list[Start]] = {side: [] for side in sides}
    for index in range(job.rounds):
        for side in sides:
            command = one_epoch_command(job, side, index)
            starts[side].append(start(command, side, job))
            advance(f"epoch with {side}")
    results = {}
    for side in sides:
        reached = reach(accuracy_command(job, side), side, job)
        results[side] = {"starts": starts[side], "reached": reached}
        advance(f"accuracy with {side}")
    return results


def turns(job: Job, with_torch: bool) -> int:
    """How often `run` calls its `advance`."""
    return (job.rounds + 1) * (2 if with_torch else 1)


def one_epoch_command(job: Job, side: str, index: int) -> list[str]:
    """The command of one epoch without augmentation, in a workdir of its own."""
    if side == "torch":
        return [*_torch_command(job), "--epochs", "1"]
    workdir = job.scratch / f"epoch{index}"
    flags = ["--epochs", "1", "--learning-rate", "1e-3", "--no-augment", *job.sizes]
    return [*_experiment_command(job, workdir), *flags]


def accuracy_command(job: Job, side: str) -> list[str]:
    """The command that trains until the accuracy is reached, each side by its own recipe."""
    if side == "torch":
        goal = ["--epochs", str(job.max_epochs), "--until", str(job.accuracy)]
        return [*_torch_command(job), *goal]
    return [*_experiment_command(job, job.scratch / "accuracy"), *shlex.split(job.recipe)]


def _torch_command(job: Job) -> list[str]:
    module = "experiments.benchmark.torch_reference"
    return [sys.executable, "-m", module, str(job.idx_folder), *job.sizes]


def _experiment_command(job: Job, workdir: Path) -> list[str]:
    place = [] if job.data_dir is None else ["--data-dir", str(job.data_dir)]
    data = ["--dataset", job.dataset, *place]
    return [sys.executable, "-m", "experiments.mnist_lstm", "--workdir", str(workdir), *data]


def start(command: list[str], side: str, job: Job) -> Start:
    """Run one epoch, and time its stages.

    Raises:
        JobError: it did not come to the epoch's end.
    """
    ready = None
    with timed_lines(command, job.scratch / "compiled") as lines:
        for seconds, line in lines:
            if line.startswith(READY[side]):
                ready = seconds
            if (record := epoch_record(line, side, command)) is not None:
                assert ready is not None, f"no line of {side} began with {READY[side]!r}"
                return Start(ready, record["seconds"], seconds)
    raise JobError(f"it ended before its epoch did: {shlex.join(command)}")


def reach(command: list[str], side: str, job: Job) -> Reached:
    """Run until an epoch's test accuracy is high enough, or to the end.

    Raises:
        JobError: it did not come to the first epoch's end.
    """
    epochs, trained, accuracy, last = 0, 0.0, 0.0, 0.0
    # A cache of its own: this is the first start of this program.
    with timed_lines(command, job.scratch / f"compiled for {side}'s accuracy") as lines:
        for seconds, line in lines:
            if (record := epoch_record(line, side, command)) is not None:
                epochs, accuracy, last = record["epoch"], record["test_accuracy"], seconds
                trained += record["seconds"]
                if accuracy >= job.accuracy:
                    break
    if not epochs:
        raise JobError(f"it ended before its first epoch did: {shlex.join(command)}")
    return Reached(accuracy, epochs, trained, last)


@contextmanager
def timed_lines(command: list[str], cache: Path) -> Iterator[Iterator[tuple[float, str]]]:
    """Start a process, and hand out its lines with the seconds since; it ends with the body.

    Args:
        command: what to run.
        cache: JAX's folder of compiled programs.
    """
    environment = {"PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        assert process.stdout is not None
        try:
            yield ((time.perf_counter() - started, line) for line in process.stdout)
        finally:
            process.kill()  # where it goes on, nobody needs what it would still do


def epoch_record(line: str, side: str, command: Sequence[str]) -> dict[str, Any] | None:
    """Return an epoch's figures when the line says that one has ended, else None."""
    if side == "torch":
        return json.loads(line) if line.startswith("{") else None
    if not line.startswith("epoch "):
        return None
    workdir = Path(command[command.index("--workdir") + 1])
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


def job_table(results: dict[str, Any], job: Job) -> str:
    """All figures in Markdown, in seconds; medians, and from least to most, of several."""
    rows = [
        ["start, nothing compiled before", *_each(results, _first_ready)],
        ["start, compiled before", *_each(results, _later_ready)],
        ["one epoch and the test set", *_each(results, lambda side: _median(side, "epoch"))],
        ["start to the end of that epoch", *_each(results, lambda s: _median(s, "whole"))],
        [f"training and evaluation to {job.accuracy:.1%}", *_each(results, _reached(job, False))],
        [f"start to {job.accuracy:.1%}", *_each(results, _reached(job, True))],
    ]
    ends = ", ".join(f"{side} at its line `{line}`" for side, line in READY.items())
    figures = table([f"seconds, {job.dataset}", "lstm_flax", "torch"], rows)
    return f"{figures}\n\n- a start ends for {ends}"


def _each(results: dict[str, Any], figure: Callable[[dict[str, Any]], str]) -> list[str]:
    sides = ("lstm_flax", "torch")
    return [figure(results[side]) if side in results else "not measured" for side in sides]


def _first_ready(side: dict[str, Any]) -> str:
    return f"{side['starts'][0].ready:.1f}"


def _later_ready(side: dict[str, Any]) -> str:
    later = [start.ready for start in side["starts"][1:]]
    return _range(later) if later else "not measured"


def _median(side: dict[str, Any], stage: str) -> str:
    return _range([getattr(start, stage) for start in side["starts"]])


def _range(seconds: list[float]) -> str:
    if len(seconds) == 1:
        return f"{seconds[0]:.1f}"
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def _reached(job: Job, whole: bool) -> Callable[[dict[str, Any]], str]:
    def figure(side: dict[str, Any]) -> str:
        reached: Reached = side["reached"]
        if reached.accuracy < job.accuracy:
            return f"not reached by epoch {reached.epochs} ({reached.accuracy:.2%})"
        seconds = reached.whole if whole else reached.seconds
        return f"{seconds:.1f} (epoch {reached.epochs})"

    return figure
