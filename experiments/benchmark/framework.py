"""What a peer is made of, whatever it is written in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = 1e-3  # Adam's

Call = Callable[[], Any]
"""Inference, which returns logits [batch, classes], or a step of Adam, which returns the loss
before it. What it returns may not be computed yet; `Framework.wait` waits for that."""


class Unavailable(Exception):
    """A peer can't run here; the message says in one line what is missing."""


class Framework(NamedTuple):
    """What the worker needs to know of a framework, beside its LSTM."""

    platform: str  # "cpu", "gpu" or "tpu"
    device: str  # its name
    wait: Callable[[Any], Any]
    """Wait until an array is computed."""
    product: Callable[[np.ndarray, np.ndarray], Call]
    """A function that multiplies two float32 matrices, which lie on the device."""
    allocator_peak: Callable[[], int]
    """Most bytes that were ever in use, on an accelerator."""
