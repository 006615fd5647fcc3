"""Sequence classification: a recurrent core, its final hidden state, one dense layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_flax.arguments import check_floating, check_integer
from lstm_flax.models.cell import at_least_float32
from lstm_flax.models.lstm import LSTMStack
from lstm_flax.models.short_help import ShortHelp
from lstm_flax.models.stack import RecurrentStack


class SequenceClassifier(nn.Module, metaclass=ShortHelp):
    """Logits from the top layer's final hidden state, of both directions if there are two.

    Each direction's final state comes after it has read the whole sequence: it is the last output
    of the forward direction, and the first output of the reverse direction.

    Attributes:
        core: an `LSTMStack`, `RNNStack` or `GRUStack`; its parameters are `params["core"]`.
        num_classes: number of logits; the dense layer's parameters are `params["head"]`.
        dtype: dtype of the dense layer's product; the logits have at least float32.
    """

    core: RecurrentStack
    num_classes: int
    dtype: Any = None

    def __post_init__(self) -> None:
        """Check the attributes.

        Raises:
            ValueError: `num_classes` is below 1, or `dtype` is not floating.
        """
        check_integer("num_classes", self.num_classes)
        check_floating("dtype", self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        seq_lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        resets: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Classify sequences into logits [batch, num_classes].

        Args:
            x: [batch, time, features], or [time, batch, features] with the core's `time_major`, of
                at least one step. As for the core, there may be no batch axis, or several.
            seq_lengths: [batch], as for the core; each sequence ends at its own last valid step.
                A sequence of length 0 gives the logits of a zero state.
            mask: bool [batch, time], as for the core.
            resets: bool [batch, time], as for the core; the logits describe the last piece.
            deterministic: switches dropout off.

        Raises:
            ValueError: the core refuses its arguments, or x has no time steps.
        """
        _, carry = self.core.run(
            x, seq_lengths=seq_lengths, mask=mask, resets=resets, deterministic=deterministic
        )
        if jnp.shape(x)[0 if self.core.time_major else -2] == 0:
            raise ValueError(f"x has shape {jnp.shape(x)}: there are no time steps to classify")
        h_n = jax.tree.leaves(carry)[0]
        top = h_n[-2:] if self.core.bidirectional else h_n[-1:]
        last = jnp.concatenate(list(top), axis=-1)
        head = nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            param_dtype=self.core.param_dtype,
            precision=self.core.precision,
            name="head",
        )
        logits = head(last)
        return logits.astype(at_least_float32(logits.dtype))


def LSTMClassifier(
    hidden_size: int = 256,
    num_layers: int = 3,
    num_classes: int = 10,
    *,
    dtype: Any = None,
    **stack_options: Any,
) -> SequenceClassifier:
    """The reference classifier: an `LSTMStack` under a `SequenceClassifier`.

    Args:
        hidden_size: units of each layer.
        num_layers: layers of the stack.
        num_classes: logits.
        dtype: compute dtype of the stack and of the dense layer.
        **stack_options: further attributes of `LSTMStack`, such as `dropout`.
    """
    core = LSTMStack(hidden_size, num_layers, dtype=dtype, **stack_options)
    return SequenceClassifier(core, num_classes, dtype)
