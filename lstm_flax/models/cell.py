"""What recurrent cells share: one step of one layer, as a Linen module.

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

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike


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

    def products(
        self, h: jax.Array, x: jax.Array, hidden_mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """`(x W_ih, h W_hh)`, each [batch, num_gates * hidden_size], in `state_dtype`.

        Args:
            h: [batch, output_size], the hidden state of the step before.
            x: [batch, features].
            hidden_mask: [batch, output_size], scales `h`; None: by one.
        """
        h = h if hidden_mask is None else h * hidden_mask
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
