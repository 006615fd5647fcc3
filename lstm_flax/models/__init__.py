"""The recurrent layers, the classifier on top of them, and weights of other libraries."""

from lstm_flax.models.cell_stack import CellStack
from lstm_flax.models.classifier import LSTMClassifier, SequenceClassifier
from lstm_flax.models.framework_weights import from_flax, from_keras, to_flax, to_keras
from lstm_flax.models.gru import GRUCell, GRUStack, ResetBeforeGRUCell
from lstm_flax.models.lstm import LSTMCarry, LSTMCell, LSTMStack, PeepholeLSTMCell, chrono_init
from lstm_flax.models.onnx_weights import to_onnx
from lstm_flax.models.rnn import RNNCell, RNNStack
from lstm_flax.models.torch_weights import from_torch, to_torch

__all__ = [
    "CellStack",
    "GRUCell",
    "GRUStack",
    "LSTMCarry",
    "LSTMCell",
    "LSTMClassifier",
    "LSTMStack",
    "PeepholeLSTMCell",
    "RNNCell",
    "RNNStack",
    "ResetBeforeGRUCell",
    "SequenceClassifier",
    "chrono_init",
    "from_flax",
    "from_keras",
    "from_torch",
    "to_flax",
    "to_keras",
    "to_onnx",
    "to_torch",
]
