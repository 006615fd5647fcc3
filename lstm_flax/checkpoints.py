"""Checkpoints of a run: state, config and metrics as one Orbax composite a step."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from orbax.checkpoint.checkpoint_managers import preservation_policy


class CheckpointError(Exception):
    """A checkpoint is not there or can't be used; the message says which, and what there is."""


class Restored(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    config: dict[str, Any]
    metrics: dict[str, Any]


def merit(metrics: dict[str, Any]) -> tuple[float, int]:
    """What makes a checkpoint the run's result: validation accuracy, or else being the last.

    Of equally accurate ones the later is better. Test figures play no part.
    """
    return metrics.get("validation_accuracy", 0.0), metrics["step"]


def open_checkpoints(
    directory: Path, *, keep: int = 3, read_only: bool = False
) -> ocp.CheckpointManager:
    """Open a run's checkpoints; use it as a context manager, which waits for pending saves.

    Args:
        directory: made where it does not exist, unless `read_only`.
        keep: how many of the latest to keep, beside the one with the most merit.
        read_only: change nothing on disk.
    """
    policy = preservation_policy.AnyPreservationPolicy(
        [
            preservation_policy.LatestN(keep),
            preservation_policy.BestN(get_metric_fn=merit, n=1),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=merit, create=not read_only, read_only=read_only
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    config: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Start saving a checkpoint of `state.step`; it is written while training goes on.

    Args:
        manager: from `open_checkpoints`.
        state: its arrays may be donated as soon as this returns.
        config: the run's, as JSON values.
        metrics: the epoch's, as JSON values; `merit` judges them.
    """
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config)
        ),
        metrics=metrics,
    )


def restore(manager: ocp.CheckpointManager, like: TrainState, step: int) -> Restored:
    """Restore the checkpoint of a step.

    Args:
        manager: from `open_checkpoints`.
        like: a state of the same structure; gives shapes, dtypes and where the arrays shall lie,
            which may be other devices than those that saved them.
        step: `manager.latest_step()`, `manager.best_step()` (see `merit`) or any other.

    Raises:
        CheckpointError: there is no checkpoint of that step.
    """
    if step not in manager.all_steps():
        steps = ", ".join(map(str, sorted(manager.all_steps()))) or "none"
        raise CheckpointError(
            f"no checkpoint of step {step} in {manager.directory}; there are: {steps}"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            config=ocp.args.JsonRestore(),
            metrics=ocp.args.JsonRestore(),
        ),
    )
    return Restored(restored["state"], restored["config"], restored["metrics"])
