"""What a run shows to the person who watches it."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
from scipy.stats import binomtest
from tqdm import tqdm

from experiments.stopping import Stopped
from experiments.usage import counted


def warn(message: str) -> None:
    """Say what the run could deal with and a person should know."""
    if jax.process_index() == 0:
        print(f"warning: {message}", file=sys.stderr)


def quiet_orbax() -> None:
    """Silence what Orbax logs as errors, since it also raises it."""
    absl.logging.set_verbosity(absl.logging.FATAL)


@contextlib.contextmanager
def without_echoes() -> Iterator[None]:
    """Leave out tracebacks of what is known already.

    Those that Orbax's other writes print after one of them failed: Orbax raises that failure
    itself, and closes the event loop that the others report to. And that of a request to stop which
    fell into a destructor: training sees it all the same.
    """
    shown = sys.unraisablehook

    def show(unraisable):
        error = unraisable.exc_value
        if str(error) != "Event loop is closed" and not isinstance(error, Stopped):
            shown(unraisable)

    sys.unraisablehook = show
    try:
        yield
    finally:
        sys.unraisablehook = shown


class Progress:
    """A progress bar over the images of a whole run on a terminal; plain lines elsewhere."""

    def __init__(self, images: int, done: int):
        self._bar = tqdm(
            total=images,
            initial=done,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=jax.process_index() > 0 or not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def advance(self, done: int, loss: float) -> None:
        """Say how many images were trained on, and the mean loss over the epoch so far."""
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update(done - self._bar.n)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Print an epoch's line."""
        self._bar.write(epoch_line(record, epochs))


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """An epoch's record in 80 columns, which stay where they are from epoch to epoch.

    Where images are held out there is room for the accuracies on all three splits, without losses.
    """
    steps = record["step"] // record["epoch"] * epochs
    splits = [name for name in ("train", "validation", "test") if f"{name}_loss" in record]
    shown = {"validation": "val"}
    return "  ".join(
        [
            f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
            f"step {record['step']:>{len(str(steps))}}",
            *(
                shown.get(name, name)
                + (f" {record[f'{name}_loss']:.4f}" if len(splits) < 3 else "")
                + f" {record[f'{name}_accuracy']:6.2%}"
                for name in splits
            ),
            f"{record['images_per_second']:,.0f} img/s",
        ]
    )


def duration(seconds: float) -> str:
    """So many seconds as a person says it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """An accuracy's 95% interval (Wilson), as fractions."""
    low, high = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return low, high


def accuracy_line(correct: int, total: int) -> str:
    """State an accuracy with its 95% interval."""
    low, high = accuracy_interval(correct, total)
    return (
        f"{correct / total:.2%} (95% interval {low:.2%} to {high:.2%}), "
        f"{correct:,} of {total:,} correct"
    )


def print_summary(
    evaluation: dict[str, Any], records: list[dict[str, Any]], checkpoint: Path, command: str
) -> None:
    """Print what a run came to.

    Args:
        evaluation: of the checkpoint, as in eval.json.
        records: the epochs' metrics.
        checkpoint: what was evaluated.
        command: how to evaluate it again.
    """
    seconds = sum(record["seconds"] for record in records)
    print()
    print(f"test accuracy  {accuracy_line(evaluation['correct'], evaluation['total'])}")
    print(f"trained        {counted(len(records), 'epoch')} in {duration(seconds)}")
    print(f"checkpoint     {checkpoint}")
    print(f"evaluate it    {command}")
