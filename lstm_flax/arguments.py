"""Argument checks, whose errors say in one line what the argument is and what it should be."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def check(name: str, value: Any, wanted: str, is_right: Callable[[Any], Any]) -> None:
    """Check a value, unless it is traced and therefore unknown.

    Args:
        name: name of the argument.
        value: value of the argument.
        wanted: what the value should be, in words.
        is_right: returns whether the value is valid. An AttributeError, TypeError or ValueError
            means that it is not.

    Raises:
        ValueError: the value is invalid.
    """
    if isinstance(value, jax.core.Tracer):
        return
    try:
        right = bool(is_right(value))
    except (AttributeError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{name} is {_brief(value)}, not {wanted}")


def check_integer(name: str, value: Any, lowest: int = 1, below: int | None = None) -> None:
    """Check that a value is an integer within bounds; NumPy's and JAX's integers are accepted.

    Raises:
        ValueError: it is not an integer, or is out of bounds.
    """
    bounds = f"of at least {lowest}" if below is None else f"from {lowest} to {below - 1}"
    check(
        name,
        value,
        f"an integer {bounds}",
        lambda v: (
            not isinstance(v, bool)
            and lowest <= operator.index(v)
            and (below is None or operator.index(v) < below)
        ),
    )


def check_flag(name: str, value: Any) -> None:
    """Check that a value is True or False; NumPy's are accepted, 0 and 1 are not.

    Raises:
        ValueError: it is neither.
    """
    check(name, value, "True or False", lambda v: isinstance(v, bool | np.bool_))


def check_rate(name: str, value: Any, *, may_be_one: bool = False) -> None:
    """Check that a value is a probability less than 1, or also 1 with `may_be_one`.

    Raises:
        ValueError: it is not.
    """
    bounds = "from 0 to 1" if may_be_one else "of at least 0 and less than 1"
    check(name, value, f"a number {bounds}", lambda v: 0 <= v < 1 or (may_be_one and v == 1))


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that a value is one of the given names.

    Raises:
        ValueError: it is not.
    """
    names = ", ".join(map(repr, choices))
    check(name, value, f"one of {names}", lambda v: v in choices)


def check_floating(name: str, dtype: DTypeLike | None) -> None:
    """Check that a dtype is a floating-point dtype, or None for the default.

    Raises:
        ValueError: it is not.
    """
    check(
        name,
        dtype,
        "a floating-point dtype",
        lambda d: d is None or jnp.issubdtype(jnp.dtype(d), jnp.floating),
    )


def check_array(
    name: str, array: Any, axes: tuple[str | int, ...], dtype: type[np.generic] | None = None
) -> None:
    """Check the shape and dtype of an array, traced or not.

    Args:
        name: name of the argument.
        array: value of the argument.
        axes: the size of each axis, or its name if any size is valid.
        dtype: NumPy class such as `np.uint8` or `np.floating`; None accepts any dtype.

    Raises:
        ValueError: the value is not an array, or has another shape or dtype.
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


def as_array(name: str, value: Any) -> jax.Array:
    """Convert a value to a JAX array.

    Raises:
        ValueError: the value can't be converted.
    """
    try:
        return jnp.asarray(value)
    except Exception as error:  # each array library raises its own
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} is a {kind}, which can't become an array: {reason}") from error


def as_floats(name: str, value: Any) -> jax.Array:
    """Convert a value to a JAX array of real floating-point numbers.

    Raises:
        ValueError: the value can't be converted, or has another dtype.
    """
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}, not a floating-point one")
    return array


def _is_of(found: Any, dtype: type[np.generic]) -> bool:
    try:
        return jax.dtypes.issubdtype(found, dtype)
    except TypeError:  # the dtype of another library
        return False


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:80]}…"
