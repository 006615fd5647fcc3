"""Train a run from where it is to its last epoch, so that an interruption changes nothing.

The state is saved at the end of each epoch, at intervals within one, and when a signal asks the run
to stop. Training resumes from any of these to the same weights. With several processes, all of them
take the same steps at the same time, and the first one writes the files.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax.training.train_state import TrainState

from experiments.harness.stopping import Stopped, StopRequests
from experiments.training_run import environment, from_config, run_files
from experiments.training_run.chunks import ChunkScheduler
from experiments.training_run.config import Config
from experiments.training_run.console import ProgressBar, duration, warn
from experiments.training_run.loop_state import LoopState, RunContext
from experiments.training_run.metric_writer import MetricWriter
from experiments.training_run.saver import Saver
from lstm_flax import training
from lstm_flax.training import Metrics

TakeSteps = Callable[..., tuple[TrainState, Metrics]]
"""`training.train_steps`, compiled for a run."""


class TrainingError(Exception):
    """Training can't continue; the message says what to change."""


def train(run: RunContext, loop_state: LoopState, saver: Saver, stop: StopRequests) -> None:
    """Train from a state of the loop to the end of the last epoch.

    Raises:
        Stopped: a signal arrived, perhaps after the last step; the state is saved.
        TrainingError: the loss is not finite.
        CheckpointError: the last state can't be saved anywhere.
    """
    config, images = run.config, len(run.datasets["train"]["label"])
    take_steps = compile_train_steps(run, loop_state)
    scheduler = ChunkScheduler(*config.save_interval, stop)
    with (
        ProgressBar(
            config.epochs * images, loop_state.epochs * images + loop_state.images
        ) as progress,
        open_metric_writer(config, loop_state) as writer,
        stop.deferred(),
    ):
        while loop_state.epochs < config.epochs and not scheduler.stop_signal:
            loop_state = train_chunk(run, loop_state, take_steps, scheduler)
            progress.update(loop_state.epochs * images + loop_state.images, loop_state.loss)
            writer.write_running_loss(loop_state.step, loop_state.loss)
            if is_end_of_epoch := loop_state.images == images:
                loop_state = end_epoch(run, loop_state)
                saver.append_metrics(loop_state)
                progress.print_epoch(loop_state.records[-1], config.epochs)
                writer.write_epoch(loop_state.records[-1])
            if is_end_of_epoch or scheduler.is_save_due or scheduler.stop_signal:
                is_back = saver.save(loop_state)
                writer.repair(loop_state.step, loop_state.records, is_back, saver.failure)
        saver.finish(loop_state)
        scheduler.after_training()
        if scheduler.stop_signal:
            raise Stopped(scheduler.stop_signal)


def compile_train_steps(run: RunContext, loop_state: LoopState) -> TakeSteps:
    """Compile `training.train_steps` ahead of time, so that no measured time includes compiling.

    Prints a line before, because it takes long. Under `jax.disable_jit` nothing is compiled.
    """
    take_steps = partial(
        training.train_steps,
        batch_size=run.config.batch_size,
        augment=from_config.augment(run.config),
        to_sequence=from_config.to_sequence(run.config),
        label_smoothing=run.config.label_smoothing,
    )
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        warn("JAX_DISABLE_JIT is set: nothing is compiled, and a step takes seconds")
        return take_steps
    print("compiling, which may take 15 seconds", flush=True)
    started = time.perf_counter()
    before = (loop_state.state, loop_state.metrics)
    # The outputs have the layout of the inputs, so that they can be inputs again.
    layout = jax.tree.map(lambda array: array.sharding, before)
    jitted = jax.jit(take_steps, donate_argnums=(0, 1), out_shardings=layout)
    compiled = jitted.lower(*before, run.datasets["train"], run.keys, np.int32(1)).compile()
    print(f"compiled in {duration(time.perf_counter() - started)}", flush=True)
    return compiled


def open_metric_writer(config: Config, loop_state: LoopState) -> MetricWriter:
    """Open the TensorBoard writer at this step; without `--tensorboard` it does nothing."""
    is_wanted = config.tensorboard and run_files.is_primary_process()
    folder = run_files.tensorboard_path(config.workdir) if is_wanted else None
    return MetricWriter(folder, loop_state.step, loop_state.records)


def train_chunk(
    run: RunContext, loop_state: LoopState, take_steps: TakeSteps, scheduler: ChunkScheduler
) -> LoopState:
    """Train one chunk of steps within the epoch, and let the scheduler choose the next one.

    Donates the arrays of `loop_state`.

    Raises:
        TrainingError: the loss is not finite.
    """
    started, step = time.perf_counter(), loop_state.step
    state, metrics = take_steps(
        loop_state.state,
        loop_state.metrics,
        run.datasets["train"],
        run.keys,
        np.int32(scheduler.steps),
    )
    jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - started
    loop_state = loop_state._replace(
        state=state, metrics=metrics, training_seconds=loop_state.training_seconds + seconds
    )
    if not (math.isfinite(loop_state.loss) and training.is_finite(state.params)):
        raise TrainingError(
            f"the loss became {loop_state.loss} by step {loop_state.step}: lower --learning-rate; "
            f"the last checkpoint is from before that step"
        )
    scheduler.after_chunk(loop_state.step, loop_state.step - step, seconds)
    return loop_state


def end_epoch(run: RunContext, loop_state: LoopState) -> LoopState:
    """Evaluate after an epoch's last step, and add a record of the epoch's metrics."""
    started = time.perf_counter()
    record: dict[str, Any] = {"epoch": loop_state.epochs + 1, "step": loop_state.step}
    record |= metric_dict("train", loop_state.metrics)
    for name in run.datasets.keys() - {"train"}:
        record |= metric_dict(name, evaluate(run, loop_state.state, name))
    record |= {
        "images_per_second": loop_state.images / loop_state.training_seconds,
        "seconds": loop_state.training_seconds + time.perf_counter() - started,
        "dataset": run.config.dataset,
        "device": environment.device_name(),
    }
    return LoopState.at_start_of_epoch(loop_state.state, [*loop_state.records, record])


def evaluate(run: RunContext, state: TrainState, split: str) -> Metrics:
    """Compute the metrics over a whole split."""
    return training.evaluate(
        state,
        run.datasets[split],
        batch_size=run.config.batch_size,
        to_sequence=from_config.to_sequence(run.config),
    )


def metric_dict(split: str, metrics: Metrics) -> dict[str, float]:
    """Return loss and accuracy on a split, named as in metrics.jsonl."""
    return {
        f"{split}_loss": float(metrics.loss),
        # From the counts, because float32 can't represent 0.9921.
        f"{split}_accuracy": int(metrics.correct) / int(metrics.count),
    }
