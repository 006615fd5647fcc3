"""The vanilla RNN: its cell, and a stack of them."""

from typing import Literal

import flax.linen as nn
import jax

from lstm_flax.arguments import check_choice
from lstm_flax.models.cell import RecurrentCell, Weights
from lstm_flax.models.stack import RecurrentStack

_NONLINEARITIES = ("tanh", "relu")


class RNNCell(RecurrentCell):
    """One step of a vanilla RNN layer (Elman 1990).

        h_t = tanh(x_t W_ih + h_{t-1} W_hh + b)

    The carry is `h`, [batch, hidden_size]. Shows: hidden.

    Attributes:
        nonlinearity: "tanh" or "relu", as PyTorch names `activation`.
        activation: instead of tanh, any other function.
    """

    nonlinearity: Literal["tanh", "relu"] = "tanh"

    def check_attributes(self) -> None:
        """Check that the attributes are within their bounds."""
        super().check_attributes()
        check_choice("nonlinearity", self.nonlinearity, _NONLINEARITIES)
        if self.nonlinearity == "relu" and self.activation is not jax.lax.tanh:
            raise ValueError("nonlinearity='relu' and an activation are one thing: give only one")

    def step(
        self,
        weights: Weights,
        carry: jax.Array,
        x: jax.Array,
        hidden_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Advance one step, see `RecurrentCell.step`."""
        from_x, from_h = self.products(weights, carry, x, hidden_mask)
        activation = nn.relu if self.nonlinearity == "relu" else self.activation
        h = activation(self.add_bias(from_x + from_h, weights)).astype(self.compute_dtype)
        return h, {"hidden": h}


class RNNStack(RecurrentStack[jax.Array]):
    """Vanilla RNN layers, as `torch.nn.RNN`: `LSTMStack`'s call, but the carry is `h` alone.

        >>> import jax, jax.numpy as jnp
        >>> from lstm_flax import RNNStack
        >>> (outputs, h_n), _ = RNNStack(16, 2, nonlinearity="relu").init_with_output(
        ...     jax.random.key(0), jnp.ones((3, 7, 5))
        ... )
        >>> outputs.shape, h_n.shape
        ((3, 7, 16), (2, 3, 16))

    Attributes:
        nonlinearity: "tanh" or "relu", as PyTorch names `activation`.
        activation: instead of tanh, any other function.
    """

    nonlinearity: Literal["tanh", "relu"] = "tanh"

    def make_cell(self, name: str | None) -> RNNCell:
        """Make the cell of one layer and direction."""
        return RNNCell(self.hidden_size, nonlinearity=self.nonlinearity, **self.cell_options(name))
