"""An LSTM for Flax Linen, its training and its checkpoints.

Everything is imported on first use. So `lstm_flax.files` needs no Flax, Orbax takes its second only
where there are checkpoints, and `lstm_flax.data` needs the extra `data`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # without this, a type checker would accept any attribute
    from lstm_flax import checkpoints as checkpoints
    from lstm_flax import data as data
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
        from_torch,
        to_onnx,
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
else:

    def __getattr__(name: str) -> Any:
        """Import a module or a public name on first use (PEP 562)."""
        if name in ("checkpoints", "data", "models", "training"):
            return importlib.import_module(f"{__name__}.{name}")
        if name in __all__:
            for module in map(
                importlib.import_module, (f"{__name__}.models", f"{__name__}.training")
            ):
                if hasattr(module, name):
                    return globals().setdefault(name, getattr(module, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "checkpoints", "data", "models", "training"})


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
    "from_torch",
    "to_onnx",
    "to_torch",
    "train_step",
    "train_steps",
]
