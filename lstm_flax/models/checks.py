"""Checks of what the layers are given; each error names the argument, its value and its bounds."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def check_size(name: str, value: Any, lowest: int = 1, below: int | None = None) -> None:
    """Check an integer from `lowest` on, smaller than `below` if that is given.

    Raises:
        ValueError: it is something else.
    """
    bounds = f"of at least {lowest}" if below is None else f"from {lowest} to {below - 1}"
    try:
        is_good = not isinstance(value, bool) and lowest <= operator.index(value)
    except TypeError:
        is_good = False
    if not is_good or (below is not None and value >= below):
        raise ValueError(f"{name} is {value!r}, not an integer {bounds}")


def check_rate(name: str, value: Any, *, may_be_one: bool = False) -> None:
    """Check a probability, from 0 to 1; 1 itself only if `may_be_one`.

    Raises:
        ValueError: it is something else.
    """
    try:
        is_good = 0 <= value < 1 or (may_be_one and value == 1)
    except TypeError:
        is_good = False
    if not is_good:
        bounds = "from 0 to 1" if may_be_one else "of at least 0 and less than 1"
        raise ValueError(f"{name} is {value!r}, not a number {bounds}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check a name out of some.

    Raises:
        ValueError: it is another one.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(map(repr, choices))}")


def check_floating(name: str, dtype: DTypeLike | None) -> None:
    """Check a dtype that a module computes in; None stands for a default.

    Raises:
        ValueError: it is no floating-point dtype.
    """
    try:
        is_good = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_good = False
    if not is_good:
        raise ValueError(f"{name} is {dtype!r}, not a floating-point dtype")


def as_array(name: str, value: Any) -> jax.Array:
    """Take what NumPy can read as an array.

    Raises:
        ValueError: that can't be.
    """
    try:
        return jnp.asarray(value)
    except Exception as error:  # each library's own
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} is a {kind}, which can't become an array: {reason}") from error


def as_floats(name: str, value: Any) -> jax.Array:
    """Take what NumPy can read as an array of real floating-point numbers.

    Raises:
        ValueError: it is none.
    """
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}, not a floating-point one")
    return array
