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


class JobError(Exception):
    """A run ended too early; it has said why on stderr."""


class Job(NamedTuple):
    """What to run."""

    dataset: str  # prepared already
    data_dir: Path | None  # tfds's, for the experiment
    idx_folder: Path  # the same images in unpacked IDX files, for the reference
    scratch: Path  # an empty folder
    rounds: int  # of one epoch each
    max_epochs: int  # of the reference, until the accuracy
    recipe: str  # further flags of the experiment, until the accuracy
    accuracy: float = 0.99  # fraction of the test images
    sizes: tuple[str, ...] = ("--hidden-size", "256", "--num-layers", "2", "--batch-size", "128")


class Timing(NamedTuple):
    """How long a process took."""

    ready: float  # seconds from its start to the line that `READY` describes
    epochs: int
    seconds: float  # of training and evaluation alone
    whole: float  # seconds from its start to the end of its last epoch
    accuracy: float  # on the test images, after the last epoch


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
    """Run all processes of the sides, in turns.

    Args:
        job: what to run.
        sides: "lstm_flax" and, if PyTorch is installed, "torch".
        advance: called after each process, `job.rounds + 1` times a side, with what it did.

    Returns:
        By side, `starts`, a `Timing` of one epoch for each round, and `reached`, the `Timing` until
        the accuracy. The first start finds an empty compilation cache, the later ones a full one.
    """
    results: dict[str, Any] = {side: {"starts": []} for side in sides}
    for index in range(job.rounds):
        for side in sides:
            flags = ["--epochs", "1"]
            if side != "torch":
                flags += ["--learning-rate", "1e-3", "--no-augment", *job.sizes]
            start = time_run(job, side, f"epoch{index}", flags, "compiled", until=0)
            results[side]["starts"].append(start)
            advance(f"epoch with {side}")
    for side in sides:
        flags = shlex.split(job.recipe)
        if side == "torch":
            flags = ["--epochs", str(job.max_epochs), "--until", str(job.accuracy)]
        # With a cache of its own, since this program starts for the first time.
        cache = f"compiled for {side}'s accuracy"
        results[side]["reached"] = time_run(job, side, "accuracy", flags, cache, job.accuracy)
        advance(f"accuracy with {side}")
    return results


def time_run(
    job: Job, side: str, workdir: str, flags: Sequence[str], cache: str, until: float
) -> Timing:
    """Run a side in a process, until an epoch reaches this test accuracy or to the end.

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
        command = ["experiments.benchmark.torch_reference", str(job.idx_folder), *job.sizes, *flags]
    else:
        command = ["experiments.mnist_lstm", "--workdir", str(job.scratch / workdir), *flags]
        command += ["--dataset", job.dataset]
        command += [] if job.data_dir is None else ["--data-dir", str(job.data_dir)]
    command = [sys.executable, "-m", *command]
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(job.scratch / cache),
    }
    timing = None
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
                    timing = Timing(ready, record["epoch"], trained, now, accuracy)
                    if accuracy >= until:
                        break
        finally:
            process.kill()  # nobody needs what it would do next
    if timing is None:
        raise JobError(f"it ended before its first epoch did: {shlex.join(command)}")
    return timing


def job_table(results: dict[str, Any], job: Job) -> str:
    """Return all times in seconds in Markdown: the median, and the range if there are several."""

    def starts(name: str, rounds: slice) -> list[str]:
        return _cells(
            results, lambda side: _spread([getattr(t, name) for t in side["starts"][rounds]])
        )

    def reached(name: str) -> list[str]:
        def cell(side: dict[str, Any]) -> str:
            timing: Timing = side["reached"]
            if timing.accuracy < job.accuracy:
                return f"not reached by epoch {timing.epochs} ({timing.accuracy:.2%})"
            return f"{getattr(timing, name):.1f} (epoch {timing.epochs})"

        return _cells(results, cell)

    rows = [
        ["start, nothing compiled before", *starts("ready", slice(1))],
        ["start, compiled before", *starts("ready", slice(1, None))],
        ["one epoch and the test set", *starts("seconds", slice(None))],
        ["start to the end of that epoch", *starts("whole", slice(None))],
        [f"training and evaluation to {job.accuracy:.1%}", *reached("seconds")],
        [f"start to {job.accuracy:.1%}", *reached("whole")],
    ]
    ends = ", ".join(f"{side} at its line `{line}`" for side, line in READY.items())
    return f"{table([f'seconds, {job.dataset}', *READY], rows)}\n\n- a start ends for {ends}"


def _cells(results: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    return [cell(results[side]) if side in results else "not measured" for side in READY]


def _spread(seconds: Sequence[float]) -> str:
    if len(seconds) < 2:
        return f"{seconds[0]:.1f}" if seconds else "not measured"
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
