"""The `nn.scan` over time that runs cells: those of this library, and any of flax's."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_flax.arguments import check_integer
from lstm_flax.models.cell import RecurrentCell, note
from lstm_flax.models.forms import Sequences, where

Carry = Any
"""`h`, or `(h, c)` for the LSTM; for another cell, its own structure."""


class _Step(nn.Module):  # its random draws depend on this name
    """One time step of some layers, each of which reads the output of the one below it."""

    cells: tuple[nn.RNNCellBase, ...]
    zoneout: Carry  # rates, shaped as a cell's carry; zero keeps nothing
    deterministic: bool
    with_gates: bool

    @nn.compact
    def __call__(
        self,
        carries: tuple[Carry, ...],
        x: jax.Array,
        is_valid: jax.Array | None,
        is_reset: jax.Array | None,
        starts: tuple[Carry, ...],
        hidden_masks: tuple[jax.Array | None, ...],
    ) -> tuple[tuple[Carry, ...], tuple[jax.Array, tuple[dict[str, jax.Array], ...]]]:
        advanced, shown = [], []
        for k, (cell, carry) in enumerate(zip(self.cells, carries, strict=True)):
            if is_reset is not None:
                carry = _choose(is_reset, starts[k], carry)
            if isinstance(cell, RecurrentCell):
                weights = cell.weights(x.shape[-1])
                new, gates = cell.step(weights, carry, x, hidden_masks[k])
            else:
                (new, x), gates = cell(carry, x), {}
            new = jax.tree.map(self._zone_out, self.zoneout, carry, new)
            if is_valid is not None:
                new = _choose(is_valid, new, carry)
            if isinstance(cell, RecurrentCell):
                x = cell.hidden(new)
            advanced.append(new)
            shown.append(gates if self.with_gates else {})
        if is_valid is not None:
            x = where(is_valid, x, jnp.zeros_like(x))
        return tuple(advanced), (x, tuple(shown))

    def _zone_out(self, rate: float, old: jax.Array, new: jax.Array) -> jax.Array:
        """Keep units at their old values: at random in training, by the mean otherwise."""
        if rate == 0:
            return new
        if self.deterministic:
            return rate * old + (1 - rate) * new
        kept = jax.random.bernoulli(self.make_rng("dropout"), rate, new.shape)
        return jnp.where(kept, old, new)


def scan_cells(
    module: nn.Module,
    cells: Sequence[nn.RNNCellBase],
    carries: Sequence[Carry],
    x: jax.Array,
    sequences: Sequences,
    *,
    starts: Sequence[Carry] = (),
    hidden_masks: Sequence[jax.Array | None] = (),
    zoneout: Carry = 0.0,
    deterministic: bool = True,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[tuple[Carry, ...], jax.Array]:
    """Run cells over rows; each cell reads the output of the one before it.

    Args:
        module: the module that the cells belong to.
        cells: cells bound to `module`.
        carries: the initial carry of each cell.
        x: [rows, time, features].
        sequences: which steps are valid, and where the carry is reset.
        starts: the carry of each cell after a reset.
        hidden_masks: one per cell, see `RecurrentCell.step`; empty: none.
        zoneout: rates, shaped as the carry of a cell.
        deterministic: switches zoneout's sampling off.
        reverse: start at the end.
        unroll: as `jax.lax.scan` takes it.

    Returns:
        The final carries, and the outputs of the last cell, [rows, time, features].
    """
    with_gates = is_asked_for_gates(module)
    step = nn.scan(
        _Step,
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
        in_axes=(1, 1, 1, nn.broadcast, nn.broadcast),
        out_axes=1,
        reverse=reverse,
        unroll=unroll,
    )(tuple(cells), zoneout, deterministic, with_gates)
    final, (outputs, shown) = step(
        tuple(carries),
        x,
        sequences.is_valid,
        sequences.resets,
        tuple(starts),
        tuple(hidden_masks) or (None,) * len(cells),
    )
    for cell, gates in zip(cells, shown, strict=True):
        if isinstance(cell, RecurrentCell):
            gates = {name: sequences.to_caller(gate) for name, gate in gates.items()}
            cell.show(gates, replace=not note(module, f"_has_shown_{cell.name}"))
    return final, outputs


def check_unroll(unroll: Any) -> None:
    """Check that `jax.lax.scan` takes this for the steps to unroll.

    Raises:
        ValueError: it is neither a positive integer nor True or False.
    """
    if not isinstance(unroll, bool):
        check_integer("unroll", unroll)


def is_asked_for_gates(module: nn.Module) -> bool:
    """Whether the caller asked to keep the gates: `apply(..., mutable="gates")`."""
    is_bound = module.scope is not None and not module.is_initializing()
    return is_bound and module.is_mutable_collection("gates")


def _choose(flags: jax.Array, a: Carry, b: Carry) -> Carry:
    return jax.tree.map(lambda x, y: where(flags, x, y), a, b)
