"""A trained run, restored from its workdir to be looked at or used; nothing in it is changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.command import quieten
from experiments.harness.usage import UsageError, command_line
from experiments.training_run import from_config, run_files
from experiments.training_run.config import Config, stored_config
from experiments.training_run.console import warn
from experiments.training_run.loop_state import LoopState
from experiments.training_run.run_files import RunFilesError
from lstm_flax import checkpoints, training
from lstm_flax.models import SequenceClassifier


class RestoredRun(NamedTuple):
    """The result of a run: `model.apply({"params": params}, x)` gives its logits."""

    config: Config
    model: SequenceClassifier
    params: dict[str, Any]  # float32 arrays
    step: int  # whose checkpoint it is


def restore_run(workdir: Path) -> RestoredRun:
    """Restore the result of the run in a workdir, the checkpoint that `--eval-only` evaluates.

    It takes no lock, so the run may be training still; the result is then that of its last save.
    Where the result's checkpoint is damaged the next best one takes its place, and that is said.

    Raises:
        RunFilesError: there is no run in the workdir, or its config.json can't be read.
        CheckpointError: it has no checkpoint that can be restored.
    """
    quieten()  # it is called without a command, too
    config = read_config(workdir)
    directory = run_files.checkpoints_path(workdir)
    if not directory.is_dir():
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
    """Class probabilities, float32 [n, classes], of images uint8 [n, rows, pixels]."""
    return classifier(run)(images)


def classifier(run: RestoredRun) -> Callable[[np.ndarray], np.ndarray]:
    """`classify`, to be called again and again: it is compiled once.

    The run reads images as it was trained to, in batches of its own size: in bfloat16 the order in
    which sums are rounded depends on it, so with another one a doubtful answer might not be the one
    that it was evaluated by.
    """
    read, batch_size = from_config.reading(run.config), run.config.batch_size

    @jax.jit
    def classify_batch(images: jax.Array) -> jax.Array:
        logits = run.model.apply({"params": run.params}, read(training.to_floats(images)))
        return jax.nn.softmax(jnp.asarray(logits))

    def classify(images: np.ndarray) -> np.ndarray:
        # The last batch is filled up, so that all of them are computed in one way.
        filled = np.arange(-(-len(images) // batch_size) * batch_size) % len(images)
        batches = filled.reshape(-1, batch_size)
        return np.concatenate([classify_batch(images[batch]) for batch in batches])[: len(images)]

    return classify


def restore_row_reader(workdir: Path) -> RestoredRun:
    """`restore_run`, for what can only watch a run that reads row by row.

    Raises:
        UsageError: the run reads otherwise.
        RunFilesError, CheckpointError: as `restore_run`.
    """
    sequence = read_config(workdir).sequence
    if sequence != "rows":
        raise UsageError(f"the run in {workdir} reads {sequence}, not rows")
    return restore_run(workdir)


def read_config(workdir: Path) -> Config:
    """The configuration of the run in a workdir.

    Raises:
        RunFilesError: there is none, or it can't be read.
    """
    config = stored_config(Config(workdir=workdir))
    if config is None:
        raise RunFilesError(
            f"there is no run in {workdir}; name one with --workdir, or train one: "
            f"{command_line('mnist_lstm', '--workdir', workdir)}"
        )
    return config
