"""Restore a trained run from its workdir to examine or use it, without changing anything in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.batches import in_batches
from experiments.harness.command import quieten
from experiments.harness.usage import UsageError, command_line
from experiments.training_run import from_config, run_files
from experiments.training_run.config import Config, stored_config
from experiments.training_run.console import warn
from experiments.training_run.loop_state import LoopState
from experiments.training_run.run_files import RunFilesError
from lstm_flax import buckets, checkpoints, training
from lstm_flax.models import SequenceClassifier


class RestoredRun(NamedTuple):
    """The result of a run: `model.apply({"params": params}, x)` returns logits."""

    config: Config
    model: SequenceClassifier
    params: dict[str, Any]  # float32 arrays
    step: int  # of the checkpoint


def restore_run(workdir: Path) -> RestoredRun:
    """Restore the result of the run in a workdir: the checkpoint that `--eval-only` evaluates.

    This takes no lock, so the run may still be training; the result is then that of its last save.
    If the checkpoint of the result is damaged, this warns and restores the next best one.

    Raises:
        RunFilesError: there is no run in the workdir, or its config.json can't be read.
        CheckpointError: no checkpoint of the run can be restored.
    """
    quieten()  # this is also called outside of commands
    config = read_config(workdir)
    directory = run_files.checkpoints_path(workdir)
    if not buckets.is_bucket(directory) and not directory.is_dir():
        raise checkpoints.CheckpointError(f"the run in {workdir} has saved no checkpoint yet")
    with (
        jax.set_mesh(training.data_mesh()),
        checkpoints.open_checkpoints(directory, read_only=True) as manager,
    ):
        like = LoopState.at_start(from_config.abstract_state(config)).tree
        steps = checkpoints.result_steps(manager)
        restored, damages = checkpoints.restore_first(manager, like, steps)
    if damages:
        warn(f"using step {restored.step} ({'; '.join(map(str, damages))})")
    model = from_config.model(config)
    return RestoredRun(config, model, restored.tree["state"].params, restored.step)


def classify(run: RestoredRun, images: np.ndarray) -> np.ndarray:
    """Return class probabilities, float32 [n, classes], of images uint8 [n, rows, pixels]."""
    return classifier(run)(images)


def classifier(run: RestoredRun) -> Callable[[np.ndarray], np.ndarray]:
    """Return `classify` for one run, compiled once for many calls.

    Images become sequences as in training, and batches have the size that the run was evaluated
    with: in bfloat16 the rounding of sums depends on it, which could change a doubtful answer.
    """
    to_sequence, batch_size = from_config.to_sequence(run.config), run.config.batch_size

    @jax.jit
    def classify_batch(images):
        logits = run.model.apply({"params": run.params}, to_sequence(training.to_floats(images)))
        return jax.nn.softmax(jnp.asarray(logits))

    def classify(images: np.ndarray) -> np.ndarray:
        return in_batches(classify_batch, images, batch_size)

    return classify


def restore_row_reader(workdir: Path) -> RestoredRun:
    """Restore a run whose time steps are rows, as `restore_run` does.

    Raises:
        UsageError: the time steps of the run are pixels.
        RunFilesError, CheckpointError: as in `restore_run`.
    """
    sequence = read_config(workdir).sequence
    if sequence != "rows":
        raise UsageError(f"the run in {workdir} reads {sequence}, not rows")
    return restore_run(workdir)


def read_config(workdir: Path) -> Config:
    """Return the configuration of the run in a workdir.

    Raises:
        RunFilesError: there is no run, or its configuration can't be read.
    """
    config = stored_config(Config(workdir=workdir))
    if config is None:
        raise RunFilesError(
            f"there is no run in {workdir}; pass another --workdir, or train a run: "
            f"{command_line('mnist_lstm', '--workdir', workdir)}"
        )
    return config
