"""Weights of any library as NumPy arrays by name; what all conversions share."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.dtypes import issubdtype

Params = dict[str, Any]
Arrays = dict[str, np.ndarray]


def to_numpy(name: str, value: Any) -> np.ndarray:
    """Convert a tensor or an array to float32 or float64; the result may be a view of it.

    Args:
        name: what messages call it.
        value: anything that NumPy can read, or a tensor of PyTorch on any device.

    Raises:
        ValueError: NumPy can't read it, or its dtype is not floating.
    """
    try:
        if hasattr(value, "detach"):  # a tensor, perhaps on a GPU, perhaps a trained parameter
            value = value.detach().cpu()
            if value.is_floating_point() and value.element_size() < 4:
                value = value.float()  # NumPy knows no bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} can't be read as an array: {first_line(error)}") from error
    if not issubdtype(array.dtype, np.floating):
        found = written(value) if array.dtype == object else array.dtype
        raise ValueError(f"{name} is {found}, not a floating array")
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


def leaves(tree: Mapping[Any, Any], separator: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of nested mappings with its path; an empty mapping is a leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, separator, f"{path}{name}{separator}")
        else:
            yield f"{path}{name}", value


def few(names: list[str], at_most: int = 3) -> str:
    """List the first names."""
    return ", ".join(names[:at_most]) + (", …" if len(names) > at_most else "")


def written(value: Any) -> str:
    """Name what a value is, for messages."""
    return str(value) if value is None or isinstance(value, type) else type(value).__name__


def first_line(error: Exception) -> str:
    """First line of an error, or its type where it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)
