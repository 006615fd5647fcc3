"""Training with and without clipping the gradient's norm, step by step."""

from typing import NamedTuple

import numpy as np
import optax

from experiments.gradient_flow.flow import mean_norms
from experiments.gradient_flow.models import Variant, start
from lstm_flax import Keys, Metrics, training
from lstm_flax.training import Batch

CLIP_NORM = 1.0
"""Largest global norm of a gradient, as in the MNIST experiment."""


class Trace(NamedTuple):
    """What was recorded at each train step; all arrays are [steps]."""

    norm: np.ndarray  # global norm of all parameters' gradient, before any clipping
    loss: np.ndarray  # mean cross-entropy of the step's batch, nats
    reach: np.ndarray  # ||dL/dh_1|| / ||dL/dh_T||, before the step


def watched_descent(learning_rate: float, clip_norm: float | None) -> optax.GradientTransformation:
    """Plain gradient descent that keeps each gradient's norm as it was before clipping.

    The claim about clipping is about plain gradient descent. Adam divides gradients by their size,
    which already does much of what clipping does.

    Args:
        learning_rate: the learning rate of every step.
        clip_norm: largest global norm; larger gradients are scaled down to it. None: no clipping.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(optax.snapshot("norm", optax.tree.norm), clip, optax.sgd(learning_rate))


def trace(
    variant: Variant,
    tx: optax.GradientTransformation,
    data: Batch,
    probe: Batch,
    keys: Keys,
    *,
    steps: int,
    batch_size: int,
) -> Trace:
    """Train, and record each step.

    Args:
        variant: what to train.
        tx: from `watched_descent`.
        data: training set.
        probe: digits whose gradients are followed back in time.
        keys: keys of the training.
        steps: number of train steps.
        batch_size: images per step.
    """
    state = start(variant, tx, data, keys)
    x = training.to_floats(probe["image"])
    norms, losses, reaches = [], [], []
    for _ in range(steps):
        flow = mean_norms(variant.model, state.params, x, probe["label"])["h"]
        state, metrics = training.train_steps(
            state, Metrics.empty(), data, keys, 1, batch_size=batch_size
        )
        norms.append(float(optax.tree.get(state.opt_state, "norm")))
        losses.append(float(metrics.loss))
        reaches.append(flow[0] / flow[-1])
    return Trace(np.array(norms), np.array(losses), np.array(reaches))
