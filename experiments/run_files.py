"""The files that a run keeps in its workdir, beside Orbax's checkpoints."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

MOST_BYTES = 8 * 2**20
"""Of a file that is read; a line an epoch takes 400 bytes."""


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


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are whole, by their folders' names; the latest first."""
    with contextlib.suppress(OSError):
        names = [path.name for path in checkpoints_path(workdir).iterdir()]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    return []


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Return the configuration of the run in `workdir`, or None where there is none.

    Raises:
        RunFilesError: config.json is there and can't be read.
    """
    path = config_path(workdir)
    try:
        values = json.loads(_read_text(path))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:  # the last: too deep
        raise RunFilesError(
            f"{path} can't be read ({error}); move it away and give the run's own flags"
        ) from error


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
        with writing(path), path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def append_environment(workdir: Path, start: dict[str, Any]) -> None:
    """Add where training starts, with what and on what; what is damaged in the file is left out."""
    path = environment_path(workdir)
    _write_lines(path, [*read_lines(path), start])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line, but for lines that are damaged; [] without it."""
    objects = []
    with contextlib.suppress(OSError):
        for line in _read_text(path, errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                objects.append(json.loads(line))
    return [entry for entry in objects if isinstance(entry, dict)]


def set_aside(workdir: Path, steps: list[int]) -> Path:
    """Move damaged checkpoints out of the way, and return the folder where they are now.

    Raises:
        RunFilesError: one can't be moved.
    """
    folder = workdir / "damaged"
    if is_writer():
        with writing(folder):
            folder.mkdir(exist_ok=True)
        for step in steps:
            numbers = itertools.count(1)
            target = folder / str(step)
            while target.exists():
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
        file = (workdir / ".lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunFilesError(
                f"--workdir {workdir} is in use by another run ({file.read()}); "
                f"wait for it, stop it, or give another --workdir"
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        with writing(workdir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
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


def _read_text(path: Path, errors: str = "strict") -> str:
    """Read a file that may be anybody's: a pipe might never begin, nor a device end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        raise OSError(errno.EINVAL, f"it is no file of at most {MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8", errors=errors)


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    _replace(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def _replace(path: Path, text: str) -> None:
    if not is_writer():
        return
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(text)
        os.replace(partial, path)


@contextlib.contextmanager
def writing(path: Path, done: str = "written") -> Iterator[None]:
    """Turn what the operating system objects to into a RunFilesError that names the path."""
    try:
        yield
    except OSError as error:
        raise RunFilesError(f"{path} can't be {done} ({error.strerror})") from error
