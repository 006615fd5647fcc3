"""Build what a run's flags describe: model, optimiser, augmentation, images as sequences."""

import math
import shutil
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

from experiments.training_run.config import Config
from lstm_flax import sequences, training
from lstm_flax.augment import distort
from lstm_flax.models import LSTMClassifier, SequenceClassifier, chrono_init
from lstm_flax.models.lstm import forget_gate_ones
from lstm_flax.training import Augment, ToSequence

IMAGE_SHAPE = (28, 28)
"""Rows, and pixels per row, of the images of every dataset."""


def model(config: Config) -> SequenceClassifier:
    """Return the classifier."""
    is_float32 = config.precision == "float32"
    # Pixels in their own order need a memory of hundreds of steps from the start: with the default
    # biases, training collapses. In a random order, training is faster with the default biases.
    is_long = config.sequence == "pixels"
    return LSTMClassifier(
        config.hidden_size,
        config.num_layers,
        dtype=jnp.dtype(config.precision),
        dropout=config.dropout if config.num_layers > 1 else 0.0,  # it lies between layers
        # By default a TPU rounds float32 operands to bfloat16, and a GPU to TensorFloat-32.
        precision=jax.lax.Precision.HIGHEST if is_float32 else None,
        bias_init=chrono_init(math.prod(IMAGE_SHAPE)) if is_long else forget_gate_ones,
    )


class Implementation(NamedTuple):
    """Which implementation of its layers a model runs, and why not a faster one."""

    name: str
    why_not_faster: str | None

    def __str__(self) -> str:
        return self.name + (f" ({self.why_not_faster})" if self.why_not_faster else "")


def implementation(config: Config) -> Implementation:
    """Return which implementation of the LSTM layer trains this model on this machine."""
    reason = model(config).core.why_not_native(_sample(config), deterministic=False)
    kernels = {"cpu": "native kernel", "tpu": "Pallas kernels", "gpu": "cuDNN"}
    name = "scan" if reason else kernels[jax.default_backend()]
    return Implementation(name, reason)


def optimizer(config: Config, num_images: int) -> optax.GradientTransformation:
    """Return the optimiser, with a schedule over all epochs of `num_images` images."""
    tx = training.onecycle_adamw(
        config.learning_rate,
        config.epochs * training.steps_per_epoch(num_images, config.batch_size),
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    return training.shard_opt_state(tx) if config.shard_optimizer else tx


def to_sequence(config: Config) -> ToSequence:
    """Return the function that turns images into sequences."""
    match config.sequence:
        case "rows":
            return sequences.rows
        case "pixels":
            return sequences.pixels
        case "permuted":
            return sequences.permuted_pixels


def augment(config: Config) -> Augment | None:
    """Return the function that distorts training images; None without `--augment`."""
    if not config.augment:
        return None
    return partial(distort, strength=config.distortion, elastic=config.elastic, gamma=config.gamma)


def train_state(config: Config, num_images: int, key: jax.Array) -> TrainState:
    """Return the state at step 0 of training on `num_images` images; `key` draws parameters."""
    tx = optimizer(config, num_images)
    return training.create_train_state(model(config), tx, _sample(config), key)


def abstract_state(config: Config) -> TrainState:
    """Return the shapes and dtypes of `train_state`, replicated on the current mesh.

    No array is made, so a checkpoint can be compared with its config.json before it takes memory.
    """
    tx = optimizer(config, config.batch_size)  # the state does not depend on the number of images
    params = _abstract_params(config)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(tx.init, params)
    state = TrainState(step, model(config).apply, params, tx, opt_state)
    whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state
    )


def summary(config: Config) -> str:
    """Return flax's table of the model, as wide as the terminal, or 100 columns without one."""
    width = shutil.get_terminal_size((100, 0)).columns
    console = {"width": width, "force_terminal": sys.stdout.isatty()}  # no colours in a pipe
    table = model(config).tabulate(
        jax.random.key(0),
        _sample(config),
        console_kwargs=console,
        column_kwargs={"overflow": "fold"},  # a shape that was cut would say nothing
    )
    return "\n".join(line.rstrip() for line in table.strip("\n").splitlines())


def count_parameters(config: Config) -> int:
    """Return the number of parameters of the model, without making them."""
    return sum(leaf.size for leaf in jax.tree.leaves(_abstract_params(config)))


def _abstract_params(config: Config) -> Any:
    sample = jax.eval_shape(lambda: _sample(config))
    return jax.eval_shape(model(config).init, jax.random.key(0), sample)["params"]


def _sample(config: Config) -> jax.Array:
    """Return a sequence of the shape and dtype of the model's input."""
    return to_sequence(config)(jnp.zeros((1, *IMAGE_SHAPE), jnp.float32))
