"""What the experiments' command lines share: flags, checks, and errors in one clear line."""

import dataclasses
import importlib.util
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from experiments.harness import output_files
from lstm_flax import buckets

Options = TypeVar("Options")

DatasetName = Literal["auto", "mnist", "fashion_mnist", "kmnist", "mnist5k"]
"""Datasets to train on; auto is mnist, or mnist5k if mnist can't be downloaded."""


def _folder(arguments: list[str]) -> Path:
    return buckets.as_path(arguments[0])


if TYPE_CHECKING:
    Folder = Path
else:
    Folder = Annotated[
        PurePath,  # of which the paths in a bucket are too, with the methods of `Path`
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=_folder,
            is_instance=lambda value: isinstance(value, PurePath),
            str_from_instance=lambda path: [str(path)],
        ),
    ]
    """Type of a flag for a folder on a disk or, as `gs://bucket/folder`, in a bucket."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPlaces:
    """Flags for where the files of a dataset are."""

    data_dir: Folder | None = None
    """Folder of tfds's datasets; None is tfds's own default."""
    manual_dir: Path | None = None
    """Folder with the dataset's four original IDX .gz files, used instead of a download."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags(DataPlaces):
    """Flags for the dataset and where its files are."""

    dataset: DatasetName = "auto"
    """Dataset to train on; auto is mnist, or mnist5k if mnist can't be downloaded."""


MAX_SEED = 2**32 - 1
"""Largest seed that NumPy's generators take."""


_WHERE = "a workdir or a data folder may be in a bucket of gs://, and all else is on a disk"


class UsageError(Exception):
    """The command line can't be carried out; the message names the flag and says what to do."""


def fail(error: Exception) -> int:
    """Print in one line why an experiment ends, and return its exit status."""
    print(f"error: {printable(error)}", file=sys.stderr)
    return 2


def printable(text: object) -> str:
    """Return a text as one line that is safe to print on a terminal.

    A file name may hold line ends and escape sequences, which become `\\n` and `\\x1b`, and bytes
    that the file system's encoding can't decode, which are escaped too.
    """
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in str(text)
    )


def read_flags(
    flags: type[Options], argv: Sequence[str] | None, *, name: str, **how: Any
) -> Options:
    """Parse a command line into a dataclass of flags.

    Expands a `~` at the start of a path. A shell does so in `--workdir ~/run`, but not in
    `--workdir=~/run`.

    Args:
        flags: the dataclass.
        argv: the command line without the command itself; None is that of this process.
        name: name of the experiment.
        how: further arguments of `tyro.cli`.

    Raises:
        SystemExit: a flag is unknown or has the wrong type (status 2), or `--help` (status 0).
    """
    options = tyro.cli(flags, prog=f"python -m experiments.{name}", args=argv, **how)
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    for key, value in values.items():
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, PurePath):
                _check_place(key, path)
    expanded = {key: _with_home(value) for key, value in values.items()}
    return dataclasses.replace(options, **expanded)


def _check_place(name: str, path: PurePath) -> None:
    """Check that the packages for a bucket are there, and that no other address is taken for one.

    `Path("gs://bucket")` is a folder called `gs:`.
    """
    if buckets.is_bucket(str(path)):
        check_packages("gcs", "gcsfs", what=buckets.SCHEME)
    elif path.parts and re.fullmatch(r"[a-z0-9]+:", path.parts[0]):
        address = str(path).replace(":/", "://", 1)
        raise UsageError(f"--{name.replace('_', '-')} can't be {address}: {_WHERE}")


def _with_home(value: Any) -> Any:
    match value:
        case Path():
            return Path(os.path.expanduser(value))  # unchanged if there is no home
        case tuple():
            return tuple(map(_with_home, value))
    return value


def command_line(name: str, *arguments: object) -> str:
    """Return the command of an experiment, quoted to be pasted into a shell in any folder.

    Args:
        name: name of the experiment.
        arguments: flags and their values; paths become absolute.
    """
    written = [str(part.absolute() if isinstance(part, Path) else part) for part in arguments]
    return shlex.join([sys.executable or "python", "-m", f"experiments.{name}", *written])


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this project, quoted likewise."""
    project = f"{Path(__file__).absolute().parents[2]}[{extra}]"
    return shlex.join([sys.executable or "python", "-m", "pip", "install", "-e", project])


def check(options: Any, name: str, holds: bool, must_be: str) -> None:
    """Check that a condition on an option holds.

    Raises:
        UsageError: it does not hold.
    """
    if not holds:
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} must be {must_be}, but is {getattr(options, name)}")


def check_numbers(options: Any, *may_be_zero: str) -> None:
    """Check that integer options are at least 1, or 0 if named, and that floats are positive.

    Raises:
        UsageError: an option is out of bounds, infinite or NaN.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.type is int:
            lowest = 0 if field.name in may_be_zero else 1
            check(options, field.name, value >= lowest, f"at least {lowest}")
        if field.type is float:
            check(options, field.name, 0 < value < math.inf, "a positive number")


def check_seeds(seeds: Sequence[int], least: int = 1) -> None:
    """Check the list of `--seeds`.

    Raises:
        UsageError: there are too few seeds, one occurs twice, or one is out of bounds.
    """
    differ = len(set(seeds)) == len(seeds)
    if len(seeds) < least or not differ or not all(0 <= seed <= MAX_SEED for seed in seeds):
        given = " ".join(map(str, seeds)) or "empty"
        raise UsageError(
            f"--seeds must be at least {counted(least, 'number')} from 0 to {MAX_SEED}, no "
            f"duplicates, but is {given}"
        )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 epoch`, `2 epochs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_status(doing: str) -> None:
    """Print what the command does now, before a wait without output."""
    print(f"{doing} ...", file=sys.stderr, flush=True)


def check_fills_batch(batch_size: int, images: int) -> None:
    """Check that there are enough training images for a batch.

    Raises:
        UsageError: there are too few.
    """
    if batch_size > images:
        raise UsageError(
            f"--batch-size is {batch_size}, but there are only {counted(images, 'training image')}"
        )


def check_packages(extra: str, *packages: str, what: str = "this") -> None:
    """Check that optional packages are installed.

    Args:
        extra: the extra of this project that installs them.
        packages: their import names.
        what: what needs them, at the start of the message.

    Raises:
        UsageError: a package is missing.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{what} needs {' and '.join(missing)}: {install_command(extra)}")


def make_folder(path: Path, flag: str) -> Path:
    """Create the folder that a flag names, unless it exists.

    Raises:
        UsageError: the folder can't be created.
    """
    try:
        output_files.make_folder(path)
    except OSError as error:
        raise UsageError(f"--{flag} {path} can't be created ({error.strerror})") from error
    return path
