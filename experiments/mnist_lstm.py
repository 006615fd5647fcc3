"""Train an LSTM that reads MNIST digits row by row; resume, evaluate.

    python -m experiments.mnist_lstm [--workdir runs/mnist_lstm] [--epochs 10] [...]

Expect 99.55% on MNIST's test set after the default ten epochs, in 10 minutes on 2 CPU
cores.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from experiments import run_files
from experiments.config import Config, ConfigError, of_the_run, parse
from experiments.console import Progress, print_summary
from lstm_flax import checkpoints, data, training
from lstm_flax.augment import random_affine
from lstm_flax.models import LSTMClassifier
from lstm_flax.training import Batch, Keys, Metrics

SECONDS_A_CALL = 1.0
"""How long one compiled call trains, about, before it returns to show how far it is."""


class TrainingError(Exception):
    """The training can't go on; the message says what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment from a command line; returns the exit status."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        run(parse(argv))
    except (ConfigError, TrainingError, data.DataError, checkpoints.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def run(config: Config) -> None:
    """Train, or go on training, then evaluate the result; or only evaluate."""
    builder = prepare_data(config)
    config = dataclasses.replace(config, dataset=builder.name)
    splits = load_splits(config, builder)
    check_batch_size(config, splits)
    directory = run_files.checkpoints_path(config.workdir)
    with (
        jax.set_mesh(training.data_mesh()),
        checkpoints.open_checkpoints(directory, read_only=config.eval_only) as manager,
    ):
        datasets = training.replicate({name: as_arrays(s) for name, s in splits.items()})
        keys = training.replicate(Keys.from_seed(config.seed))
        fresh = training.replicate(create_state(config, datasets, keys))
        describe(config, splits, fresh)
        if not config.eval_only:
            train(config, fresh, datasets, keys, manager)
        evaluate_result(config, fresh, datasets["test"], manager)


def prepare_data(config: Config):
    """Return the dataset's tfds builder, prepared."""
    if config.dataset == "auto":
        return data.prepare_auto(config.data_dir, config.manual_dir)
    return data.prepare(config.dataset, config.data_dir, config.manual_dir)


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
        raise ConfigError(
            f"--batch-size is {config.batch_size}, but there are only {images} training images"
        )
    if config.batch_size % devices:
        raise ConfigError(
            f"--batch-size is {config.batch_size}, which {devices} devices can't share equally"
        )


def as_arrays(split: data.Split) -> dict[str, np.ndarray]:
    """A split as the dict of arrays that training takes."""
    return {"image": split.images, "label": split.labels}


def total_steps(config: Config, train_set: Batch) -> int:
    """Steps of the whole run."""
    return config.epochs * training.steps_per_epoch(len(train_set["label"]), config.batch_size)


def create_state(config: Config, datasets: dict[str, Batch], keys: Keys) -> TrainState:
    """The state at step 0."""
    model = LSTMClassifier(
        config.hidden_size,
        config.num_layers,
        dtype=jnp.dtype(config.precision),
        dropout=config.dropout,
    )
    tx = training.onecycle_adamw(
        config.learning_rate,
        total_steps(config, datasets["train"]),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    sample = training.to_sequence(datasets["train"]["image"][:1])
    return training.create_train_state(model, tx, sample, keys.init)


def describe(config: Config, splits: dict[str, data.Split], state: TrainState) -> None:
    """Print what the run is about to work on."""
    images = ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"data    {config.dataset}: {images} images")
    print(
        f"model   {config.num_layers} layers x {config.hidden_size}, "
        f"{parameters:,} parameters, {config.precision} products"
    )
    print(f"device  {device_name()}")


def device_name() -> str:
    """Kind and number of the devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def train(
    config: Config,
    state: TrainState,
    datasets: dict[str, Batch],
    keys: Keys,
    manager: ocp.CheckpointManager,
) -> None:
    """Train from the latest checkpoint, or from `state`, to the last epoch, saving each."""
    last_step, images = total_steps(config, datasets["train"]), len(datasets["train"]["label"])
    if manager.latest_step() is None:
        record = None
    else:
        restored = checkpoints.restore(manager, state, manager.latest_step())
        state, record = restored.state, restored.metrics
        if int(state.step) >= last_step:
            print(f"run     finished at step {int(state.step)}; evaluating it")
            return
        print(f"run     resuming from step {int(state.step)} of {last_step}")
    config.workdir.mkdir(parents=True, exist_ok=True)
    run_files.write_json(run_files.config_path(config.workdir), of_the_run(config))
    run_files.rewind_metrics(config.workdir, record)

    started = time.perf_counter()
    take_steps = compile_train_steps(config, state, datasets["train"], keys)
    print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)

    done = 0 if record is None else record["epoch"]
    with Progress(config.epochs * images, done * images) as progress:
        for epoch in range(done + 1, config.epochs + 1):
            started = time.perf_counter()
            state, metrics, seconds = train_epoch(
                take_steps, state, datasets["train"], keys, progress
            )
            record = {"epoch": epoch, "step": int(state.step), **figures("train", metrics)}
            for name in datasets.keys() - {"train"}:
                held_out = training.evaluate(state, datasets[name], batch_size=config.batch_size)
                record |= figures(name, held_out)
            record |= {
                "images_per_second": images / seconds,
                "seconds": time.perf_counter() - started,
                "dataset": config.dataset,
                "device": device_name(),
            }
            checkpoints.save(manager, state, of_the_run(config), record)
            run_files.append_metrics(config.workdir, record)
            progress.epoch(record, config.epochs)
    manager.wait_until_finished()


def compile_train_steps(config: Config, state: TrainState, train_set: Batch, keys: Keys):
    """Compile `training.train_steps` ahead of time, so that no figure holds compile time."""
    return training.train_steps.lower(
        state,
        training.replicate(Metrics.zero()),
        train_set,
        keys,
        np.int32(1),
        batch_size=config.batch_size,
        augment=random_affine if config.augment else None,
    ).compile()


def train_epoch(
    take_steps, state: TrainState, train_set: Batch, keys: Keys, progress: Progress
) -> tuple[TrainState, Metrics, float]:
    """Train to the end of the epoch, in calls of about `SECONDS_A_CALL`.

    Returns:
        The new state, the epoch's metrics, and the seconds that went into training.

    Raises:
        TrainingError: the loss is not finite.
    """
    images = len(train_set["label"])
    metrics = training.replicate(Metrics.zero())
    steps_a_call, seen, seconds = 1, 0, 0.0
    while seen < images:
        started, first_step = time.perf_counter(), int(state.step)
        state, metrics = take_steps(state, metrics, train_set, keys, np.int32(steps_a_call))
        now_seen, loss = int(metrics.count), float(metrics.loss)
        elapsed = time.perf_counter() - started
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} by step {int(state.step)}: lower --learning-rate; "
                f"the last checkpoint is from before"
            )
        progress.advance(now_seen - seen, loss)
        seen, seconds = now_seen, seconds + elapsed
        steps_a_call = max(1, round((int(state.step) - first_step) * SECONDS_A_CALL / elapsed))
    return state, metrics, seconds


def figures(split: str, metrics: Metrics) -> dict[str, float]:
    """Loss and accuracy on a split, named as in metrics.jsonl."""
    return {
        f"{split}_loss": float(metrics.loss),
        # Of the counts themselves, since float32 has no 0.9921.
        f"{split}_accuracy": int(metrics.correct) / int(metrics.count),
    }


def evaluate_result(
    config: Config, state: TrainState, test_set: Batch, manager: ocp.CheckpointManager
) -> None:
    """Restore the result, or the step asked for, evaluate it, and say and write what it is."""
    step = manager.best_step() if config.step is None else config.step
    if step is None:
        raise checkpoints.CheckpointError(f"there is no checkpoint in {manager.directory} yet")
    state = checkpoints.restore(manager, state, step).state
    metrics = training.evaluate(state, test_set, batch_size=config.batch_size)
    evaluation = {
        "step": step,
        "dataset": config.dataset,
        **figures("test", metrics),
        "correct": int(metrics.correct),
        "total": int(metrics.count),
        "params_sha256": run_files.params_sha256(state.params),
    }
    run_files.write_json(run_files.eval_path(config.workdir), evaluation)
    print_summary(
        evaluation,
        [r for r in run_files.read_metrics(config.workdir) if r["step"] <= step],
        Path(manager.directory) / str(step),
        evaluation_command(config),
    )


def evaluation_command(config: Config) -> str:
    """The command that evaluates this checkpoint again."""
    places: dict[str, Any] = {"data-dir": config.data_dir, "step": config.step}
    given = "".join(f" --{flag} {value}" for flag, value in places.items() if value is not None)
    return f"python -m experiments.mnist_lstm --workdir {config.workdir} --eval-only{given}"


if __name__ == "__main__":
    sys.exit(main())
