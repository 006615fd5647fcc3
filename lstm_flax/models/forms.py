"""The forms in which a caller has sequences, and the one in which layers run them.

A caller's x is [..., time, features]: one sequence, a batch of them, or several batch axes. Some of
its steps may not count. Layers run rows [rows, time, features], a sequence each, of which the first
`lengths` steps count. `Sequences` leads from the one to the other and back.
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
    """The axes of a caller's x, [..., time, features] or [time, ..., features].

    Attributes:
        batch: the sizes of those before time, or after it with `time_major`.
        time: steps.
        time_major: time is the first axis.
    """

    batch: tuple[int, ...]
    time: int
    time_major: bool

    @classmethod
    def of(cls, shape: Sequence[int], time_major: bool, feature_axes: int = 1) -> "Axes":
        """The axes of an x of this shape.

        Raises:
            ValueError: it has too few axes.
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
        """The shape of an array with one entry a step, as the caller has it."""
        return (self.time, *self.batch) if self.time_major else (*self.batch, self.time)

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return math.prod(self.batch)

    def fold(self, array: jax.Array) -> jax.Array:
        """The caller's [..., time, *rest] as [rows, time, *rest]."""
        count = len(self.batch)
        array = jnp.moveaxis(array, 0, count) if self.time_major else array
        return array.reshape(self.rows, *array.shape[count:])

    def unfold(self, array: jax.Array) -> jax.Array:
        """Undo `fold`."""
        array = array.reshape(*self.batch, *array.shape[1:])
        return jnp.moveaxis(array, len(self.batch), 0) if self.time_major else array

    def fold_states(self, carry: Any, layers: int = 1) -> Any:
        """The batch axes of states as one; so many axes, of layers, come before it."""
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
    """Which steps count, where the carry starts anew, and the way back to the caller's order.

    Attributes:
        axes: the caller's.
        lengths: int32 [rows], steps that count, which are a row's first; None: all.
        mask: bool [rows, time], those that count in the caller's order; None: as in a row.
        resets: bool [rows, time], steps before which the carry starts anew; None: none.
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
        """From checked arguments, in the caller's axes."""
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
        """Bool [rows, time], steps of a row that count; None: all."""
        return None if self.lengths is None else is_valid_step(self.lengths, self.axes.time)

    def to_rows(self, x: jax.Array) -> jax.Array:
        """The caller's x, or flags of steps, as rows, with zeros for what does not count."""
        x = self._close(self.axes.fold(x))
        if self.is_valid is None:
            return x
        # Not even a NaN there may come back as 0 x NaN in a gradient.
        return where(self.is_valid, x, jnp.zeros_like(x))

    def to_caller(
        self, steps: jax.Array, before: Sequence[jax.Array] = (), reverse: bool = False
    ) -> jax.Array:
        """Steps of rows in the caller's order and axes.

        Where steps do not count there are zeros, or what each direction had before it.

        Args:
            steps: [rows, time, ...], zero in the padding of rows if that is to be so.
            before: for each direction, whose features lie side by side in `steps`, what it had
                before its first step, [rows, ...]. Empty: there are to be zeros.
            reverse: the only direction is the reverse one.
        """
        counts = self.is_valid if self.mask is None else self.mask
        if counts is None or (self.mask is None and not before) or 0 in steps.shape:
            return self.axes.unfold(steps)
        # How many steps of the row have counted, this one included.
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
        """The steps of such numbers [rows, time]; any will do where there is none."""
        numbers = jnp.clip(numbers, 0, self.axes.time - 1)
        return jnp.take_along_axis(steps, _like(numbers, steps), axis=1)

    def _close(self, steps: jax.Array) -> jax.Array:
        """Steps that count move to the front, in their order."""
        if self.mask is None or 0 in steps.shape:
            return steps
        order = jnp.argsort(~self.mask, axis=1, stable=True)
        return jnp.take_along_axis(steps, _like(order, steps), axis=1)


def where(flags: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.where` with flags for the first axes."""
    return jnp.where(_like(flags, a), a, b)


def flip(steps: jax.Array, lengths: jax.Array) -> jax.Array:
    """Turn each row [rows, time, ...] around, its padding staying at the end."""
    time = steps.shape[1]
    order = (jnp.arange(time - 1, -1, -1, dtype=lengths.dtype)[None] + lengths[:, None]) % time
    return jnp.take_along_axis(steps, _like(order, steps), axis=1)


def _like(flags: jax.Array, array: jax.Array) -> jax.Array:
    """With axes of one at the end, to go with an array of more."""
    return flags.reshape(*flags.shape, *(1,) * (array.ndim - flags.ndim))


def check_lengths(seq_lengths: Any, axes: Axes) -> jax.Array:
    """Lengths as int32 [...], from 0 to time; only those that are known can be refused.

    Raises:
        ValueError: they have another shape, are no integers, or are out of range.
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
    """Flags as bool, one a step.

    Raises:
        ValueError: they have another shape or dtype.
    """
    flags = as_array(name, flags)
    if flags.shape != axes.steps or flags.dtype != bool:
        raise ValueError(
            f"{name} has shape {flags.shape} and dtype {flags.dtype}, not {axes.steps} and bool"
        )
    return flags
