"""The vanilla RNN: its cell, and a stack of them."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_flax.models.cell import RecurrentCell
from lstm_flax.models.stack import RecurrentStack


class RNNCell(RecurrentCell):
    """One step of a vanilla RNN layer (Elman 1990).

        h_t = tanh(x_t W_ih + h_{t-1} W_hh + b)

    The carry is `h`, [batch, hidden_size]. Shows: hidden.

    Attributes:
        nonlinearity: "tanh" or "relu".
    """

    nonlinearity: Literal["tanh", "relu"] = "tanh"

    @nn.compact
    def __call__(
        self, carry: jax.Array, x: jax.Array, hidden_mask: jax.Array | None = None
    ) -> jax.Array:
        """Advance one step: carry as above, x [batch, features], hidden_mask scales `h_{t-1}`."""
        from_x, from_h = self.products(carry, x, hidden_mask)
        activation = {"tanh": jnp.tanh, "relu": nn.relu}[self.nonlinearity]
        h = activation(from_x + from_h + self.bias()).astype(self.compute_dtype)
        self.show(hidden=h)
        return h


class RNNStack(RecurrentStack):
    """Vanilla RNN layers, as `torch.nn.RNN`: `LSTMStack`'s call, but the carry is `h` alone.

        >>> import jax, jax.numpy as jnp
        >>> from lstm_flax import RNNStack
        >>> (outputs, h_n), _ = RNNStack(16, 2, nonlinearity="relu").init_with_output(
        ...     jax.random.key(0), jnp.ones((3, 7, 5))
        ... )
        >>> outputs.shape, h_n.shape
        ((3, 7, 16), (2, 3, 16))

    Attributes:
        nonlinearity: "tanh" or "relu".
    """

    nonlinearity: Literal["tanh", "relu"] = "tanh"

    def make_cell(self, name: str) -> RNNCell:
        """Make the cell of one layer and direction."""
        return RNNCell(
            self.hidden_size, nonlinearity=self.nonlinearity, name=name, **self.cell_options()
        )
