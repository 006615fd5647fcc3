"""A stack of any cells, of flax, of this library or your own, with the call of `LSTMStack`."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_flax.arguments import as_floats, check_flag, check_rate
from lstm_flax.models.cell import RecurrentCell, check_carry
from lstm_flax.models.forms import Axes, Sequences, check_flags, check_lengths
from lstm_flax.models.short_help import ShortHelp
from lstm_flax.models.stack import refuse_other_layers
from lstm_flax.models.steps import check_unroll, is_asked_for_gates, scan_cells

Carries = tuple[Any, ...]
"""The carry of each layer and direction."""


class CellStack(nn.Module, metaclass=ShortHelp):
    """Layers of any cells, which may differ in kind and size, with `LSTMStack`'s call.

    A cell is any `flax.linen.RNNCellBase`, so a cell of flax, of this library or your own. It is
    called as `cell(carry, x_t) -> (carry, y_t)`, and has `initialize_carry(rng, shape of x_t)` and
    `num_feature_axes`. Cells always scan: kernels do not run them.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from lstm_flax import CellStack, LSTMCell
        >>> stack = CellStack([LSTMCell(16), nn.GRUCell(8)], bidirectional=True)
        >>> x = jnp.ones((3, 7, 5))
        >>> (outputs, carry), variables = stack.init_with_output(
        ...     jax.random.key(0), x, seq_lengths=jnp.array([7, 2, 4])
        ... )
        >>> outputs.shape, sorted(variables["params"])
        ((3, 7, 16), ['l0', 'l0_reverse', 'l1', 'l1_reverse'])
        >>> jax.tree.map(jnp.shape, carry[0]), jax.tree.map(jnp.shape, carry[3])
        (((3, 16), (3, 16)), (3, 8))

    The parameters of layer k are `params["l{k}"]`, and `params["l{k}_reverse"]` for its reverse
    direction, as the cell names them. The carry is a tuple with the carry of each layer and
    direction, in PyTorch's order: `(l0, l0_reverse, l1, ...)`. Each has the structure that the
    cell's `initialize_carry` returns for x without its time axis, so its states are [batch, size].

    Attributes:
        cells: one per layer; each reads the output of the one before it.
        bidirectional: also run each layer from the end to the start, with a copy of its cell that
            has its own parameters; the next layer reads both outputs, joined in the last axis.
        dropout: fraction of each layer's output that is dropped on its way to the next layer.
        hold_outputs: as in `LSTMStack`, but zeros come before a direction's first step.

    `reverse`, `time_major`, `return_carry` and `unroll` are as in `LSTMStack`.

    Raises:
        ValueError: an attribute is out of its bounds.
    """

    cells: Sequence[nn.RNNCellBase]
    bidirectional: bool = False
    reverse: bool = False
    dropout: float = 0.0
    time_major: bool = False
    hold_outputs: bool = False
    return_carry: bool = True
    unroll: int | bool = 1

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError("cells is empty: there is no layer to run")
        check_rate("dropout", self.dropout, may_be_one=True)
        for name in ("bidirectional", "reverse", "time_major", "hold_outputs", "return_carry"):
            check_flag(name, getattr(self, name))
        check_unroll(self.unroll)
        if self.reverse and self.bidirectional:
            raise ValueError("reverse is for one direction: bidirectional has both already")
        super().__post_init__()

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Carries:
        """The carry that the cells start from.

        Args:
            rng: for cells whose carry is random; None: `jax.random.key(0)`, as in `flax.linen.RNN`.
            input_shape: of x, [..., time, features], or [time, ..., features] with `time_major`.
        """
        axes = self._axes(input_shape)
        features = input_shape[len(axes.batch) + 1 :]
        sides, carries = len(self._directions), []
        for layer in self.cells:
            cell = layer.clone(parent=None)
            rng, key = jax.random.split(jax.random.key(0) if rng is None else rng)
            shape = (*axes.batch, *features)
            carries += [cell.initialize_carry(k, shape) for k in jax.random.split(key, sides)]
            features = _output_features(cell, carries[-1], shape, len(axes.batch))
            features = (*features[:-1], sides * features[-1])
        return tuple(carries)

    def __call__(
        self,
        x: jax.Array,
        initial_carry: Carries | None = None,
        *,
        seq_lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        resets: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Run whole sequences, as `LSTMStack` does.

        Args:
            x: floating, [..., time, features], or [time, ..., features] with `time_major`. A cell
                may have several feature axes, as `nn.ConvLSTMCell` has.
            initial_carry: a tuple with the carry of each layer and direction; None: what
                `initialize_carry` returns.
            seq_lengths: as for `LSTMStack`.
            mask: as for `LSTMStack`.
            resets: as for `LSTMStack`; the carry is reset to what `initialize_carry` returns.
            deterministic: switches dropout off.

        Returns:
            `(outputs, carry)`, or with `return_carry=False` the outputs alone.

        Raises:
            ValueError: for the same reasons as `LSTMStack`.
        """
        x = as_floats("x", x)
        axes = self._axes(x.shape)
        zeros = jax.eval_shape(lambda: self.initialize_carry(None, x.shape))
        if initial_carry is not None:
            names = [f"[{k}]" for k, _ in enumerate(jax.tree.leaves(zeros))]
            initial_carry = check_carry("initial_carry", initial_carry, zeros, tuple(names))
        lengths = None if seq_lengths is None else check_lengths(seq_lengths, axes)
        mask = None if mask is None else check_flags("mask", mask, axes)
        resets = None if resets is None else check_flags("resets", resets, axes)
        given = x, initial_carry, lengths, mask, resets
        is_eager = not isinstance(x, jax.core.Tracer) and deterministic
        if is_eager and not (self.is_initializing() or is_asked_for_gates(self)):
            outputs, carry = self._run_compiled(*given)
        else:
            outputs, carry = self._run(*given, deterministic)
        return (outputs, carry) if self.return_carry else outputs

    @nn.jit
    def _run_compiled(self, x, initial_carry, lengths, mask, resets):
        return self._run(x, initial_carry, lengths, mask, resets, deterministic=True)

    @nn.compact
    def _run(self, x, initial_carry, lengths, mask, resets, deterministic) -> Any:
        axes = self._axes(x.shape)
        sequences = Sequences.of(axes, lengths, mask, resets)
        refuse_other_layers(
            self, [f"l{k}{side}" for k in range(len(self.cells)) for side in self._directions]
        )
        starts = axes.fold_states(self.initialize_carry(None, x.shape), layers=0)
        x = sequences.to_rows(x)
        # Adding zeros made from x puts the carry on the devices and mesh axes of x.
        starts = jax.tree.map(lambda s: s + _zeros_of(x, s), starts)
        given = axes.fold_states(initial_carry, layers=0) if initial_carry is not None else starts
        sides = len(self._directions)
        final: tuple[Any, ...] = ()
        for k, layer in enumerate(self.cells):
            if k > 0:
                x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
            outputs = []
            for n, side in enumerate(self._directions, sides * k):
                last, output = scan_cells(
                    self,
                    [layer.copy(name=f"l{k}{side}")],
                    given[n : n + 1],
                    x,
                    sequences,
                    starts=starts[n : n + 1],
                    deterministic=deterministic,
                    reverse=self.reverse or side == "_reverse",
                    unroll=self.unroll,
                )
                final += last
                outputs.append(output)
            x = jnp.concatenate(outputs, axis=-1)
        before = [jnp.zeros_like(output[:, 0]) for output in outputs] if self.hold_outputs else []
        return sequences.to_caller(x, before, self.reverse), axes.unfold_states(final, layers=0)

    @nn.nowrap
    def _axes(self, shape: Sequence[int]) -> Axes:
        return Axes.of(shape, self.time_major, self.cells[0].num_feature_axes)

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)


def _output_features(
    cell: nn.RNNCellBase, carry: Any, shape: tuple[int, ...], batch_axes: int
) -> tuple[int, ...]:
    """The shape of a cell's output without its batch axes."""
    if isinstance(cell, RecurrentCell):
        return (cell.output_size,)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    (_, y), _ = jax.eval_shape(cell.init_with_output, jax.random.key(0), carry, x)
    return y.shape[batch_axes:]


def _zeros_of(x: jax.Array, state: jax.Array) -> jax.Array:
    """Zeros made from x that broadcast against a state [rows, ...]."""
    zeros = jnp.zeros_like(x).sum(range(1, x.ndim)).astype(state.dtype)
    return zeros.reshape(-1, *(1,) * (state.ndim - 1))
