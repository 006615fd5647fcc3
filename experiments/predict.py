"""Read the digits in picture files with a trained model.

    python -m experiments.predict --workdir runs/mnist_lstm digit.png photos/ [--json]

Takes PNG, JPEG and what else Pillow reads, one digit a picture, dark on light or light on dark, and
folders of them. Prints a line a picture: the label, its probability and the runner-up. A file that
is no picture is named and skipped, and the exit status is then 2.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from experiments.command import command
from experiments.console import warn
from experiments.digit_image import DigitImageError, read_digit_image
from experiments.restored import classify, restore_run
from experiments.run_files import RunFilesError
from experiments.usage import UsageError, fail, read_flags
from lstm_flax.checkpoints import CheckpointError


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """Picture files, and folders, of which all files that are named as pictures are read."""
    workdir: Path = Path("runs/mnist_lstm")
    """Where the trained run lives."""
    json: bool = False
    """Print a line of JSON a picture, with the probabilities of all classes."""


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Predict from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="predict", description=__doc__)
    if not options.pictures:
        return fail(UsageError("name the pictures to read, files or folders"))
    try:
        trained = restore_run(options.workdir)
    except (RunFilesError, CheckpointError) as error:
        return fail(error)
    images, skipped = read_images(options.pictures)
    if images:
        show = json_line if options.json else line
        width = max(len(str(path)) for path in images)
        predictions = classify(trained, np.stack(list(images.values())))
        for path, probabilities in zip(images, predictions, strict=True):
            print(show(path, width, probabilities))
    return 2 if skipped else 0


def read_images(pictures: Sequence[Path]) -> tuple[dict[Path, np.ndarray], int]:
    """Read pictures as MNIST images, by their paths; say which can't be, and count those."""
    images, skipped = {}, 0
    for path in pictures:
        files = picture_files(path) if path.is_dir() else [path]
        if not files:
            warn(f"skipped {path}: there are no pictures in this folder")
            skipped += 1
        for file in files:
            try:
                images[file] = read_digit_image(file)
            except DigitImageError as error:
                warn(f"skipped: {error}")
                skipped += 1
    return images, skipped


def picture_files(folder: Path) -> list[Path]:
    """The files in a folder and those below it whose names end as a picture's, sorted."""
    endings = Image.registered_extensions()
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in endings]


def line(path: Path, width: int, probabilities: np.ndarray) -> str:
    """A picture's result for a person; paths take so many characters."""
    label, runner_up = likeliest(probabilities)
    return (
        f"{path!s:{width}}  {label}  {probabilities[label]:6.1%}"
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
