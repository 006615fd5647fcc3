"""The GRU: its cell, and a stack of them."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_flax.arguments import check_flag
from lstm_flax.models.cell import (
    Activation,
    RecurrentCell,
    Weights,
    check_activation,
    per_gate,
)
from lstm_flax.models.stack import RecurrentStack


class GRUCell(RecurrentCell):
    """One step of a GRU layer (Cho et al. 2014), with the reset gate after the product.

    PyTorch and cuDNN compute the same:

        r, z = σ(x_t W_ih + h_{t-1} W_hh + b), the first two thirds
        n = tanh(x_t W_in + b_n + r ⊙ (h_{t-1} W_hn + b_hn))
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    The bias inside the reset gate's product is a parameter of its own, `bias_hn` [hidden_size].
    The carry is `h`, [batch, hidden_size]. Shows: reset, update, candidate.

    Attributes:
        recurrent_activation: of the gates, σ above; `activation` is tanh.
    """

    recurrent_activation: Activation = jax.lax.logistic

    num_gates: ClassVar[int] = 3

    def check_attributes(self) -> None:
        """Check that the attributes are within their bounds."""
        super().check_attributes()
        check_activation("recurrent_activation", self.recurrent_activation)

    def declare(self, features: int) -> Weights:
        """Make the parameters for x [batch, features]."""
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
        r, z = (self.recurrent_activation(gate) for gate in (x_r + h_r, x_z + h_z))
        n = self.activation(x_n + r * self.add_bias(h_n, weights, "bias_hn"))
        h = (1 - z) * n + z * carry.astype(self.state_dtype)
        return h.astype(self.compute_dtype), {"reset": r, "update": z, "candidate": n}


class ResetBeforeGRUCell(GRUCell):
    """One step of a GRU layer (Cho et al. 2014), with the reset gate before the product.

    The paper has it so:

        r, z = σ(x_t W_ih + h_{t-1} W_hh + b), the first two thirds
        n = tanh(x_t W_in + (r ⊙ h_{t-1}) W_hn + b_n)
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    The parameters differ from those of `GRUCell`, so that weights of one kind never load into the
    other: `kernel_hh` [hidden_size, 2 * hidden_size] belongs to the two gates, `kernel_hn`
    [hidden_size, hidden_size] to the candidate, and there is one bias. `layer_norm` normalises
    the two products separately.
    """

    def declare(self, features: int) -> Weights:
        """Make the parameters for x [batch, features]."""
        size = self.hidden_size
        parts = {"ih": (features, 3), "hh": (size, 2), "hn": (size, 1)}
        weights: Weights = {}
        for name, (rows, gates) in parts.items():
            init = self.kernel_init if name == "ih" else self.recurrent_init
            weights |= self.declare_product(name, per_gate(init, gates), (rows, gates * size))
        return weights | self.declare_bias("bias", self.bias_init)

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
        h_r, h_z = jnp.split(from_h, 2, axis=-1)
        r, z = (self.recurrent_activation(gate) for gate in (x_r + h_r, x_z + h_z))
        kept = self.masked(carry, hidden_mask).astype(self.state_dtype)
        n = self.activation(x_n + self.product("hn", weights, r * kept))
        h = (1 - z) * n + z * carry.astype(self.state_dtype)
        return h.astype(self.compute_dtype), {"reset": r, "update": z, "candidate": n}


class GRUStack(RecurrentStack[jax.Array]):
    """GRU layers, as in `torch.nn.GRU`. The call is that of `LSTMStack`, and the carry is `h`.

        >>> import jax, jax.numpy as jnp
        >>> from lstm_flax import GRUStack
        >>> (outputs, h_n), _ = GRUStack(16).init_with_output(
        ...     jax.random.key(0), jnp.ones((3, 7, 5))
        ... )
        >>> outputs.shape, h_n.shape
        ((3, 7, 16), (1, 3, 16))

    Attributes:
        reset_after: the reset gate scales the product with `h_{t-1}`, as in PyTorch and cuDNN.
            Keras calls this `reset_after=True`, and ONNX `linear_before_reset=1`. With False it
            scales `h_{t-1}` itself, see `ResetBeforeGRUCell`; Haiku does this, and ONNX by default.
        recurrent_activation: as in `GRUCell`.
    """

    reset_after: bool = True
    recurrent_activation: Activation = jax.lax.logistic

    def check_attributes(self) -> None:
        """Check that the attributes are within their bounds."""
        super().check_attributes()
        check_flag("reset_after", self.reset_after)

    def make_cell(self, name: str | None) -> GRUCell:
        """Make the cell of one layer and direction."""
        kind = GRUCell if self.reset_after else ResetBeforeGRUCell
        options = self.cell_options(name)
        return kind(self.hidden_size, recurrent_activation=self.recurrent_activation, **options)
