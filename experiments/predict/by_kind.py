"""Measure how well pictures of many kinds are read, and whether the probabilities can be trusted.

    python -m experiments.predict.by_kind PICTURES [--workdir runs/mnist_lstm]

PICTURES holds a folder of each kind, whose files are named NUMBER_LABEL.png, with the digits that
they show from left to right as the label; a blank page has no label. Prints a table by kind, the
reliability of the probabilities, and the temperature that would fit them best.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from experiments.harness import markdown
from experiments.harness.command import command
from experiments.harness.usage import UsageError, read_flags
from experiments.predict.__main__ import picture_files
from experiments.predict.calibration import (
    UNSURE,
    calibrated,
    fit_temperature,
    reliability,
    temperature_for,
)
from experiments.predict.digit_image import DigitImageError, read_picture
from experiments.pretrained.model import restore_or_pretrained
from experiments.training_run.restored import RestoredRun, classifier
from experiments.training_run.run_files import RunFilesError
from lstm_flax.checkpoints import CheckpointError

EDGES = (0.0, 0.5, 0.7, UNSURE, 0.95, 0.99, 0.999, 1.0)
"""Bounds of the bins by probability."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    pictures: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURES")]
    """Folder of folders of pictures, one for each kind."""
    workdir: Path | None = None
    """Where the trained run lives; None is runs/mnist_lstm, or the pretrained model without it."""


class Answer(NamedTuple):
    """What a picture shows, and the probabilities of the digits that were found in it."""

    kind: str
    truth: str  # the digits from left to right; empty for a blank page
    probabilities: np.ndarray  # [digits, classes], not calibrated

    @property
    def number(self) -> str:
        """The likeliest digits."""
        return "".join(map(str, self.probabilities.argmax(-1)))


@command(RunFilesError, CheckpointError, DigitImageError)
def main(argv: Sequence[str] | None = None) -> int:
    """Measure from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="predict.by_kind", description=__doc__)
    if not options.pictures.is_dir():
        raise UsageError(f"{options.pictures} is no folder")
    trained = restore_or_pretrained(options.workdir)
    answers = read_all(trained, options.pictures)
    if not answers:
        raise UsageError(f"{options.pictures} has no folders of pictures")
    print(table_by_kind(answers))
    alone = [a for a in answers if len(a.truth) == len(a.probabilities) == 1]
    if alone:
        probabilities = np.concatenate([answer.probabilities for answer in alone])
        labels = np.array([int(answer.truth) for answer in alone])
        temperature = temperature_for(trained.config.label_smoothing)
        print("\n" + table_of_reliability(calibrated(probabilities, temperature), labels))
        best = fit_temperature(probabilities, labels)
        print(f"\ntemperature {temperature}; these pictures' best is {best:.2f}")
    return 0


def read_all(trained: RestoredRun, pictures: Path) -> list[Answer]:
    """Read all pictures in the folders of a folder."""
    classify = classifier(trained)
    answers = []
    for folder in sorted(path for path in pictures.iterdir() if path.is_dir()):
        files = picture_files(folder)
        found = [[digit.image for digit in read_picture(file).digits] for file in files]
        images = [image for each in found for image in each]
        predictions = classify(np.stack(images)) if images else np.zeros((0, 10))
        ends = np.cumsum([len(each) for each in found[:-1]], dtype=int)
        for file, own in zip(files, np.split(predictions, ends), strict=True):
            answers.append(Answer(folder.name, file.stem.partition("_")[2], own))
    return answers


def table_by_kind(answers: Sequence[Answer]) -> str:
    """The pictures of each kind, how many of them were read rightly, and in how many no digit was.

    A blank page is read rightly where no digit is found.
    """
    rows = []
    for kind in dict.fromkeys(answer.kind for answer in answers):
        own = [answer for answer in answers if answer.kind == kind]
        right = np.mean([answer.number == answer.truth for answer in own])
        none = sum(not len(answer.probabilities) for answer in own)
        rows.append([kind.replace("_", " "), str(len(own)), f"{right:.1%}", str(none)])
    return markdown.table(["kind", "pictures", "right", "no digit"], rows)


def table_of_reliability(probabilities: np.ndarray, labels: np.ndarray) -> str:
    """How sure answers are, and how often they are right."""
    right = probabilities.argmax(-1) == labels
    bins = reliability(probabilities.max(-1), right, EDGES)
    rows = [
        [f"{low:.1%} to {high:.1%}", str(count), f"{mean:.1%}", f"{part:.1%}"]
        for low, high, (count, mean, part) in zip(EDGES[:-1], EDGES[1:], bins, strict=True)
        if count
    ]
    return markdown.table(["probability", "pictures", "mean", "right"], rows)


if __name__ == "__main__":
    sys.exit(main())
