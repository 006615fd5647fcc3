"""Sequence classification: a recurrent core, its last output, one dense layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_flax.models.cell import at_least_float32
from lstm_flax.models.lstm import LSTMStack
from lstm_flax.models.stack import RecurrentStack


class SequenceClassifier(nn.Module):
    """Logits from the last output of a recurrent core.

    Attributes:
        core: an `LSTMStack`, `RNNStack` or `GRUStack`; its parameters are `params["core"]`.
        num_classes: number of logits; the dense layer's parameters are `params["head"]`.
        dtype: of the dense layer's product; the logits never have less than float32.
    """

    core: RecurrentStack
    num_classes: int
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        seq_lengths: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Classify sequences into logits [batch, num_classes].

        Args:
            x: [batch, time, features], or time first if the core has it so.
            seq_lengths: [batch], as for the core; the last valid output is each sequence's own.
            deterministic: switches dropout off.
        """
        outputs, _ = self.core(x, seq_lengths=seq_lengths, deterministic=deterministic)
        if self.core.time_major:
            outputs = jnp.swapaxes(outputs, 0, 1)
        if seq_lengths is None:
            last = outputs[:, -1]
        else:
            last = outputs[jnp.arange(outputs.shape[0]), jnp.asarray(seq_lengths) - 1]
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
