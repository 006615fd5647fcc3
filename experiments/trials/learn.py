"""Train a model by an idea, and let it answer held-out images."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.short_training import EVAL_BATCH_SIZE
from experiments.training_run import from_config
from experiments.training_run.config import Config
from experiments.trials.ideas import Idea, Params, Reading, model_logits
from lstm_flax import sequences, training
from lstm_flax.training import Batch, Keys


class Answers(NamedTuple):
    """What a trained model says of the held-out images, in their order."""

    is_correct: np.ndarray  # bool [images]
    loss: np.ndarray  # float32 [images], cross-entropy in nats


def config_of(idea: Idea, recipe: Config, seed: int) -> Config:
    """Return the recipe's flags with those of the idea."""
    epochs = idea.longer * recipe.epochs
    return dataclasses.replace(recipe, **{"seed": seed, "epochs": epochs, **idea.flags})


def train(idea: Idea, config: Config, data: Batch, teachers: Sequence[Params] = ()) -> Params:
    """Train from new parameters to the last epoch.

    An epoch has the batches of `lstm_flax.training.train_steps`, but for the last one, which is
    filled up with the first images of the epoch.

    Args:
        idea: what to do.
        config: with which flags.
        data: the training set, on the device.
        teachers: params of models whose answers take the place of the labels, if any. Each step
            asks another one. The gradient is linear in the targets, so that on average it is that
            of the teachers' mean answer, for the price of one.
    """
    model, keys = from_config.model(config), Keys.from_seed(config.seed)
    images = len(data["label"])
    state = from_config.train_state(config, images, keys.init)
    params, tx = idea.extend(state.params), idea.optimizer(config, images)
    state = state.replace(params=params, tx=tx, opt_state=tx.init(params))
    per_epoch = training.steps_per_epoch(images, config.batch_size)
    num_teachers = len(teachers)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *teachers) if teachers else None

    def step(state, batch, teachers):
        dropout_key, augment_key = jax.random.split(jax.random.fold_in(keys.noise, state.step))
        progress = state.step / (config.epochs * per_epoch)
        pixels = training.to_floats(batch["image"])
        pixels = idea.augment(config, augment_key, pixels, progress)
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], 10), config.label_smoothing)
        if num_teachers:
            asked = state.step % num_teachers
            teacher = jax.tree.map(lambda leaves: leaves[asked], teachers)
            targets = jax.nn.softmax(model_logits(Reading(model, teacher, sequences.rows(pixels))))
        pixels, targets = idea.mix(jax.random.fold_in(augment_key, 3), pixels, targets)

        def loss(params):
            reading = Reading(model, params, sequences.rows(pixels), dropout_key)
            return idea.loss(idea, reading, targets)

        return state.apply_gradients(grads=idea.gradient(loss, state.params))

    @jax.jit
    def train_epoch(state, data, teachers):
        order = jax.random.permutation(
            jax.random.fold_in(keys.order, state.step // per_epoch), images
        )
        chosen = jnp.resize(order, (per_epoch, config.batch_size))

        def body(index, state):
            batch = {name: array[chosen[index]] for name, array in data.items()}
            return step(state, batch, teachers)

        return jax.lax.fori_loop(0, per_epoch, body, state)

    for _ in range(config.epochs):
        state = train_epoch(state, data, stacked)
    return state.params


def answer(idea: Idea, config: Config, params: Params, data: Batch) -> Answers:
    """Answer all images of a dataset, without distortion or dropout."""
    model = from_config.model(config)

    @jax.jit
    def answers(params, images, labels):
        x = sequences.rows(training.to_floats(images))
        logits = idea.logits(Reading(model, params, x))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.argmax(logits, -1) == labels, losses

    pieces = [
        answers(params, *(data[name][at : at + EVAL_BATCH_SIZE] for name in ("image", "label")))
        for at in range(0, len(data["label"]), EVAL_BATCH_SIZE)
    ]
    return Answers(*(np.concatenate(of_all) for of_all in zip(*pieces, strict=True)))
