"""Recurrent cells: one step of one layer, as Linen modules.

Every cell has the same interface, so that a stack can scan over any of them:
`cell.initial_carry(batch_size)` and `cell(carry, x_t) -> (carry, h_t)`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer

LSTMCarry = tuple[jax.Array, jax.Array]


def at_least_float32(dtype: Any) -> Any:
    """The dtype to accumulate in: `dtype` itself, or float32 where that has fewer bits."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def per_gate(init: Initializer, num_gates: int) -> Initializer:
    """Draw each gate's block of a fused kernel [rows, num_gates * hidden_size] by itself.

    Fan-in, fan-out and orthogonality are properties of one gate's matrix, not of the four that
    lie side by side for the sake of one large product.
    """

    def stacked(key, shape, dtype=jnp.float32, out_sharding=None):
        rows, columns = shape
        blocks = [
            init(k, (rows, columns // num_gates), dtype) for k in jax.random.split(key, num_gates)
        ]
        return jnp.concatenate(blocks, axis=1)

    return stacked


def forget_gate_ones(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Bias [4 * hidden_size], in the order i, f, g, o: zero, but one for the forget gate.

    The cell then remembers from its first step on: Jozefowicz, Zaremba and Sutskever, "An
    Empirical Exploration of Recurrent Network Architectures" (ICML 2015).
    """
    (size,) = shape
    hidden_size = size // 4
    return jnp.zeros(shape, dtype).at[hidden_size : 2 * hidden_size].set(1)


class LSTMCell(nn.Module):
    """One step of an LSTM layer (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

        i, f, g, o = split(x_t W_ih + h_{t-1} W_hh + b)
        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(c_t)

    Parameters: `kernel_ih` [features, 4 * hidden_size], `kernel_hh` [hidden_size,
    4 * hidden_size] and `bias` [4 * hidden_size], their gates side by side in PyTorch's order
    i, f, g, o.

    Attributes:
        hidden_size: units of the hidden and of the cell state.
        kernel_init: initialiser of `kernel_ih`, called once a gate.
        recurrent_init: initialiser of `kernel_hh`, called once a gate.
        bias_init: initialiser of `bias`, called once for all gates.
        dtype: of the products and of `h`; None infers it from the input and the parameters. The
            sums, the gates and the cell state never have less than float32.
        param_dtype: of the parameters.
    """

    hidden_size: int
    kernel_init: Initializer = nn.initializers.glorot_uniform()
    recurrent_init: Initializer = nn.initializers.orthogonal()
    bias_init: Initializer = forget_gate_ones
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def initial_carry(self, batch_size: int) -> LSTMCarry:
        """Zero `(h, c)`, each [batch_size, hidden_size]."""
        shape = (batch_size, self.hidden_size)
        dtype = self.dtype or self.param_dtype
        return jnp.zeros(shape, dtype), jnp.zeros(shape, at_least_float32(dtype))

    @nn.compact
    def __call__(self, carry: LSTMCarry, x: jax.Array) -> tuple[LSTMCarry, jax.Array]:
        """Advance one step.

        Args:
            carry: `(h, c)`, each [batch, hidden_size].
            x: one step's input, [batch, features].

        Returns:
            The new carry, and `h` once more as the step's output.
        """
        h, c = carry
        width = 4 * self.hidden_size
        kernel_ih = self.param(
            "kernel_ih", per_gate(self.kernel_init, 4), (x.shape[-1], width), self.param_dtype
        )
        kernel_hh = self.param(
            "kernel_hh",
            per_gate(self.recurrent_init, 4),
            (self.hidden_size, width),
            self.param_dtype,
        )
        bias = self.param("bias", self.bias_init, (width,), self.param_dtype)

        x, h, kernel_ih, kernel_hh = promote_dtype(x, h, kernel_ih, kernel_hh, dtype=self.dtype)
        gates = (
            jnp.dot(x, kernel_ih, preferred_element_type=c.dtype)
            + jnp.dot(h, kernel_hh, preferred_element_type=c.dtype)
            + bias.astype(c.dtype)
        )
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = (nn.sigmoid(o) * jnp.tanh(c)).astype(h.dtype)
        return (h, c), h
