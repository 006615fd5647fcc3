"""Read the digits in picture files with a trained model.

    python -m experiments.predict --workdir runs/mnist_lstm digit.png photos/ [--json]
    python -m experiments.predict --model digits.onnx digit.png photos/ [--json]

Takes PNG, JPEG, WebP, GIF, BMP and TIFF files, one digit a picture, dark on light or light on dark,
and folders of them. Prints a line a picture: the label, its probability and the runner-up. A file
that can't be read is named and skipped, and the exit status is then 2.
"""

import dataclasses
import json
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
from experiments.harness.usage import UsageError, printable, read_flags
from experiments.predict.digit_image import ENDINGS, DigitImageError, read_digit_image
from experiments.training_run.console import warn
from experiments.training_run.run_files import RunFilesError

PATIENCE = 0.2
"""Seconds for which an answer may wait for more pictures, to be computed in one batch with them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """Picture files, and folders, of which all files are read that are named as pictures."""
    workdir: Path = Path("runs/mnist_lstm")
    """Where the trained run lives."""
    model: Path | None = None
    """An export to read with, instead of a run."""
    json: bool = False
    """Print a line of JSON a picture, with the probabilities of all classes."""


class Reader(NamedTuple):
    """What reads images, and how many of them it computes at once."""

    classify: Callable[[np.ndarray], np.ndarray]  # uint8 [n, 28, 28] to probabilities [n, classes]
    batch_size: int


@command(RunFilesError, ExportError)
def main(argv: Sequence[str] | None = None) -> int:
    """Predict from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="predict", description=__doc__)
    if not options.pictures:
        raise UsageError("name the pictures to read, files or folders")
    reader = of_run(options.workdir) if options.model is None else of_export(options.model)
    return 2 if predict(reader, options) else 0


def of_run(workdir: Path) -> Reader:
    """Return the reader that a run has trained.

    Raises:
        RunFilesError: as `restore_run` does.
        UsageError: no checkpoint can be restored.
    """
    from experiments.training_run.restored import classifier, restore_run  # imports Flax
    from lstm_flax.checkpoints import CheckpointError

    try:
        trained = restore_run(workdir)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    return Reader(classifier(trained), trained.config.batch_size)


def of_export(path: Path) -> Reader:
    """Return the reader in an export.

    Raises:
        ExportError: the file is no export.
    """
    logits = read_export(path).logits
    return Reader(lambda images: softmax(logits(images), axis=-1), BATCH_SIZE)


def predict(reader: Reader, options: Options) -> int:
    """Print each picture's answer as it comes; returns how many pictures are skipped."""
    classify, show = reader.classify, json_line if options.json else line
    files, skipped = [], 0
    for path in options.pictures:
        found = picture_files(path)
        if not found:
            warn(f"skipped {path}: there are no pictures in this folder")
            skipped += 1
        files += found
    width = max((len(printable(file)) for file in files), default=0)
    waiting: list[tuple[Path, np.ndarray]] = []  # read, and not answered yet
    answered = 0.0  # when, in seconds

    def answer() -> None:
        if waiting:
            predictions = classify(np.stack([image for _, image in waiting]))
            for (file, _), probabilities in zip(waiting, predictions, strict=True):
                print(show(file, width, probabilities), flush=True)
            waiting.clear()

    for file in files:
        try:
            waiting.append((file, read_digit_image(file)))
        except DigitImageError as error:
            answer()
            warn(f"skipped: {error}")
            skipped += 1
        if len(waiting) == reader.batch_size or time.monotonic() > answered + PATIENCE:
            answer()
            answered = time.monotonic()
    answer()
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


def line(path: Path, width: int, probabilities: np.ndarray) -> str:
    """A picture's result for a person; paths take so many characters."""
    label, runner_up = likeliest(probabilities)
    return (
        f"{printable(path):{width}}  {label}  {probabilities[label]:6.1%}"
        f"   or {runner_up}, {probabilities[runner_up]:.1%}"
    )


def json_line(path: Path, width: int, probabilities: np.ndarray) -> str:
    """A picture's result for a program."""
    label, runner_up = likeliest(probabilities)
    result: dict[str, Any] = {
        "file": str(path),
        "label": label,
        "probability": float(probabilities[label]),
        "runner_up": runner_up,
        "probabilities": probabilities.tolist(),
    }
    return json.dumps(result)


def likeliest(probabilities: np.ndarray) -> tuple[int, int]:
    """The two likeliest classes, the likeliest first."""
    second, first = np.argsort(probabilities)[-2:]
    return int(first), int(second)


if __name__ == "__main__":
    sys.exit(main())
