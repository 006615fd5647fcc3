"""An LSTM for Flax Linen, its training and its checkpoints.

The data pipeline, `lstm_flax.data`, is imported by name, since it alone needs tfds.
"""

from lstm_flax.models import (
    GRUCell,
    GRUStack,
    LSTMCell,
    LSTMClassifier,
    LSTMStack,
    RNNCell,
    RNNStack,
    SequenceClassifier,
    chrono_init,
    from_torch,
    to_torch,
)
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
    "GRUCell",
    "GRUStack",
    "Keys",
    "LSTMCell",
    "LSTMClassifier",
    "LSTMStack",
    "Metrics",
    "RNNCell",
    "RNNStack",
    "SequenceClassifier",
    "chrono_init",
    "create_train_state",
    "eval_step",
    "evaluate",
    "from_torch",
    "to_torch",
    "train_step",
    "train_steps",
]
