"""The progress of a run: saved as a checkpoint, and resumed from it."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from experiments.harness.usage import UsageError
from experiments.training_run import run_files
from experiments.training_run.config import MAX_EPOCHS, Config, config_diff, hyperparameters
from experiments.training_run.console import warn
from lstm_flax import checkpoints, training
from lstm_flax.training import Batch, Keys, Metrics


class RunContext(NamedTuple):
    """What a run uses from start to end."""

    config: Config
    datasets: dict[str, Batch]  # "train", "test" and, where images are held out, "validation"
    keys: Keys


class LoopState(NamedTuple):
    """How far a run is; with the `RunContext`, it determines everything that follows."""

    state: TrainState
    metrics: Metrics  # of the epoch so far
    records: list[dict[str, Any]]  # the line of metrics.jsonl for each finished epoch
    training_seconds: float = 0.0  # of the epoch so far

    @classmethod
    def at_start(cls, state: TrainState) -> "LoopState":
        """Return the state of a run that has taken no step."""
        return cls.at_start_of_epoch(state, [])

    @classmethod
    def at_start_of_epoch(cls, state: TrainState, records: list[dict[str, Any]]) -> "LoopState":
        """Return the state of a run between two epochs."""
        return cls(state, training.replicate(Metrics.empty()), records)

    @property
    def tree(self) -> dict[str, Any]:
        """The arrays, as a checkpoint holds them."""
        return {"state": self.state, "metrics": self.metrics}

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return int(self.state.step)

    @property
    def epochs(self) -> int:
        """Number of finished epochs."""
        return len(self.records)

    @property
    def images(self) -> int:
        """Number of images trained on in the epoch so far."""
        return int(self.metrics.count)

    @property
    def loss(self) -> float:
        """Mean training loss over the epoch so far."""
        return float(self.metrics.loss)


class CheckpointMetadata(NamedTuple):
    """What a checkpoint holds beside its arrays."""

    config: dict[str, Any]  # of the run
    records: list[dict[str, Any]]
    training_seconds: float

    @classmethod
    def parse(cls, step: int, metadata: dict[str, Any]) -> "CheckpointMetadata":
        """Check and return the metadata of the checkpoint of a step, which may be untrusted.

        Raises:
            DamagedError: no run writes such metadata.
        """
        try:
            saved = cls(**metadata)
            is_ours = (
                _is_number(saved.config["epochs"], 1, MAX_EPOCHS)
                and _is_number(saved.training_seconds)
                and all(_is_record(n, record) for n, record in enumerate(saved.records, 1))
            )
        except (TypeError, KeyError, AttributeError):
            is_ours = False
        if not is_ours:
            raise checkpoints.DamagedError(f"step {step}: its metadata are not those of a run")
        return saved


def _is_record(epoch: int, record: dict[str, Any]) -> bool:
    """Whether a record can be that of an epoch; its metrics are numbers, perhaps infinite."""
    metrics = [value for name, value in record.items() if name not in ("dataset", "device")]
    return (
        all(isinstance(value, int | float) for value in metrics)
        and record["epoch"] == epoch <= MAX_EPOCHS
        and _is_number(record["step"])
        and _is_number(record["seconds"])
    )


def _is_number(value: Any, low: float = 0, high: float = 1e12) -> bool:
    return type(value) in (int, float) and low <= value <= high


def check_epochs(config: Config, folder: Path) -> None:
    """Check that the run in the workdir, if there is one, has no more epochs than `--epochs`.

    Args:
        config: the flags.
        folder: the workdir, or the rescue folder.

    Raises:
        UsageError: the run was saved for more epochs, or has trained more.
    """
    directory = run_files.checkpoints_path(folder)
    planned, done = 0, len(run_files.read_lines(run_files.metrics_path(folder)))
    for step in run_files.saved_steps(folder):
        with contextlib.suppress(checkpoints.DamagedError):  # restoring reports it
            saved = CheckpointMetadata.parse(
                step, checkpoints.read_description(directory, step)["about"]
            )
            planned = max(planned, saved.config["epochs"])
            done = max(done, len(saved.records))
    if config.epochs < max(planned, done):
        raise UsageError(
            f"--epochs is {config.epochs}, but the run in {folder} has trained {done} of "
            f"{max(planned, done)}; its epochs may only grow: leave --epochs out, or give another "
            f"--workdir"
        )


def restore_newest(
    config: Config, folder: Path, manager: ocp.CheckpointManager, fresh: LoopState
) -> LoopState:
    """The state of the newest checkpoint that is intact, or `fresh` where there is none at all.

    Newer ones that are damaged are moved out of the way, and that is said.

    Args:
        config: the flags of the run.
        folder: the workdir, or the rescue folder.
        manager: of the checkpoints in that folder.
        fresh: the state before the first step.

    Raises:
        CheckpointError: all checkpoints are damaged, or they are another run's.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps:
        return fresh
    restored, damages = checkpoints.restore_first(manager, fresh.tree, steps)
    saved = CheckpointMetadata.parse(restored.step, restored.metadata)
    if differing := config_diff(config, saved.config):
        raise checkpoints.CheckpointError(
            f"the checkpoints in {manager.directory} are another run's: {'; '.join(differing)}"
        )
    if damages:
        damaged = [step for step in steps if step > restored.step]
        moved_to = run_files.quarantine(folder, damaged)
        manager.reload()
        warn(f"moved damaged checkpoints to {moved_to} ({'; '.join(map(str, damages))})")
    return _as_loop_state(restored)


def restore_step(manager: ocp.CheckpointManager, like: LoopState, step: int) -> LoopState:
    """Restore the state of a step.

    Raises:
        DamagedError: the checkpoint is not as it was saved.
    """
    return _as_loop_state(checkpoints.restore(manager, like.tree, step))


def _as_loop_state(restored: checkpoints.Restored) -> LoopState:
    saved = CheckpointMetadata.parse(restored.step, restored.metadata)
    return LoopState(
        **restored.tree, records=saved.records, training_seconds=saved.training_seconds
    )


def save(manager: ocp.CheckpointManager, config: Config, loop_state: LoopState) -> None:
    """Start to save the state of the loop as a checkpoint."""
    metadata = CheckpointMetadata(
        hyperparameters(config), loop_state.records, loop_state.training_seconds
    )._asdict()
    is_between_epochs = loop_state.images == 0
    metrics = loop_state.records[-1] if is_between_epochs else {}
    checkpoints.save(manager, loop_state.step, loop_state.tree, metadata, metrics)
