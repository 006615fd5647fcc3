"""Keep two runs from training in one workdir at the same time.

On a disk the kernel holds the lock, and frees it when the process dies. A bucket has no locks.
There an object is the lock: a run makes it if there is none, and writes it anew every minute. A
run that finds it unchanged for five minutes takes it over. TensorStore writes the object on the
condition that it is still the one that was read, so that only one of several runs succeeds.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import tensorstore as ts

from experiments.harness import output_files
from experiments.training_run import run_files
from experiments.training_run.run_files import RunFilesError, lock_path
from lstm_flax import buckets
from lstm_flax.files import parse_json

MAX_OWNER_BYTES = 200
"""Bytes that are shown of who holds a lock on a disk."""

RENEW_SECONDS = 60
"""How often a run writes its lock in a bucket anew."""

SILENT_SECONDS = 300
"""How old a lock in a bucket is when its run counts as dead."""


class LostError(RunFilesError):
    """Another run has taken over the workdir."""


class Lock(Protocol):
    """A lock that is held."""

    def check(self) -> None:
        """Check that it is still held, before the run writes anything.

        Raises:
            LostError: another run has taken it over.
            RunFilesError: its file is not in the workdir any more, perhaps because a mount is gone.
        """


class _Free:
    """Stands for the lock of a process that writes nothing."""

    def check(self) -> None:
        """Do nothing."""


NO_LOCK = _Free()
"""The lock of a run that is only read."""


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[Lock]:
    """Make the workdir, and keep other runs out of it.

    Raises:
        RunFilesError: a live run has it, or it can't be written.
    """
    if not run_files.is_primary_process():
        yield NO_LOCK
        return
    with run_files.writing(workdir):
        output_files.make_folder(workdir)
    with _lease(workdir) if buckets.is_bucket(workdir) else _flock(workdir) as lock:
        yield lock


@contextlib.contextmanager
def _flock(workdir: Path) -> Iterator[Lock]:
    with run_files.writing(lock_path(workdir)):
        file = run_files.open_to_change(lock_path(workdir), os.O_CREAT)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = file.read(MAX_OWNER_BYTES).decode(errors="replace")
            raise _in_use(workdir, owner) from error
        except OSError:
            pass  # some network file systems have no locks
        with run_files.writing(workdir):
            file.truncate(0)
            file.write(_name(_this_process()).encode())
            file.flush()
        yield _Flock(workdir, os.fstat(file.fileno()))


class _Flock:
    """A lock on a disk, which the kernel holds."""

    def __init__(self, workdir: Path, status: os.stat_result):
        self._workdir, self._status = workdir, status

    def check(self) -> None:
        """Check that the locked file is the one in the workdir."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(lock_path(self._workdir)), self._status):
                return
        raise RunFilesError(f"{self._workdir} was mounted anew, or its mount is gone")


class _Lease:
    """A lock in a bucket, held by a thread that writes it anew until `release`."""

    def __init__(self, workdir: Path):
        """Take the lock.

        Raises:
            RunFilesError: a live run has it, or it can't be written.
        """
        self._workdir, self._path = workdir, lock_path(workdir)
        self._content = json.dumps(_this_process()).encode()
        self._store = _open(workdir)
        self._generation = self._take()
        self._taken_by: str | None = None
        self._released = threading.Event()
        threading.Thread(target=self._keep, daemon=True, name="lock").start()

    def check(self) -> None:
        """Check that no other run has taken it over."""
        if self._taken_by is not None:
            raise LostError(
                f"another run ({self._taken_by}) has taken over {self._workdir}, because this one "
                f"gave no sign of life for {SILENT_SECONDS // 60} minutes; nothing more is written"
            )

    def release(self) -> None:
        """Remove the lock, if it is still this run's."""
        self._released.set()
        with contextlib.suppress(OSError):
            self._write(None, self._generation)

    def _take(self) -> bytes:
        there = self._read()
        if there.state == "value" and self._is_alive(there.value):
            owner = _owner(there.value)
            raise _in_use(
                self._workdir,
                f"{_name(owner)}, which last wrote its lock {self._age():.0f} seconds ago; a run "
                f"that has died loses it after {SILENT_SECONDS} seconds",
            )
        generation = self._write(self._content, there.stamp.generation)
        # A server that knows no conditions lets two runs write it at once: the last one has it.
        now = self._read()
        if generation is None or now.value != self._content:
            raise _in_use(self._workdir, _name(_owner(now.value)))
        return generation

    def _is_alive(self, content: bytes) -> bool:
        owner, here = _owner(content), _this_process()
        is_here = all(owner.get(key) == here[key] for key in ("host", "boot"))
        if is_here and not os.path.exists(f"/proc/{owner.get('pid')}"):
            return False  # no need to wait
        return self._age() < SILENT_SECONDS

    def _age(self) -> float:
        with run_files.writing(self._path, "looked at"):
            return max(0.0, time.time() - buckets.last_changed(self._path))

    def _keep(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # an outage: the next try may succeed
                generation = self._write(self._content, self._generation)
                if generation is None:
                    self._taken_by = _name(_owner(self._read().value))
                    return
                self._generation = generation

    def _read(self) -> Any:
        with run_files.writing(self._path, "read"):
            return _result(self._store.read(self._path.name))

    def _write(self, content: bytes | None, generation: bytes) -> bytes | None:
        """Write or remove the object, if it is of a generation; return the new one, or None."""
        name = self._path.name
        with run_files.writing(self._path):
            try:
                written = _result(self._store.write(name, content, if_equal=generation))
            except ValueError:  # some emulators name no generations
                written = _result(self._store.write(name, content))
        return written.generation or None


@contextlib.contextmanager
def _lease(workdir: Path) -> Iterator[Lock]:
    lease = _Lease(workdir)
    try:
        yield lease
    finally:
        lease.release()


def _open(workdir: Path) -> ts.KvStore:
    retries = {"gcs_request_retries": {"max_retries": 5}}  # half a minute
    return ts.KvStore.open(f"{workdir}/", context=ts.Context(retries)).result()


def _result(future: Any) -> Any:
    """Wait for TensorStore; an error of the service becomes an OSError in one line."""
    try:
        return future.result()
    except Exception as error:
        if "StorageGeneration" in str(error):
            raise
        raise OSError(errno.EIO, buckets.reason(error)) from error


def _in_use(workdir: Path, owner: str) -> RunFilesError:
    return RunFilesError(
        f"--workdir {workdir} is in use by another run ({owner}); "
        f"wait for it, stop it, or give another --workdir"
    )


def _this_process() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else None,
    }


def _owner(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        owner = parse_json(content)
        if isinstance(owner, dict):
            return owner
    return {}


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}"[:MAX_OWNER_BYTES]
