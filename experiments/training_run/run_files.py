"""The files that a run keeps in its workdir, beside Orbax's checkpoints.

A workdir may be untrusted, so only this module opens, reads, writes and replaces a run's files. It
follows no links: it writes a new file, which then replaces the old one, and changes only regular
files in place. The workdir itself may be a link, or lie in a bucket, where files are whole objects.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness import output_files
from experiments.harness.output_files import replacing
from lstm_flax import buckets, checkpoints
from lstm_flax.files import (
    MIB,
    open_regular_file,
    parse_json,
    read_regular_file,
    walk,
)

MAX_FILE_BYTES = 8 * MIB
"""Largest size of a file that is read; the line of an epoch takes 400 bytes."""


class RunFilesError(Exception):
    """The workdir can't be used; the message says why and what to do."""


def config_path(workdir: Path) -> Path:
    """Path of the resolved configuration."""
    return workdir / "config.json"


def metrics_path(workdir: Path) -> Path:
    """Path of the metrics, one line per epoch."""
    return workdir / "metrics.jsonl"


def eval_path(workdir: Path) -> Path:
    """Path of the latest evaluation."""
    return workdir / "eval.json"


def environment_path(workdir: Path) -> Path:
    """Path of the environments, one line per start of training."""
    return workdir / "environment.jsonl"


def tensorboard_path(workdir: Path) -> Path:
    """Path of the folder of TensorBoard's event files."""
    return workdir / "tensorboard"


def checkpoints_path(workdir: Path) -> Path:
    """Path of the folder of Orbax's checkpoints."""
    return workdir / "checkpoints"


def damaged_path(workdir: Path) -> Path:
    """Path of the folder that damaged checkpoints are moved to."""
    return workdir / "damaged"


def figures_path(workdir: Path) -> Path:
    """Path of the folder of figures about the run."""
    return workdir / "figures"


def report_path(workdir: Path) -> Path:
    """Path of the report about the run."""
    return workdir / "report.html"


def lock_path(workdir: Path) -> Path:
    """Path of the file that locks the workdir."""
    return workdir / ".lock"


PATHS = (
    config_path, metrics_path, eval_path, environment_path, tensorboard_path, checkpoints_path,
    damaged_path, figures_path, report_path, lock_path,
)  # fmt: skip
"""Everything that a run reads or writes."""


def check_workdir(workdir: Path) -> None:
    """Check that no path of a run leads outside of its workdir, before any of them is opened.

    Raises:
        RunFilesError: a path is a link, or is neither a file nor a folder.
    """
    if buckets.is_bucket(workdir):
        return  # it knows no links
    try:
        for path in PATHS:
            for _ in walk(path(workdir)):
                pass
    except OSError as error:
        raise RunFilesError(
            f"{error.filename} can't be used ({error.strerror}); a workdir may be a link, but "
            f"holds only files and folders"
        ) from error


def saved_steps(workdir: Path) -> list[int]:
    """Return the steps of complete checkpoints by their folders' names, the latest first."""
    return checkpoints.saved_steps(checkpoints_path(workdir))


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Return the configuration of the run in `workdir`, or None if there is none.

    Every command calls this first, so it checks the workdir too.

    Raises:
        RunFilesError: config.json exists but can't be read, or a path in the workdir leads
            elsewhere.
    """
    check_workdir(workdir)
    path = config_path(workdir)
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if buckets.is_bucket(path) and isinstance(error, OSError):
            raise RunFilesError(
                f"{path} can't be read ({error.strerror}); try again when the bucket can be reached"
            ) from error
        raise RunFilesError(
            f"{path} can't be read ({error}); move it away and pass the run's own flags"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        OSError: the file can't be read, or is not one that a run writes.
        ValueError: the file does not hold a JSON object.
    """
    values = parse_json(read_bytes(path))
    if not isinstance(values, dict):
        raise ValueError("it does not hold a JSON object")
    return values


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        OSError: the file can't be read, or is not one that a run writes; `strerror` says why.
    """
    return read_regular_file(path, MAX_FILE_BYTES)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file; at every moment the old or the new one is there and complete."""
    _replace(path, json.dumps(values, indent=2) + "\n")


def write_metrics(workdir: Path, records: list[dict[str, Any]]) -> None:
    """Write the metrics of all epochs so far, whatever the file held."""
    _write_lines(metrics_path(workdir), records)


def append_metrics(workdir: Path, records: list[dict[str, Any]]) -> None:
    """Append the metrics of the last of all epochs so far; in a bucket, write all of them."""
    path, record = metrics_path(workdir), records[-1]
    if buckets.is_bucket(path):
        write_metrics(workdir, records)
    elif is_primary_process():
        with writing(path), open_to_change(path, os.O_APPEND | os.O_CREAT) as file:
            file.write(json.dumps(record).encode() + b"\n")


def append_environment(workdir: Path, start: dict[str, Any]) -> None:
    """Append a start of training; damaged lines are dropped."""
    path, before = environment_path(workdir), b""
    with writing(path), contextlib.suppress(FileNotFoundError):
        before = read_bytes(path)  # what can't be read now is not written anew
    _write_lines(path, [*_parse_lines(before), start])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in a file, one per line; skips damaged lines; [] without a file."""
    with contextlib.suppress(OSError):
        return _parse_lines(read_bytes(path))
    return []


def _parse_lines(content: bytes) -> list[dict[str, Any]]:
    objects = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            objects.append(parse_json(line))
    return [entry for entry in objects if isinstance(entry, dict)]


def quarantine(workdir: Path, steps: list[int]) -> Path:
    """Move damaged checkpoints out of the way, and return the folder that now holds them.

    Raises:
        RunFilesError: a checkpoint can't be moved.
    """
    folder = damaged_path(workdir)
    if is_primary_process():
        move = buckets.move if buckets.is_bucket(folder) else os.rename
        with writing(folder):
            output_files.make_folder(folder)
        for step in steps:
            numbers = itertools.count(1)
            target = folder / str(step)
            while output_files.exists(target):
                target = folder / f"{step}-{next(numbers)}"
            path = checkpoints_path(workdir) / str(step)
            with writing(path, "moved away, though it is damaged"):
                move(path, target)
    multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
    return folder


def is_primary_process() -> bool:
    """Whether this process writes files: of all that train together, only the first does."""
    return jax.process_index() == 0


def params_sha256(params: Any) -> str:
    """Return the SHA-256 of all parameters: name, shape, dtype and bytes, sorted by name."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for name in sorted(named):
        array = np.asarray(named[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def open_to_change(path: Path, flags: int = 0) -> IO[bytes]:
    """Open an existing file for reading and writing.

    Args:
        path: path of the file.
        flags: further flags, such as `os.O_CREAT`.

    Raises:
        OSError: the file can't be opened, is a link, or is not a regular file.
    """
    return open(open_regular_file(path, os.O_RDWR | flags), "r+b")


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    _replace(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def _replace(path: Path, text: str) -> None:
    if is_primary_process():
        with writing(path), replacing(path) as new:
            new.write_text(text)


@contextlib.contextmanager
def writing(path: Path, done: str = "written") -> Iterator[None]:
    """Turn an OSError into a RunFilesError that names the path."""
    try:
        yield
    except OSError as error:
        raise RunFilesError(f"{path} can't be {done} ({error.strerror})") from error
