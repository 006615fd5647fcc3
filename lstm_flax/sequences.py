"""Sequences out of other things: images [batch, height, width] of any dtype, or ragged lists.

Images of another rank raise a ValueError.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from lstm_flax.arguments import check_array, check_integer

PERMUTATION_SEED = 92916
"""Seed of `RandomState` for the fixed random order of the pixels. The public code of many papers on
permuted MNIST uses it, such as those on unitary and orthogonal RNNs."""


def rows(images: jax.Array) -> jax.Array:
    """Return a row per time step: [batch, height, width]."""
    check_array("images", images, ("batch", "height", "width"))
    return images


def pixels(images: jax.Array) -> jax.Array:
    """Return a pixel per time step, row after row: [batch, height * width, 1]."""
    batch, height, width = rows(images).shape
    return images.reshape(batch, height * width, 1)


def permuted_pixels(images: jax.Array) -> jax.Array:
    """Return a pixel per time step, in one random order that is the same for all images and runs.

    Neighbouring pixels are then far apart in time (Le, Jaitly and Hinton, "A Simple Way to
    Initialize Recurrent Networks of Rectified Linear Units", 2015).
    """
    sequence = pixels(images)
    order = np.random.RandomState(PERMUTATION_SEED).permutation(sequence.shape[1])
    return sequence[:, order]


def pad_sequences(
    sequences: Iterable[Any],
    *,
    multiple_of: int = 1,
    time_major: bool = False,
    padding_value: ArrayLike = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pad sequences of unlike lengths at their ends, into one batch and its lengths.

    It does what PyTorch's `pad_sequence` and `pack_sequence` are for, in any order of lengths:
    stacks take the lengths as `seq_lengths` and let no padding reach a result.

        >>> import jax, numpy as np
        >>> from lstm_flax import LSTMStack, pad_sequences
        >>> x, lengths = pad_sequences([np.ones((3, 5)), np.ones((7, 5))], multiple_of=4)
        >>> x.shape, lengths
        ((2, 8, 5), array([3, 7], dtype=int32))
        >>> (outputs, _), _ = LSTMStack(16).init_with_output(
        ...     jax.random.key(0), x.astype(np.float32), seq_lengths=lengths
        ... )
        >>> outputs.shape
        (2, 8, 16)

    Args:
        sequences: arrays, or what NumPy makes arrays of, each [time, ...] with its own time; the
            other axes, such as features, are the same for all.
        multiple_of: time is padded to a multiple of it. `jax.jit` compiles anew for each shape:
            with 32, sequences of up to 128 steps make four shapes at most.
        time_major: returns [time, batch, ...] instead.
        padding_value: what the padding holds.

    Returns:
        The batch [batch, time, ...], in the dtype that holds all sequences, and the lengths
        [batch], int32.

    Raises:
        ValueError: there are no sequences, or one is no array, has no time axis, or has other
            features than the first; the message says which.
    """
    check_integer("multiple_of", multiple_of)
    arrays = [_as_sequence(k, sequence) for k, sequence in enumerate(sequences)]
    if not arrays:
        raise ValueError("pad_sequences needs at least one sequence")
    features = arrays[0].shape[1:]
    for k, array in enumerate(arrays):
        if array.shape[1:] != features:
            first = ["time", *features]
            raise ValueError(
                f"sequence {k} has shape {list(array.shape)}, not {first} as the first"
            )
    lengths = np.array([len(array) for array in arrays], np.int32)
    time = -(-int(lengths.max()) // multiple_of) * multiple_of
    dtype = np.result_type(*arrays)
    batch = np.full((len(arrays), time, *features), padding_value, dtype)
    for row, array in zip(batch, arrays, strict=True):
        row[: len(array)] = array
    return (batch.swapaxes(0, 1).copy() if time_major else batch), lengths


def _as_sequence(k: int, sequence: Any) -> np.ndarray:
    try:
        array = np.asarray(sequence)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sequence {k} can't become an array: {error}") from error
    if array.ndim == 0 or array.dtype == object:
        raise ValueError(f"sequence {k} is {type(sequence).__name__}, not an array [time, ...]")
    return array
