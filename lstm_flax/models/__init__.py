"""The recurrent layers, the classifier on top of them, and PyTorch's weights."""

from lstm_flax.models.cells import GRUCell, LSTMCell, RNNCell
from lstm_flax.models.classifier import LSTMClassifier, SequenceClassifier
from lstm_flax.models.stack import GRUStack, LSTMStack, RNNStack
from lstm_flax.models.torch_weights import from_torch, to_torch

__all__ = [
    "GRUCell",
    "GRUStack",
    "LSTMCell",
    "LSTMClassifier",
    "LSTMStack",
    "RNNCell",
    "RNNStack",
    "SequenceClassifier",
    "from_torch",
    "to_torch",
]
