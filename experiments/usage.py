"""What the experiments' command lines have in common: names, and refusing in one clear line."""

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any, Literal

DatasetName = Literal["auto", "mnist", "fashion_mnist", "kmnist", "mnist5k"]
"""What can be learnt; auto is mnist, or mnist5k where mnist can't be had."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPlaces:
    """Flags that say where a dataset's files are, with their defaults."""

    data_dir: Path | None = None
    """tfds's folder; None is tfds's own default."""
    manual_dir: Path | None = None
    """Folder with the dataset's four original IDX .gz files, in place of a download."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags(DataPlaces):
    """Flags that say which dataset to take too, with their defaults."""

    dataset: DatasetName = "auto"
    """What to learn; auto is mnist, or mnist5k where mnist can't be had."""


class UsageError(Exception):
    """What was asked for can't be done; the message names the flag, and says what to do."""


def fail(error: Exception) -> int:
    """Say in one line why an experiment ends; returns its exit status."""
    print(f"error: {printable(error)}", file=sys.stderr)
    return 2


def printable(text: object) -> str:
    """A text in one line that a terminal shows and does not obey.

    The name of a file may hold line ends and escape sequences; those are printed as `\\n` and
    `\\x1b`. So are bytes that are no text in the file system's encoding.
    """
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in str(text)
    )


def check(options: Any, name: str, holds: bool, must_be: str) -> None:
    """Check what an option must be.

    Raises:
        UsageError: it does not hold.
    """
    if not holds:
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} must be {must_be}, but is {getattr(options, name)}")


def check_at_least(options: Any, lowest: int, *names: str) -> None:
    """Check that these options are at least so much.

    Raises:
        UsageError: one is less.
    """
    for name in names:
        check(options, name, getattr(options, name) >= lowest, f"at least {lowest}")


def check_positive(options: Any, *names: str) -> None:
    """Check that these options are positive, and neither infinite nor NaN.

    Raises:
        UsageError: one is not.
    """
    for name in names:
        check(options, name, 0 < getattr(options, name) < math.inf, "a positive number")


def check_fills_batch(batch_size: int, images: int) -> None:
    """Check that there are training images for a batch.

    Raises:
        UsageError: there are fewer.
    """
    if batch_size > images:
        raise UsageError(
            f"--batch-size is {batch_size}, but there are only {images} training images"
        )


def check_packages(extra: str, *packages: str, what: str = "this") -> None:
    """Check that packages are installed which only some experiments need.

    Args:
        extra: of this project, which brings them.
        packages: as they are imported.
        what: needs them.

    Raises:
        UsageError: one is missing.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UsageError(f'{what} needs {" and ".join(missing)}: pip install -e ".[{extra}]"')


def make_folder(path: Path, flag: str) -> Path:
    """Make the folder that a flag names, if there is none.

    Raises:
        UsageError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--{flag} {path} can't be made ({error.strerror})") from error
    return path
