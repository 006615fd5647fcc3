"""Recurrent cells: one step of one layer, as Linen modules.

Every cell has the same interface, so that a stack can scan over any of them:

    carry = cell.initial_carry(batch_size)          zeros
    carry = cell(carry, x_t, hidden_mask=None)      one step
    h_t = cell.hidden(carry)                        what the layer above sees

Directions, lengths, dropout between layers and zoneout are the stack's affair. A cell's parameters
are fused over its gates, which lie side by side in PyTorch's order: `kernel_ih` [features, gates *
hidden_size], `kernel_hh` [hidden_size, gates * hidden_size] and `bias` [gates * hidden_size], the
sum of PyTorch's two biases.

With `layer_norm`, each of the two products is normalised over all gates at once, with a learned
scale, before the bias is added (Ba, Kiros and Hinton, "Layer Normalization", 2016, section 3.1).
"""

from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

LSTMCarry = tuple[jax.Array, jax.Array]


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The dtype to accumulate in: `dtype` itself, or float32 where that has fewer bits."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def per_gate(init: Initializer, num_gates: int) -> Initializer:
    """Draw each gate's block of a fused kernel [rows, num_gates * hidden_size] by itself.

    Fan-in, fan-out and orthogonality are properties of one gate's matrix, not of those that lie
    side by side for the sake of one large product.
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


class RecurrentCell(nn.Module):
    """What all cells share: their attributes and the two products.

    Attributes:
        hidden_size: units.
        use_bias: add a bias to the gates.
        layer_norm: normalise both products, and the LSTM's cell state on its way to the output.
        kernel_init: initialiser of `kernel_ih`, called once a gate.
        recurrent_init: initialiser of `kernel_hh`, called once a gate.
        bias_init: initialiser of `bias`, called once for all gates.
        dtype: of the products and of `h`; None takes `param_dtype`. The sums, the gates and the
            cell state never have less than float32.
        param_dtype: of the parameters.
        precision: of the products, as in `jax.lax.dot`.
    """

    hidden_size: int
    use_bias: bool = True
    layer_norm: bool = False
    kernel_init: Initializer = nn.initializers.glorot_uniform()
    recurrent_init: Initializer = nn.initializers.orthogonal()
    bias_init: Initializer = nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    num_gates: ClassVar[int] = 1

    @property
    def output_size(self) -> int:
        """Features of `h`."""
        return self.hidden_size

    @property
    def compute_dtype(self) -> DTypeLike:
        """Of the products' operands and of `h`."""
        return self.dtype or self.param_dtype

    @property
    def state_dtype(self) -> DTypeLike:
        """Of the sums, the gates and the cell state."""
        return at_least_float32(self.compute_dtype)

    def initial_carry(self, batch_size: int) -> Any:
        """The zero carry."""
        return jnp.zeros((batch_size, self.output_size), self.compute_dtype)

    def hidden(self, carry: Any) -> jax.Array:
        """The hidden state [batch, output_size] within a carry."""
        return carry

    def products(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`(x W_ih, h W_hh)`, each [batch, num_gates * hidden_size], in `state_dtype`."""
        return (
            self._product("ih", self.kernel_init, x),
            self._product("hh", self.recurrent_init, h),
        )

    def bias(self, name: str = "bias", init: Initializer | None = None, gates: int = 0) -> Any:
        """The bias over all gates, or over so many, in `state_dtype`; 0 without `use_bias`."""
        if not self.use_bias:
            return 0
        shape = ((gates or self.num_gates) * self.hidden_size,)
        bias = self.param(name, init or self.bias_init, shape, self.param_dtype)
        return bias.astype(self.state_dtype)

    def _product(self, name: str, init: Initializer, operand: jax.Array) -> jax.Array:
        shape = (operand.shape[-1], self.num_gates * self.hidden_size)
        init = per_gate(init, self.num_gates)
        kernel = self.param(f"kernel_{name}", init, shape, self.param_dtype)
        operand, kernel = promote_dtype(operand, kernel, dtype=self.compute_dtype)
        product = jnp.dot(
            operand, kernel, precision=self.precision, preferred_element_type=self.state_dtype
        )
        if self.layer_norm:
            product = self._norm(f"norm_{name}", use_bias=False)(product)
        return product

    def _norm(self, name: str, use_bias: bool) -> nn.LayerNorm:
        return nn.LayerNorm(
            use_bias=use_bias,
            dtype=self.state_dtype,
            param_dtype=self.param_dtype,
            use_fast_variance=False,  # E[x²] - E[x]² cancels
            name=name,
        )

    def show(self, **gates: jax.Array) -> None:
        """Keep gates, each [batch, hidden_size], in the collection "gates" if that is asked for.

        It costs nothing otherwise: `apply(..., mutable="gates")` asks.
        """
        if not self.is_initializing():
            for name, value in gates.items():
                self.sow("gates", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def _masked(h: jax.Array, mask: jax.Array | None) -> jax.Array:
    return h if mask is None else h * mask


class LSTMCell(RecurrentCell):
    """One step of an LSTM layer (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

        i, f, g, o = split(x_t W_ih + h_{t-1} W_hh + b)
        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(c_t)

    With `proj_size`, `h_t` is multiplied by `kernel_hr` [hidden_size, proj_size] (Sak, Senior and
    Beaufays 2014). With `layer_norm`, `c_t` is normalised inside the last tanh.

    The carry is `(h, c)`, [batch, output_size] and [batch, hidden_size].
    Shows: input, forget, candidate, output and cell.

    Attributes:
        bias_init: as for every cell; by default the forget gate's bias starts at one.
        proj_size: features of `h`; 0 projects nothing.
    """

    bias_init: Initializer = forget_gate_ones
    proj_size: int = 0

    num_gates: ClassVar[int] = 4

    @property
    def output_size(self) -> int:
        """Features of `h`."""
        return self.proj_size or self.hidden_size

    def initial_carry(self, batch_size: int) -> LSTMCarry:
        """Zero `(h, c)`."""
        h = jnp.zeros((batch_size, self.output_size), self.compute_dtype)
        return h, jnp.zeros((batch_size, self.hidden_size), self.state_dtype)

    def hidden(self, carry: LSTMCarry) -> jax.Array:
        """`h` of `(h, c)`."""
        return carry[0]

    @nn.compact
    def __call__(
        self, carry: LSTMCarry, x: jax.Array, hidden_mask: jax.Array | None = None
    ) -> LSTMCarry:
        """Advance one step: carry as above, x [batch, features], hidden_mask scales `h_{t-1}`."""
        h, c = carry
        from_x, from_h = self.products(_masked(h, hidden_mask), x)
        i, f, g, o = jnp.split(from_x + from_h + self.bias(), 4, axis=-1)
        i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
        c = f * c + i * g
        self.show(input=i, forget=f, candidate=g, output=o, cell=c)
        shown = self._norm("norm_c", use_bias=True)(c) if self.layer_norm else c
        h = (o * jnp.tanh(shown)).astype(self.compute_dtype)
        if self.proj_size:
            shape = (self.hidden_size, self.proj_size)
            kernel = self.param("kernel_hr", self.kernel_init, shape, self.param_dtype)
            h = jnp.dot(
                h,
                kernel.astype(self.compute_dtype),
                precision=self.precision,
                preferred_element_type=self.state_dtype,
            ).astype(self.compute_dtype)
        return h, c


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
        from_x, from_h = self.products(_masked(carry, hidden_mask), x)
        activation = {"tanh": jnp.tanh, "relu": nn.relu}[self.nonlinearity]
        h = activation(from_x + from_h + self.bias()).astype(self.compute_dtype)
        self.show(hidden=h)
        return h


class GRUCell(RecurrentCell):
    """One step of a GRU layer (Cho et al. 2014), its reset gate where PyTorch and cuDNN have it.

        r, z = σ(x_t W_ih + h_{t-1} W_hh + b), the first two thirds
        n = tanh(x_t W_in + b_n + r ⊙ (h_{t-1} W_hn + b_hn))
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    The bias inside the reset gate's product is a parameter of its own, `bias_hn` [hidden_size].
    The carry is `h`, [batch, hidden_size]. Shows: reset, update, candidate.
    """

    num_gates: ClassVar[int] = 3

    @nn.compact
    def __call__(
        self, carry: jax.Array, x: jax.Array, hidden_mask: jax.Array | None = None
    ) -> jax.Array:
        """Advance one step: carry as above, x [batch, features], hidden_mask scales `h_{t-1}`."""
        from_x, from_h = self.products(_masked(carry, hidden_mask), x)
        x_r, x_z, x_n = jnp.split(from_x + self.bias(), 3, axis=-1)
        h_r, h_z, h_n = jnp.split(from_h, 3, axis=-1)
        r, z = nn.sigmoid(x_r + h_r), nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * (h_n + self.bias("bias_hn", nn.initializers.zeros, gates=1)))
        self.show(reset=r, update=z, candidate=n)
        h = (1 - z) * n + z * carry.astype(self.state_dtype)
        return h.astype(self.compute_dtype)
