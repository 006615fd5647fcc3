"""What the MNIST experiment is asked to do: its flags, their defaults and their bounds."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from experiments.harness.usage import (
    MOST_SEED,
    DatasetName,
    UsageError,
    check,
    check_packages,
    read_flags,
)
from experiments.training_run import run_files
from experiments.training_run.run_files import RunFilesError

MOST_EPOCHS = 10_000
"""Of a run."""

MOST_WEIGHTS = 10**9
"""Between hidden units; training them takes three times as many floats, 12 GB."""

LARGEST = sys.float_info.max
"""An integer may be larger, and then is no float."""

RecipeName = Literal["standard", "fast", "best"]
"""Of `RECIPES`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of a run, with their defaults."""

    workdir: Path = Path("runs/mnist_lstm")
    """Where the run lives; a run that is already there is resumed."""
    recipe: RecipeName = "standard"
    """What the flags that are left out are: 10 epochs, 3, or 20 with more distortion."""
    dataset: DatasetName = "auto"
    """What to learn; auto is mnist, or mnist5k where mnist can't be had."""
    data_dir: Path | None = None
    """tfds's folder; None is tfds's own default."""
    manual_dir: Path | None = None
    """Folder with the dataset's four original IDX .gz files, in place of a download."""
    validation_size: int = 0
    """Training images held out to choose the best checkpoint; 0: the last step is the result."""
    sequence: Literal["rows", "pixels", "permuted"] = "rows"
    """A time step is a row, a pixel, or a pixel in one random order, the same for all images."""
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
    label_smoothing: float = 0.0
    """Part of each label's weight that goes to all classes alike."""
    augment: bool = True
    """Rotate, shear, scale and shift the training images at random."""
    elastic: float = 0.0
    """With --augment: bend them too; standard deviation of the points' moves, in pixels."""
    hidden_size: int = 256
    """Units of each LSTM layer."""
    num_layers: int = 2
    """LSTM layers."""
    seed: int = 0
    """Of everything random: parameters, order of the images, held-out images, noise."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; parameters, cell states and sums stay float32."""
    checkpoint_every: str = "60s"
    """Save within an epoch too: every 500 (steps) or 60s (seconds); 0: at its end alone."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too, to the folder tensorboard in the workdir."""
    shard_optimizer: bool = False
    """Let each device keep a share of AdamW's moments, in place of all of them."""
    distributed: bool = False
    """This is one of several processes that train one model; start each of them with this flag."""
    coordinator: str | None = None
    """With --distributed, where JAX can't find it by itself: HOST:PORT of the first process."""
    num_processes: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: which of them this is; 0 is the first."""
    eval_only: bool = False
    """Evaluate the result's checkpoint on the test set, write eval.json, train nothing."""
    step: int | None = None
    """With --eval-only: evaluate the checkpoint of this step instead."""

    @property
    def save_interval(self) -> tuple[int | None, float | None]:
        """`--checkpoint-every` in steps and in seconds, of which one at least is None.

        Raises:
            ValueError: it is neither.
        """
        every = self.checkpoint_every
        if every.endswith("s"):
            return None, float(every.removesuffix("s")) or None
        return int(every) or None, None


RECIPES: dict[RecipeName, dict[str, Any]] = {
    # Of MNIST: 99.52% (one seed) in 10 minutes on 2 CPU cores, in float32.
    "standard": {},
    # 99.23% (0.07 standard deviation over 5 seeds) in 2 minutes on 2 CPU cores, in bfloat16.
    "fast": {"epochs": 3},
    # 99.61% (0.03 standard deviation over 5 seeds) in 12 minutes on the same.
    "best": {"epochs": 20, "elastic": 0.5, "label_smoothing": 0.05},
}
"""By name, what differs from the defaults. What one reaches is measured by

    python -m experiments.accuracy --recipe best --seeds 0 1 2 3 4 \\
        --flags="--dataset mnist --manual-dir FOLDER --precision bfloat16"
"""

# What says where a run is, how it is kept and on what machines; it does not change what it learns.
_NOT_OF_THE_RUN = (
    "workdir", "data_dir", "manual_dir", "checkpoint_every", "tensorboard", "shard_optimizer",
    "distributed", "coordinator", "num_processes", "process_id", "eval_only", "step",
)  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read the command line.

    Where the workdir holds a run already, that run's values take the place of the defaults, and
    the flags given must agree with them, but for `--epochs`, which may grow.

    Raises:
        UsageError: a value is out of bounds, or differs from the run's in the workdir.
        SystemExit: a flag is unknown or not of its type (status 2), or `--help` (status 0).
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
    if differing := differences(config, of_the_run(run)):
        raise UsageError(
            f"{config.workdir} holds another run: {'; '.join(differing)}; "
            f"give the run's values or another --workdir"
        )
    return config


def _read(argv: Sequence[str], default: Config) -> Config:
    description = "Train a stack of LSTM layers to read MNIST digits row by row."
    return read_flags(Config, argv, name="mnist_lstm", description=description, default=default)


def _recipe(argv: Sequence[str]) -> Config:
    """The defaults by the recipe that is asked for, whatever else is: `--help` shows them too."""

    @dataclasses.dataclass
    class Recipe:
        recipe: RecipeName = "standard"

    asked, _ = tyro.cli(Recipe, args=argv, add_help=False, return_unknown_args=True)
    return Config(recipe=asked.recipe, **RECIPES[asked.recipe])


def stored_config(config: Config) -> Config | None:
    """A configuration with the values of the run in its workdir; None where there is no run.

    Only what makes the run what it is counts, within the bounds that the flags have.

    Raises:
        RunFilesError: config.json can't be read, or a value in it can't be used.
    """
    stored = run_files.read_config(config.workdir)
    if stored is None:
        return None
    path = run_files.config_path(config.workdir)
    kinds = {name: get_type_hints(Config)[name] for name in of_the_run(config)}
    for name, value in stored.items():
        if name not in kinds:
            raise RunFilesError(f"{path}: a run has no {name!r}")
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
    """Whether a JSON value is of a field's type: a whole number is a float too, a bool is none."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def differences(config: Config, run: dict[str, Any]) -> list[str]:
    """Say in what a configuration differs from a run's own, but for how long it trains."""
    # A run from before there was a flag did what is the flag's default.
    run = of_the_run(Config()) | run
    return [
        f"--{name.replace('_', '-')} is {value}, the run's is {run[name]!s:.50}"
        for name, value in of_the_run(config).items()
        if name != "epochs" and value != run[name]
    ]


def of_the_run(config: Config) -> dict[str, int | float | str | bool]:
    """Return what makes the run what it is, as JSON values; this is kept in config.json."""
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in _NOT_OF_THE_RUN}


def _bounds(config: Config) -> Iterator[tuple[str, bool, str]]:
    """The bounds of what makes a run: the flag's name, whether they hold, what it must be."""
    for name, lowest, highest in (
        ("epochs", 1, MOST_EPOCHS),
        ("batch_size", 1, 1_000_000),
        ("hidden_size", 1, 16_384),
        ("num_layers", 1, 100),
        ("seed", 0, MOST_SEED),
        ("validation_size", 0, math.inf),
    ):
        value = getattr(config, name)
        must_be = f"at least {lowest}" if value < lowest else f"at most {highest}"
        yield name, lowest <= value <= highest, must_be
    weights = 8 * config.hidden_size**2 * config.num_layers
    yield "hidden_size", weights <= MOST_WEIGHTS, f"less with {config.num_layers} layers"
    for name in ("learning_rate", "clip_norm"):
        yield name, 0 < getattr(config, name) <= LARGEST, "a positive number"
    for name in ("weight_decay", "elastic"):
        yield name, 0 <= getattr(config, name) <= LARGEST, "at least 0"
    for name in ("label_smoothing", "dropout"):
        yield name, 0 <= getattr(config, name) < 1, "at least 0 and less than 1"


def _check_flags(config: Config) -> None:
    for name, holds, must_be in _bounds(config):
        check(config, name, holds, must_be)
    workdir = config.workdir
    is_free = not os.path.lexists(workdir)  # a link to nowhere is there, and no folder
    check(config, "workdir", is_free or os.path.isdir(workdir), "a folder")
    try:
        is_interval = all(value is None or value > 0 for value in config.save_interval)
    except ValueError:
        is_interval = False
    check(config, "checkpoint_every", is_interval, "steps, as in 500, or seconds, as in 60s")
    for name in ("coordinator", "num_processes", "process_id"):
        given = getattr(config, name) is not None
        check(config, name, config.distributed or not given, "given with --distributed")
    check(config, "step", config.step is None or config.eval_only, "given with --eval-only")
