"""The recurrent layers and the classifier on top of them."""

from lstm_flax.models.cells import LSTMCell
from lstm_flax.models.classifier import LSTMClassifier, SequenceClassifier
from lstm_flax.models.stack import LSTMStack

__all__ = ["LSTMCell", "LSTMClassifier", "LSTMStack", "SequenceClassifier"]
