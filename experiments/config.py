"""What the MNIST experiment is asked to do: its flags, their defaults and their bounds."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from experiments import run_files


class ConfigError(Exception):
    """A flag's value can't be used; the message names the flag."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of a run, with their defaults."""

    workdir: Path = Path("runs/mnist_lstm")
    """Where the run lives; a run that is already there is resumed."""
    dataset: Literal["auto", "mnist", "fashion_mnist", "kmnist", "mnist5k"] = "auto"
    """What to learn; auto is mnist, or mnist5k where mnist can't be had."""
    data_dir: Path | None = None
    """tfds's folder; None is tfds's own default."""
    manual_dir: Path | None = None
    """Folder with the dataset's four original IDX .gz files, in place of a download."""
    validation_size: int = 0
    """Training images held out to choose the best checkpoint; 0: the last step is the result."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step, over all devices."""
    learning_rate: float = 4e-3
    """Peak of AdamW's one-cycle learning rate."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay, a step, as a multiple of the learning rate."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; larger ones are scaled down to it."""
    dropout: float = 0.0
    """Fraction of each layer's output that is dropped on its way to the next layer."""
    augment: bool = True
    """Rotate, shear, scale and shift the training images at random."""
    hidden_size: int = 256
    """Units of each LSTM layer."""
    num_layers: int = 2
    """LSTM layers."""
    seed: int = 0
    """Of everything random: parameters, order of the images, held-out images, noise."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; parameters, cell states and sums stay float32."""
    eval_only: bool = False
    """Evaluate the result's checkpoint on the test set, write eval.json, train nothing."""
    step: int | None = None
    """With --eval-only: evaluate the checkpoint of this step instead."""


# What says where and how to look at a run, and is no part of what the run is.
_NOT_OF_THE_RUN = ("workdir", "data_dir", "manual_dir", "eval_only", "step")


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read the command line.

    Where the workdir holds a run already, that run's values take the place of the defaults, and
    the flags given must agree with them, but for `--epochs`, which may grow.

    Raises:
        ConfigError: a value is out of bounds, or differs from the run's in the workdir.
        SystemExit: a flag is unknown or not of its type (status 2), or `--help` (status 0).
    """
    description = "Train a stack of LSTM layers to read MNIST digits row by row."
    prog = "python -m experiments.mnist_lstm"
    config = tyro.cli(Config, prog=prog, description=description, args=argv)
    _check_bounds(config)
    stored = run_files.read_config(config.workdir)
    if stored is None:
        if config.eval_only:
            raise ConfigError(f"--eval-only: there is no run in {config.workdir}")
        return config
    try:
        run = dataclasses.replace(config, **stored)
    except TypeError as error:
        raise ConfigError(f"{run_files.config_path(config.workdir)}: {error}") from error
    config = tyro.cli(Config, prog=prog, args=argv, default=run)
    if config.dataset == "auto":
        config = dataclasses.replace(config, dataset=run.dataset)
    differences = [
        f"--{name.replace('_', '-')} is {getattr(config, name)}, the run's is {value}"
        for name, value in of_the_run(run).items()
        if name != "epochs" and getattr(config, name) != value
    ]
    if differences:
        raise ConfigError(
            f"{config.workdir} holds another run: {'; '.join(differences)}; "
            f"give the run's values or another --workdir"
        )
    return config


def of_the_run(config: Config) -> dict[str, int | float | str | bool]:
    """Return what makes the run what it is, as JSON values; this is kept in config.json."""
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in _NOT_OF_THE_RUN}


def _check_bounds(config: Config) -> None:
    for name in ("epochs", "batch_size", "hidden_size", "num_layers"):
        _check(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("seed", "validation_size"):
        _check(config, name, getattr(config, name) >= 0, "at least 0")
    for name in ("learning_rate", "clip_norm"):
        value = getattr(config, name)
        _check(config, name, math.isfinite(value) and value > 0, "a positive number")
    decay = config.weight_decay
    _check(config, "weight_decay", math.isfinite(decay) and decay >= 0, "at least 0")
    _check(config, "dropout", 0 <= config.dropout < 1, "at least 0 and less than 1")
    workdir = config.workdir
    _check(config, "workdir", workdir.is_dir() or not workdir.exists(), "a folder")
    _check(config, "step", config.step is None or config.eval_only, "given with --eval-only")


def _check(config: Config, name: str, holds: bool, must_be: str) -> None:
    if not holds:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} must be {must_be}, but is {getattr(config, name)}")
