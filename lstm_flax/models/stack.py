"""A stack of recurrent layers: every layer's cell inside one `nn.scan` over time."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from lstm_flax.models.cells import LSTMCarry, LSTMCell, forget_gate_ones


class _StackStep(nn.Module):
    """One time step of all layers: each reads the output of the one below it."""

    cells: tuple[LSTMCell, ...]
    dropout: float

    @nn.compact
    def __call__(
        self, carries: tuple[LSTMCarry, ...], x: jax.Array, deterministic: bool
    ) -> tuple[tuple[LSTMCarry, ...], jax.Array]:
        advanced = []
        for layer, (cell, carry) in enumerate(zip(self.cells, carries, strict=True)):
            if layer > 0:
                x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
            carry, x = cell(carry, x)
            advanced.append(carry)
        return tuple(advanced), x


class LSTMStack(nn.Module):
    """`num_layers` LSTM layers over a sequence, with the call and the shapes of `torch.nn.LSTM`.

    The parameters of layer k are `params["l{k}"]`, as `LSTMCell` describes them.

    Attributes:
        hidden_size: units of each layer.
        num_layers: layers, the output of one being the input of the next.
        dropout: fraction of each layer's output that is dropped on its way to the next layer,
            with a new mask at each time step; needs an rng named "dropout".
        kernel_init, recurrent_init, bias_init, dtype, param_dtype: `LSTMCell`'s.
    """

    hidden_size: int
    num_layers: int = 1
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.glorot_uniform()
    recurrent_init: Initializer = nn.initializers.orthogonal()
    bias_init: Initializer = forget_gate_ones
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, initial_carry: LSTMCarry | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, LSTMCarry]:
        """Run the whole sequence.

        Args:
            x: [batch, time, features].
            initial_carry: `(h_0, c_0)`, each [num_layers, batch, hidden_size]; zeros if None.
            deterministic: switches dropout off.

        Returns:
            `(outputs, (h_n, c_n))`: the top layer's output at every step, [batch, time,
            hidden_size], and every layer's final states, each [num_layers, batch, hidden_size].
        """
        cells = tuple(
            LSTMCell(
                self.hidden_size,
                self.kernel_init,
                self.recurrent_init,
                self.bias_init,
                self.dtype,
                self.param_dtype,
                name=f"l{layer}",
            )
            for layer in range(self.num_layers)
        )
        zeros = tuple(cell.initial_carry(x.shape[0]) for cell in cells)
        carries = zeros if initial_carry is None else _split_layers(initial_carry, zeros)

        scan = nn.scan(
            _StackStep,
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            in_axes=(1, nn.broadcast),
            out_axes=1,
        )
        carries, outputs = scan(cells, self.dropout, name="scan")(carries, x, deterministic)
        return outputs, jax.tree.map(lambda *layers: jnp.stack(layers), *carries)


def _split_layers(initial_carry: LSTMCarry, like: tuple[LSTMCarry, ...]) -> tuple[LSTMCarry, ...]:
    """`(h_0, c_0)` as one carry a layer, in the dtypes that the cells keep."""
    expected = (len(like), *like[0][0].shape)
    for name, state in zip(("h_0", "c_0"), initial_carry, strict=True):
        if state.shape != expected:
            raise ValueError(f"initial_carry: {name} has shape {state.shape}, not {expected}")
    return tuple(
        jax.tree.map(lambda state, zero, k=k: state[k].astype(zero.dtype), initial_carry, zeros)
        for k, zeros in enumerate(like)
    )
