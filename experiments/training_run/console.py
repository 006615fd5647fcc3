"""What a run prints on the terminal."""

import contextlib
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.harness.usage import counted, printable


def warn(message: str) -> None:
    """Print a warning about a problem that does not end the run."""
    if jax.process_index() == 0:
        tqdm.write(f"warning: {printable(message)}", file=sys.stderr)


def note(message: str) -> None:
    """Print what the run does, without breaking its progress bar."""
    if jax.process_index() == 0:
        tqdm.write(f"run     {printable(message)}", file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def hide_repeated_tracebacks() -> Iterator[None]:
    """Hide tracebacks that only repeat an error.

    When one of Orbax's writes fails, Orbax raises that failure and closes the event loop that its
    other writes report to, so these print a traceback each.
    """
    shown = sys.unraisablehook

    def show(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = show
    try:
        yield
    finally:
        sys.unraisablehook = shown


class ProgressBar:
    """A progress bar over the images of a whole run on a terminal, and plain lines elsewhere."""

    def __init__(self, images: int, done: int):
        self._has_header = False
        self._bar = tqdm(
            total=images,
            initial=done,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=jax.process_index() > 0 or not sys.stderr.isatty(),
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def update(self, done: int, loss: float) -> None:
        """Show how many images are done, and the mean loss over the epoch so far."""
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update(done - self._bar.n)

    def print_epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Print an epoch's line, and the column titles before the first one."""
        splits = [name for name in ("train", "validation", "test") if f"{name}_loss" in record]
        last_step = record["step"] * epochs // record["epoch"]
        columns = {
            " " * len("epoch /"): f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
            "step": f"{record['step']:>{max(4, len(str(last_step)))}}",
            **{f"{name[:5]} loss %": _loss_and_accuracy(record, name) for name in splits},
            "img/s": f"{record['images_per_second']:6.0f}",
            "time": f"{duration(record['seconds']):>5}",
        }
        if not self._has_header:
            header = (name.rjust(len(cell)) for name, cell in columns.items())
            self._bar.write("  ".join(header))
            self._has_header = True
        self._bar.write("  ".join(columns.values()))


def _loss_and_accuracy(record: Mapping[str, Any], split: str) -> str:
    """Format a loss and an accuracy in percent, in twelve characters."""
    loss, percent = record[f"{split}_loss"], 100 * record[f"{split}_accuracy"]
    return f"{loss:.4f}"[:6] + " " + f"{percent:.2f}"[:5].rjust(5)


def duration(seconds: float) -> str:
    """Format a duration, short or long, in a few characters."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 599.5:
        return f"{seconds:.{int(seconds < 9.95)}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95% confidence interval (Wilson, 1927) of an accuracy, as fractions.

    `scipy.stats` offers it too, but takes longer to import than JAX.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    accuracy, shrinkage = correct / total, 1 + z**2 / total
    centre = (accuracy + z**2 / (2 * total)) / shrinkage
    half = z / shrinkage * (accuracy * (1 - accuracy) / total + (z / (2 * total)) ** 2) ** 0.5
    return centre - half, centre + half


def accuracy_line(correct: int, total: int) -> str:
    """Format an accuracy with its 95% interval."""
    low, high = accuracy_interval(correct, total)
    return (
        f"{correct / total:.2%} (95% interval {low:.2%} to {high:.2%}), "
        f"{correct:,} of {total:,} correct"
    )


def print_summary(
    evaluation: dict[str, Any], records: list[dict[str, Any]], checkpoint: Path, command: str
) -> None:
    """Print the result of a run.

    Args:
        evaluation: metrics of the checkpoint, as in eval.json.
        records: metrics of the epochs.
        checkpoint: path of the checkpoint.
        command: the command that evaluates it again.
    """
    time = duration(sum(record["seconds"] for record in records))
    print()
    print(f"test accuracy  {accuracy_line(evaluation['correct'], evaluation['total'])}")
    print(f"trained        {counted(len(records), 'epoch')} in {time}")
    print(f"checkpoint     {checkpoint}")
    print(f"evaluate it    {command}")
