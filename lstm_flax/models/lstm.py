"""The LSTM: its cell, and a stack of them, which a native kernel can run."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from lstm_flax.models import native
from lstm_flax.models.cell import RecurrentCell
from lstm_flax.models.stack import Carry, RecurrentStack

LSTMCarry = tuple[jax.Array, jax.Array]
"""`(h, c)`."""


def forget_gate_ones(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Bias [4 * hidden_size], in the order i, f, g, o: zero, but one for the forget gate.

    The cell then remembers from its first step on: Jozefowicz, Zaremba and Sutskever, "An
    Empirical Exploration of Recurrent Network Architectures" (ICML 2015).
    """
    (size,) = shape
    hidden_size = size // 4
    return jnp.zeros(shape, dtype).at[hidden_size : 2 * hidden_size].set(1)


@functools.cache  # so that stacks with the same biases are equal, and compiled once
def chrono_init(max_steps: int) -> Initializer:
    """Biases, in the order i, f, g, o, of a cell that is to remember for 1 to `max_steps` steps.

    Unit by unit `b_f = log(u)` and `b_i = -b_f`, u being uniform in [1, max_steps - 1]; the others
    are zero (Tallec and Ollivier, "Can Recurrent Neural Networks Warp Time?", 2018).
    For `LSTMStack(..., bias_init=chrono_init(784))`.
    """

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        (size,) = shape
        b_f = jnp.log(jax.random.uniform(key, (size // 4,), dtype, 1, max_steps - 1))
        return jnp.concatenate([-b_f, b_f, jnp.zeros(size // 2, dtype)])

    return init


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
        bias_init: as for every cell; by default the forget gate's bias starts at one, and
            `chrono_init` is for sequences of hundreds of steps.
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
        from_x, from_h = self.products(h, x, hidden_mask)
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


class LSTMStack(RecurrentStack):
    """`num_layers` LSTM layers over sequences, with the call and the shapes of `torch.nn.LSTM`.

    The parameters of layer k are `params["l{k}"]`, and `params["l{k}_reverse"]` for its reverse
    direction, as `LSTMCell` describes them.

        >>> import jax, jax.numpy as jnp
        >>> from lstm_flax import LSTMStack
        >>> lstm = LSTMStack(hidden_size=16, num_layers=2, bidirectional=True)
        >>> x = jnp.ones((3, 7, 5))
        >>> params = lstm.init(jax.random.key(0), x)["params"]
        >>> outputs, (h_n, c_n) = lstm.apply(
        ...     {"params": params}, x, seq_lengths=jnp.array([7, 2, 4])
        ... )
        >>> outputs.shape, h_n.shape, c_n.shape
        ((3, 7, 32), (4, 3, 16), (4, 3, 16))
        >>> _, kept = lstm.apply({"params": params}, x, mutable="gates")
        >>> kept["gates"]["l0"]["forget"].shape
        (3, 7, 16)

    Attributes:
        hidden_size: units of each layer and direction.
        num_layers: layers, the output of one being the input of the next.
        bidirectional: also run each layer from the end to the start, with parameters of its own.
        use_bias: add biases.
        dropout: fraction of each layer's output that is dropped on its way to the next layer,
            with a new mask at each time step, as in PyTorch. This and what follows draws from the
            rng "dropout".
        recurrent_dropout: fraction of `h_{t-1}` that is dropped on its way into the gates, with
            one mask a sequence (Gal and Ghahramani, "A Theoretically Grounded Application of
            Dropout in Recurrent Neural Networks", 2016).
        zoneout: probability that a unit of `h` stays as it was a step ago (Krueger et al.,
            "Zoneout", 2017); their mean in evaluation.
        zoneout_cell: the same for `c`.
        layer_norm: the LayerNorm LSTM, see `lstm_flax.models.cell`.
        proj_size: features that `h` is projected to; 0 projects nothing.
        time_major: time is the first axis of x and of the outputs.
        kernel_init, recurrent_init, bias_init, dtype, param_dtype, precision: the cell's.
        implementation: "scan" is the plain `nn.scan` of cells, which the others are equal to;
            "native" is the kernel in `lstm_flax.models.native`, for one CPU, in float32, and in
            bfloat16 where the CPU multiplies that; "auto"
            takes the faster one that the options and the machine allow. Where "native" is asked
            for and impossible, a warning says why, and it scans; "auto" logs that to the logger
            "lstm_flax". `jax.jvp`, derivatives of derivatives and `jax.export` need "scan".
    """

    bias_init: Initializer = forget_gate_ones
    zoneout_cell: float = 0.0
    proj_size: int = 0

    def make_cell(self, name: str) -> LSTMCell:
        """Make the cell of one layer and direction."""
        return LSTMCell(
            self.hidden_size, proj_size=self.proj_size, name=name, **self.cell_options()
        )

    def zoneout_rates(self) -> tuple[float, float]:
        """The rates for `(h, c)`."""
        return self.zoneout, self.zoneout_cell

    def why_not_native(self, x: jax.Array, deterministic: bool = True) -> str | None:
        """Say in a few words why `__call__` scans in place of the native kernel; None: it won't.

        Args:
            x: what it would be called with.
            deterministic: the same.
        """
        dtype = jnp.dtype(self.dtype or self.param_dtype)
        is_known = dtype.name in native.DTYPES and self.param_dtype == jnp.float32
        reasons = {
            "layer_norm": self.layer_norm,
            "proj_size": self.proj_size,
            "zoneout": self.zoneout or self.zoneout_cell,
            "recurrent_dropout": self.recurrent_dropout and not deterministic,
            f"products in {dtype.name} of parameters in {jnp.dtype(self.param_dtype).name}": (
                not is_known
            ),
            "an odd hidden_size in bfloat16": dtype == jnp.bfloat16 and self.hidden_size % 2,
            "gates are asked for": self.scope and self.is_mutable_collection("gates"),
            "nothing to compute": 0 in x.shape,
            "not on a CPU": jax.default_backend() != "cpu",
            "several devices": jax.device_count() > 1,
        }
        found = [reason for reason, applies in reasons.items() if applies]
        return found[0] if found else native.problem(dtype)

    def run_native(
        self, cell: RecurrentCell, carry: Carry, x: jax.Array, lengths: Any, reverse: bool
    ) -> tuple[tuple[Carry], jax.Array]:
        """Run one layer and direction by its native kernel, as the scan does."""
        if self.time_major:
            x = x.swapaxes(0, 1)
        batch, time, features = x.shape
        x, kernel_ih = x.astype(cell.compute_dtype), self._weight(cell, "kernel_ih")
        if x.dtype == jnp.bfloat16 and features % 2:  # it takes two at a time
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 1)))
            kernel_ih = jnp.pad(kernel_ih, ((0, 1), (0, 0)))
        bias = self._weight(cell, "bias") if self.use_bias else jnp.zeros(4 * self.hidden_size)
        outputs, h_n, c_n = native.lstm_layer(
            x,
            kernel_ih,
            self._weight(cell, "kernel_hh"),
            bias.astype(jnp.float32),
            *carry,
            jnp.full(batch, time, jnp.int32) if lengths is None else jnp.clip(lengths, 0, time),
            reverse,
        )
        return ((h_n, c_n),), outputs.swapaxes(0, 1) if self.time_major else outputs

    @staticmethod
    def _weight(cell: RecurrentCell, name: str) -> jax.Array:
        return nn.meta.unbox(cell.get_variable("params", name))
