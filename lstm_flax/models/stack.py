"""Stacks of recurrent layers: cells inside `nn.scan` over time, with PyTorch's calls and shapes.

What all kinds of stack share is here, once: layers, directions, lengths, dropout, zoneout and the
initial carry. What differs, one step of one layer, is each kind's own cell.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer

from lstm_flax.models.cell import RecurrentCell

logger = logging.getLogger("lstm_flax")

IMPLEMENTATIONS = ("auto", "scan", "native")

Carry = Any
"""`h`, or for the LSTM `(h, c)`; in a stack each has a leading axis of layers x directions."""


class _Step(nn.Module):
    """One time step of some layers, each of which reads the output of the one below it."""

    cells: tuple[RecurrentCell, ...]
    zoneout: Carry  # rates, shaped as a cell's carry
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        carries: tuple[Carry, ...],
        x: jax.Array,
        is_valid: jax.Array | None,
        hidden_masks: tuple[jax.Array | None, ...],
    ) -> tuple[tuple[Carry, ...], jax.Array]:
        advanced = []
        for cell, carry, mask in zip(self.cells, carries, hidden_masks, strict=True):
            new = jax.tree.map(self._zone_out, self.zoneout, carry, cell(carry, x, mask))
            if is_valid is not None:
                new = jax.tree.map(lambda n, o: jnp.where(is_valid[:, None], n, o), new, carry)
            advanced.append(new)
            x = cell.hidden(new)
        if is_valid is not None:
            x = jnp.where(is_valid[:, None], x, jnp.zeros_like(x))
        return tuple(advanced), x

    def _zone_out(self, rate: float, old: jax.Array, new: jax.Array) -> jax.Array:
        """Keep units as they were: at random in training, in the mean otherwise."""
        if rate == 0:
            return new
        if self.deterministic:
            return rate * old + (1 - rate) * new
        kept = jax.random.bernoulli(self.make_rng("dropout"), rate, new.shape)
        return jnp.where(kept, old, new)


class RecurrentStack(nn.Module):
    """What all stacks share; see `LSTMStack` for the call and the attributes."""

    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    layer_norm: bool = False
    time_major: bool = False
    kernel_init: Initializer = nn.initializers.glorot_uniform()
    recurrent_init: Initializer = nn.initializers.orthogonal()
    bias_init: Initializer = nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: Literal["auto", "scan", "native"] = "auto"

    def make_cell(self, name: str) -> RecurrentCell:
        """Make the cell of one layer and direction."""
        raise NotImplementedError

    def zoneout_rates(self) -> Carry:
        """The zoneout rates, shaped as a cell's carry."""
        return self.zoneout

    def cell_options(self) -> dict[str, Any]:
        """The attributes that every cell has, as the stack's own say."""
        names = (
            "use_bias", "layer_norm", "kernel_init", "recurrent_init", "bias_init", "dtype",
            "param_dtype", "precision",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        initial_carry: Carry | None = None,
        *,
        seq_lengths: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Carry]:
        """Run whole sequences.

        Args:
            x: [batch, time, features], or [time, batch, features] with `time_major`.
            initial_carry: `(h_0, c_0)`, or `h_0` where the cell has one state, each
                [num_layers * directions, batch, its size]; zeros if None.
            seq_lengths: [batch], integers from 1 to time: steps of each right-padded sequence.
                Padding reaches neither outputs, which are zero there, nor the carry, nor any
                gradient; the reverse direction starts at each sequence's own end. Under a
                transformation, where lengths can't be checked, one beyond time counts as time,
                and one below 1 leaves the initial carry and zero outputs.
            deterministic: switches dropout and zoneout's sampling off.

        Returns:
            `(outputs, carry)`: the top layer's output at every step, [batch, time,
            size * directions], forward before reverse, and the final states of every layer and
            direction, shaped as `initial_carry`, in PyTorch's order.

        Raises:
            ValueError: x, a state of `initial_carry` or `seq_lengths` is misshapen, or a length
                is out of range.
        """
        if x.ndim != 3:
            raise ValueError(f"x has shape {x.shape}, not [batch, time, features]")
        x, lengths, is_valid = self._without_padding(x, seq_lengths)
        directions = ("", "_reverse") if self.bidirectional else ("",)
        layers = [
            [self.make_cell(f"l{layer}{direction}") for direction in directions]
            for layer in range(self.num_layers)
        ]
        cells = [cell for layer in layers for cell in layer]
        carries = [cell.initial_carry(x.shape[1 - self._time_axis]) for cell in cells]
        if initial_carry is not None:
            carries = _split_layers(initial_carry, carries)

        is_native = self._is_native(x, deterministic)
        drops = self.dropout > 0 and not deterministic
        if not (self.bidirectional or is_native or drops):
            # All layers advance together, in one scan.
            final, x = self._scan(cells, carries, x, is_valid, deterministic)
            return x, _join_layers(final)

        final = ()
        for k, layer in enumerate(layers):
            if k > 0:
                x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
            outputs = []
            for d, cell in enumerate(layer):
                carry = carries[len(layer) * k + d]
                if is_native:
                    last, output = self.run_native(cell, carry, x, lengths, reverse=d == 1)
                else:
                    last, output = self._scan(
                        [cell], [carry], x, is_valid, deterministic, reverse=d == 1
                    )
                final += tuple(last)
                outputs.append(output)
            x = jnp.concatenate(outputs, axis=-1) if self.bidirectional else outputs[0]
        return x, _join_layers(final)

    @property
    def _time_axis(self) -> int:
        return 0 if self.time_major else 1

    def _without_padding(
        self, x: jax.Array, seq_lengths: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """`(x, lengths, is_valid)`: zeros for padding, int32 [batch], bool [batch, time]."""
        if seq_lengths is None:
            return x, None, None
        batch, time = x.shape[1 - self._time_axis], x.shape[self._time_axis]
        lengths = _check_lengths(seq_lengths, batch, time)
        steps = jnp.arange(time, dtype=jnp.int32)
        is_valid = steps[:, None] < lengths if self.time_major else steps < lengths[:, None]
        # Not even a NaN in the padding may come back as 0 x NaN in a gradient.
        return jnp.where(is_valid[:, :, None], x, jnp.zeros_like(x)), lengths, is_valid

    def _scan(
        self,
        cells: Sequence[RecurrentCell],
        carries: Sequence[Carry],
        x: jax.Array,
        is_valid: jax.Array | None,
        deterministic: bool,
        reverse: bool = False,
    ) -> tuple[tuple[Carry, ...], jax.Array]:
        """Run cells over time, each on the output of the one before it."""
        axis = self._time_axis
        step = nn.scan(
            _Step,
            variable_broadcast="params",
            variable_axes={"gates": axis},
            split_rngs={"params": False, "dropout": True},
            in_axes=(axis, axis, nn.broadcast),
            out_axes=axis,
            reverse=reverse,
        )(tuple(cells), self.zoneout_rates(), deterministic)
        batch = x.shape[1 - axis]
        masks = tuple(self._hidden_mask(cell, batch, deterministic) for cell in cells)
        return step(tuple(carries), x, is_valid, masks)

    def why_not_native(self, x: jax.Array, deterministic: bool = True) -> str | None:
        """Say in a few words why `__call__` scans in place of the native kernel; None: it won't."""
        return f"there is none for {type(self).__name__}"

    def run_native(
        self, cell: RecurrentCell, carry: Carry, x: jax.Array, lengths: Any, reverse: bool
    ) -> tuple[tuple[Carry], jax.Array]:
        """Run one layer and direction by its native kernel, as the scan does."""
        raise NotImplementedError

    def _is_native(self, x: jax.Array, deterministic: bool) -> bool:
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation is {self.implementation!r}, not {IMPLEMENTATIONS}")
        if self.implementation == "scan" or self.is_initializing():
            return False
        reason = self.why_not_native(x, deterministic)
        if reason and self.implementation == "native":
            warnings.warn(f"implementation='native' scans: {reason}", stacklevel=2)
        elif reason:
            logger.info("implementation='auto' scans: %s", reason)
        return reason is None

    def _hidden_mask(
        self, cell: RecurrentCell, batch: int, deterministic: bool
    ) -> jax.Array | None:
        """One dropout mask a sequence for `h_{t-1}`, scaled so that its mean is one."""
        if deterministic or self.recurrent_dropout == 0:
            return None
        keep = 1 - self.recurrent_dropout
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (batch, cell.output_size))
        return kept.astype(cell.compute_dtype) / keep


def _check_lengths(seq_lengths: jax.Array, batch: int, time: int) -> jax.Array:
    lengths = jnp.asarray(seq_lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"seq_lengths has shape {lengths.shape} and dtype {lengths.dtype}, "
            f"not ({batch},) and integers"
        )
    if not isinstance(lengths, jax.core.Tracer):
        wrong = np.asarray(lengths)[(np.asarray(lengths) < 1) | (np.asarray(lengths) > time)]
        if wrong.size:
            raise ValueError(f"seq_lengths must lie in 1..{time}, but has {wrong.tolist()}")
    return lengths.astype(jnp.int32)


def _split_layers(initial_carry: Carry, like: Sequence[Carry]) -> list[Carry]:
    """A stack's carry as one carry a cell, in the dtypes that the cells keep."""
    stacked = _join_layers(like)
    given, expected = jax.tree.structure(initial_carry), jax.tree.structure(stacked)
    if given != expected:  # type: ignore[operator]  # jaxlib declares no __ne__
        raise ValueError(f"initial_carry has the structure {given}, not {expected}")
    names = ("h_0", "c_0")
    for name, state, zeros in zip(
        names, jax.tree.leaves(initial_carry), jax.tree.leaves(stacked), strict=False
    ):
        if state.shape != zeros.shape:
            raise ValueError(f"initial_carry: {name} has shape {state.shape}, not {zeros.shape}")
    return [
        jax.tree.map(lambda state, zero, k=k: state[k].astype(zero.dtype), initial_carry, zeros)
        for k, zeros in enumerate(like)
    ]


def _join_layers(carries: Sequence[Carry]) -> Carry:
    return jax.tree.map(lambda *states: jnp.stack(states), *carries)
