"""The files that a run keeps in its workdir, beside Orbax's checkpoints.

A workdir may be anybody's, so a run's files are opened, read, written and replaced here alone. No
link is followed: a file is written as a new one, which then takes the old one's place, and what is
opened to be changed is a regular file. The workdir itself may be a link.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.output_files import replacing
from lstm_flax.files import (
    MIB,
    open_regular_file,
    parse_json,
    read_regular_file,
    walk,
)

MOST_BYTES = 8 * MIB
"""Of a file that is read; a line an epoch takes 400 bytes."""

LONGEST_OWNER = 200
"""Bytes that are shown of who holds a lock."""


class RunFilesError(Exception):
    """A workdir can't be used; the message says why and what to do."""


def config_path(workdir: Path) -> Path:
    """The resolved configuration."""
    return workdir / "config.json"


def metrics_path(workdir: Path) -> Path:
    """A line an epoch."""
    return workdir / "metrics.jsonl"


def eval_path(workdir: Path) -> Path:
    """The latest evaluation."""
    return workdir / "eval.json"


def environment_path(workdir: Path) -> Path:
    """A line each time that training started."""
    return workdir / "environment.jsonl"


def tensorboard_path(workdir: Path) -> Path:
    """The folder of TensorBoard's event files."""
    return workdir / "tensorboard"


def checkpoints_path(workdir: Path) -> Path:
    """Orbax's folder."""
    return workdir / "checkpoints"


def damaged_path(workdir: Path) -> Path:
    """The folder of damaged checkpoints that were moved away."""
    return workdir / "damaged"


def figures_path(workdir: Path) -> Path:
    """The folder of the figures that are drawn of the run."""
    return workdir / "figures"


def report_path(workdir: Path) -> Path:
    """The page that reports the run."""
    return workdir / "report.html"


def lock_path(workdir: Path) -> Path:
    """The file by which a run keeps others out."""
    return workdir / ".lock"


PATHS = (
    config_path, metrics_path, eval_path, environment_path, tensorboard_path, checkpoints_path,
    damaged_path, figures_path, report_path, lock_path,
)  # fmt: skip
"""All that a run reads or writes."""


def check_workdir(workdir: Path) -> None:
    """Check, before anything in it is opened, that nothing of a run lies outside its workdir.

    Raises:
        RunFilesError: a file or a folder is a link, or something else than a file and a folder.
    """
    try:
        for path in PATHS:
            for _ in walk(path(workdir)):
                pass
    except OSError as error:
        raise RunFilesError(
            f"{error.filename} can't be used ({error.strerror}); a run's folder may be a link, but "
            f"holds only files and folders"
        ) from error


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are whole, by their folders' names; the latest first."""
    with contextlib.suppress(OSError):
        names = [path.name for path in checkpoints_path(workdir).iterdir()]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    return []


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Return the configuration of the run in `workdir`, or None where there is none.

    Every command reads it before all else, so it checks the workdir too.

    Raises:
        RunFilesError: config.json is there and can't be read, or something in the workdir leads
            elsewhere.
    """
    check_workdir(workdir)
    path = config_path(workdir)
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFilesError(
            f"{path} can't be read ({error}); move it away and give the run's own flags"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        OSError: the file can't be read, or is none that a run writes.
        ValueError: it holds no JSON object.
    """
    values = parse_json(read_bytes(path))
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        OSError: it can't be read, or is none that a run writes; `strerror` says why.
    """
    return read_regular_file(path, MOST_BYTES)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file so that at every moment the old or the new one is there, whole."""
    _replace(path, json.dumps(values, indent=2) + "\n")


def write_metrics(workdir: Path, records: list[dict[str, Any]]) -> None:
    """Bring the metrics to where a run resumes, whatever the file held."""
    _write_lines(metrics_path(workdir), records)


def append_metrics(workdir: Path, record: dict[str, Any]) -> None:
    """Add an epoch's metrics."""
    path = metrics_path(workdir)
    if is_writer():
        with writing(path), open_to_change(path, os.O_APPEND | os.O_CREAT) as file:
            file.write(json.dumps(record).encode() + b"\n")


def append_environment(workdir: Path, start: dict[str, Any]) -> None:
    """Add where training starts, with what and on what; what is damaged in the file is left out."""
    path = environment_path(workdir)
    _write_lines(path, [*read_lines(path), start])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line, but for lines that are damaged; [] without it."""
    objects = []
    with contextlib.suppress(OSError):
        for line in read_bytes(path).splitlines():
            with contextlib.suppress(ValueError):
                objects.append(parse_json(line))
    return [entry for entry in objects if isinstance(entry, dict)]


def set_aside(workdir: Path, steps: list[int]) -> Path:
    """Move damaged checkpoints out of the way, and return the folder where they are now.

    Raises:
        RunFilesError: one can't be moved.
    """
    folder = damaged_path(workdir)
    if is_writer():
        with writing(folder):
            folder.mkdir(exist_ok=True)
        for step in steps:
            numbers = itertools.count(1)
            target = folder / str(step)
            while os.path.lexists(target):
                target = folder / f"{step}-{next(numbers)}"
            path = checkpoints_path(workdir) / str(step)
            with writing(path, "moved away, though it is damaged"):
                path.rename(target)
    multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
    return folder


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Make the workdir, and keep other runs out of it; the kernel frees a dead run's lock.

    Raises:
        RunFilesError: a live run has it, or it can't be written.
    """
    if not is_writer():
        yield
        return
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with writing(lock_path(workdir)):
        file = open_to_change(lock_path(workdir), os.O_CREAT)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = file.read(LONGEST_OWNER).decode(errors="replace")
            raise RunFilesError(
                f"--workdir {workdir} is in use by another run ({owner}); "
                f"wait for it, stop it, or give another --workdir"
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        with writing(workdir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        yield


def is_writer() -> bool:
    """Whether this process is the one, of all that train together, that writes files."""
    return jax.process_index() == 0


def params_sha256(params: Any) -> str:
    """SHA-256 over each parameter's name, shape, dtype and bytes, in the order of the names."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for name in sorted(named):
        array = np.asarray(named[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def open_to_change(path: Path, flags: int = 0) -> IO[bytes]:
    """Open a file in its place, to be read and written.

    Args:
        path: of the file.
        flags: as `os.O_CREAT`.

    Raises:
        OSError: it can't be opened, or is a link or no regular file.
    """
    return open(open_regular_file(path, os.O_RDWR | flags), "r+b")


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    _replace(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def _replace(path: Path, text: str) -> None:
    if is_writer():
        with writing(path), replacing(path) as new:
            new.write_text(text)


@contextlib.contextmanager
def writing(path: Path, done: str = "written") -> Iterator[None]:
    """Turn what the operating system objects to into a RunFilesError that names the path."""
    try:
        yield
    except OSError as error:
        raise RunFilesError(f"{path} can't be {done} ({error.strerror})") from error
