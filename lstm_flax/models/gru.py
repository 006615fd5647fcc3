"""The GRU: its cell, and a stack of them."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_flax.models.cell import RecurrentCell, Weights
from lstm_flax.models.stack import RecurrentStack


class GRUCell(RecurrentCell):
    """One step of a GRU layer (Cho et al. 2014), its reset gate where PyTorch and cuDNN have it.

        r, z = σ(x_t W_ih + h_{t-1} W_hh + b), the first two thirds
        n = tanh(x_t W_in + b_n + r ⊙ (h_{t-1} W_hn + b_hn))
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    The bias inside the reset gate's product is a parameter of its own, `bias_hn` [hidden_size].
    The carry is `h`, [batch, hidden_size]. Shows: reset, update, candidate.
    """

    num_gates: ClassVar[int] = 3

    def declare(self, features: int) -> Weights:
        """Make the parameters for x of so many features."""
        weights = super().declare(features)
        return weights | self.declare_bias("bias_hn", nn.initializers.zeros, gates=1)

    def step(
        self,
        weights: Weights,
        carry: jax.Array,
        x: jax.Array,
        hidden_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Advance one step, see `RecurrentCell.step`."""
        from_x, from_h = self.products(weights, carry, x, hidden_mask)
        x_r, x_z, x_n = jnp.split(self.add_bias(from_x, weights), 3, axis=-1)
        h_r, h_z, h_n = jnp.split(from_h, 3, axis=-1)
        r, z = nn.sigmoid(x_r + h_r), nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * self.add_bias(h_n, weights, "bias_hn"))
        h = (1 - z) * n + z * carry.astype(self.state_dtype)
        return h.astype(self.compute_dtype), {"reset": r, "update": z, "candidate": n}


class GRUStack(RecurrentStack):
    """GRU layers, as `torch.nn.GRU`: `LSTMStack`'s call, but the carry is `h` alone.

    >>> import jax, jax.numpy as jnp
    >>> from lstm_flax import GRUStack
    >>> (outputs, h_n), _ = GRUStack(16).init_with_output(jax.random.key(0), jnp.ones((3, 7, 5)))
    >>> outputs.shape, h_n.shape
    ((3, 7, 16), (1, 3, 16))
    """

    def make_cell(self, name: str | None) -> GRUCell:
        """Make the cell of one layer and direction."""
        return GRUCell(self.hidden_size, **self.cell_options(name))
