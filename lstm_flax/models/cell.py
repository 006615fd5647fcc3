"""What recurrent cells share: one step of one layer, as a Linen module.

Every cell has the same interface, so that a stack can scan over any of them:

    carry = cell.initialize_carry(key, x_t.shape)       zeros
    carry, h_t = cell(carry, x_t, hidden_mask=None)     one step; the layer above reads h_t
    h_t = cell.hidden(carry)                            the same h_t

The first two are the interface of flax's cells, so `flax.linen.RNN` runs these cells too.

A cell has two parts. `declare` makes its parameters. `step`, a pure function, computes the next
carry from them, a carry and an input. The stack handles directions, lengths, dropout between layers
and zoneout. Parameters are fused over the gates, which lie side by side in PyTorch's order:
`kernel_ih` [features, gates * hidden_size], `kernel_hh` [hidden_size, gates * hidden_size] and
`bias` [gates * hidden_size], the sum of PyTorch's two biases.

With `layer_norm`, each of the two products is normalised over all gates at once, with a learned
scale, before the bias is added (Ba, Kiros and Hinton, "Layer Normalization", 2016, section 3.1).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from lstm_flax.arguments import as_floats, check, check_flag, check_floating, check_integer
from lstm_flax.models.short_help import ShortHelp

Weights = dict[str, Any]
"""A cell's parameters by name, and its normalisations as functions."""

Activation = Callable[[jax.Array], jax.Array]

_GLOROT = nn.initializers.glorot_uniform()
_ORTHOGONAL = nn.initializers.orthogonal()


# Flax's own are closures, with which no module can be pickled.
def glorot_uniform(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Glorot and Bengio's uniform distribution (2010), as `flax.linen.initializers` has it."""
    return _GLOROT(key, shape, dtype, out_sharding)


def orthogonal(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """A random orthogonal matrix, as `flax.linen.initializers` has it."""
    return _ORTHOGONAL(key, shape, dtype, out_sharding)


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The dtype to accumulate in: `dtype` itself, or float32 where that has fewer bits."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def per_gate(init: Initializer, num_gates: int) -> Initializer:
    """Draw each gate's block of a fused kernel [rows, num_gates * hidden_size] by itself.

    Fan-in, fan-out and orthogonality are properties of one gate's matrix, not of the fused kernel,
    which joins them for one large product. If `init` boxes its result, as `nn.with_partitioning`
    does, the fused kernel is boxed too.
    """

    def stacked(key, shape, dtype=jnp.float32, out_sharding=None):
        rows, columns = shape
        blocks = [
            init(k, (rows, columns // num_gates), dtype) for k in jax.random.split(key, num_gates)
        ]
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *blocks)

    return stacked


def in_float32(init: Initializer) -> Initializer:
    """Draw in float32, then round: some initialisers, such as orthogonal, need it."""

    def rounded(key, shape, dtype=jnp.float32, out_sharding=None):
        drawn = init(key, shape, at_least_float32(dtype))
        return jax.tree.map(lambda array: array.astype(dtype), drawn)

    return rounded


class RecurrentCell(nn.RNNCellBase, metaclass=ShortHelp):
    """What all cells share: their attributes and their two products.

    Attributes:
        hidden_size: units.
        use_bias: add a bias to the gates.
        layer_norm: normalise both products, and the LSTM's cell state on its way to the output.
        kernel_init: initialiser of `kernel_ih`, called once a gate.
        recurrent_init: initialiser of `kernel_hh`, called once a gate.
        bias_init: initialiser of `bias`, called once for all gates.
        dtype: dtype of the products and of `h`; None means `param_dtype`. The sums, the gates and
            the cell state have at least float32.
        param_dtype: dtype of the parameters.
        precision: precision of the products, as in `jax.lax.dot`.
        activation: function of the candidate, and of the LSTM's `c` before the output gate. Any
            function of arrays that keeps shapes and dtypes will do, such as `flax.linen.relu`.
    """

    hidden_size: int
    use_bias: bool = True
    layer_norm: bool = False
    kernel_init: Initializer = glorot_uniform
    recurrent_init: Initializer = orthogonal
    bias_init: Initializer = nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    activation: Activation = jax.lax.tanh  # jnp's can't be pickled

    num_gates: ClassVar[int] = 1

    def __init_subclass__(cls, **options: Any) -> None:
        nowrap_overridden(cls, RecurrentCell)
        super().__init_subclass__(**options)

    def __post_init__(self) -> None:
        self.check_attributes()
        super().__post_init__()

    @nn.nowrap
    def check_attributes(self) -> None:
        """Check that the attributes are within their bounds.

        Raises:
            ValueError: one of them is not.
        """
        check_integer("hidden_size", self.hidden_size)
        check_flag("use_bias", self.use_bias)
        check_flag("layer_norm", self.layer_norm)
        check_floating("dtype", self.dtype)
        check_floating("param_dtype", self.param_dtype)
        check_activation("activation", self.activation)

    @property
    def output_size(self) -> int:
        """Features of `h`."""
        return self.hidden_size

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of the products' operands and of `h`."""
        return jnp.dtype(self.dtype or self.param_dtype)

    @property
    def state_dtype(self) -> jnp.dtype:
        """The dtype of the sums, the gates and the cell state."""
        return jnp.dtype(at_least_float32(self.compute_dtype))

    @property
    def num_feature_axes(self) -> int:
        """How many axes of x hold features; `flax.linen.RNN` reads this."""
        return 1

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Any:
        """Return the zero carry for an input of this shape.

        Args:
            rng: not used; Flax's interface has it, since a carry may be random.
            input_shape: shape of x, [batch, features] or [features].
        """
        return jnp.zeros((*input_shape[:-1], self.output_size), self.compute_dtype)

    @nn.nowrap
    def hidden(self, carry: Any) -> jax.Array:
        """The hidden state [batch, output_size] within a carry."""
        return carry

    def declare(self, features: int) -> Weights:
        """Make the parameters for x [batch, features]."""
        return self.declare_products(features) | self.declare_bias("bias", self.bias_init)

    def declare_products(self, features: int) -> Weights:
        """Make both kernels, and their normalisations."""
        weights: Weights = {}
        sizes = {"ih": features, "hh": self.output_size}
        inits = {"ih": self.kernel_init, "hh": self.recurrent_init}
        for name, rows in sizes.items():
            shape = (rows, self.num_gates * self.hidden_size)
            weights |= self.declare_product(name, per_gate(inits[name], self.num_gates), shape)
        return weights

    def declare_product(self, name: str, init: Initializer, shape: tuple[int, ...]) -> Weights:
        """Make one kernel, and the normalisation of its product."""
        weights: Weights = {f"kernel_{name}": self.declare_param(f"kernel_{name}", init, shape)}
        if self.layer_norm:
            weights[f"norm_{name}"] = self.declare_norm(f"norm_{name}", use_bias=False)
        return weights

    def declare_bias(self, name: str, init: Initializer, gates: int = 0) -> Weights:
        """Make a bias over this many gates, by default all; no bias without `use_bias`."""
        if not self.use_bias:
            return {}
        shape = ((gates or self.num_gates) * self.hidden_size,)
        return {name: self.declare_param(name, init, shape)}

    def declare_param(self, name: str, init: Initializer, shape: tuple[int, ...]) -> jax.Array:
        """Make a parameter, or take the given one if it has this shape.

        Raises:
            ValueError: the given one is not floating.
        """
        path = "/".join((*self.path, name))
        return as_floats(path, self.param(name, in_float32(init), shape, self.param_dtype))

    def declare_norm(self, name: str, use_bias: bool) -> nn.LayerNorm:
        """Make a normalisation over the last axis."""
        return nn.LayerNorm(
            use_bias=use_bias,
            dtype=self.state_dtype,
            param_dtype=self.param_dtype,
            use_fast_variance=False,  # E[x²] - E[x]² cancels
            name=name,
        )

    @nn.compact
    def weights(self, features: int, kernel_dtype: DTypeLike | None = None) -> Weights:
        """Check and cast all parameters: kernels to the compute dtype, biases to `state_dtype`.

        Args:
            features: of x.
            kernel_dtype: cast kernels to this dtype instead.

        Raises:
            flax.errors.ScopeParamShapeError: a parameter has another shape.
            flax.errors.ScopeParamNotFoundError: a parameter is missing.
            ValueError: a parameter does not belong to this cell, or x has no features.
        """
        check_integer("x's number of features", features)
        weights = self.declare(features)
        if extra := sorted(self.variables.get("params", {}).keys() - weights.keys()):
            raise ValueError(
                f"params has {'/'.join((*self.path, extra[0]))}, which {type(self).__name__} "
                f"does not have with these options; it has {', '.join(weights)}"
            )
        kernel_dtype = kernel_dtype or self.compute_dtype
        return {
            name: weight
            if isinstance(weight, nn.Module)
            else weight.astype(kernel_dtype if name.startswith("kernel") else self.state_dtype)
            for name, weight in weights.items()
        }

    def step(
        self, weights: Weights, carry: Any, x: jax.Array, hidden_mask: jax.Array | None = None
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Advance one step.

        Args:
            weights: from `weights`.
            carry: [batch, its size].
            x: [batch, features].
            hidden_mask: [batch, output_size], scales `h_{t-1}`; None: by one.

        Returns:
            The next carry, and the gates by name, each [batch, hidden_size].
        """
        raise NotImplementedError

    def __call__(
        self, carry: Any, x: jax.Array, hidden_mask: jax.Array | None = None
    ) -> tuple[Any, jax.Array]:
        """Advance one step.

        Args:
            carry: each state is [batch, its size], or [its size] for an x without a batch.
            x: floating, [batch, features] or [features].
            hidden_mask: [batch, output_size], scales `h_{t-1}`; None: by one.

        Returns:
            The next carry, and its `h` [batch, output_size], as flax's cells return them. With
            `mutable="gates"`, the collection "gates" keeps the gates.

        Raises:
            ValueError: x, a state of the carry or the mask has a wrong shape or is not floating.
        """
        x = as_floats("x", x)
        if x.ndim == 0:
            raise ValueError("x has shape (), not [batch, features] or [features]")
        zeros = jax.eval_shape(lambda: self.initialize_carry(None, x.shape))
        carry = check_carry("carry", carry, zeros, ("h", "c"))
        if hidden_mask is not None:
            hidden_mask = as_floats("hidden_mask", hidden_mask)
            if hidden_mask.shape != self.hidden(zeros).shape:
                raise ValueError(
                    f"hidden_mask has shape {hidden_mask.shape}, not {self.hidden(zeros).shape}"
                )
        carry, gates = self.step(self.weights(x.shape[-1]), carry, x, hidden_mask)
        self.show(gates, replace=not note(self, "_has_shown"))
        return carry, self.hidden(carry)

    def products(
        self, weights: Weights, h: jax.Array, x: jax.Array, hidden_mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """`(x W_ih, h W_hh)`, each [batch, num_gates * hidden_size], in `state_dtype`."""
        h = self.masked(h, hidden_mask)
        return self.product("ih", weights, x), self.product("hh", weights, h)

    def masked(self, h: jax.Array, hidden_mask: jax.Array | None) -> jax.Array:
        """`h_{t-1}` after its dropout mask."""
        return h if hidden_mask is None else h * hidden_mask.astype(h.dtype)

    def product(self, name: str, weights: Weights, operand: jax.Array) -> jax.Array:
        """A product with one kernel, normalised with `layer_norm`, in `state_dtype`."""
        product = self.dot(operand, weights[f"kernel_{name}"])
        return weights[f"norm_{name}"](product) if self.layer_norm else product

    def dot(self, operand: jax.Array, kernel: jax.Array) -> jax.Array:
        """A product in the compute dtype that accumulates in `state_dtype`."""
        return jnp.dot(
            operand.astype(self.compute_dtype),
            kernel,
            precision=self.precision,
            preferred_element_type=self.state_dtype,
        )

    def add_bias(self, sums: jax.Array, weights: Weights, name: str = "bias") -> jax.Array:
        """Sums [batch, size] plus a bias [size], if there is one."""
        if name not in weights:
            return sums
        return sums + jnp.broadcast_to(weights[name], sums.shape)

    def show(self, gates: dict[str, jax.Array], replace: bool) -> None:
        """Keep gates in the collection "gates", if `apply(..., mutable="gates")` asks for it.

        Args:
            gates: by name, each [batch, hidden_size], or [batch, time, hidden_size].
            replace: replace gates that an earlier `apply` left. Otherwise they come from an earlier
                call within this `apply`, and a tuple keeps both.
        """
        if self.is_initializing():
            return
        for name, value in gates.items():
            self.sow(
                "gates", name, value, reduce_fn=_replace if replace else _append, init_fn=tuple
            )


def _append(kept: Any, new: jax.Array) -> Any:
    return (*kept, new) if isinstance(kept, tuple) else (kept, new)


def _replace(kept: Any, new: jax.Array) -> jax.Array:
    return new


def nowrap_overridden(cls: type[nn.Module], base: type[nn.Module]) -> None:
    """Apply `nn.nowrap` to the methods of a new class which override methods that have it.

    A layer calls them outside of any scope too, where `nn.tabulate` refuses to note a call.
    """
    for name, method in vars(cls).items():
        if hasattr(getattr(base, name, None), "nowrap") and callable(method):
            nn.nowrap(method)


def check_activation(name: str, activation: Any) -> None:
    """Check that an activation is a function.

    Raises:
        ValueError: it is not.
    """
    check(name, activation, "a function of an array", callable)


def note(module: nn.Module, name: str) -> bool:
    """Set a flag on a module for the rest of this `apply`; returns whether it was set before."""
    was_noted = name in vars(module)
    object.__setattr__(module, name, True)  # Linen's own attributes can't be set
    return was_noted


def check_carry(what: str, given: Any, like: Any, names: tuple[str, ...]) -> Any:
    """Return the caller's carry as arrays with the shapes and dtypes of `like`.

    Args:
        what: the argument's name, for errors.
        given: the carry, of arrays or of what converts to arrays.
        like: a carry with the wanted structure, shapes and dtypes.
        names: names of the states, in their order.

    Raises:
        ValueError: the structure or the shape of a state differs, or a state is not floating.
    """
    if isinstance(given, list) and isinstance(like, tuple):
        given = tuple(given)
    wanted, structure = jax.tree.flatten(like)
    try:
        states = structure.flatten_up_to(given)  # type: ignore[attr-defined]  # jaxlib's stubs lack it
    except ValueError:
        states = [{}]
    if any(isinstance(state, (dict, tuple)) for state in states):
        found = jax.tree.structure(given)
        raise ValueError(f"{what} has the structure {found}, not {structure}")
    checked = []
    for name, state, zeros in zip(names, states, wanted, strict=False):
        state = as_floats(f"{what}: {name}", state)
        if state.shape != zeros.shape:
            raise ValueError(f"{what}: {name} has shape {state.shape}, not {zeros.shape}")
        checked.append(state.astype(zeros.dtype))
    return jax.tree.unflatten(structure, checked)
