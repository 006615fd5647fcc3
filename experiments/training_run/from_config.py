"""What a run's flags describe, made: its model, its optimiser, how it reads and distorts images."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

from experiments.training_run.config import Config
from lstm_flax import readings, training
from lstm_flax.augment import distort
from lstm_flax.models import LSTMClassifier, SequenceClassifier, chrono_init
from lstm_flax.models.lstm import forget_gate_ones
from lstm_flax.training import Augment, Reading

IMAGE_SHAPE = (28, 28)
"""Rows and pixels a row of every dataset's images."""


def model(config: Config) -> SequenceClassifier:
    """The classifier."""
    is_float32 = config.precision == "float32"
    # An image's pixels in their own order need a memory of hundreds of steps from the start: with
    # the default biases training collapses. In a random order those learn faster.
    is_long = config.sequence == "pixels"
    return LSTMClassifier(
        config.hidden_size,
        config.num_layers,
        dtype=jnp.dtype(config.precision),
        dropout=config.dropout,
        # Else a TPU would round float32 operands to bfloat16, and a GPU to TensorFloat-32.
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
    """Which implementation of the LSTM layer trains this model on this machine."""
    reason = model(config).core.why_not_native(_sample(config), deterministic=False)
    kernels = {"cpu": "native kernel", "tpu": "Pallas kernels", "gpu": "cuDNN"}
    name = "scan" if reason else kernels[jax.default_backend()]
    return Implementation(name, reason)


def optimizer(config: Config, num_images: int) -> optax.GradientTransformation:
    """The optimiser, whose schedule spans all epochs over so many images."""
    tx = training.onecycle_adamw(
        config.learning_rate,
        config.epochs * training.steps_per_epoch(num_images, config.batch_size),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    return training.shard_opt_state(tx) if config.shard_optimizer else tx


def reading(config: Config) -> Reading:
    """How images become sequences."""
    match config.sequence:
        case "rows":
            return readings.rows
        case "pixels":
            return readings.pixels
        case "permuted":
            return readings.permuted_pixels


def augment(config: Config) -> Augment | None:
    """How the training images are distorted."""
    return partial(distort, elastic=config.elastic) if config.augment else None


def train_state(config: Config, num_images: int, key: jax.Array) -> TrainState:
    """The state at step 0 of a training on so many images; `key` draws the parameters."""
    tx = optimizer(config, num_images)
    return training.create_train_state(model(config), tx, _sample(config), key)


def abstract_state(config: Config) -> TrainState:
    """What `train_state` is like, whole on each device of the mesh in force; no array is made.

    So a checkpoint can be compared with what its config.json asks for before that takes memory.
    """
    tx = optimizer(config, config.batch_size)  # how many images it spans is no part of the state
    params = _abstract_params(config)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(tx.init, params)
    state = TrainState(step, model(config).apply, params, tx, opt_state)
    whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state
    )


def count_parameters(config: Config) -> int:
    """How many parameters the model has; none is made."""
    return sum(leaf.size for leaf in jax.tree.leaves(_abstract_params(config)))


def _abstract_params(config: Config) -> Any:
    sample = jax.eval_shape(lambda: _sample(config))
    return jax.eval_shape(model(config).init, jax.random.key(0), sample)["params"]


def _sample(config: Config) -> jax.Array:
    """A sequence of the shape and dtype that the model is given."""
    return reading(config)(jnp.zeros((1, *IMAGE_SHAPE), jnp.float32))
