"""What a run has recorded of itself, checked before it is believed: a workdir may be anybody's.

Lines that were cut off or damaged are left out. A number that no run can have written, and a file
that is none or is far too large, are refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.training_run import run_files
from experiments.training_run.config import MOST_EPOCHS
from experiments.training_run.run_files import RunFilesError

MOST_STARTS, MOST_FACTS = 1_000, 100
"""How often a run can have been started, and how many things are told about the environment."""

LONGEST_FACT = 500
"""Characters."""


class Bounds(NamedTuple):
    """What a number can be."""

    kind: type[int] | type[float]  # a float may be written as a whole number
    low: float
    high: float

    def holds(self, value: object) -> bool:
        """Whether it is such a number; NaN is none."""
        is_kind = isinstance(value, int if self.kind is int else int | float)
        return is_kind and not isinstance(value, bool) and self.low <= value <= self.high  # type: ignore[operator]


FIGURES = {
    "epoch": Bounds(int, 1, MOST_EPOCHS),
    "step": Bounds(int, 1, 1e12),
    "train_loss": Bounds(float, 0, 1e12),
    "train_accuracy": Bounds(float, 0, 1),
    "test_loss": Bounds(float, 0, 1e12),
    "test_accuracy": Bounds(float, 0, 1),
    "images_per_second": Bounds(float, 0, 1e12),
    "seconds": Bounds(float, 0, 1e9),
}
"""Numbers that each line of metrics.jsonl has."""

COUNTS = {
    "step": Bounds(int, 0, 1e12),
    "correct": Bounds(int, 0, 1e9),
    "total": Bounds(int, 1, 1e9),
}
"""Numbers of eval.json that are shown."""


def read_epochs(workdir: Path) -> list[dict[str, Any]]:
    """`FIGURES` of each epoch, and its device, in their order; [] where there is none.

    Raises:
        RunFilesError: a number is out of bounds, or the file can't be read.
    """
    epochs: list[dict[str, Any]] = []
    for place, line in _objects(run_files.metrics_path(workdir)):
        if FIGURES.keys() <= line.keys():
            epoch = _checked(place, line, FIGURES)
            if epochs and epoch["epoch"] <= epochs[-1]["epoch"]:
                raise RunFilesError(f"{place}: its epoch comes again, or too late")
            epochs.append(epoch | {"device": _fact(line.get("device"))})
    return epochs


def read_evaluation(workdir: Path) -> dict[str, int] | None:
    """`COUNTS` of the last evaluation; None where there is none, or it is damaged.

    Raises:
        RunFilesError: a number is out of bounds, or the file can't be read.
    """
    path = run_files.eval_path(workdir)
    evaluation = _object(str(path), _read(path))
    if evaluation is None or not COUNTS.keys() <= evaluation.keys():
        return None
    counts = _checked(str(path), evaluation, COUNTS)
    if counts["correct"] > counts["total"]:
        raise RunFilesError(f"{path}: more images are correct than there are")
    return counts


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """Of each start of training the facts, as texts, by name; facts on a second level too.

    Raises:
        RunFilesError: there are far too many, or the file can't be read.
    """
    path, starts, names = run_files.environment_path(workdir), [], set()
    for _, line in _objects(path):
        starts.append({
            name: {inner: _fact(of) for inner, of in value.items()}
            if isinstance(value, dict)
            else _fact(value)
            for name, value in line.items()
        })  # fmt: skip
        names |= {inner for name, value in line.items() for inner in [name, *_keys(value)]}
        if len(starts) > MOST_STARTS or len(names) > MOST_FACTS:
            raise RunFilesError(f"{path} tells of more starts or facts than a run can have")
    return starts


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _fact(value: object) -> str | None:
    """A value as a short text; what is deeper is left out."""
    return None if value is None or isinstance(value, dict | list) else str(value)[:LONGEST_FACT]


def _checked(place: str, values: dict[str, Any], bounds: dict[str, Bounds]) -> dict[str, Any]:
    for name, bound in bounds.items():
        if not bound.holds(values[name]):
            raise RunFilesError(
                f"{place}: {name} can't be true, it is no {'whole ' * (bound.kind is int)}number "
                f"from {bound.low:,.0f} to {bound.high:,.0f}"
            )
    return {name: values[name] for name in bounds}


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of one a line, each after where it is."""
    for number, line in enumerate(_read(path).splitlines(), 1):
        place = f"{path}, line {number}"
        if (values := _object(place, line)) is not None:
            yield place, values


def _object(place: str, text: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise RunFilesError(f"{place} is nested too deeply") from error
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _read(path: Path) -> bytes:
    try:
        return run_files.read_bytes(path)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RunFilesError(f"{path} can't be read ({error.strerror})") from error
