"""From the caller's sequences to the rows that layers run, and back.

The caller's x is [..., time, features]: one sequence, a batch of them, or several batch axes. A
mask may exclude any of its steps. Layers run rows [rows, time, features]: each row is a sequence
whose first `lengths` steps are valid. `Sequences` converts in both directions.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstm_flax.arguments import as_array
from lstm_flax.models.lstm_layer import is_valid_step


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of the caller's x, [..., time, features] or [time, ..., features].

    Attributes:
        batch: sizes of the batch axes.
        time: number of steps.
        time_major: time is the first axis.
    """

    batch: tuple[int, ...]
    time: int
    time_major: bool

    @classmethod
    def of(cls, shape: Sequence[int], time_major: bool, feature_axes: int = 1) -> "Axes":
        """Read them off the shape of x.

        Raises:
            ValueError: the shape has too few axes.
        """
        if len(shape) < 1 + feature_axes:
            axes = "[time, ..., features]" if time_major else "[..., time, features]"
            raise ValueError(f"x has shape {tuple(shape)}, not {axes}")
        leading = tuple(shape[: len(shape) - feature_axes])
        if time_major:
            return cls(leading[1:], leading[0], True)
        return cls(leading[:-1], leading[-1], False)

    @property
    def steps(self) -> tuple[int, ...]:
        """The shape of an array that has one entry per step, in the caller's axes."""
        return (self.time, *self.batch) if self.time_major else (*self.batch, self.time)

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return math.prod(self.batch)

    def fold(self, array: jax.Array) -> jax.Array:
        """Turn the caller's [..., time, *rest] into [rows, time, *rest]."""
        count = len(self.batch)
        array = jnp.moveaxis(array, 0, count) if self.time_major else array
        return array.reshape(self.rows, *array.shape[count:])

    def unfold(self, array: jax.Array) -> jax.Array:
        """Undo `fold`."""
        array = array.reshape(*self.batch, *array.shape[1:])
        return jnp.moveaxis(array, len(self.batch), 0) if self.time_major else array

    def fold_states(self, carry: Any, layers: int = 1) -> Any:
        """Join the batch axes of states into one; `layers` axes come before them."""
        after = layers + len(self.batch)
        return jax.tree.map(
            lambda s: s.reshape(*s.shape[:layers], self.rows, *s.shape[after:]), carry
        )

    def unfold_states(self, carry: Any, layers: int = 1) -> Any:
        """Undo `fold_states`."""
        return jax.tree.map(
            lambda s: s.reshape(*s.shape[:layers], *self.batch, *s.shape[layers + 1 :]), carry
        )


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Which steps are valid, where the carry is reset, and how to restore the caller's order.

    Attributes:
        axes: the caller's axes.
        lengths: int32 [rows], number of valid steps, which come first in a row; None: all steps.
        mask: bool [rows, time], valid steps in the caller's order; None: the same order as in rows.
        resets: bool [rows, time], steps before which the carry is reset; None: no step.
    """

    axes: Axes
    lengths: jax.Array | None = None
    mask: jax.Array | None = None
    resets: jax.Array | None = None

    @classmethod
    def of(
        cls,
        axes: Axes,
        lengths: jax.Array | None,
        mask: jax.Array | None,
        resets: jax.Array | None,
    ) -> "Sequences":
        """Build them from checked arguments in the caller's axes."""
        lengths = None if lengths is None else lengths.reshape(axes.rows)
        mask = None if mask is None else axes.fold(mask)
        if mask is not None and lengths is not None:
            mask = mask & is_valid_step(lengths, axes.time)
        if mask is not None:
            lengths = mask.sum(axis=1, dtype=jnp.int32)
        found = cls(axes, lengths, mask)
        return found if resets is None else dataclasses.replace(found, resets=found.to_rows(resets))

    @property
    def is_valid(self) -> jax.Array | None:
        """Valid steps of the rows, bool [rows, time]; None: all steps."""
        return None if self.lengths is None else is_valid_step(self.lengths, self.axes.time)

    def to_rows(self, x: jax.Array) -> jax.Array:
        """Turn x, or flags of its steps, into rows; steps that are not valid become zero."""
        x = self._close(self.axes.fold(x))
        if self.is_valid is None:
            return x
        # `where` keeps a NaN there from reaching a gradient as 0 x NaN.
        return where(self.is_valid, x, jnp.zeros_like(x))

    def to_caller(
        self, steps: jax.Array, before: Sequence[jax.Array] = (), reverse: bool = False
    ) -> jax.Array:
        """Turn steps of rows into the caller's order and axes.

        Steps that are not valid get zeros, or hold the latest value of each direction.

        Args:
            steps: [rows, time, ...]; the features of two directions lie side by side.
            before: what each direction holds before its first step, [rows, ...]. Empty: zeros are
                wanted.
            reverse: the only direction is the reverse one.
        """
        counts = self.is_valid if self.mask is None else self.mask
        if counts is None or (self.mask is None and not before) or 0 in steps.shape:
            return self.axes.unfold(steps)
        # How many steps up to this one, and with it, are valid.
        counted = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
        if not before:
            shown = where(counts, self._take(steps, counted - 1), jnp.zeros_like(steps))
            return self.axes.unfold(shown)
        sides = []
        for d, side in enumerate(jnp.split(steps, len(before), axis=-1)):
            is_reverse = reverse or d == 1
            latest = counted - counts.astype(jnp.int32) if is_reverse else counted - 1
            is_there = (latest >= 0) & (latest < counted[:, -1:])
            first = jnp.broadcast_to(before[d][:, None], side.shape)
            sides.append(where(is_there, self._take(side, latest), first))
        return self.axes.unfold(jnp.concatenate(sides, axis=-1))

    def _take(self, steps: jax.Array, numbers: jax.Array) -> jax.Array:
        """Gather steps by their numbers [rows, time]; numbers out of range give any step."""
        numbers = jnp.clip(numbers, 0, self.axes.time - 1)
        return jnp.take_along_axis(steps, _like(numbers, steps), axis=1)

    def _close(self, steps: jax.Array) -> jax.Array:
        """Move valid steps to the front and keep their order."""
        if self.mask is None or 0 in steps.shape:
            return steps
        order = jnp.argsort(~self.mask, axis=1, stable=True)
        return jnp.take_along_axis(steps, _like(order, steps), axis=1)


def where(flags: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.where` with flags for the first axes."""
    return jnp.where(_like(flags, a), a, b)


def flip(steps: jax.Array, lengths: jax.Array) -> jax.Array:
    """Reverse the valid steps of each row [rows, time, ...]; the padding stays at the end."""
    time = steps.shape[1]
    order = (jnp.arange(time - 1, -1, -1, dtype=lengths.dtype)[None] + lengths[:, None]) % time
    return jnp.take_along_axis(steps, _like(order, steps), axis=1)


def _like(flags: jax.Array, array: jax.Array) -> jax.Array:
    """Append axes of size one, so that flags broadcast against the array."""
    return flags.reshape(*flags.shape, *(1,) * (array.ndim - flags.ndim))


def check_lengths(seq_lengths: Any, axes: Axes) -> jax.Array:
    """Return lengths as int32 [...], from 0 to time; traced ones are clipped, not refused.

    Raises:
        ValueError: the lengths have another shape, are not integers, or are out of range.
    """
    lengths = as_array("seq_lengths", seq_lengths)
    if lengths.shape != axes.batch or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"seq_lengths has shape {lengths.shape} and dtype {lengths.dtype}, "
            f"not {axes.batch} and integers"
        )
    if not isinstance(lengths, jax.core.Tracer):
        wrong = np.asarray(lengths)[(np.asarray(lengths) < 0) | (np.asarray(lengths) > axes.time)]
        if wrong.size:
            raise ValueError(f"seq_lengths must lie in 0..{axes.time}, but has {wrong.tolist()}")
    return jnp.clip(lengths, 0, axes.time).astype(jnp.int32)


def check_flags(name: str, flags: Any, axes: Axes) -> jax.Array:
    """Return flags as bool, one per step.

    Raises:
        ValueError: the flags have another shape or dtype.
    """
    flags = as_array(name, flags)
    if flags.shape != axes.steps or flags.dtype != bool:
        raise ValueError(
            f"{name} has shape {flags.shape} and dtype {flags.dtype}, not {axes.steps} and bool"
        )
    return flags
