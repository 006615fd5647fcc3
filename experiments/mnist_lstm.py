"""Train an LSTM that reads MNIST digits row by row; resume, evaluate.

    python -m experiments.mnist_lstm [--workdir runs/mnist_lstm] [--epochs 10] [...]

Expect 99.55% on MNIST's test set after the default ten epochs, in 10 minutes on 2 CPU
cores.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from experiments import environment, loop, run_files
from experiments.config import Config, of_the_run, parse
from experiments.console import print_summary, quiet_orbax, warn, without_echoes
from experiments.loop import Position, Run, TrainingError
from experiments.run_files import RunFilesError
from experiments.stopping import Stopped, StopRequests, stop_requests
from experiments.usage import UsageError, fail
from lstm_flax import checkpoints, data, training
from lstm_flax.checkpoints import CheckpointError
from lstm_flax.data import DataError
from lstm_flax.models import LSTMClassifier, SequenceClassifier
from lstm_flax.training import Keys

LOST_PROCESS_SECONDS = 30
"""How long a process that shows no sign of life may stay away before the others give up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment from a command line; returns the exit status."""
    quiet_orbax()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the same, of Orbax's event loop
    try:
        with stop_requests() as stop, without_echoes():
            run(parse(argv), stop)
    except (UsageError, RunFilesError, TrainingError, DataError, CheckpointError) as error:
        return failed(error)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        return failed(UsageError(str(error).splitlines()[0]))
    except Stopped as stopped:
        print(f"stopped by {stopped}: the same command goes on from there", file=sys.stderr)
        return 128 + stopped.signal
    return 0


def failed(error: Exception) -> int:
    """Say in one line why the experiment ends; returns the exit status."""
    if jax.process_count() == 1:
        return fail(error)
    hint = "if another process was lost, start all of them again: they go on from the last save"
    print(f"error: {error}; {hint}", file=sys.stderr, flush=True)
    os._exit(2)  # JAX would wait for the other processes, and those perhaps for this one


def run(config: Config, stop: StopRequests) -> None:
    """Train, or go on training, then evaluate the result; or only evaluate."""
    if config.distributed:
        # Else JAX would take SIGTERM for itself; `loop.Pace` tells all processes of it.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=LOST_PROCESS_SECONDS,
        )
    with ExitStack() as stack:
        if jax.process_index() > 0:  # the first process speaks for all
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(jax.set_mesh(training.data_mesh()))
        builder = data.prepare(config.dataset, config.data_dir, config.manual_dir)
        config = dataclasses.replace(config, dataset=builder.name)
        splits = load_splits(config, builder)
        check_batch_size(config, splits)
        if not config.eval_only:
            stack.enter_context(run_files.lock(config.workdir))
        manager = stack.enter_context(
            checkpoints.open_checkpoints(
                run_files.checkpoints_path(config.workdir), read_only=config.eval_only
            )
        )
        datasets = training.replicate({name: s.arrays for name, s in splits.items()})
        keys = training.replicate(Keys.from_seed(config.seed))
        run = Run(config, datasets, keys, manager)
        fresh = loop.start(create_state(run))
        describe(run, fresh)
        if not config.eval_only:
            train(run, fresh, stop)
        evaluate_result(run, fresh)


def load_splits(config: Config, builder) -> dict[str, data.Split]:
    """Read the splits "train" and "test", and "validation" where images are held out."""
    splits = {name: data.read_split(builder, name) for name in ("train", "test")}
    if config.validation_size:
        splits["train"], splits["validation"] = data.hold_out(
            splits["train"], config.validation_size, config.seed
        )
    return splits


def check_batch_size(config: Config, splits: dict[str, data.Split]) -> None:
    """Refuse a batch that the data can't fill or the devices can't share."""
    images, devices = len(splits["train"].labels), jax.device_count()
    if config.batch_size > images:
        raise UsageError(
            f"--batch-size is {config.batch_size}, but there are only {images} training images"
        )
    if config.batch_size % devices:
        raise UsageError(
            f"--batch-size is {config.batch_size}, which {devices} devices can't share equally"
        )


def make_model(config: Config) -> SequenceClassifier:
    """The classifier that the flags describe."""
    is_float32 = config.precision == "float32"
    return LSTMClassifier(
        config.hidden_size,
        config.num_layers,
        dtype=jnp.dtype(config.precision),
        dropout=config.dropout,
        # Else a TPU would round float32 operands to bfloat16, and a GPU to TensorFloat-32.
        precision=jax.lax.Precision.HIGHEST if is_float32 else None,
    )


def make_optimizer(config: Config, num_images: int) -> optax.GradientTransformation:
    """The optimiser, whose schedule spans all epochs over so many images."""
    tx = training.onecycle_adamw(
        config.learning_rate,
        config.epochs * training.steps_per_epoch(num_images, config.batch_size),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    return training.spread_state(tx) if config.shard_optimizer else tx


def create_state(run: Run) -> TrainState:
    """The state at step 0."""
    images = run.datasets["train"]["image"]
    model, tx = make_model(run.config), make_optimizer(run.config, len(images))
    sample = loop.reading(run.config)(training.to_floats(images[:1]))
    return training.create_train_state(model, tx, sample, run.keys.init)


def describe(run: Run, position: Position) -> None:
    """Print what the run is about to work on."""
    config = run.config
    names = [name for name in ("train", "validation", "test") if name in run.datasets]
    images = ", ".join(f"{len(run.datasets[name]['label']):,} {name}" for name in names)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(position.state.params))
    print(f"data    {config.dataset}: {images} images")
    print(
        f"model   {config.num_layers} layers x {config.hidden_size}, "
        f"{parameters:,} parameters, {config.precision} products"
    )
    print(f"device  {environment.device_name()}")


def train(run: Run, fresh: Position, stop: StopRequests) -> None:
    """Train from the newest intact checkpoint, or from the start, to the last epoch."""
    position, config = loop.resume(run, fresh), run.config
    # Whatever happened to these files, the checkpoint knows what they held.
    run_files.write_json(run_files.config_path(config.workdir), of_the_run(config))
    run_files.write_metrics(config.workdir, position.records)
    if len(position.records) >= config.epochs:
        print(f"run     finished at step {position.step}; evaluating it")
        return
    if position.step:
        print(f"run     resuming from step {position.step}, in epoch {len(position.records) + 1}")
    record_start(config.workdir, position.step)
    loop.train(run, position, stop)


def record_start(workdir: Path, step: int) -> None:
    """Keep with what and on what the run is trained from a step on; it trains without, too."""
    try:
        run_files.append_environment(workdir, environment.of_start(step))
    except RunFilesError as error:
        warn(str(error))


def evaluate_result(run: Run, fresh: Position) -> None:
    """Restore the result, or the step asked for, evaluate it, and say and write what it is."""
    config, manager = run.config, run.manager
    if config.step is None:
        steps = checkpoints.result_steps(manager)
        restored, damages = checkpoints.restore_first(manager, fresh.tree, steps)
        if damages:
            warn(f"evaluating step {restored.step} ({'; '.join(map(str, damages))})")
    else:
        restored = checkpoints.restore(manager, fresh.tree, config.step)
    state = restored.tree["state"]
    metrics = loop.evaluate(run, state, "test")
    evaluation = {
        "step": restored.step,
        "dataset": config.dataset,
        **loop.figures("test", metrics),
        "correct": int(metrics.correct),
        "total": int(metrics.count),
        "params_sha256": run_files.params_sha256(state.params),
    }
    print_summary(
        evaluation,
        restored.about["records"],
        Path(manager.directory) / str(restored.step),
        evaluation_command(config),
    )
    run_files.write_json(run_files.eval_path(config.workdir), evaluation)


def evaluation_command(config: Config) -> str:
    """The command that evaluates this checkpoint again."""
    places: dict[str, Any] = {"data-dir": config.data_dir, "step": config.step}
    given = "".join(f" --{flag} {value}" for flag, value in places.items() if value is not None)
    return f"python -m experiments.mnist_lstm --workdir {config.workdir} --eval-only{given}"


if __name__ == "__main__":
    sys.exit(main())
