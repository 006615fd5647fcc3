"""Checks of arguments: one line that names the argument, what it is and what it should be."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def check(name: str, value: Any, wanted: str, is_right: Callable[[Any], Any]) -> None:
    """Check a value, unless it is traced and so not known.

    Args:
        name: of the argument.
        value: to be checked.
        wanted: what it should be, in words.
        is_right: whether it is so; an error of type or value also says that it is not.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, jax.core.Tracer):
        return
    try:
        right = bool(is_right(value))
    except (AttributeError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{name} is {_brief(value)}, not {wanted}")


def check_integer(name: str, value: Any, lowest: int) -> None:
    """Check that a value is an integer, and at least so much; one of NumPy or JAX is one too.

    Raises:
        ValueError: it is not.
    """
    check(name, value, f"an integer from {lowest} on", lambda v: operator.index(v) >= lowest)


def check_array(
    name: str, array: Any, axes: tuple[str | int, ...], dtype: type[np.generic] | None = None
) -> None:
    """Check that this is an array of such a shape and dtype, traced or not.

    Args:
        name: of the argument.
        array: to be checked.
        axes: the size of each axis, or a word for it where any size will do.
        dtype: NumPy's class for it, as in `np.uint8` or `np.floating`; None: any.

    Raises:
        ValueError: it is not.
    """
    shape, found = getattr(array, "shape", None), getattr(array, "dtype", None)
    is_right = (
        shape is not None
        and len(shape) == len(axes)
        and all(isinstance(b, str) or a == b for a, b in zip(shape, axes, strict=True))
        and (dtype is None or _is_of(found, dtype))
    )
    if not is_right:
        wanted = "an array " if dtype is None else f"{dtype.__name__.strip('_')} "
        wanted += f"[{', '.join(map(str, axes))}]"
        given = type(array).__name__ if shape is None else f"{found} {list(shape)}"
        raise ValueError(f"{name} is {given}, not {wanted}")


def _is_of(found: Any, dtype: type[np.generic]) -> bool:
    try:
        return jax.dtypes.issubdtype(found, dtype)
    except TypeError:  # another library's
        return False


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:80]}…"
