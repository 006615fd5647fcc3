"""An LSTM for Flax Linen, its training and its checkpoints.

`lstm_flax.checkpoints` and `lstm_flax.data` are imported on first use: Orbax takes a second to
import, and `lstm_flax.data` needs the extra `data`.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from lstm_flax.models import (
    CellStack,
    GRUCell,
    GRUStack,
    LSTMCell,
    LSTMClassifier,
    LSTMStack,
    PeepholeLSTMCell,
    ResetBeforeGRUCell,
    RNNCell,
    RNNStack,
    SequenceClassifier,
    chrono_init,
    from_flax,
    from_keras,
    from_torch,
    to_flax,
    to_keras,
    to_torch,
)
from lstm_flax.sequences import pad_sequences
from lstm_flax.training import (
    Keys,
    Metrics,
    create_train_state,
    eval_step,
    evaluate,
    train_step,
    train_steps,
)

if TYPE_CHECKING:  # without this, a type checker would accept any attribute
    from lstm_flax import checkpoints as checkpoints
    from lstm_flax import data as data

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        """Import `checkpoints` or `data` on first use (PEP 562); `__version__` is the package's."""
        if name == "__version__":
            return importlib.metadata.version("lstm_flax")
        if name in ("checkpoints", "data"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CellStack",
    "GRUCell",
    "GRUStack",
    "Keys",
    "LSTMCell",
    "LSTMClassifier",
    "LSTMStack",
    "Metrics",
    "PeepholeLSTMCell",
    "RNNCell",
    "RNNStack",
    "ResetBeforeGRUCell",
    "SequenceClassifier",
    "chrono_init",
    "create_train_state",
    "eval_step",
    "evaluate",
    "from_flax",
    "from_keras",
    "from_torch",
    "pad_sequences",
    "to_flax",
    "to_keras",
    "to_torch",
    "train_step",
    "train_steps",
]
