"""An LSTM for Flax Linen, its training and its checkpoints.

The data pipeline, `lstm_flax.data`, is imported by name, since it alone needs tfds.
"""

from lstm_flax.models import LSTMCell, LSTMClassifier, LSTMStack, SequenceClassifier
from lstm_flax.training import (
    Keys,
    Metrics,
    create_train_state,
    eval_step,
    evaluate,
    train_step,
    train_steps,
)

__all__ = [
    "Keys",
    "LSTMCell",
    "LSTMClassifier",
    "LSTMStack",
    "Metrics",
    "SequenceClassifier",
    "create_train_state",
    "eval_step",
    "evaluate",
    "train_step",
    "train_steps",
]
