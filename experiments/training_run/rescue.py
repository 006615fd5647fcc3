"""The rescue folder: where a run keeps its last state while its workdir can't be written.

The rescue folder is laid out as a workdir. Its name depends on the workdir's path and on the
hyperparameters, so another run never takes it for its own. It may lie in a folder that all users
share, so it is used only if this user owns it and nobody else can open it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from experiments.training_run import lock, run_files
from experiments.training_run.config import Config, hyperparameters
from experiments.training_run.console import warn
from experiments.training_run.loop_state import (
    LoopState,
    check_epochs,
    restore_newest,
    restore_step,
    save,
)
from experiments.training_run.run_files import RunFilesError
from lstm_flax import buckets, checkpoints
from lstm_flax.checkpoints import CheckpointError

FAILURES = (CheckpointError, RunFilesError, OSError)
"""What a save fails with while its folder can't be written."""


class Rescue:
    """The rescue folder of a run; it is made when it is needed."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = rescue_folder(config)
        self.step: int | None = None
        """The step that is kept."""
        self.failure: Exception | None = None
        """Why the last state could not be kept."""
        self._lock = contextlib.ExitStack()
        self._is_locked = False

    def keep(self, loop_state: LoopState) -> bool:
        """Save a state in place of the one before; return whether that worked."""
        if self.step == loop_state.step:
            return True
        try:
            with run_files.writing(self.folder), self._open() as manager:
                stale = [step for step in manager.all_steps() if step >= loop_state.step]
                if stale:  # they could not be restored
                    run_files.quarantine(self.folder, stale)
                    manager.reload()
                save(manager, self.config, loop_state)
                checkpoints.wait(manager)
        except FAILURES as error:
            self.failure = error
            if newest_step(self.config) is None:
                self.remove()  # what was half-written
            return False
        self.step = loop_state.step
        return True

    def restore_newer(self, step: int, fresh: LoopState) -> LoopState | None:
        """Return the newest state that is kept, if it is of a later step; else forget it.

        Raises:
            UsageError: it was saved for more epochs than `--epochs`.
            RunFilesError: another process is using the folder.
        """
        if jax.process_count() > 1:
            return None
        try:
            check_private(self.folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            warn(f"{self.folder} can't be used to keep the state ({error.strerror})")
            return None
        newest = newest_step(self.config)
        if newest is None:
            return None
        if newest <= step:
            with self._open():
                self.remove()
            return None
        check_epochs(self.config, self.folder)
        with self._open() as manager:
            try:
                kept = restore_newest(self.config, self.folder, manager, fresh)
            except CheckpointError as error:
                warn(f"{error}; going on from step {step} of {self.config.workdir}")
                return None
        self.step = kept.step
        return kept if kept.step > step else None

    def restore_between(self, step: int | None, like: LoopState) -> Iterator[LoopState]:
        """Yield the intact states that are later than a step and earlier than `like`, in order."""
        if self.step is None:
            return
        with self._open() as manager:
            for kept in sorted(manager.all_steps()):
                if (step or 0) < kept < like.step:
                    with contextlib.suppress(checkpoints.DamagedError):
                        yield restore_step(manager, like, kept)

    def remove(self) -> None:
        """Remove the folder, because the workdir holds all of it."""
        if self._is_locked:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let other processes use the folder."""
        self.step, self._is_locked = None, False
        self._lock.close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[ocp.CheckpointManager]:
        """Open the folder's checkpoints; from the first time on it is locked, until `close`."""
        with run_files.writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            check_private(self.folder)
            if not self._is_locked:
                self._lock.enter_context(lock.hold(self.folder))
                self._is_locked = True
        path = run_files.checkpoints_path(self.folder)
        with checkpoints.open_checkpoints(path, keep=1) as manager:
            yield manager


def rescue_folder(config: Config) -> Path:
    """Path of the rescue folder of a run."""
    of_the_run = hyperparameters(config) | {"epochs": None}  # which may grow
    workdir = os.fspath(config.workdir)
    where = workdir if buckets.is_bucket(workdir) else os.path.abspath(workdir)
    identity = json.dumps([where, of_the_run], sort_keys=True)
    name = f"lstm_flax_{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    return (config.rescue_dir or Path(tempfile.gettempdir())) / name


def newest_step(config: Config) -> int | None:
    """Return the newest step in a run's rescue folder; None without any, or if it isn't private."""
    folder = rescue_folder(config)
    with contextlib.suppress(OSError):
        check_private(folder)
        return next(iter(run_files.saved_steps(folder)), None)
    return None


def hint(config: Config, step: int | None) -> str:
    """Return where the last state is while the workdir can't be written, and what to do."""
    return (
        f"the last state, of step {step}, is kept in {rescue_folder(config)}: make "
        f"{config.workdir} writable again and run the same command"
    )


def check_private(folder: Path) -> None:
    """Check that a folder is this user's and that nobody else can open it.

    Raises:
        OSError: it is missing, a link, no folder, another user's, or open to others.
    """
    status = os.lstat(folder)
    for holds, reason in (
        (not stat.S_ISLNK(status.st_mode), "it is a link"),
        (stat.S_ISDIR(status.st_mode), "it is not a folder"),
        (status.st_uid == os.geteuid(), "it is another user's"),
        (not status.st_mode & 0o077, "other users can open it"),
    ):
        if not holds:
            raise PermissionError(None, reason, os.fspath(folder))
