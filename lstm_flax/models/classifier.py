"""Sequence classification: a recurrent core, its last output, one dense layer."""

from typing import Any

import flax.linen as nn
import jax

from lstm_flax.models.cells import at_least_float32
from lstm_flax.models.stack import LSTMStack


class SequenceClassifier(nn.Module):
    """Logits from the last output of a recurrent core.

    Attributes:
        core: the recurrent layers, called as `core(x, deterministic=...) -> (outputs, carry)`;
            its parameters are `params["core"]`.
        num_classes: logits; the dense layer's parameters are `params["head"]`.
        dtype: of the dense layer's product; the logits never have less than float32.
    """

    core: nn.Module
    num_classes: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Classify sequences x, [batch, time, features], into logits [batch, num_classes]."""
        outputs, _ = self.core(x, deterministic=deterministic)
        head = nn.Dense(self.num_classes, dtype=self.dtype, name="head")
        logits = head(outputs[:, -1])
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
