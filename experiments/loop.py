"""The training of a run, from where it is to its last epoch, so that being cut off changes nothing.

A `Position` is all that a run's future depends on. It is saved at the end of each epoch, from time
to time within one, and when somebody asks the run to stop; from any of them training goes on to
the same weights. With several processes, all of them take the same steps at the same time, and the
first one writes the files.
"""

import math
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.experimental import multihost_utils

from experiments import environment, run_files
from experiments.board import Board
from experiments.config import Config, differences, of_the_run
from experiments.console import Progress, warn
from experiments.stopping import Stopped, StopRequests
from lstm_flax import checkpoints, readings, training
from lstm_flax.augment import distort
from lstm_flax.training import Batch, Keys, Metrics, Reading

SECONDS_A_CALL = 1.0
"""How long one compiled call trains, about, before it returns to show how far it is."""


class TrainingError(Exception):
    """The training can't go on; the message says what to change."""


class Run(NamedTuple):
    """What a run works with from its start to its end."""

    config: Config
    datasets: dict[str, Batch]  # "train", "test" and, where images are held out, "validation"
    keys: Keys
    manager: ocp.CheckpointManager


class Position(NamedTuple):
    """How far a run is."""

    state: TrainState
    metrics: Metrics  # of the epoch so far
    records: list[dict[str, Any]]  # a line of metrics.jsonl for each epoch that is done
    seconds: float = 0.0  # of the epoch so far
    training_seconds: float = 0.0  # of those, without evaluation and saving

    @property
    def tree(self) -> dict[str, Any]:
        """The arrays, as a checkpoint holds them."""
        return {"state": self.state, "metrics": self.metrics}

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.state.step)


def start(state: TrainState) -> Position:
    """Position of a run that has taken no step."""
    return Position(state, training.replicate(Metrics.zero()), [])


def resume(run: Run, fresh: Position) -> Position:
    """Position of the newest checkpoint that is intact, or `fresh` where there is none at all.

    Newer ones that are damaged are moved out of the way, and that is said.

    Raises:
        CheckpointError: all checkpoints are damaged, or they are another run's.
    """
    steps = sorted(run.manager.all_steps(), reverse=True)
    if not steps:
        return fresh
    restored, damages = checkpoints.restore_first(run.manager, fresh.tree, steps)
    about = restored.about
    if differing := differences(run.config, about["config"]):
        raise checkpoints.CheckpointError(
            f"the checkpoints in {run.manager.directory} are another run's: {'; '.join(differing)}"
        )
    if damages:
        damaged = [step for step in steps if step > restored.step]
        folder = run_files.set_aside(run.config.workdir, damaged)
        run.manager.reload()
        warn(f"moved damaged checkpoints to {folder} ({'; '.join(map(str, damages))})")
    return Position(
        **restored.tree,
        records=about["records"],
        seconds=about["seconds"],
        training_seconds=about["training_seconds"],
    )


def save(run: Run, position: Position) -> None:
    """Start saving a position as a checkpoint."""
    at_end_of_epoch = position.seconds == 0
    about = {
        "config": of_the_run(run.config),
        "records": position.records,
        "seconds": position.seconds,
        "training_seconds": position.training_seconds,
    }
    metrics = position.records[-1] if at_end_of_epoch else {}
    checkpoints.save(run.manager, position.step, position.tree, about, metrics)


class Pace:
    """How many steps the next call takes, whether to save before it, and whether to stop.

    Calls grow to about `SECONDS_A_CALL`, and end where a checkpoint is due. All processes keep the
    same pace, the first one's; a request to stop may come to any of them.
    """

    def __init__(self, every_steps: int | None, every_seconds: float | None, stop: StopRequests):
        self.steps = 1
        self.is_save_due = False
        self.stop_signal = 0
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._stop = stop
        self._saved = time.perf_counter()

    def after_call(self, step: int, steps: int, seconds: float) -> None:
        """Set the pace after a call that took so many steps and seconds, up to `step`."""
        steps = max(1, round(steps * SECONDS_A_CALL / seconds))
        is_due = False
        if self._every_steps:
            is_due = step % self._every_steps == 0
            steps = min(steps, self._every_steps - step % self._every_steps)
        elif self._every_seconds:
            is_due = time.perf_counter() - self._saved >= self._every_seconds
        agreed = np.array([[steps, is_due, self._stop.asked]])
        if jax.process_count() > 1:
            agreed = multihost_utils.process_allgather(agreed[0])
        self.steps, self.is_save_due = int(agreed[0, 0]), bool(agreed[0, 1])
        self.stop_signal = int(agreed[:, 2].max())
        if self.is_save_due:
            self._saved = time.perf_counter()


def train(run: Run, position: Position, stop: StopRequests) -> None:
    """Train from a position to the end of the last epoch.

    Raises:
        Stopped: asked to; the position is saved.
        TrainingError: the loss is not finite.
        CheckpointError: a checkpoint can't be written.
    """
    config, images = run.config, len(run.datasets["train"]["label"])
    started = time.perf_counter()
    take_steps = compile_train_steps(run, position)
    print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)

    seen = len(position.records) * images + int(position.metrics.count)
    pace = Pace(*config.save_interval, stop)
    with (
        Progress(config.epochs * images, seen) as progress,
        open_board(config, position) as board,
        stop.deferred(),
    ):
        while len(position.records) < config.epochs and not pace.stop_signal:
            position = train_epoch(run, position, take_steps, pace, progress, board)
            if int(position.metrics.count) == images:
                position = end_epoch(run, position)
                run_files.append_metrics(config.workdir, position.records[-1])
                progress.epoch(position.records[-1], config.epochs)
                board.epoch(position.records[-1])
            save(run, position)
        checkpoints.wait(run.manager)
    if pace.stop_signal and len(position.records) < config.epochs:
        raise Stopped(pace.stop_signal)


def open_board(config: Config, position: Position) -> Board:
    """TensorBoard's curves up to a position, to be gone on with; nothing where nobody asked."""
    is_wanted = config.tensorboard and run_files.is_writer()
    folder = run_files.tensorboard_path(config.workdir) if is_wanted else None
    return Board(folder, position.step, position.records)


def compile_train_steps(run: Run, position: Position):
    """Compile `training.train_steps` ahead of time, so that no figure holds compile time."""
    take_steps = partial(
        training.train_steps,
        batch_size=run.config.batch_size,
        augment=partial(distort, elastic=run.config.elastic) if run.config.augment else None,
        read=reading(run.config),
        label_smoothing=run.config.label_smoothing,
    )
    before = (position.state, position.metrics)
    # What comes out lies on the devices as what went in, so that it can go in again.
    layout = jax.tree.map(lambda array: array.sharding, before)
    jitted = jax.jit(take_steps, donate_argnums=(0, 1), out_shardings=layout)
    return jitted.lower(*before, run.datasets["train"], run.keys, np.int32(1)).compile()


def reading(config: Config) -> Reading:
    """How the images are read as sequences."""
    match config.sequence:
        case "rows":
            return readings.rows
        case "pixels":
            return readings.pixels
        case "permuted":
            return readings.permuted_pixels


def evaluate(run: Run, state: TrainState, split: str) -> Metrics:
    """Metrics over a whole split."""
    return training.evaluate(
        state,
        run.datasets[split],
        batch_size=run.config.batch_size,
        read=reading(run.config),
    )


def train_epoch(
    run: Run, position: Position, take_steps, pace: Pace, progress: Progress, board: Board
) -> Position:
    """Train to the end of the epoch, or until the pace says to stop.

    Raises:
        TrainingError: the loss is not finite.
        CheckpointError: a checkpoint can't be written.
    """
    train_set = run.datasets["train"]
    started, seconds_before = time.perf_counter(), position.seconds
    while (seen := int(position.metrics.count)) < len(train_set["label"]):
        step, called = position.step, time.perf_counter()
        state, metrics = take_steps(
            position.state, position.metrics, train_set, run.keys, np.int32(pace.steps)
        )
        loss = float(metrics.loss)
        now = time.perf_counter()
        position = position._replace(
            state=state,
            metrics=metrics,
            seconds=seconds_before + now - started,
            training_seconds=position.training_seconds + now - called,
        )
        if not (math.isfinite(loss) and training.is_finite(state.params)):
            raise TrainingError(
                f"the loss became {loss} by step {position.step}: lower --learning-rate; "
                f"the last checkpoint is from before"
            )
        progress.advance(int(metrics.count) - seen, loss)
        board.advance(position.step, loss)
        pace.after_call(position.step, position.step - step, now - called)
        if pace.stop_signal:
            break
        if pace.is_save_due and int(metrics.count) < len(train_set["label"]):
            save(run, position)
    return position


def end_epoch(run: Run, position: Position) -> Position:
    """Evaluate after an epoch's last step; the epoch's figures become a record."""
    started = time.perf_counter()
    record: dict[str, Any] = {"epoch": len(position.records) + 1, "step": position.step}
    record |= figures("train", position.metrics)
    for name in run.datasets.keys() - {"train"}:
        record |= figures(name, evaluate(run, position.state, name))
    record |= {
        "images_per_second": int(position.metrics.count) / position.training_seconds,
        "seconds": position.seconds + time.perf_counter() - started,
        "dataset": run.config.dataset,
        "device": environment.device_name(),
    }
    return Position(position.state, training.replicate(Metrics.zero()), [*position.records, record])


def figures(split: str, metrics: Metrics) -> dict[str, float]:
    """Loss and accuracy on a split, named as in metrics.jsonl."""
    return {
        f"{split}_loss": float(metrics.loss),
        # Of the counts themselves, since float32 has no 0.9921.
        f"{split}_accuracy": int(metrics.correct) / int(metrics.count),
    }
