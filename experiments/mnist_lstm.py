"""Train an LSTM that reads MNIST digits row by row; resume, evaluate.

    python -m experiments.mnist_lstm [--workdir runs/mnist_lstm] [--epochs 10] [...]

Expect 99.5% on MNIST's test set after the default ten epochs, in 10 minutes on 2 CPU
cores.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from experiments.harness import stopping
from experiments.harness.command import command
from experiments.harness.stopping import Stopped, StopRequests
from experiments.harness.usage import UsageError, check_fills_batch, command_line, counted
from experiments.training_run import environment, from_config, loop, processes, rescue, run_files
from experiments.training_run.config import Config, hyperparameters, parse
from experiments.training_run.console import hide_repeated_tracebacks, print_summary, warn
from experiments.training_run.loop import TrainingError
from experiments.training_run.loop_state import (
    CheckpointMetadata,
    LoopState,
    RunContext,
    check_epochs,
)
from experiments.training_run.run_files import RunFilesError
from experiments.training_run.saver import Saver, open_saver
from lstm_flax import checkpoints, data, training
from lstm_flax.checkpoints import CheckpointError
from lstm_flax.data import DataError
from lstm_flax.training import Keys


@command(RunFilesError, TrainingError, DataError, CheckpointError, fail=processes.fail)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment from a command line and return the exit status."""
    try:
        with hide_repeated_tracebacks():
            run(parse(argv), stopping.REQUESTS)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        return processes.fail(UsageError(str(error).splitlines()[0]))
    except Stopped as stopped:
        stopping.REQUESTS.announce(stopped)
        return 128 + stopped.signal
    return 0


def run(config: Config, stop: StopRequests) -> None:
    """Train or resume a run and evaluate its result, or only evaluate it, or print a summary."""
    if config.summary:
        print(from_config.summary(config))
        return
    check_epochs(config, config.workdir)
    stop.hint = partial(stop_hint, config)
    with processes.distributed_context(config):
        builder = data.prepare(config.dataset, config.data_dir, config.manual_dir)
        config = dataclasses.replace(config, dataset=builder.name)
        stop.hint = partial(stop_hint, config)
        splits = load_splits(config, builder)
        check_batch_size(config, splits)
        datasets = training.replicate({name: split.arrays for name, split in splits.items()})
        keys = training.replicate(Keys.from_seed(config.seed))
        run = RunContext(config, datasets, keys)
        if config.eval_only:
            evaluate(run)
            return
        with open_saver(config) as saver:
            state = from_config.train_state(config, len(splits["train"].labels), keys.init)
            describe(run, state)
            train(run, state, saver, stop)
            if saver.failure:
                warn(f"{saver.failure}; {rescue.hint(config, saver.rescued_step)}")
            else:
                evaluate_result(run, saver.manager, state)


def stop_hint(config: Config) -> str:
    """Return what the same command will do after this one was stopped."""
    if config.eval_only:
        return ""
    saved, rescued = run_files.saved_steps(config.workdir), rescue.newest_step(config)
    if rescued is not None and rescued > max(saved, default=-1):
        return f": {rescue.hint(config, rescued)} to resume"
    if saved:
        return ": run the same command to resume"
    return " before the first save: run the same command to start again"


def load_splits(config: Config, builder) -> dict[str, data.Split]:
    """Read the splits "train" and "test", and "validation" if images are held out."""
    splits = {name: data.read_split(builder, name) for name in ("train", "test")}
    if config.validation_size:
        splits["train"], splits["validation"] = data.hold_out(
            splits["train"], config.validation_size, config.seed
        )
    return splits


def check_batch_size(config: Config, splits: dict[str, data.Split]) -> None:
    """Check that the data fill a batch and that the devices divide it."""
    check_fills_batch(config.batch_size, len(splits["train"].labels))
    devices = jax.device_count()
    if config.batch_size % devices:
        raise UsageError(
            f"--batch-size must be a multiple of the {devices} devices, but is {config.batch_size}"
        )


def describe(run: RunContext, state: TrainState) -> None:
    """Print the data, the model and the device."""
    config = run.config
    names = [name for name in ("train", "validation", "test") if name in run.datasets]
    images = ", ".join(f"{len(run.datasets[name]['label']):,} {name}" for name in names)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"data    {config.dataset}: {images} images")
    print(
        f"model   {counted(config.num_layers, 'layer')} x {config.hidden_size}, "
        f"{parameters:,} parameters, {config.precision} products"
    )
    layers = [state.params["core"][f"l{k}"] for k in range(config.num_layers)]
    for k, layer in enumerate(layers, 1):
        print_layer(f"layer {k}", layer["kernel_ih"].shape[0], config.hidden_size, layer)
    head = state.params["head"]
    print_layer("head", config.hidden_size, len(head["bias"]), head)
    print(f"device  {environment.device_name()}, {from_config.implementation(config)}")
    if config.dropout and config.num_layers == 1:
        warn(f"--dropout {config.dropout} drops nothing: it lies between layers, and there is one")


def print_layer(name: str, inputs: int, outputs: int, params: Any) -> None:
    """Print a layer's sizes and its number of parameters."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{name:7} {inputs} -> {outputs}, {parameters:,} parameters")


def train(run: RunContext, fresh: TrainState, saver: Saver, stop: StopRequests) -> None:
    """Train from the newest intact checkpoint, or from a fresh state, to the last epoch."""
    loop_state, config = saver.resume(LoopState.at_start(fresh)), run.config
    # Whatever happened to these files, the checkpoint knows what they held.
    run_files.write_json(run_files.config_path(config.workdir), hyperparameters(config))
    run_files.write_metrics(config.workdir, loop_state.records)
    if loop_state.epochs >= config.epochs:
        print(f"run     finished at step {loop_state.step}")
        return
    if loop_state.step:
        print(f"run     resuming from step {loop_state.step}, in epoch {loop_state.epochs + 1}")
    record_start(config, loop_state.step)
    loop.train(run, loop_state, saver, stop)


def record_start(config: Config, step: int) -> None:
    """Record software and hardware for training from a step on; a failure only warns."""
    start = environment.start_record(step) | {
        "implementation": str(from_config.implementation(config))
    }
    try:
        run_files.append_environment(config.workdir, start)
    except RunFilesError as error:
        warn(str(error))


def evaluate(run: RunContext) -> None:
    """Evaluate the result, or the checkpoint of `--step`, of a run that may still be training."""
    config = run.config
    path = run_files.checkpoints_path(config.workdir)
    with checkpoints.open_checkpoints(path, read_only=True) as manager:
        if config.shard_optimizer:
            num_images = len(run.datasets["train"]["label"])
            state = from_config.train_state(config, num_images, run.keys.init)
        else:
            state = from_config.abstract_state(config)
        describe(run, state)
        rescued = rescue.newest_step(config)
        if config.step is None and rescued is not None and rescued > (manager.latest_step() or 0):
            warn(
                f"this evaluates an earlier state; the last one, of step {rescued}, is kept in "
                f"{rescue.rescue_folder(config)}: run the same command without --eval-only"
            )
        evaluate_result(run, manager, state)


def evaluate_result(run: RunContext, manager: ocp.CheckpointManager, like: TrainState) -> None:
    """Restore the result or the checkpoint of `--step`, evaluate it, and print and save that."""
    config, tree = run.config, LoopState.at_start(like).tree
    if config.step is None:
        steps = checkpoints.result_steps(manager)
        restored, damages = checkpoints.restore_first(manager, tree, steps)
        if damages:
            warn(f"evaluating step {restored.step} ({'; '.join(map(str, damages))})")
    else:
        restored = checkpoints.restore(manager, tree, config.step)
    print(f"run     evaluating step {restored.step}", flush=True)
    state = restored.tree["state"]
    metrics = loop.evaluate(run, state, "test")
    evaluation = {
        "step": restored.step,
        "dataset": config.dataset,
        **loop.metric_dict("test", metrics),
        "correct": int(metrics.correct),
        "total": int(metrics.count),
        "params_sha256": run_files.params_sha256(state.params),
    }
    print_summary(
        evaluation,
        CheckpointMetadata.parse(restored.step, restored.metadata).records,
        manager.directory / str(restored.step),
        evaluation_command(config),
    )
    try:
        run_files.write_json(run_files.eval_path(config.workdir), evaluation)
    except RunFilesError as error:
        warn(str(error))  # a read-only run can still be evaluated


def evaluation_command(config: Config) -> str:
    """Return the command that evaluates this checkpoint again."""
    places: dict[str, Any] = {"data-dir": config.data_dir, "step": config.step}
    given = [(f"--{flag}", value) for flag, value in places.items() if value is not None]
    flags = ["--workdir", config.workdir, "--eval-only", *itertools.chain(*given)]
    return command_line("mnist_lstm", *flags)


if __name__ == "__main__":
    stopping.leave(main())
