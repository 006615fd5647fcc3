"""The flags of the MNIST experiment, their defaults and their bounds."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from experiments.harness.usage import (
    MAX_SEED,
    DatasetName,
    Folder,
    UsageError,
    check,
    check_packages,
    read_flags,
)
from experiments.training_run import run_files
from experiments.training_run.run_files import RunFilesError
from lstm_flax import buckets

MAX_EPOCHS = 10_000
"""Largest number of epochs of a run."""

MAX_WEIGHTS = 10**9
"""Largest number of weights; training them takes three times as many floats, 12 GB."""

MAX_FLOAT = sys.float_info.max
"""Largest float; an integer may be larger."""

RecipeName = Literal["standard", "fast", "best", "pixels", "permuted"]
"""Names of `RECIPES`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of a run, with their defaults."""

    workdir: Folder = Path("runs/mnist_lstm")
    """Folder of the run, or gs://BUCKET/FOLDER; a run that is already there is resumed."""
    recipe: RecipeName = "standard"
    """Sets defaults for other flags: 10 epochs, 3, or 20 with more distortion; or one layer of 128
    units that reads pixel by pixel, in their own order or permuted."""
    dataset: DatasetName = "auto"
    """Dataset to train on; auto is mnist, or mnist5k if mnist can't be downloaded."""
    data_dir: Folder | None = None
    """Folder of tfds's datasets; None is tfds's own default."""
    manual_dir: Path | None = None
    """Folder with the dataset's four original IDX .gz files, used instead of a download."""
    validation_size: int = 0
    """Training images held out to choose the best checkpoint; 0 takes the last step instead."""
    sequence: Literal["rows", "pixels", "permuted"] = "rows"
    """What a time step is: a row, a pixel, or a pixel in one random order that all images share."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step, over all devices."""
    learning_rate: float = 4e-3
    """Peak of AdamW's one-cycle learning rate."""
    warmup: float = 0.3
    """Fraction of the steps in which the learning rate rises to its peak."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay per step, as a multiple of the learning rate."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; larger ones are scaled down to it."""
    dropout: float = 0.0
    """Fraction of each layer's output that is dropped before the next layer."""
    label_smoothing: float = 0.0
    """Share of each label's weight that is spread evenly over all classes."""
    augment: bool = True
    """Rotate, shear, scale and shift the training images at random."""
    distortion: float = 1.0
    """With --augment: how far; 0.5 halves the largest angle, change of size and shift."""
    elastic: float = 0.0
    """With --augment: also bend the images; standard deviation of a point's move, in pixels."""
    gamma: float = 1.0
    """With --augment: also raise the pixels to powers from 1/gamma to gamma; 1 leaves them."""
    hidden_size: int = 256
    """Units of each LSTM layer."""
    num_layers: int = 2
    """LSTM layers."""
    seed: int = 0
    """Seed of everything random: parameters, order of the images, held-out images, noise."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products; parameters, cell states and sums stay float32."""
    checkpoint_every: str = "60s"
    """Also save within an epoch: every 500 (steps) or 60s (seconds); 0 saves only after epochs."""
    rescue_dir: Path | None = None
    """Folder for the last state while the workdir can't be written; None is the temporary one."""
    tensorboard: bool = False
    """Also write the curves for TensorBoard, to the folder tensorboard in the workdir."""
    shard_optimizer: bool = False
    """Shard AdamW's moments over the devices instead of replicating them."""
    distributed: bool = False
    """Train one model with several processes; start each of them with this flag."""
    coordinator: str | None = None
    """With --distributed, if JAX can't find it by itself: HOST:PORT of the first process."""
    num_processes: int | None = None
    """With --coordinator: number of processes."""
    process_id: int | None = None
    """With --coordinator: index of this process; 0 is the first."""
    eval_only: bool = False
    """Evaluate the result's checkpoint on the test set and write eval.json, without training."""
    step: int | None = None
    """With --eval-only: evaluate the checkpoint of this step instead."""
    summary: bool = False
    """Print a table of the model's layers, shapes and parameters, and do nothing else."""

    @property
    def save_interval(self) -> tuple[int | None, float | None]:
        """`--checkpoint-every` in steps and in seconds; at least one of them is None.

        Raises:
            ValueError: the flag holds neither.
        """
        every = self.checkpoint_every
        if every.endswith("s"):
            return None, float(every.removesuffix("s")) or None
        return int(every) or None, None


# With a warm-up of the usual 3 tenths, the first epochs learn next to nothing.
_PIXEL_BY_PIXEL = {
    "num_layers": 1, "hidden_size": 128, "epochs": 46, "warmup": 0.05, "distortion": 0.3,
}  # fmt: skip

RECIPES: dict[RecipeName, dict[str, Any]] = {
    # Of MNIST: 99.52% (one seed) in 10 minutes on 2 CPU cores, in float32.
    "standard": {},
    # 99.23% (0.07 standard deviation over 5 seeds) in 2 minutes on 2 CPU cores, in bfloat16.
    "fast": {"epochs": 3},
    # 99.61% (0.03 standard deviation over 5 seeds) in 12 minutes on the same.
    "best": {"epochs": 20, "elastic": 0.5, "label_smoothing": 0.05},
    # 98.63% (seed 0) in 2 hours on one CPU core, in bfloat16.
    "pixels": {
        **_PIXEL_BY_PIXEL,
        "sequence": "pixels",
        "learning_rate": 1e-3,
        "batch_size": 32,
    },
    # 93.19% (seed 0) in 2.1 hours on the same.
    "permuted": {
        **_PIXEL_BY_PIXEL,
        "sequence": "permuted",
        "learning_rate": 2e-3,
        "batch_size": 64,
    },
}
"""The flags of each recipe that differ from the defaults. This measures what a recipe reaches:

    python -m experiments.accuracy --recipe best --seeds 0 1 2 3 4 \\
        --flags="--dataset mnist --manual-dir FOLDER --precision bfloat16"
"""

# Where a run is, how it is saved and on which machines it runs does not change what it learns.
_NOT_HYPERPARAMETERS = (
    "workdir", "data_dir", "manual_dir", "checkpoint_every", "rescue_dir", "tensorboard",
    "shard_optimizer", "distributed", "coordinator", "num_processes", "process_id", "eval_only",
    "step", "summary",
)  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> Config:
    """Parse the command line.

    If the workdir already holds a run, that run's values replace the defaults. Flags that are
    passed must agree with them, except `--epochs`, which may grow.

    Raises:
        UsageError: a value is out of bounds, or differs from that of the run in the workdir.
        SystemExit: a flag is unknown or has the wrong type (status 2), or `--help` (status 0).
    """
    argv = sys.argv[1:] if argv is None else argv
    config = _read(argv, _recipe(argv))
    _check_flags(config)
    if config.tensorboard:
        check_packages("tensorboard", "tensorboardX", what="--tensorboard")
    run = stored_config(config)
    if run is None:
        if config.eval_only:
            raise UsageError(f"--eval-only: there is no run in {config.workdir}")
        return config
    config = _read(argv, run)
    if config.dataset == "auto":
        config = dataclasses.replace(config, dataset=run.dataset)
    if differing := config_diff(config, hyperparameters(run)):
        raise UsageError(
            f"{config.workdir} holds another run: {'; '.join(differing)}; "
            f"pass the run's values or another --workdir"
        )
    return config


def _read(argv: Sequence[str], default: Config) -> Config:
    description = "Train a stack of LSTM layers to read MNIST digits row by row."
    return read_flags(Config, argv, name="mnist_lstm", description=description, default=default)


def _recipe(argv: Sequence[str]) -> Config:
    """Return the recipe's defaults, whatever the other flags are, so that `--help` shows them."""

    @dataclasses.dataclass
    class Recipe:
        recipe: RecipeName = "standard"

    asked, _ = tyro.cli(Recipe, args=argv, add_help=False, return_unknown_args=True)
    return Config(recipe=asked.recipe, **RECIPES[asked.recipe])


def stored_config(config: Config) -> Config | None:
    """Return `config` with the hyperparameters of the run in its workdir; None without a run.

    They are checked against the bounds of the flags.

    Raises:
        RunFilesError: config.json can't be read, or a value in it can't be used.
    """
    stored = run_files.read_config(config.workdir)
    if stored is None:
        return None
    path = run_files.config_path(config.workdir)
    kinds = {name: get_type_hints(Config)[name] for name in hyperparameters(config)}
    for name, value in stored.items():
        if name not in kinds:
            raise RunFilesError(f"{path}: {name!r} is unknown")
        if not _is_of(value, kinds[name]):
            must_be = " or ".join(get_args(kinds[name])) or kinds[name].__name__
            raise RunFilesError(f"{path}: {name!r} must be {must_be}, but is {value!r:.50}")
    run = dataclasses.replace(config, **stored)
    for name, holds, must_be in _bounds(run):
        if not holds:
            raise RunFilesError(
                f"{path}: {name!r} must be {must_be}, but is {getattr(run, name)!r:.50}"
            )
    return run


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a field's type; an integer counts as a float, a bool does not."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def config_diff(config: Config, run: dict[str, Any]) -> list[str]:
    """Return how a configuration differs from a run's, apart from the number of epochs."""
    # A run from before a flag existed did what is now the flag's default.
    run = hyperparameters(Config()) | run
    return [
        f"--{name.replace('_', '-')} is {value}, but the run's is {run[name]!s:.50}"
        for name, value in hyperparameters(config).items()
        if name != "epochs" and value != run[name]
    ]


def hyperparameters(config: Config) -> dict[str, int | float | str | bool]:
    """Return the values that determine what a run learns, as config.json holds them."""
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in _NOT_HYPERPARAMETERS}


def _bounds(config: Config) -> Iterator[tuple[str, bool, str]]:
    """Yield a flag's name, whether its bounds hold, and what it must be, per hyperparameter."""
    for name, lowest, highest in (
        ("epochs", 1, MAX_EPOCHS),
        ("batch_size", 1, 1_000_000),
        ("hidden_size", 1, 16_384),
        ("num_layers", 1, 100),
        ("seed", 0, MAX_SEED),
        ("validation_size", 0, math.inf),
    ):
        value = getattr(config, name)
        must_be = f"at least {lowest}" if value < lowest else f"at most {highest}"
        yield name, lowest <= value <= highest, must_be
    weights = 8 * config.hidden_size**2 * config.num_layers
    yield "hidden_size", weights <= MAX_WEIGHTS, f"less with {config.num_layers} layers"
    for name in ("learning_rate", "clip_norm"):
        yield name, 0 < getattr(config, name) <= MAX_FLOAT, "a positive number"
    yield "warmup", 0 < config.warmup < 1, "more than 0 and less than 1"
    for name in ("weight_decay", "elastic"):
        yield name, 0 <= getattr(config, name) <= MAX_FLOAT, "at least 0"
    yield "gamma", 1 <= config.gamma <= 100, "at least 1 and at most 100"
    # At 7.8, an image would be sheared by a right angle.
    yield "distortion", 0 <= config.distortion <= 5, "at least 0 and at most 5"
    for name in ("label_smoothing", "dropout"):
        yield name, 0 <= getattr(config, name) < 1, "at least 0 and less than 1"


def _check_flags(config: Config) -> None:
    for name, holds, must_be in _bounds(config):
        check(config, name, holds, must_be)
    if not buckets.is_bucket(config.workdir):
        check(config, "workdir", _may_be_folder(config.workdir), "a folder")
    rescue_dir = config.rescue_dir
    is_local = rescue_dir is None or not buckets.is_bucket(rescue_dir)
    check(config, "rescue_dir", is_local, "a folder on this machine")
    is_folder = rescue_dir is None or _may_be_folder(rescue_dir)
    check(config, "rescue_dir", is_folder, "a folder")
    try:
        is_interval = all(value is None or value > 0 for value in config.save_interval)
    except ValueError:
        is_interval = False
    check(config, "checkpoint_every", is_interval, "steps, as in 500, or seconds, as in 60s")
    for name in ("coordinator", "num_processes", "process_id"):
        given = getattr(config, name) is not None
        check(config, name, config.distributed or not given, "given with --distributed")
    check(config, "step", config.step is None or config.eval_only, "given with --eval-only")


def _may_be_folder(path: Path) -> bool:
    """Whether a path is a folder, or free; a dangling link exists, but is not a folder."""
    return os.path.isdir(path) or not os.path.lexists(path)
