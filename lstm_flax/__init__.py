"""An LSTM for Flax Linen, its training and its checkpoints.

Everything is imported on first use. So `lstm_flax.files` needs no Flax, Orbax takes its second only
where there are checkpoints, and `lstm_flax.data` needs the extra `data`.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # without this, a type checker would accept any attribute
    from lstm_flax import checkpoints as checkpoints
    from lstm_flax import data as data
    from lstm_flax.models import (
        CellStack,
        GRUCell,
        GRUStack,
        LSTMCarry,
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
        to_onnx,
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

    __version__: str
else:
    _MODULES = ("models", "training", "sequences", "checkpoints", "data")

    def __getattr__(name: str) -> Any:
        """Import a module or a public name on first use (PEP 562), or return the version."""
        if name == "__version__":
            return importlib.metadata.version("lstm_flax")
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in __all__:
            for module in _MODULES:
                found = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
                if found is not None:
                    return globals().setdefault(name, found)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_MODULES})


__all__ = [
    "CellStack",
    "GRUCell",
    "GRUStack",
    "Keys",
    "LSTMCarry",
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
    "to_onnx",
    "to_torch",
    "train_step",
    "train_steps",
]
