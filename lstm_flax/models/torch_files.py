"""Files of PyTorch's weights, read by their own libraries; no code in a file ever runs."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lstm_flax.models.weight_arrays import first_line, written

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_SAFE_TORCH = (2, 6)  # before, a file could run code in spite of weights_only (CVE-2025-32434)


def read_state_dict(path: Path) -> Mapping[Any, Any]:
    """Read the state dict in a file.

    Args:
        path: a `.safetensors` file, which the package safetensors reads; or one of `torch.save`,
            `.pt`, `.pth`, `.bin` or `.ckpt`, which PyTorch reads with `weights_only=True`.

    Returns:
        Arrays or tensors by name; a training checkpoint nests them.

    Raises:
        FileNotFoundError: this is not a file.
        ImportError: the package that reads it is missing or too old.
        ValueError: the file is of another format, is damaged, or holds more than weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    load: Callable[[ModuleType, Path], Any]
    if path.suffix == ".safetensors":
        library, load = "safetensors.numpy", _load_safetensors
    elif path.suffix in _TORCH_SUFFIXES:
        library, load = "torch", _load_torch
    else:
        known = ", ".join((".safetensors", *_TORCH_SUFFIXES))
        raise ValueError(f"{path} is no file of weights by its name, which ends in {known}")
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        package = library.partition(".")[0]
        install = '"lstm_flax[safetensors]"' if package == "safetensors" else package
        raise ImportError(f"reading {path} needs {package}: pip install {install}") from error
    state = load(module, path)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {written(state)}, not a state dict")
    return state


def _load_safetensors(safetensors: ModuleType, path: Path) -> Any:
    try:
        return safetensors.load_file(path)
    except Exception as error:  # its own type, which derives from Exception alone
        raise ValueError(f"{path} is not a safetensors file: {first_line(error)}") from error


def _load_torch(torch: ModuleType, path: Path) -> Any:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise ImportError(
            f"reading {path} safely needs torch 2.6 or newer, not {torch.__version__}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and PyTorch's own
        raise ValueError(f"{path} is not a file of weights alone: {first_line(error)}") from error
