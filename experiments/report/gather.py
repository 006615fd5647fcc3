"""Gather what a workdir holds about its run, and what is missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.read_digit.reading import Mistakes, find_mistakes
from experiments.report import recorded
from experiments.training_run import from_config
from experiments.training_run.config import Config, hyperparameters
from experiments.training_run.restored import classify, read_config, restore_run
from lstm_flax import data
from lstm_flax.checkpoints import CheckpointError
from lstm_flax.data import DataError, Split

MAX_NAMED = 10
"""How many missing epochs are listed; the others are only counted."""


class Score(NamedTuple):
    """A test accuracy."""

    step: int  # of the checkpoint
    accuracy: float  # as a fraction
    correct: int | None  # images; None if only the fraction is known
    total: int | None
    is_measured: bool  # by this report; otherwise the run recorded it


class Result(NamedTuple):
    """How the result of a run classifies the test images."""

    step: int  # of the checkpoint
    images: np.ndarray  # all test images, uint8 [n, 28, 28]
    confusion: np.ndarray  # images by label and answer, int [10, 10]
    mistakes: Mistakes  # the most confident first


class RunData(NamedTuple):
    """What is known about a run."""

    workdir: Path
    config: Config
    records: list[dict[str, Any]]  # one for each epoch
    starts: list[dict[str, Any]]  # one for each start of training: software and machine
    parameters: int
    result: Result | None
    score: Score | None
    missing: list[str]  # one line for each


def gather(workdir: Path, test_sets: Mapping[str, Split | DataError]) -> RunData:
    """Read what a run has written, and classify the test images with its result.

    Args:
        workdir: folder of the run, which may still be training.
        test_sets: the test images of each dataset, or why they are unavailable.

    Raises:
        RunFilesError: there is no run in the workdir, or its records can't be read or are invalid.
    """
    config, missing = read_config(workdir), []
    records, evaluation = recorded.read_epochs(workdir), recorded.read_evaluation(workdir)
    if note := what_epochs_are_missing(records, config.epochs):
        missing.append(note)
    starts = recorded.read_starts(workdir)
    if not starts:
        missing.append(
            "the software and machine it was trained on: environment.jsonl is missing or damaged"
        )
    result = None
    try:
        test = test_sets[config.dataset]
        if isinstance(test, DataError):
            raise test
        result = read_test_set(workdir, test)
    except (CheckpointError, DataError) as error:
        missing.append(f"its confusion matrix and its mistakes: {error}")
    score = score_of(result) or evaluated_score(evaluation) or last_score(records)
    parameters = from_config.count_parameters(config)
    return RunData(workdir, config, records, starts, parameters, result, score, missing)


def read_test_sets(
    datasets: Sequence[str], data_dir: Path | None, manual_dir: Path | None
) -> dict[str, Split | DataError]:
    """Return the test images of each dataset, or why they are unavailable."""
    found: dict[str, Split | DataError] = {}
    for name in dict.fromkeys(datasets):
        try:
            found[name] = data.read_split(data.prepare(name, data_dir, manual_dir), "test")
        except DataError as error:
            found[name] = error
    return found


def read_test_set(workdir: Path, test: Split) -> Result:
    """Classify the test images with the result of a run.

    Raises:
        CheckpointError: no checkpoint can be restored.
    """
    from sklearn.metrics import confusion_matrix  # takes a second to import

    run = restore_run(workdir)
    probabilities = classify(run, test.images)
    classes = range(probabilities.shape[1])
    confusion = confusion_matrix(test.labels, probabilities.argmax(-1), labels=classes)
    mistakes = find_mistakes(probabilities, test.labels)
    return Result(run.step, test.images, confusion, mistakes)


def score_of(result: Result | None) -> Score | None:
    """Return the accuracy of a confusion matrix; None without a result."""
    if result is None:
        return None
    correct, total = int(result.confusion.trace()), int(result.confusion.sum())
    return Score(result.step, correct / total, correct, total, is_measured=True)


def evaluated_score(evaluation: Mapping[str, int] | None) -> Score | None:
    """Return the accuracy in eval.json; None without it."""
    if evaluation is None:
        return None
    step, correct, total = (evaluation[name] for name in ("step", "correct", "total"))
    return Score(step, correct / total, correct, total, is_measured=False)


def last_score(records: Sequence[Mapping[str, Any]]) -> Score | None:
    """Return the accuracy after the last epoch; None if no epoch is finished."""
    if not records:
        return None
    last = records[-1]
    return Score(last["step"], last["test_accuracy"], None, None, is_measured=False)


def what_epochs_are_missing(records: Sequence[Mapping[str, Any]], epochs: int) -> str | None:
    """Return which epochs of a run are missing; None if all are there."""
    done = {record["epoch"] for record in records}
    if not done:
        return "all epochs: none is finished yet, or metrics.jsonl is lost"
    if lost := sorted(set(range(1, max(done))) - done):
        more = f" and {len(lost) - MAX_NAMED:,} more" if len(lost) > MAX_NAMED else ""
        numbers = ", ".join(map(str, lost[:MAX_NAMED])) + more
        return f"the curves of epoch {numbers}: damaged in metrics.jsonl"
    if max(done) < epochs:
        return f"{epochs - max(done)} of {epochs} epochs: the run is still training, or was stopped"
    return None


def differing_flags(runs: Sequence[RunData]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Return the flags that differ, with the value of each run, and those in common."""
    values = [hyperparameters(run.config) for run in runs]
    by_flag = {f"--{name.replace('_', '-')}": [of[name] for of in values] for name in values[0]}
    differing = {flag: of for flag, of in by_flag.items() if any(one != of[0] for one in of)}
    common = {flag: of[0] for flag, of in by_flag.items() if flag not in differing}
    return differing, common
