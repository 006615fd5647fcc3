"""The LSTM: its cell, and a stack of them, which kernels can run."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from lstm_flax.arguments import check_flag, check_integer, check_rate
from lstm_flax.models import cudnn
from lstm_flax.models.cell import Activation, RecurrentCell, Weights, check_activation
from lstm_flax.models.forms import Axes
from lstm_flax.models.lstm_layer import KERNELS, Operands, lstm_layer
from lstm_flax.models.stack import RecurrentStack

LSTMCarry = tuple[jax.Array, jax.Array]
"""Type of an LSTM's carry, `(h, c)`; of a stack's, `(h_n, c_n)`."""

# The functions that kernels compute, under all their names.
_TANHS, _SIGMOIDS = (jax.lax.tanh, jnp.tanh), (jax.lax.logistic, nn.sigmoid)


def forget_gate_ones(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Bias [4 * hidden_size], in the order i, f, g, o: zero, but one for the forget gate.

    The cell then remembers from its first step on: Jozefowicz, Zaremba and Sutskever, "An
    Empirical Exploration of Recurrent Network Architectures" (ICML 2015).
    """
    (size,) = shape
    hidden_size = size // 4
    return jnp.zeros(shape, dtype).at[hidden_size : 2 * hidden_size].set(1)


@dataclasses.dataclass(frozen=True)
class ChronoInit:
    """What `chrono_init` returns. Two with the same steps are equal, as are stacks with them."""

    max_steps: int

    def __call__(self, key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
        """Draw biases [4 * hidden_size]."""
        (size,) = shape
        b_f = jnp.log(jax.random.uniform(key, (size // 4,), dtype, 1, self.max_steps - 1))
        return jnp.concatenate([-b_f, b_f, jnp.zeros(size // 2, dtype)])


def chrono_init(max_steps: int) -> Initializer:
    """Initialise biases, in the order i, f, g, o, for a cell that remembers 1 to `max_steps` steps.

    Unit by unit `b_f = log(u)` and `b_i = -b_f`, u being uniform in [1, max_steps - 1]; the others
    are zero (Tallec and Ollivier, "Can Recurrent Neural Networks Warp Time?", 2018).
    For `LSTMStack(..., bias_init=chrono_init(784))`.

    Raises:
        ValueError: `max_steps` is not an integer of at least 2.
    """
    check_integer("max_steps", max_steps, lowest=2)
    return ChronoInit(max_steps)


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
        bias_init: initialiser of `bias`. By default the forget gate's bias starts at one; for
            sequences of hundreds of steps, use `chrono_init`.
        proj_size: features of `h`, less than `hidden_size`; 0 means no projection.
        recurrent_activation: function of the gates, σ above; `activation` is tanh above.
    """

    bias_init: Initializer = forget_gate_ones
    proj_size: int = 0
    recurrent_activation: Activation = jax.lax.logistic

    num_gates: ClassVar[int] = 4

    def check_attributes(self) -> None:
        """Check that the attributes are within their bounds."""
        super().check_attributes()
        check_activation("recurrent_activation", self.recurrent_activation)
        check_integer("proj_size", self.proj_size, lowest=0, below=self.hidden_size)

    @property
    def output_size(self) -> int:
        """Features of `h`."""
        return self.proj_size or self.hidden_size

    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> LSTMCarry:
        """Zero `(h, c)`, see `RecurrentCell.initialize_carry`."""
        c = jnp.zeros((*input_shape[:-1], self.hidden_size), self.state_dtype)
        return super().initialize_carry(rng, input_shape), c

    def hidden(self, carry: LSTMCarry) -> jax.Array:
        """`h` of `(h, c)`."""
        return carry[0]

    def declare(self, features: int) -> Weights:
        """Make the parameters for x [batch, features]."""
        weights = super().declare(features)
        if self.layer_norm:
            weights["norm_c"] = self.declare_norm("norm_c", use_bias=True)
        if self.proj_size:
            shape = (self.hidden_size, self.proj_size)
            weights["kernel_hr"] = self.declare_param("kernel_hr", self.kernel_init, shape)
        return weights

    def step(
        self,
        weights: Weights,
        carry: LSTMCarry,
        x: jax.Array,
        hidden_mask: jax.Array | None = None,
    ) -> tuple[LSTMCarry, dict[str, jax.Array]]:
        """Advance one step, see `RecurrentCell.step`."""
        h, c = carry
        from_x, from_h = self.products(weights, h, x, hidden_mask)
        i, f, g, o = jnp.split(self.add_bias(from_x + from_h, weights), 4, axis=-1)
        i, f, o = (self.recurrent_activation(gate) for gate in (i, f, o))
        g = self.activation(g)
        c = f * c + i * g
        h = self.show_cell(weights, c, o)
        return (h, c), {"input": i, "forget": f, "candidate": g, "output": o, "cell": c}

    def show_cell(self, weights: Weights, c: jax.Array, o: jax.Array) -> jax.Array:
        """Compute `h_t` from `c_t` and the output gate."""
        shown = weights["norm_c"](c) if self.layer_norm else c
        h = (o * self.activation(shown)).astype(self.compute_dtype)
        if self.proj_size:
            h = self.dot(h, weights["kernel_hr"]).astype(self.compute_dtype)
        return h


class PeepholeLSTMCell(LSTMCell):
    """One step of an LSTM layer whose gates see the cell state (Gers and Schmidhuber 2000).

        i, f, g, o = split(x_t W_ih + h_{t-1} W_hh + b)
        c_t = σ(f + p_f ⊙ c_{t-1}) ⊙ c_{t-1} + σ(i + p_i ⊙ c_{t-1}) ⊙ tanh(g)
        h_t = σ(o + p_o ⊙ c_t) ⊙ tanh(c_t)

    The three vectors are the parameters `peephole_i`, `peephole_f` and `peephole_o`, each
    [hidden_size], zero at first. ONNX's `P` [3 * hidden_size] has them in the order i, o, f.
    Everything else is as in `LSTMCell`.
    """

    def declare(self, features: int) -> Weights:
        """Make the parameters for x [batch, features]."""
        names = ("peephole_i", "peephole_f", "peephole_o")
        shape = (self.hidden_size,)
        zeros = nn.initializers.zeros
        peepholes = {name: self.declare_param(name, zeros, shape) for name in names}
        return super().declare(features) | peepholes

    def step(
        self,
        weights: Weights,
        carry: LSTMCarry,
        x: jax.Array,
        hidden_mask: jax.Array | None = None,
    ) -> tuple[LSTMCarry, dict[str, jax.Array]]:
        """Advance one step, see `RecurrentCell.step`."""
        h, c = carry
        from_x, from_h = self.products(weights, h, x, hidden_mask)
        i, f, g, o = jnp.split(self.add_bias(from_x + from_h, weights), 4, axis=-1)
        i = self.recurrent_activation(i + self.peep(weights, "peephole_i", c))
        f = self.recurrent_activation(f + self.peep(weights, "peephole_f", c))
        g = self.activation(g)
        c = f * c + i * g
        o = self.recurrent_activation(o + self.peep(weights, "peephole_o", c))
        h = self.show_cell(weights, c, o)
        return (h, c), {"input": i, "forget": f, "candidate": g, "output": o, "cell": c}

    def peep(self, weights: Weights, name: str, c: jax.Array) -> jax.Array:
        """The part of the cell state [batch, hidden_size] that a gate sees."""
        return jnp.broadcast_to(weights[name], c.shape) * c


class LSTMStack(RecurrentStack[LSTMCarry]):
    """`num_layers` LSTM layers over sequences, with the call and the shapes of `torch.nn.LSTM`.

        >>> import jax, jax.numpy as jnp
        >>> from lstm_flax import LSTMStack
        >>> lstm = LSTMStack(hidden_size=16, num_layers=2, bidirectional=True)
        >>> x = jnp.ones((3, 7, 5))
        >>> variables = lstm.init(jax.random.key(0), x)
        >>> outputs, (h_n, c_n) = lstm.apply(variables, x, seq_lengths=jnp.array([7, 2, 4]))
        >>> outputs.shape, h_n.shape, c_n.shape
        ((3, 7, 32), (4, 3, 16), (4, 3, 16))
        >>> _, kept = lstm.apply(variables, x, mutable="gates")
        >>> kept["gates"]["l0"]["forget"].shape
        (3, 7, 16)

    The parameters of layer k are `params["l{k}"]`, and `params["l{k}_reverse"]` in reverse.
    `lstm_flax.models.cell` describes them, and its `RecurrentCell` the attributes not listed here.

    Attributes:
        hidden_size: units of each layer and direction.
        num_layers: number of layers; each reads the output of the one below it.
        bidirectional: also run each layer from the end to the start, with its own parameters.
        dropout: fraction of each layer's output that is dropped on its way to the next layer, with
            a new mask at each step. All dropout and zoneout draws from the rng "dropout".
        recurrent_dropout: fraction of `h_{t-1}` that is dropped on its way into the gates, with one
            mask per sequence (Gal and Ghahramani, 2016).
        zoneout: probability that a unit of `h` keeps its value of the step before (Krueger et al.,
            2017); evaluation uses the mean.
        zoneout_cell: the same for `c`.
        layer_norm: normalise inside the cell (Ba et al., 2016), see `lstm_flax.models.cell`.
        proj_size: features that `h` is projected to, less than `hidden_size`; 0: no projection.
        peephole: let the gates see the cell state, see `PeepholeLSTMCell`.
        time_major: time is the first axis of x, of the outputs, and of masks.
        reverse: run from each sequence's end to its start; outputs stay in the order of x.
        hold_outputs: at steps that are not valid, repeat the latest output of each direction, or
            `h_0` before its first, as Keras's `zero_output_for_mask=False` does; otherwise zero.
        return_carry: return `(outputs, carry)`; otherwise the outputs, as `nn.Sequential` needs.
        unroll: steps in one iteration of the scan, as in `jax.lax.scan`; True takes all of them.
        implementation: "scan" is the reference that the others equal. "native" (CPU), "pallas"
            (TPU) and "cudnn" (CUDA) are kernels; if one can't run, a warning says why, and the
            stack scans. "auto" chooses by the platform, the options and the size, and never warns.

    Raises:
        ValueError: an attribute is out of its bounds; the message gives them.
    """

    bias_init: Initializer = forget_gate_ones
    zoneout_cell: float = 0.0
    proj_size: int = 0
    recurrent_activation: Activation = jax.lax.logistic
    peephole: bool = False

    def check_attributes(self) -> None:
        """Check that the attributes are within their bounds."""
        super().check_attributes()
        check_rate("zoneout_cell", self.zoneout_cell, may_be_one=True)
        check_flag("peephole", self.peephole)

    def make_cell(self, name: str | None) -> LSTMCell:
        """Make the cell of one layer and direction."""
        kind = PeepholeLSTMCell if self.peephole else LSTMCell
        return kind(
            self.hidden_size,
            proj_size=self.proj_size,
            recurrent_activation=self.recurrent_activation,
            **self.cell_options(name),
        )

    def zoneout_rates(self) -> tuple[float, float]:
        """The rates for `(h, c)`."""
        return self.zoneout, self.zoneout_cell

    def why_not_layer(self, x: jax.Array, deterministic: bool = True) -> str | None:
        """Say in a few words why `__call__` scans on every platform; None: it does not.

        Args:
            x: the input, or its shape and dtype.
            deterministic: as in `__call__`.
        """
        dtype = self.make_cell(None).compute_dtype
        time = Axes.of(x.shape, self.time_major).time
        reasons = {
            "layer_norm": self.layer_norm,
            "proj_size": self.proj_size,
            "peephole": self.peephole,
            "another activation": self.activation not in _TANHS,
            "another recurrent_activation": self.recurrent_activation not in _SIGMOIDS,
            "zoneout": self.zoneout or self.zoneout_cell,
            "recurrent_dropout": self.recurrent_dropout and not deterministic,
            f"products in {dtype.name}": dtype.name not in ("float32", "bfloat16"),
            "gates are asked for": self.is_asked_for_gates(),
            "a symbolic shape": not all(isinstance(size, int) for size in x.shape),
            "nothing to compute": 0 in x.shape,
            # One step repays neither the kernel's loop nor what it keeps for gradients.
            "a single step": self.implementation == "auto" and time == 1,
            "several devices": jax.device_count() > 1 and not _is_one_devices_share(),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def why_no_kernel(self, x: jax.Array, platform: str) -> str | None:
        """Say in a few words why no kernel of this platform takes x; None: one does."""
        if platform == cudnn.PLATFORM:
            return cudnn.why_not(self.make_cell(None).compute_dtype)
        if platform not in KERNELS:
            return f"there is none for {platform}"
        axes = Axes.of(x.shape, self.time_major)
        batch, time, features = axes.rows, axes.time, x.shape[-1]
        deeper = [self.hidden_size * (1 + self.bidirectional)] if self.num_layers > 1 else []
        for size in (features, *deeper):
            sample = jax.ShapeDtypeStruct((batch, time, size), x.dtype)
            reason = KERNELS[platform]().why_not("forward", jax.eval_shape(self._sample, sample))
            if reason:
                return reason
        return None

    def _sample(self, x: jax.Array) -> Operands:
        """The operands of a layer over x [batch, time, features]; only shapes and dtypes matter."""
        cell = self.make_cell(None)
        h_0, c_0 = cell.initialize_carry(None, (len(x), x.shape[-1]))
        gates = jnp.zeros(4 * self.hidden_size, c_0.dtype)
        kernel_ih, kernel_hh = (
            jnp.broadcast_to(gates, (size, len(gates))) for size in (x.shape[-1], h_0.shape[-1])
        )
        lengths = jnp.zeros(len(x), jnp.int32)
        return Operands(x.astype(h_0.dtype), kernel_ih, kernel_hh, gates, h_0, c_0, lengths)

    def run_layer(
        self, cell: RecurrentCell, carry: LSTMCarry, x: jax.Array, lengths: jax.Array, reverse: bool
    ) -> tuple[LSTMCarry, jax.Array]:
        """Run one layer and direction over x [batch, time, features] as one operation."""
        kernel_ih, kernel_hh, bias = self._weights(cell, x.shape[-1])
        operands = Operands(
            x=x.astype(cell.compute_dtype),
            kernel_ih=kernel_ih,
            kernel_hh=kernel_hh,
            bias=bias,
            h_0=carry[0],
            c_0=carry[1],
            lengths=lengths,
        )
        outputs, h_n, c_n = lstm_layer(
            operands,
            reverse=reverse,
            precision=self.precision,
            at_any_size=self.implementation != "auto",
        )
        return (h_n, c_n), outputs

    def run_cudnn(
        self,
        cells: Sequence[RecurrentCell],
        carries: Sequence[LSTMCarry],
        x: jax.Array,
        lengths: jax.Array,
    ) -> tuple[tuple[LSTMCarry, ...], jax.Array]:
        """Run layers over x [batch, time, features] as one operation of cuDNN."""
        directions = 1 + self.bidirectional
        features = [x.shape[-1]] * directions + [directions * self.hidden_size] * len(cells)
        h_0, c_0 = (jnp.stack(states) for states in zip(*carries, strict=True))
        outputs, h_n, c_n = cudnn.lstm(
            x.astype(h_0.dtype),
            h_0,
            c_0,
            [self._weights(cell, size) for cell, size in zip(cells, features, strict=False)],
            lengths,
            bidirectional=self.bidirectional,
            precision=self.precision,
        )
        return tuple(zip(h_n, c_n, strict=True)), outputs

    def _weights(self, cell: RecurrentCell, features: int) -> cudnn.Weights:
        """`(kernel_ih, kernel_hh, bias)` in the accumulation dtype; the bias may be zero."""
        weights = cell.weights(features, kernel_dtype=cell.state_dtype)
        no_bias = jnp.zeros(4 * self.hidden_size, cell.state_dtype)
        return weights["kernel_ih"], weights["kernel_hh"], weights.get("bias", no_bias)


def _is_one_devices_share() -> bool:
    """Whether this is traced inside `jax.shard_map`, for one device's share of the arrays."""
    axes = jax.sharding.get_abstract_mesh().axis_types
    return bool(axes) and all(kind == jax.sharding.AxisType.Manual for kind in axes)
