"""Stacks of recurrent layers: cells inside `nn.scan` over time, with PyTorch's calls and shapes.

This module holds what all stacks share: layers, directions, lengths, dropout, zoneout and the
initial carry. Each kind of stack adds its own cell, which computes one step of one layer.
"""

import logging
import re
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import RNGSequences, VariableDict
from jax.nn.initializers import Initializer

from lstm_flax.arguments import as_floats, check_choice, check_flag, check_integer, check_rate
from lstm_flax.models.cell import (
    Activation,
    RecurrentCell,
    check_carry,
    glorot_uniform,
    nowrap_overridden,
    orthogonal,
)
from lstm_flax.models.forms import Axes, Sequences, check_flags, check_lengths, flip
from lstm_flax.models.short_help import ShortHelp
from lstm_flax.models.steps import check_unroll, is_asked_for_gates, scan_cells

logger = logging.getLogger("lstm_flax")

IMPLEMENTATIONS = ("auto", "scan", "native", "pallas", "cudnn")
PLATFORMS = {"native": "cpu", "pallas": "tpu"}  # where their kernels run

Carry = Any
"""`h`, or for the LSTM `(h, c)`; in a stack each has a leading axis of layers x directions."""

CarryT = TypeVar("CarryT")
"""The carry's type, which each kind of stack names, so that type checkers know what a call returns:
`(outputs, carry)`. With `return_carry=False`, which they can't see, it is the outputs alone."""


class RecurrentStack(nn.Module, Generic[CarryT], metaclass=ShortHelp):
    """The base of all stacks; `LSTMStack` documents the call and the attributes."""

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
    reverse: bool = False
    hold_outputs: bool = False
    activation: Activation = jax.lax.tanh
    unroll: int | bool = 1

    def __init_subclass__(cls, **options: Any) -> None:
        nowrap_overridden(cls, RecurrentStack)
        super().__init_subclass__(**options)

    def __post_init__(self) -> None:
        self.check_attributes()
        # Flax makes copies, each with a parent. Only the caller's own module warns.
        is_the_callers = self.parent is type(self).__dataclass_fields__["parent"].default
        if self.dropout > 0 and self.num_layers == 1 and is_the_callers:
            warnings.warn(
                f"dropout={self.dropout} drops nothing in a stack of one layer: "
                f"it lies between layers",
                stacklevel=3,
            )
        super().__post_init__()

    @nn.nowrap
    def check_attributes(self) -> None:
        """Check that the attributes are within their bounds.

        Raises:
            ValueError: one of them is not.
        """
        self.make_cell(None)  # checks the attributes that it shares
        check_integer("num_layers", self.num_layers)
        check_rate("dropout", self.dropout, may_be_one=True)
        check_rate("recurrent_dropout", self.recurrent_dropout)
        check_rate("zoneout", self.zoneout, may_be_one=True)
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        for name in ("bidirectional", "time_major", "return_carry", "reverse", "hold_outputs"):
            check_flag(name, getattr(self, name))
        check_unroll(self.unroll)
        if self.reverse and self.bidirectional:
            raise ValueError("reverse is for one direction: bidirectional has both already")

    @nn.nowrap
    def make_cell(self, name: str | None) -> RecurrentCell:
        """Make the cell of one layer and direction; without a name, one outside of any module."""
        raise NotImplementedError

    @nn.nowrap
    def zoneout_rates(self) -> Carry:
        """The zoneout rates, shaped as a cell's carry."""
        return self.zoneout

    @nn.nowrap
    def cell_options(self, cell_name: str | None) -> dict[str, Any]:
        """The attributes that the stack hands on to every cell."""
        names = (
            "use_bias", "layer_norm", "kernel_init", "recurrent_init", "bias_init", "dtype",
            "param_dtype", "precision", "activation",
        )  # fmt: skip
        place = {"parent": None} if cell_name is None else {"name": cell_name}
        return {name: getattr(self, name) for name in names} | place

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> CarryT:
        """Return the zero carry, in the dtypes that the stack returns.

        Args:
            rng: not used; Flax's interface has it, since a carry may be random.
            input_shape: of x, [..., time, features], or [time, ..., features] with `time_major`.
        """
        batch = Axes.of(input_shape, self.time_major).batch
        zeros = self.make_cell(None).initialize_carry(rng, (*batch, input_shape[-1]))
        return _join_layers([zeros] * (self.num_layers * len(self._directions)))

    def __call__(
        self,
        x: jax.Array,
        initial_carry: CarryT | None = None,
        *,
        seq_lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        resets: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, CarryT]:
        """Run whole sequences.

        Args:
            x: floating, [batch, time, features], or [time, batch, features] with `time_major`.
                There may be no batch axis, or several; [batch] stands for all of them.
            initial_carry: `(h_0, c_0)`, or `h_0` where the cell has one state, each
                [num_layers * directions, batch, its size]; zeros if None.
            seq_lengths: [batch], integers from 0 to time: the steps of each right-padded sequence.
                Padding reaches neither the carry nor any gradient, and outputs there are zero. The
                reverse direction starts at each sequence's own end. Traced lengths are clipped.
            mask: bool, shaped as x without features: True at valid steps, which may lie anywhere.
                The others are treated as padding. With `seq_lengths` as well, both must agree.
            resets: bool, shaped as x without features: the carry is set to zero before such a step:
                forward, the first of an episode; in reverse, its last. Kernels don't take resets.
            deterministic: switches dropout and zoneout's sampling off.

        Returns:
            `(outputs, carry)`, the top layer's output at every step, [batch, time,
            size * directions], forward before reverse, and the final states of every layer and
            direction, shaped as `initial_carry`, in PyTorch's order: `h_n[-1]` is the top layer's
            state at each sequence's last valid step. With `return_carry=False`, the outputs alone.

        Raises:
            ValueError: an argument has a wrong shape or dtype, a length is out of range, or a
                parameter does not belong here.
            flax.errors.ScopeParamShapeError: a parameter's shape does not fit x and the attributes.
        """
        outputs, carry = self.run(
            x,
            initial_carry,
            seq_lengths=seq_lengths,
            mask=mask,
            resets=resets,
            deterministic=deterministic,
        )
        return (outputs, carry) if self.return_carry else outputs  # type: ignore[return-value]

    if TYPE_CHECKING:  # Flax's own `apply` returns Any

        @overload
        def apply(
            self,
            variables: VariableDict,
            x: jax.Array,
            initial_carry: CarryT | None = None,
            *,
            seq_lengths: jax.Array | None = None,
            mask: jax.Array | None = None,
            resets: jax.Array | None = None,
            deterministic: bool = True,
            rngs: jax.Array | RNGSequences | None = None,
        ) -> tuple[jax.Array, CarryT]: ...

        @overload
        def apply(self, variables: VariableDict, *args: Any, **kwargs: Any) -> Any: ...

        def apply(self, variables: VariableDict, *args: Any, **kwargs: Any) -> Any:
            """Call the module with these variables."""

    def run(
        self,
        x: jax.Array,
        initial_carry: CarryT | None = None,
        *,
        seq_lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        resets: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, CarryT]:
        """Run `__call__`, but always return `(outputs, carry)`."""
        x = as_floats("x", x)
        axes = Axes.of(x.shape, self.time_major)
        if initial_carry is not None:
            zeros = jax.eval_shape(lambda: self.initialize_carry(None, x.shape))
            initial_carry = check_carry("initial_carry", initial_carry, zeros, ("h_0", "c_0"))
        lengths = None if seq_lengths is None else check_lengths(seq_lengths, axes)
        mask = None if mask is None else check_flags("mask", mask, axes)
        resets = None if resets is None else check_flags("resets", resets, axes)
        how = self._choose(x, deterministic, resets is not None)
        given = x, initial_carry, lengths, mask, resets
        # A scan outside of `jax.jit` would compile anew at each call.
        is_eager = not isinstance(x, jax.core.Tracer) and deterministic
        if is_eager and not (self.is_initializing() or is_asked_for_gates(self)):
            return self._run_compiled(*given, how=how)
        return self._run(*given, how, deterministic)

    @partial(nn.jit, static_argnames="how")
    def _run_compiled(self, x, initial_carry, lengths, mask, resets, how):
        return self._run(x, initial_carry, lengths, mask, resets, how, deterministic=True)

    @nn.compact
    def _run(
        self,
        x: jax.Array,
        initial_carry: Carry | None,
        lengths: jax.Array | None,
        mask: jax.Array | None,
        resets: jax.Array | None,
        how: str,
        deterministic: bool,
    ) -> tuple[jax.Array, Carry]:
        axes = Axes.of(x.shape, self.time_major)
        sequences = Sequences.of(axes, lengths, mask, resets)
        names = [f"l{k}{side}" for k in range(self.num_layers) for side in self._directions]
        refuse_other_layers(self, names)
        cells = [self.make_cell(name) for name in names]
        x = sequences.to_rows(x)
        if initial_carry is None:
            carries = [self._zero_carry(cell, x) for cell in cells]
        else:
            states = axes.fold_states(initial_carry)
            carries = [jax.tree.map(lambda s, k=k: s[k], states) for k in range(len(cells))]
        outputs, final = self._run_rows(cells, carries, x, sequences, how, deterministic)
        top = carries[-len(self._directions) :] if self.hold_outputs else []
        before = [cells[-1].hidden(carry) for carry in top]
        outputs = sequences.to_caller(outputs, before, self.reverse)
        return outputs, axes.unfold_states(_join_layers(final))

    def _run_rows(
        self,
        cells: Sequence[RecurrentCell],
        carries: Sequence[Carry],
        x: jax.Array,
        sequences: Sequences,
        how: str,
        deterministic: bool,
    ) -> tuple[jax.Array, Sequence[Carry]]:
        """Run all layers over x [rows, time, features]; carries come in the order of cells."""
        drops = self.dropout > 0 and not deterministic
        if how == "cudnn":
            at_once = 1 if drops else self.num_layers
            return self._run_cudnn(cells, carries, x, sequences.lengths, at_once)
        if not (self.bidirectional or how == "layer" or drops):
            # All layers advance together, in one scan.
            final, x = self._scan(cells, carries, x, sequences, deterministic, self.reverse)
            return x, final

        final = ()
        for k in range(self.num_layers):
            if k > 0:
                x = self._drop(x, deterministic)
            outputs = []
            for d in range(len(self._directions)):
                n = len(self._directions) * k + d
                reverse = self.reverse or d == 1
                if how == "layer":
                    lengths = _all_lengths(sequences.lengths, x)
                    last, output = self.run_layer(cells[n], carries[n], x, lengths, reverse)
                    final += (last,)
                else:
                    last, output = self._scan(
                        [cells[n]], [carries[n]], x, sequences, deterministic, reverse
                    )
                    final += last
                outputs.append(output)
            x = jnp.concatenate(outputs, axis=-1) if self.bidirectional else outputs[0]
        return x, final

    @nn.nowrap
    def is_asked_for_gates(self) -> bool:
        """Whether the caller asked to keep the gates: `apply(..., mutable="gates")`."""
        return is_asked_for_gates(self)

    @property
    def _directions(self) -> tuple[str, ...]:
        """The directions, by the suffix of their parameters' names."""
        return ("", "_reverse") if self.bidirectional else ("",)

    def _drop(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Apply dropout between layers, with masks drawn in the caller's order of axes."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        return drop(x.swapaxes(0, 1)).swapaxes(0, 1) if self.time_major else drop(x)

    def _zero_carry(self, cell: RecurrentCell, x: jax.Array) -> Carry:
        """A cell's zero carry, on the devices and mesh axes of x."""
        zeros = jnp.zeros_like(x).sum((1, 2))[:, None]
        like = jax.eval_shape(lambda: cell.initialize_carry(None, (zeros.shape[0], x.shape[-1])))
        return jax.tree.map(lambda s: jnp.broadcast_to(zeros, s.shape).astype(s.dtype), like)

    def _scan(
        self,
        cells: Sequence[RecurrentCell],
        carries: Sequence[Carry],
        x: jax.Array,
        sequences: Sequences,
        deterministic: bool,
        reverse: bool,
    ) -> tuple[tuple[Carry, ...], jax.Array]:
        """Scan cells over time; each reads the output of the one before it."""
        has_resets = sequences.resets is not None
        return scan_cells(
            self,
            cells,
            carries,
            x,
            sequences,
            starts=jax.tree.map(jnp.zeros_like, tuple(carries)) if has_resets else (),
            hidden_masks=[self._hidden_mask(cell, x.shape[0], deterministic) for cell in cells],
            zoneout=self.zoneout_rates(),
            deterministic=deterministic,
            reverse=reverse,
            unroll=self.unroll,
        )

    def why_not_native(self, x: jax.Array, deterministic: bool = True) -> str | None:
        """Say in a few words why `__call__` runs no kernel on this machine; None: it runs one.

        Args:
            x: the input, or its shape and dtype.
            deterministic: as in `__call__`.
        """
        reason = self.why_not_layer(x, deterministic)
        return reason or self.why_no_kernel(x, _platform())

    def why_not_layer(self, x: jax.Array, deterministic: bool = True) -> str | None:
        """Say in a few words why `__call__` scans on every platform; None: it does not."""
        return f"there is none for {type(self).__name__}"

    def why_no_kernel(self, x: jax.Array, platform: str) -> str | None:
        """Say in a few words why no kernel of this platform takes x; None: one does."""
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
        """Run layers over x [batch, time, features] as one operation of cuDNN."""
        raise NotImplementedError

    def _run_cudnn(
        self,
        cells: Sequence[RecurrentCell],
        carries: Sequence[Carry],
        x: jax.Array,
        lengths: jax.Array | None,
        layers_at_once: int,
    ) -> tuple[jax.Array, tuple[Carry, ...]]:
        lengths = _all_lengths(lengths, x)
        at_once = len(self._directions) * layers_at_once
        x = flip(x, lengths) if self.reverse else x
        final: tuple[Carry, ...] = ()
        for k in range(0, len(cells), at_once):
            if k > 0:
                x = self._drop(x, deterministic=False)
            last, x = self.run_cudnn(cells[k : k + at_once], carries[k : k + at_once], x, lengths)
            final += last
        return flip(x, lengths) if self.reverse else x, final

    def _choose(self, x: jax.Array, deterministic: bool, has_resets: bool) -> str:
        """How layers run: "scan", one operation per "layer", or all layers at once by "cudnn"."""
        asked = self.implementation
        if asked == "scan" or self.is_initializing():
            return "scan"
        reason = "resets" if has_resets else self.why_not_layer(x, deterministic)
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
        """One dropout mask per sequence for `h_{t-1}`, scaled so that its mean is one."""
        if deterministic or self.recurrent_dropout == 0:
            return None
        keep = 1 - self.recurrent_dropout
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (batch, cell.output_size))
        return kept.astype(cell.compute_dtype) / keep


def _platform() -> str:
    """This machine's platform, by the name that JAX's lowering uses."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def refuse_other_layers(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse parameters of layers that the stack does not have.

    Raises:
        ValueError: there is such a parameter.
    """
    given = module.variables.get("params", {})
    others = [n for n in given if re.fullmatch(r"l\d+(_reverse)?", n) and n not in names]
    if others:
        raise ValueError(
            f"params has {'/'.join((*module.path, others[0]))}, which this {type(module).__name__} "
            f"does not have; it has {', '.join(names)}"
        )


def _all_lengths(lengths: jax.Array | None, x: jax.Array) -> jax.Array:
    return jnp.full(len(x), x.shape[1], jnp.int32) if lengths is None else lengths


def _join_layers(carries: Sequence[Carry]) -> Carry:
    return jax.tree.map(lambda *states: jnp.stack(states), *carries)
