"""Read and check what a run has recorded, because a workdir may be untrusted.

Damaged lines are skipped. Numbers that no run can have written are an error, and so are files that
are too large or not regular.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.training_run import run_files
from experiments.training_run.config import MAX_EPOCHS
from experiments.training_run.run_files import RunFilesError

MAX_STARTS, MAX_FACTS = 1_000, 100
"""Largest number of starts of a run, and of facts about its environments."""

MAX_FACT_LENGTH = 500
"""Largest number of characters of a fact."""


class Bounds(NamedTuple):
    """The type and range of a number."""

    kind: type[int] | type[float]  # a float may be written as a whole number
    low: float
    high: float

    def holds(self, value: object) -> bool:
        """Whether a value is such a number; NaN is not."""
        is_kind = isinstance(value, int if self.kind is int else int | float)
        return is_kind and not isinstance(value, bool) and self.low <= value <= self.high  # type: ignore[operator]


EPOCH_METRICS = {
    "epoch": Bounds(int, 1, MAX_EPOCHS),
    "step": Bounds(int, 1, 1e12),
    "train_loss": Bounds(float, 0, 1e12),
    "train_accuracy": Bounds(float, 0, 1),
    "test_loss": Bounds(float, 0, 1e12),
    "test_accuracy": Bounds(float, 0, 1),
    "images_per_second": Bounds(float, 0, 1e12),
    "seconds": Bounds(float, 0, 1e9),
}
"""Numbers in each line of metrics.jsonl."""

COUNTS = {
    "step": Bounds(int, 0, 1e12),
    "correct": Bounds(int, 0, 1e9),
    "total": Bounds(int, 1, 1e9),
}
"""Numbers in eval.json that the page shows."""


def read_epochs(workdir: Path) -> list[dict[str, Any]]:
    """Return `EPOCH_METRICS` and the device of each epoch, in order; [] without epochs.

    Raises:
        RunFilesError: a number is out of bounds, or the file can't be read.
    """
    epochs: list[dict[str, Any]] = []
    for place, line in _objects(run_files.metrics_path(workdir)):
        if EPOCH_METRICS.keys() <= line.keys():
            epoch = _checked(place, line, EPOCH_METRICS)
            if epochs and epoch["epoch"] <= epochs[-1]["epoch"]:
                raise RunFilesError(f"{place}: its epoch is out of order")
            epochs.append(epoch | {"device": _fact(line.get("device"))})
    return epochs


def read_evaluation(workdir: Path) -> dict[str, int] | None:
    """Return `COUNTS` of the last evaluation; None if there is none, or if it is damaged.

    Raises:
        RunFilesError: a number is out of bounds, or the file can't be read.
    """
    path = run_files.eval_path(workdir)
    evaluation = _object(str(path), _read(path))
    if evaluation is None or not COUNTS.keys() <= evaluation.keys():
        return None
    counts = _checked(str(path), evaluation, COUNTS)
    if counts["correct"] > counts["total"]:
        raise RunFilesError(f"{path}: correct is larger than total")
    return counts


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """Return the facts about each start of training as strings, on at most two levels.

    Raises:
        RunFilesError: there are too many starts or facts, or the file can't be read.
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
        if len(starts) > MAX_STARTS or len(names) > MAX_FACTS:
            raise RunFilesError(f"{path} holds more starts or facts than a run can have")
    return starts


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _fact(value: object) -> str | None:
    """Return a value as a short string; None for what is nested more deeply."""
    return None if value is None or isinstance(value, dict | list) else str(value)[:MAX_FACT_LENGTH]


def _checked(place: str, values: dict[str, Any], bounds: dict[str, Bounds]) -> dict[str, Any]:
    for name, bound in bounds.items():
        if not bound.holds(values[name]):
            raise RunFilesError(
                f"{place}: {name} must be {'an integer' if bound.kind is int else 'a number'} "
                f"from {bound.low:,.0f} to {bound.high:,.0f}"
            )
    return {name: values[name] for name in bounds}


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON objects in a file, one per line, each after its place in the file."""
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
