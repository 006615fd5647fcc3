"""What the experiments' command lines have in common: names, and refusing in one clear line."""

import dataclasses
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

Options = TypeVar("Options")

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


MOST_SEED = 2**32 - 1
"""What NumPy's generators take."""


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


def read_flags(
    flags: type[Options], argv: Sequence[str] | None, *, name: str, **how: Any
) -> Options:
    """Read a command line into a dataclass of flags.

    A `~` at the start of a path is the home; a shell makes it that in `--workdir ~/run`, but not in
    `--workdir=~/run`.

    Args:
        flags: the dataclass.
        argv: the command line, without the command itself; None is this process's.
        name: of the experiment.
        how: further arguments of `tyro.cli`.

    Raises:
        SystemExit: a flag is unknown or not of its type (status 2), or `--help` (status 0).
    """
    options = tyro.cli(flags, prog=f"python -m experiments.{name}", args=argv, **how)
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    expanded = {key: _with_home(value) for key, value in values.items()}
    return dataclasses.replace(options, **expanded)


def _with_home(value: Any) -> Any:
    match value:
        case Path():
            return Path(os.path.expanduser(value))  # stays as it is where there is no home
        case tuple():
            return tuple(map(_with_home, value))
    return value


def command_line(name: str, *arguments: object) -> str:
    """The command of an experiment, to be pasted into any shell, in any folder.

    Args:
        name: of the experiment.
        arguments: flags and their values; paths become absolute.
    """
    written = [str(part.absolute() if isinstance(part, Path) else part) for part in arguments]
    return shlex.join([sys.executable or "python", "-m", f"experiments.{name}", *written])


def install_command(extra: str) -> str:
    """The command that installs an extra of this project, likewise."""
    project = f"{Path(__file__).absolute().parents[2]}[{extra}]"
    return shlex.join([sys.executable or "python", "-m", "pip", "install", "-e", project])


def check(options: Any, name: str, holds: bool, must_be: str) -> None:
    """Check what an option must be.

    Raises:
        UsageError: it does not hold.
    """
    if not holds:
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} must be {must_be}, but is {getattr(options, name)}")


def check_numbers(options: Any, *may_be_zero: str) -> None:
    """Check that integers among the options are at least 1, or 0 by name, and floats positive.

    Raises:
        UsageError: one is not, or is infinite or NaN.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.type is int:
            lowest = 0 if field.name in may_be_zero else 1
            check(options, field.name, value >= lowest, f"at least {lowest}")
        if field.type is float:
            check(options, field.name, 0 < value < math.inf, "a positive number")


def check_seeds(seeds: Sequence[int], least: int = 1) -> None:
    """Check what `--seeds` lists.

    Raises:
        UsageError: there are too few, one comes twice, or one is out of bounds.
    """
    differ = len(set(seeds)) == len(seeds)
    if len(seeds) < least or not differ or not all(0 <= seed <= MOST_SEED for seed in seeds):
        given = " ".join(map(str, seeds)) or "empty"
        raise UsageError(
            f"--seeds must be at least {counted(least, 'number')} from 0 to {MOST_SEED}, each "
            f"another one, but is {given}"
        )


def counted(number: int, noun: str) -> str:
    """So many of something: `1 epoch`, `2 epochs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def tell(doing: str) -> None:
    """Say what the command does now, before a time in which it says nothing."""
    print(f"{doing} ...", file=sys.stderr, flush=True)


def check_fills_batch(batch_size: int, images: int) -> None:
    """Check that there are training images for a batch.

    Raises:
        UsageError: there are fewer.
    """
    if batch_size > images:
        raise UsageError(
            f"--batch-size is {batch_size}, but there are only {counted(images, 'training image')}"
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
        raise UsageError(f"{what} needs {' and '.join(missing)}: {install_command(extra)}")


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
