"""Stacks of recurrent layers: cells inside `nn.scan` over time, with PyTorch's calls and shapes.

What all kinds of stack share is here, once: layers, directions, lengths, dropout, zoneout and the
initial carry. What differs, one step of one layer, is each kind's own cell.
"""

import logging
import re
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer

from lstm_flax.arguments import (
    as_array,
    as_floats,
    check_choice,
    check_integer,
    check_rate,
)
from lstm_flax.models.cell import RecurrentCell, check_carry, glorot_uniform, note, orthogonal
from lstm_flax.models.lstm_layer import is_valid_step

logger = logging.getLogger("lstm_flax")

IMPLEMENTATIONS = ("auto", "scan", "native", "pallas", "cudnn")
PLATFORMS = {"native": "cpu", "pallas": "tpu"}  # that their kernels are for

Carry = Any
"""`h`, or for the LSTM `(h, c)`; in a stack each has a leading axis of layers x directions."""


class _Step(nn.Module):
    """One time step of some layers, each of which reads the output of the one below it."""

    cells: tuple[RecurrentCell, ...]
    zoneout: Carry  # rates, shaped as a cell's carry
    deterministic: bool
    with_gates: bool

    @nn.compact
    def __call__(
        self,
        carries: tuple[Carry, ...],
        x: jax.Array,
        is_valid: jax.Array | None,
        hidden_masks: tuple[jax.Array | None, ...],
    ) -> tuple[tuple[Carry, ...], tuple[jax.Array, tuple[dict[str, jax.Array], ...]]]:
        advanced, shown = [], []
        for cell, carry, mask in zip(self.cells, carries, hidden_masks, strict=True):
            new, gates = cell.step(cell.weights(x.shape[-1]), carry, x, mask)
            new = jax.tree.map(self._zone_out, self.zoneout, carry, new)
            if is_valid is not None:
                new = jax.tree.map(lambda n, o: jnp.where(is_valid[:, None], n, o), new, carry)
            advanced.append(new)
            shown.append(gates if self.with_gates else {})
            x = cell.hidden(new)
        if is_valid is not None:
            x = jnp.where(is_valid[:, None], x, jnp.zeros_like(x))
        return tuple(advanced), (x, tuple(shown))

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
    kernel_init: Initializer = glorot_uniform
    recurrent_init: Initializer = orthogonal
    bias_init: Initializer = nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: Literal["auto", "scan", "native", "pallas", "cudnn"] = "auto"
    return_carry: bool = True

    def __post_init__(self) -> None:
        self.check_attributes()
        # Flax makes copies, each with a parent; those are not to warn again.
        is_the_callers = self.parent is type(self).__dataclass_fields__["parent"].default
        if self.dropout > 0 and self.num_layers == 1 and is_the_callers:
            warnings.warn(
                f"dropout={self.dropout} drops nothing in a stack of one layer: "
                f"it lies between layers",
                stacklevel=3,
            )
        super().__post_init__()

    def check_attributes(self) -> None:
        """Refuse values that attributes can't have.

        Raises:
            ValueError: one of them has such a value.
        """
        self.make_cell(None)  # which checks what is its own
        check_integer("num_layers", self.num_layers)
        check_rate("dropout", self.dropout, may_be_one=True)
        check_rate("recurrent_dropout", self.recurrent_dropout)
        check_rate("zoneout", self.zoneout, may_be_one=True)
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)

    def make_cell(self, name: str | None) -> RecurrentCell:
        """Make the cell of one layer and direction; without a name one by itself."""
        raise NotImplementedError

    def zoneout_rates(self) -> Carry:
        """The zoneout rates, shaped as a cell's carry."""
        return self.zoneout

    def cell_options(self, cell_name: str | None) -> dict[str, Any]:
        """The attributes that every cell has, as the stack's own say."""
        names = (
            "use_bias", "layer_norm", "kernel_init", "recurrent_init", "bias_init", "dtype",
            "param_dtype", "precision",
        )  # fmt: skip
        place = {"parent": None} if cell_name is None else {"name": cell_name}
        return {name: getattr(self, name) for name in names} | place

    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Carry:
        """The zero carry, in the dtypes that the stack returns it in.

        With `dtype` bfloat16 that is a bfloat16 `h` and, for the LSTM, a float32 `c`.

            >>> import jax
            >>> from lstm_flax import LSTMStack
            >>> h_0, c_0 = LSTMStack(16, num_layers=2).initialize_carry(None, (3, 7, 5))
            >>> h_0.shape, c_0.shape
            ((2, 3, 16), (2, 3, 16))

        Args:
            rng: not used; it is there for the sake of flax's cells, whose carry may be random.
            input_shape: of x, [batch, time, features], or [time, batch, features] with
                `time_major`.
        """
        batch = input_shape[1 - self._time_axis]
        zeros = self.make_cell(None).initialize_carry(rng, (batch, input_shape[-1]))
        return _join_layers([zeros] * (self.num_layers * self._num_directions))

    def __call__(
        self,
        x: jax.Array,
        initial_carry: Carry | None = None,
        *,
        seq_lengths: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Run whole sequences.

        Args:
            x: floating, [batch, time, features], or [time, batch, features] with `time_major`.
                Without any sequence the results are empty; without any step the outputs are, and
                the carry is the initial one.
            initial_carry: `(h_0, c_0)`, or `h_0` where the cell has one state, each
                [num_layers * directions, batch, its size]; zeros if None.
            seq_lengths: [batch], integers from 0 to time: steps of each right-padded sequence.
                Padding reaches neither outputs, which are zero there, nor the carry, nor any
                gradient; the reverse direction starts at each sequence's own end. A sequence of
                length 0 leaves its initial carry. Under a transformation, where lengths can't be
                checked, one beyond time counts as time, and one below 0 as 0.
            deterministic: switches dropout and zoneout's sampling off.

        Returns:
            `(outputs, carry)`: the top layer's output at every step, [batch, time,
            size * directions], forward before reverse, and the final states of every layer and
            direction, shaped as `initial_carry`, in PyTorch's order: `h_n[-1]` is the top layer's
            at each sequence's last valid step. With `return_carry=False` the outputs alone.

        Raises:
            ValueError: x, a state of `initial_carry` or `seq_lengths` is misshapen or of a wrong
                dtype, a length is out of range, or there is a parameter that does not belong here.
            flax.errors.ScopeParamShapeError: a parameter does not have the shape that x and the
                attributes ask for.
        """
        outputs, carry = self.run(
            x, initial_carry, seq_lengths=seq_lengths, deterministic=deterministic
        )
        return (outputs, carry) if self.return_carry else outputs

    def run(
        self,
        x: jax.Array,
        initial_carry: Carry | None = None,
        *,
        seq_lengths: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Carry]:
        """Do what `__call__` does, and return `(outputs, carry)` also with `return_carry=False`."""
        x = as_floats("x", x)
        if x.ndim != 3:
            axes = "[time, batch, features]" if self.time_major else "[batch, time, features]"
            raise ValueError(f"x has shape {x.shape}, not {axes}")
        if initial_carry is not None:
            zeros = jax.eval_shape(lambda: self.initialize_carry(None, x.shape))
            initial_carry = check_carry("initial_carry", initial_carry, zeros, ("h_0", "c_0"))
        if seq_lengths is not None:
            batch, time = x.shape[1 - self._time_axis], x.shape[self._time_axis]
            seq_lengths = _check_lengths(seq_lengths, batch, time)
        how = self._choose(x, deterministic)
        # A scan outside of `jax.jit` would compile anew at each call.
        is_eager = not isinstance(x, jax.core.Tracer) and deterministic
        if is_eager and not (self.is_initializing() or self.is_asked_for_gates()):
            return self._run_compiled(x, initial_carry, seq_lengths, how=how)
        return self._run(x, initial_carry, seq_lengths, how, deterministic)

    @partial(nn.jit, static_argnames="how")
    def _run_compiled(self, x, initial_carry, lengths, how):
        return self._run(x, initial_carry, lengths, how, deterministic=True)

    @nn.compact
    def _run(
        self,
        x: jax.Array,
        initial_carry: Carry | None,
        lengths: jax.Array | None,
        how: str,
        deterministic: bool,
    ) -> tuple[jax.Array, Carry]:
        x, is_valid = self._without_padding(x, lengths)
        directions = ("", "_reverse") if self.bidirectional else ("",)
        names = [f"l{k}{direction}" for k in range(self.num_layers) for direction in directions]
        self._refuse_other_layers(names)
        cells = [self.make_cell(name) for name in names]
        if initial_carry is None:
            carries = [self._zero_carry(cell, x) for cell in cells]
        else:
            carries = [jax.tree.map(lambda s, k=k: s[k], initial_carry) for k in range(len(cells))]

        drops = self.dropout > 0 and not deterministic
        if how == "cudnn":
            return self._run_cudnn(cells, carries, x, lengths, layers_at_once=1 if drops else None)
        if not (self.bidirectional or how == "layer" or drops):
            # All layers advance together, in one scan.
            final, x = self._scan(cells, carries, x, is_valid, deterministic)
            return x, _join_layers(final)

        final = ()
        for k in range(self.num_layers):
            if k > 0:
                x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
            outputs = []
            for d in range(len(directions)):
                cell, carry = cells[len(directions) * k + d], carries[len(directions) * k + d]
                if how == "layer":
                    last, output = self._run_layer(cell, carry, x, lengths, reverse=d == 1)
                else:
                    last, output = self._scan(
                        [cell], [carry], x, is_valid, deterministic, reverse=d == 1
                    )
                final += tuple(last)
                outputs.append(output)
            x = jnp.concatenate(outputs, axis=-1) if self.bidirectional else outputs[0]
        return x, _join_layers(final)

    def is_asked_for_gates(self) -> bool:
        """Whether this call is to keep the gates: `apply(..., mutable="gates")`."""
        is_bound = self.scope is not None and not self.is_initializing()
        return is_bound and self.is_mutable_collection("gates")

    @property
    def _time_axis(self) -> int:
        return 0 if self.time_major else 1

    @property
    def _num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _refuse_other_layers(self, names: Sequence[str]) -> None:
        given = self.variables.get("params", {})
        others = [n for n in given if re.fullmatch(r"l\d+(_reverse)?", n) and n not in names]
        if others:
            raise ValueError(
                f"params has {'/'.join((*self.path, others[0]))}, which this {type(self).__name__} "
                f"does not have; it has {', '.join(names)}"
            )

    def _zero_carry(self, cell: RecurrentCell, x: jax.Array) -> Carry:
        """A cell's zero carry, on the devices and mesh axes that x is on."""
        zeros = jnp.zeros_like(x).sum((self._time_axis, 2))[:, None]
        like = jax.eval_shape(lambda: cell.initialize_carry(None, (zeros.shape[0], x.shape[-1])))
        return jax.tree.map(lambda s: jnp.broadcast_to(zeros, s.shape).astype(s.dtype), like)

    def _without_padding(
        self, x: jax.Array, lengths: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """`(x, is_valid)`: zeros for padding, and bool [batch, time] or [time, batch] as x is."""
        if lengths is None:
            return x, None
        is_valid = is_valid_step(lengths, x.shape[self._time_axis])
        is_valid = is_valid.T if self.time_major else is_valid
        # Not even a NaN in the padding may come back as 0 x NaN in a gradient.
        return jnp.where(is_valid[:, :, None], x, jnp.zeros_like(x)), is_valid

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
            split_rngs={"params": False, "dropout": True},
            in_axes=(axis, axis, nn.broadcast),
            out_axes=axis,
            reverse=reverse,
        )(tuple(cells), self.zoneout_rates(), deterministic, self.is_asked_for_gates())
        batch = x.shape[1 - axis]
        masks = tuple(self._hidden_mask(cell, batch, deterministic) for cell in cells)
        final, (outputs, shown) = step(tuple(carries), x, is_valid, masks)
        for cell, gates in zip(cells, shown, strict=True):
            cell.show(gates, replace=not note(self, f"_has_shown_{cell.name}"))
        return final, outputs

    def why_not_native(self, x: jax.Array, deterministic: bool = True) -> str | None:
        """Say in a few words why no kernel of this machine runs in `__call__`; None: one does.

        Args:
            x: what it would be called with.
            deterministic: the same.
        """
        reason = self.why_not_layer(x, deterministic)
        return reason or self.why_no_kernel(x, _platform())

    def why_not_layer(self, x: jax.Array, deterministic: bool = True) -> str | None:
        """Say in a few words why `__call__` scans cells wherever it runs; None: it won't."""
        return f"there is none for {type(self).__name__}"

    def why_no_kernel(self, x: jax.Array, platform: str) -> str | None:
        """Say in a few words why a platform has no kernel for x; None: it has one."""
        raise NotImplementedError

    def run_layer(
        self, cell: RecurrentCell, carry: Carry, x: jax.Array, lengths: jax.Array, reverse: bool
    ) -> tuple[Carry, jax.Array]:
        """Run one layer and direction over x [batch, time, features] as one operation."""
        raise NotImplementedError

    def run_cudnn(
        self, cells: Sequence[RecurrentCell], carries: Sequence[Carry], x: jax.Array,
        lengths: jax.Array,
    ) -> tuple[tuple[Carry, ...], jax.Array]:  # fmt: skip
        """Run layers over x [batch, time, features] as one operation, which cuDNN has."""
        raise NotImplementedError

    def _run_cudnn(
        self,
        cells: Sequence[RecurrentCell],
        carries: Sequence[Carry],
        x: jax.Array,
        lengths: jax.Array | None,
        layers_at_once: int | None,
    ) -> tuple[jax.Array, Carry]:
        x = x.swapaxes(0, 1) if self.time_major else x
        if lengths is None:
            lengths = jnp.full(len(x), x.shape[1], jnp.int32)
        at_once = self._num_directions * (layers_at_once or self.num_layers)
        final: tuple[Carry, ...] = ()
        for k in range(0, len(cells), at_once):
            if k > 0:
                x = nn.Dropout(self.dropout, deterministic=False)(x)
            last, x = self.run_cudnn(cells[k : k + at_once], carries[k : k + at_once], x, lengths)
            final += last
        return x.swapaxes(0, 1) if self.time_major else x, _join_layers(final)

    def _run_layer(
        self,
        cell: RecurrentCell,
        carry: Carry,
        x: jax.Array,
        lengths: jax.Array | None,
        reverse: bool,
    ) -> tuple[tuple[Carry], jax.Array]:
        x = x.swapaxes(0, 1) if self.time_major else x
        if lengths is None:
            lengths = jnp.full(len(x), x.shape[1], jnp.int32)
        final, outputs = self.run_layer(cell, carry, x, lengths, reverse)
        return (final,), outputs.swapaxes(0, 1) if self.time_major else outputs

    def _choose(self, x: jax.Array, deterministic: bool) -> str:
        """How layers run: "scan", or one operation for a "layer", or for several by "cudnn"."""
        asked = self.implementation
        if asked == "scan" or self.is_initializing():
            return "scan"
        reason = self.why_not_layer(x, deterministic)
        if asked == "auto":
            if reason:
                logger.info("implementation='auto' scans: %s", reason)
                return "scan"
            is_cudnn = _platform() == "cuda" and self.why_no_kernel(x, "cuda") is None
            return "cudnn" if is_cudnn else "layer"
        if asked in PLATFORMS and PLATFORMS[asked] != _platform():
            reason = reason or f"not on a {PLATFORMS[asked].upper()}"
        if reason := reason or self.why_no_kernel(x, PLATFORMS.get(asked, "cuda")):
            warnings.warn(f"implementation={asked!r} scans: {reason}", stacklevel=2)
            return "scan"
        return "cudnn" if asked == "cudnn" else "layer"

    def _hidden_mask(
        self, cell: RecurrentCell, batch: int, deterministic: bool
    ) -> jax.Array | None:
        """One dropout mask a sequence for `h_{t-1}`, scaled so that its mean is one."""
        if deterministic or self.recurrent_dropout == 0:
            return None
        keep = 1 - self.recurrent_dropout
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (batch, cell.output_size))
        return kept.astype(cell.compute_dtype) / keep


def _platform() -> str:
    """This machine's, as JAX's lowering calls it."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def _check_lengths(seq_lengths: Any, batch: int, time: int) -> jax.Array:
    """Lengths as int32 [batch], from 0 to time; only those that are known can be refused."""
    lengths = as_array("seq_lengths", seq_lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"seq_lengths has shape {lengths.shape} and dtype {lengths.dtype}, "
            f"not ({batch},) and integers"
        )
    if not isinstance(lengths, jax.core.Tracer):
        wrong = np.asarray(lengths)[(np.asarray(lengths) < 0) | (np.asarray(lengths) > time)]
        if wrong.size:
            raise ValueError(f"seq_lengths must lie in 0..{time}, but has {wrong.tolist()}")
    return jnp.clip(lengths, 0, time).astype(jnp.int32)


def _join_layers(carries: Sequence[Carry]) -> Carry:
    return jax.tree.map(lambda *states: jnp.stack(states), *carries)
