"""Read the digits in picture files with a trained model.

    python -m experiments.predict digit.png photos/ [--workdir runs/mnist_lstm] [--json]
    python -m experiments.predict digit.png photos/ --model digits.onnx [--json]

Takes PNG, JPEG, WebP, GIF, BMP and TIFF files, dark on light or light on dark, and folders of them.
Digits in a row are read as a number. Prints a line a picture: what it shows, the probability, and
of one digit the runner-up; "unsure" where the probability is low. A file that can't be read is
named and skipped, and the exit status is then 2.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from scipy.special import softmax

from experiments.export.reading import BATCH_SIZE, ExportError, read_export
from experiments.harness.command import command
from experiments.harness.output_files import replacing
from experiments.harness.usage import Folder, UsageError, printable, read_flags
from experiments.predict import show
from experiments.predict.calibration import TEMPERATURE, UNSURE, calibrated, temperature_for
from experiments.predict.digit_image import ENDINGS, DigitImageError, Picture, read_picture
from experiments.training_run.console import warn
from experiments.training_run.run_files import RunFilesError

PATIENCE = 0.2
"""Seconds for which an answer may wait for more pictures, to be computed in one batch with them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """Picture files, and folders, of which all files are read that are named as pictures."""
    workdir: Folder | None = None
    """Where the trained run lives; None is runs/mnist_lstm, or the pretrained model without it."""
    model: Path | None = None
    """An export to read with, instead of a run."""
    json: bool = False
    """Print a line of JSON a picture, with the box and all probabilities of each digit."""
    single: bool = False
    """Take each picture as one digit, whatever parts it has."""
    show: Path | None = None
    """Picture to write, a PNG: what the model saw beside what was given, of the first 100."""


class Reader(NamedTuple):
    """What reads images, and how many of them it computes at once."""

    classify: Callable[[np.ndarray], np.ndarray]  # uint8 [n, 28, 28] to probabilities [n, classes]
    batch_size: int
    temperature: float


@command(RunFilesError, ExportError)
def main(argv: Sequence[str] | None = None) -> int:
    """Predict from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="predict", description=__doc__)
    if not options.pictures:
        raise UsageError("name the pictures to read, files or folders")
    if options.show and options.show.suffix.lower() != ".png":
        raise UsageError(f"--show {options.show}: name a .png file to write")
    reader = of_run(options.workdir) if options.model is None else of_export(options.model)
    return 2 if predict(reader, options) else 0


def of_run(workdir: Path | None) -> Reader:
    """Return the reader that a run has trained; see `restore_or_pretrained`.

    Raises:
        RunFilesError: as `restore_run` does.
        UsageError: no checkpoint can be restored, or the pretrained model can't be read.
    """
    from experiments.pretrained.model import restore_or_pretrained  # imports Flax
    from experiments.training_run.restored import classifier
    from lstm_flax.checkpoints import CheckpointError

    try:
        trained = restore_or_pretrained(workdir)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    temperature = temperature_for(trained.config.label_smoothing)
    return Reader(classifier(trained), trained.config.batch_size, temperature)


def of_export(path: Path) -> Reader:
    """Return the reader in an export.

    Raises:
        ExportError: the file is no export.
    """
    logits = read_export(path).logits
    return Reader(lambda images: softmax(logits(images), axis=-1), BATCH_SIZE, TEMPERATURE)


def predict(reader: Reader, options: Options) -> int:
    """Print each picture's answer as it comes; returns how many pictures are skipped."""
    classify, describe = reader.classify, json_line if options.json else line
    files, skipped = [], 0
    for path in options.pictures:
        found = picture_files(path)
        if not found:
            warn(f"skipped {path}: there are no pictures in this folder")
            skipped += 1
        files += found
    width = max((len(printable(file)) for file in files), default=0)
    waiting: list[tuple[Path, Picture]] = []  # read, and not answered yet
    shown: list[show.Seen] = []
    answered = 0.0  # when, in seconds

    def answer() -> None:
        images = [digit.image for _, picture in waiting for digit in picture.digits]
        predictions = iter(
            calibrated(classify(np.stack(images)), reader.temperature) if images else []
        )
        for file, picture in waiting:
            found = [Reading(digit.box, next(predictions)) for digit in picture.digits]
            print(describe(file, width, found), flush=True)
            if options.show and len(shown) < show.MOST_SHOWN:
                shown.append(show.Seen(picture, printable(file.name), [*map(short, found)]))
        waiting.clear()

    for file in files:
        try:
            waiting.append((file, read_picture(file, options.single)))
        except DigitImageError as error:
            answer()
            warn(f"skipped: {error}")
            skipped += 1
        if len(waiting) == reader.batch_size or time.monotonic() > answered + PATIENCE:
            answer()
            answered = time.monotonic()
    answer()
    if options.show and shown:
        with replacing(options.show) as new:
            show.draw(shown).save(new)
    return skipped


def picture_files(path: Path) -> list[Path]:
    """A file itself; of a folder the files in and below it that are named as pictures, sorted.

    Hidden ones are left out.
    """
    if not os.path.isdir(path):  # False too where nobody may look
        return [path]
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in ENDINGS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]


class Reading(NamedTuple):
    """A digit that was read."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in the upright picture, in pixels
    probabilities: np.ndarray  # float64 [classes], calibrated

    @property
    def label(self) -> int:
        """The likeliest class."""
        return likeliest(self.probabilities)[0]

    @property
    def probability(self) -> float:
        """That of the label."""
        return float(self.probabilities[self.label])


def line(path: Path, width: int, readings: Sequence[Reading]) -> str:
    """A picture's result for a person; paths take so many characters."""
    name = f"{printable(path):{width}}"
    if not readings:
        return f"{name}  no digit"
    probability = math.prod(reading.probability for reading in readings)
    shown = f"{name}  {number(readings)}  {probability:6.1%}"
    if len(readings) == 1:
        (reading,) = readings
        runner_up = likeliest(reading.probabilities)[1]
        shown += f"   or {runner_up}, {reading.probabilities[runner_up]:.1%}"
    return shown + ("   unsure" if is_unsure(readings) else "")


def json_line(path: Path, width: int, readings: Sequence[Reading]) -> str:
    """A picture's result for a program; of one digit its label and probabilities stand on top."""
    digits = [{"box": reading.box} | as_json(reading) for reading in readings]
    result: dict[str, Any] = {"file": str(path)}
    if len(readings) == 1:
        result |= as_json(readings[0])
    elif readings:
        probability = math.prod(reading.probability for reading in readings)
        result |= {"label": None, "probability": probability, "unsure": is_unsure(readings)}
    else:
        result |= {"label": None, "probability": None}
    return json.dumps(result | {"number": number(readings) or None, "digits": digits})


def as_json(reading: Reading) -> dict[str, Any]:
    """What is known of one digit."""
    return {
        "label": reading.label,
        "probability": reading.probability,
        "runner_up": likeliest(reading.probabilities)[1],
        "unsure": is_unsure([reading]),
        "probabilities": reading.probabilities.tolist(),
    }


def short(reading: Reading) -> str:
    """A digit's result in a few words."""
    return f"{reading.label}, {reading.probability:.1%}" + (" unsure" * is_unsure([reading]))


def number(readings: Sequence[Reading]) -> str:
    """The labels from left to right."""
    return "".join(str(reading.label) for reading in readings)


def is_unsure(readings: Sequence[Reading]) -> bool:
    """Whether the answer may well be wrong."""
    return math.prod(reading.probability for reading in readings) < UNSURE


def likeliest(probabilities: np.ndarray) -> tuple[int, int]:
    """The two likeliest classes, the likeliest first."""
    second, first = np.argsort(probabilities)[-2:]
    return int(first), int(second)


if __name__ == "__main__":
    sys.exit(main())
