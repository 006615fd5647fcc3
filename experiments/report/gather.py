"""What a run's workdir tells about it, as far as it goes, and what is missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.read_digit.reading import Mistakes, find_mistakes
from experiments.report import recorded
from experiments.training_run import from_config
from experiments.training_run.config import Config, of_the_run
from experiments.training_run.restored import classify, read_config, restore_run
from lstm_flax import data
from lstm_flax.checkpoints import CheckpointError
from lstm_flax.data import DataError, Split

MOST_NAMED = 10
"""How many missing epochs are named; of more the number is told."""


class Score(NamedTuple):
    """A test accuracy."""

    step: int  # whose it is
    accuracy: float  # as a fraction
    correct: int | None  # images; None where only the fraction is known
    total: int | None
    is_measured: bool  # by this report; else it is what the run recorded


class Result(NamedTuple):
    """What the run's result makes of the test images."""

    step: int  # whose checkpoint it is
    images: np.ndarray  # all of them, uint8 [n, 28, 28]
    confusion: np.ndarray  # images of each class, read as each class, int [10, 10]
    mistakes: Mistakes  # the most confident ones first


class Gathered(NamedTuple):
    """A run."""

    workdir: Path
    config: Config
    records: list[dict[str, Any]]  # of its epochs
    starts: list[dict[str, Any]]  # of each start of training, with what and on what
    parameters: int
    result: Result | None
    score: Score | None
    missing: list[str]  # a line for each thing that is not there


def gather(workdir: Path, test_sets: Mapping[str, Split | DataError]) -> Gathered:
    """Read what a run has written, and let its result read the test images.

    Args:
        workdir: of the run, which may be training still.
        test_sets: by dataset, its test images, or why they can't be had.

    Raises:
        RunFilesError: there is no run in the workdir, or what it recorded can't be read or be true.
    """
    config, missing = read_config(workdir), []
    records, evaluation = recorded.read_epochs(workdir), recorded.read_evaluation(workdir)
    if note := what_epochs_are_missing(records, config.epochs):
        missing.append(note)
    starts = recorded.read_starts(workdir)
    if not starts:
        missing.append("what it was trained with and on: environment.jsonl is missing or damaged")
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
    return Gathered(workdir, config, records, starts, parameters, result, score, missing)


def read_test_sets(
    datasets: Sequence[str], data_dir: Path | None, manual_dir: Path | None
) -> dict[str, Split | DataError]:
    """The test images of each dataset, or why they can't be had."""
    found: dict[str, Split | DataError] = {}
    for name in dict.fromkeys(datasets):
        try:
            found[name] = data.read_split(data.prepare(name, data_dir, manual_dir), "test")
        except DataError as error:
            found[name] = error
    return found


def read_test_set(workdir: Path, test: Split) -> Result:
    """Let a run's result read the test images.

    Raises:
        CheckpointError: there is none that can be restored.
    """
    from sklearn.metrics import confusion_matrix  # takes a second

    run = restore_run(workdir)
    probabilities = classify(run, test.images)
    classes = range(probabilities.shape[1])
    confusion = confusion_matrix(test.labels, probabilities.argmax(-1), labels=classes)
    mistakes = find_mistakes(probabilities, test.labels)
    return Result(run.step, test.images, confusion, mistakes)


def score_of(result: Result | None) -> Score | None:
    """The accuracy that goes with a confusion matrix."""
    if result is None:
        return None
    correct, total = int(result.confusion.trace()), int(result.confusion.sum())
    return Score(result.step, correct / total, correct, total, is_measured=True)


def evaluated_score(evaluation: Mapping[str, int] | None) -> Score | None:
    """The accuracy that eval.json tells, None where there is none."""
    if evaluation is None:
        return None
    step, correct, total = (evaluation[name] for name in ("step", "correct", "total"))
    return Score(step, correct / total, correct, total, is_measured=False)


def last_score(records: Sequence[Mapping[str, Any]]) -> Score | None:
    """The accuracy after the last epoch, None where none is finished."""
    if not records:
        return None
    last = records[-1]
    return Score(last["step"], last["test_accuracy"], None, None, is_measured=False)


def what_epochs_are_missing(records: Sequence[Mapping[str, Any]], epochs: int) -> str | None:
    """Say which of a run's epochs are not there; None where all of them are."""
    done = {record["epoch"] for record in records}
    if not done:
        return "all epochs: none is finished yet, or metrics.jsonl is lost"
    if lost := sorted(set(range(1, max(done))) - done):
        more = f" and {len(lost) - MOST_NAMED:,} more" if len(lost) > MOST_NAMED else ""
        numbers = ", ".join(map(str, lost[:MOST_NAMED])) + more
        return f"the curves of epoch {numbers}: damaged in metrics.jsonl"
    if max(done) < epochs:
        return f"{epochs - max(done)} of {epochs} epochs: it is training still, or was stopped"
    return None


def differing_flags(runs: Sequence[Gathered]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The runs' configurations: flags that differ, with each run's value, and those in common."""
    values = [of_the_run(run.config) for run in runs]
    by_flag = {f"--{name.replace('_', '-')}": [of[name] for of in values] for name in values[0]}
    differing = {flag: of for flag, of in by_flag.items() if any(one != of[0] for one in of)}
    common = {flag: of[0] for flag, of in by_flag.items() if flag not in differing}
    return differing, common
