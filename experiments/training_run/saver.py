"""Save a run in its workdir and, while that fails, in its rescue folder, so that training goes on.

A workdir may fill up, turn read-only or lose its mount for a while. The run then keeps its last
state in the rescue folder, tries the workdir again at each save, and brings everything back once
that works. A run that ends before finds the state again at its next start.
"""

import contextlib
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from experiments.training_run import lock, run_files
from experiments.training_run.config import Config, hyperparameters
from experiments.training_run.console import note, warn
from experiments.training_run.lock import NO_LOCK, Lock, LostError
from experiments.training_run.loop_state import LoopState, restore_newest, save
from experiments.training_run.rescue import FAILURES, Rescue
from experiments.training_run.run_files import RunFilesError
from lstm_flax import checkpoints
from lstm_flax.checkpoints import CheckpointError


class Saver:
    """Saves a run in its workdir, or in its rescue folder while the workdir can't be written.

    With several processes, a failure is raised instead: all of them save together, but not all may
    see it fail.
    """

    def __init__(self, config: Config):
        self.config = config
        self.failure: Exception | None = None
        """Why the workdir can't be written now; None while it can."""
        self._rescue = Rescue(config)
        self._is_told = self._is_loss_told = False
        self._lock, self._open = contextlib.ExitStack(), contextlib.ExitStack()
        self._held: Lock = NO_LOCK
        self.manager: ocp.CheckpointManager

    def resume(self, fresh: LoopState) -> LoopState:
        """Return the newest state of the run, or `fresh` without any.

        A state in the rescue folder that is newer than the workdir's is first brought back to it.

        Raises:
            CheckpointError: all checkpoints in the workdir are damaged, or they are another run's.
            UsageError: the rescued run was saved for more epochs than `--epochs`.
        """
        config = self.config
        loop_state = restore_newest(config, config.workdir, self.manager, fresh)
        rescued = self._rescue.restore_newer(loop_state.step, fresh)
        if rescued is None:
            return loop_state
        note(f"the state of step {rescued.step} was kept in {self._rescue.folder}")
        self._try_again(rescued)
        return rescued

    def append_metrics(self, loop_state: LoopState) -> None:
        """Append the metrics of the epoch that ended."""
        if not self.failure:
            with self._noting_failure():
                self._check_folder()
                run_files.append_metrics(self.config.workdir, loop_state.records)

    def save(self, loop_state: LoopState) -> bool:
        """Start to save the state of the loop; after a failure, save it before this returns.

        A failure shows at the next save, because Orbax writes while training goes on.

        Returns:
            Whether the workdir can be written again, after a failure.
        """
        if not self.failure:
            with self._noting_failure():
                self._check_folder()
                save(self.manager, self.config, loop_state)
        return self.failure is not None and self._try_again(loop_state)

    def finish(self, loop_state: LoopState) -> None:
        """Wait until the state that was saved last is on a disk.

        Afterwards `failure` tells whether that is the workdir's.

        Raises:
            CheckpointError: it could be saved neither in the workdir nor in the rescue folder.
        """
        if not self.failure:
            with self._noting_failure():
                checkpoints.wait(self.manager)
                self._check_folder()
            if self.failure:  # the caller tells what follows from it
                self._try_again(loop_state, is_last=True)
        if self.failure and self.rescued_step != loop_state.step:
            raise CheckpointError(
                f"{self.failure}; {self._rescue.failure}; the state of step {loop_state.step} is "
                f"lost, and the same command resumes from the last save"
            )

    @property
    def rescued_step(self) -> int | None:
        """The step that the rescue folder keeps."""
        return self._rescue.step

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            with run_files.writing(self.config.workdir):
                yield
        except FAILURES as error:
            if jax.process_count() > 1 or isinstance(error, LostError):
                raise
            self.failure = error

    def _try_again(self, loop_state: LoopState, is_last: bool = False) -> bool:
        """Save in the workdir what is missing there or, if that fails, keep the state elsewhere.

        Returns:
            Whether the workdir holds it now.
        """
        cause = self.failure
        try:
            with run_files.writing(self.config.workdir):
                self._reopen()
                self._bring_back(loop_state)
        except LostError:
            raise
        except FAILURES as error:
            self.failure = error
            is_kept = self._rescue.keep(loop_state)
            if not is_last:
                self._tell(is_kept)
            return False
        self._rescue.remove()
        if self._is_told or cause is None:
            note(f"saved step {loop_state.step} in {self.config.workdir} again")
        else:
            warn(f"{cause}; the next try, at step {loop_state.step}, worked")
        self.failure, self._is_told, self._is_loss_told = None, False, False
        return True

    def _bring_back(self, loop_state: LoopState) -> None:
        workdir, config = self.config.workdir, self.config
        # First, because of a save that can't begin Orbax keeps the arrays for ten minutes.
        run_files.write_json(run_files.config_path(workdir), hyperparameters(config))
        run_files.write_metrics(workdir, loop_state.records)
        if config.validation_size:  # an epoch's state may be the result, though not the last
            for earlier in self._rescue.restore_between(self.manager.latest_step(), loop_state):
                save(self.manager, config, earlier)
        if self.manager.latest_step() != loop_state.step:
            save(self.manager, config, loop_state)
        checkpoints.wait(self.manager)
        self._check_folder()

    def _tell(self, is_kept: bool) -> None:
        """Warn once that the workdir can't be written, and once if nothing can."""
        if not is_kept and not self._is_loss_told:
            warn(
                f"{self.failure}; {self._rescue.failure}; training goes on and tries again at each "
                f"save, but the state is lost if the run ends before; a restart with another "
                f"--rescue-dir helps"
            )
        elif not self._is_told:
            warn(
                f"{self.failure}; training goes on and tries again at each save; meanwhile the "
                f"last state is kept in {self._rescue.folder}"
            )
        self._is_told, self._is_loss_told = True, not is_kept

    def start(self) -> None:
        """Lock the workdir and open its checkpoints.

        Raises:
            RunFilesError: another run has the workdir, or it can't be written.
            CheckpointError: its checkpoints can't be opened.
        """
        workdir = self.config.workdir
        with run_files.writing(workdir):
            self._held = self._lock.enter_context(lock.hold(workdir))
        self._open_checkpoints()

    def _open_checkpoints(self) -> None:
        path = run_files.checkpoints_path(self.config.workdir)
        self.manager = self._open.enter_context(checkpoints.open_checkpoints(path))
        self._open.callback(self._settle)  # before it closes

    def _settle(self) -> None:
        """Wait for the last save; its failure was told, and would keep Orbax from closing."""
        with contextlib.suppress(*FAILURES):
            checkpoints.wait(self.manager)

    def _reopen(self) -> None:
        """Open the checkpoints anew, and lock the workdir if it was mounted anew.

        After a failed save, Orbax's manager has forgotten checkpoints that it meant to replace, and
        leaves a half-written one on the full disk. Opening corrects both.
        """
        self._close_checkpoints()
        try:
            self._held.check()
        except LostError:
            raise
        except RunFilesError:
            self._check_config()
            with contextlib.suppress(OSError):  # of a mount that is gone
                self._lock.close()
            self.start()
        else:
            self._open_checkpoints()

    def _check_folder(self) -> None:
        """Check that the workdir is still the folder that this run locked.

        Where a mount was taken away there may be an empty folder, and writing there would hide the
        run under the mount that comes back.

        Raises:
            LostError: another run has taken over the workdir.
            RunFilesError: it is another folder, or can't be read.
        """
        try:
            self._held.check()
        except LostError:
            raise
        except RunFilesError:
            if jax.process_count() == 1:
                self._check_config()
                raise

    def _check_config(self) -> None:
        """Check that the folder in the workdir's place holds this run.

        Raises:
            RunFilesError: it does not, or can't be read.
        """
        workdir = self.config.workdir
        try:
            stored = run_files.read_json(run_files.config_path(workdir))
        except FileNotFoundError as error:
            raise RunFilesError(
                f"{workdir} does not hold the run any more, perhaps because its mount is gone"
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunFilesError(f"{workdir} can't be read ({reason})") from error
        if stored != hyperparameters(self.config):
            raise RunFilesError(f"{workdir} holds another run now")
        run_files.check_workdir(workdir)

    def _close_checkpoints(self) -> None:
        with contextlib.suppress(*FAILURES):
            self._open.close()

    def close(self) -> None:
        """Close what is open."""
        self._close_checkpoints()
        for held in (self._lock, self._rescue):
            with contextlib.suppress(OSError):
                held.close()


@contextlib.contextmanager
def open_saver(config: Config) -> Iterator[Saver]:
    """Lock the workdir and open its checkpoints, until the body ends.

    Raises:
        RunFilesError: another run has the workdir, or it can't be written.
        CheckpointError: its checkpoints can't be opened.
    """
    saver = Saver(config)
    try:
        saver.start()
        yield saver
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            saver.close()
        raise
    saver.close()
