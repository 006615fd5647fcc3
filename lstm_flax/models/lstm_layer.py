"""One LSTM layer over whole sequences, as one JAX operation that a kernel may compute.

`lstm_layer` takes what a scan of `LSTMCell` takes and returns what that returns. It is made of five
primitives. Each has a definition in `jax.numpy`, the function of the same name below, which says
what it computes and runs wherever no kernel does: on other platforms, in an export, in forward-mode
and second derivatives. A kernel for a platform is a module with functions of these names.

This is the only file that knows about transformations, so that no kernel has to:

- `grad` runs `forward` with what it keeps, then the three gradients; `jvp` differentiates the
  definitions.
- `vmap` folds the mapped axis into the batch where the weights are not mapped.
- Lowering picks the kernel by the platform that the program is for, not by that of this machine.
  Where there is one that can't take the operands, a line to the logger "lstm_flax" says why. Where
  it would take longer than the definition, that runs, unless a kernel was asked for by name.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from lstm_flax.models import native

logger = logging.getLogger("lstm_flax")

Arrays = Sequence[jax.Array]


class Kernels(Protocol):
    """A module of functions for one platform, each with a definition's name and its arguments."""

    PLATFORM: str
    """As `jax.jit(...).trace(...).lower(lowering_platforms=...)` calls it."""
    CAN_BE_EXPORTED: bool
    """Whether what they are lowered to runs on another machine of the platform."""

    def why_not(self, part: str, operands: Arrays) -> str | None:
        """Why the function called `part` can't take these; None: it can."""

    def is_slower(self, part: str, operands: Arrays) -> bool:
        """Whether the definition takes less time for these."""


class Operands(NamedTuple):
    """What a layer is computed from, in the form that kernels get it.

    The numbers that are multiplied have the compute dtype, float32 or less; all else is in the
    accumulation dtype, which has no less than float32.
    """

    x: jax.Array  # compute dtype [batch, time, features], zero in the padding
    kernel_ih: jax.Array  # accumulation dtype [features, 4 * hidden_size], gates i, f, g, o
    kernel_hh: jax.Array  # accumulation dtype [hidden_size, 4 * hidden_size]
    bias: jax.Array  # accumulation dtype [4 * hidden_size]
    h_0: jax.Array  # compute dtype [batch, hidden_size]
    c_0: jax.Array  # accumulation dtype [batch, hidden_size]
    lengths: jax.Array  # int32 [batch], from 0 to time


def lstm_layer(
    operands: Operands,
    *,
    reverse: bool = False,
    precision: Any = None,
    at_any_size: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer and direction over whole sequences.

    Args:
        operands: see `Operands`.
        reverse: start each sequence at its end.
        precision: of the products, as in `jax.lax.dot`; kernels for CPUs have the highest always.
        at_any_size: by a kernel that can, also where the definition takes less time.

    Returns:
        `(outputs, h_n, c_n)`: the outputs, compute dtype [batch, time, hidden_size], zero in the
        padding, and the final states, in the dtypes of `h_0` and `c_0`. A sequence of length 0
        leaves its initial states.

    Raises:
        ValueError: an operand does not have the shape or the dtype that `Operands` gives it.
    """
    _check(operands)
    operands = Operands(*_varying_alike(operands))
    static = {"reverse": reverse, "precision": precision, "at_any_size": at_any_size}
    return tuple(forward_p.bind(*operands, keep=False, **static))


def _check(operands: Operands) -> None:
    batch, time, features = operands.x.shape
    hidden = operands.h_0.shape[-1]
    number, total = operands.x.dtype, operands.c_0.dtype
    needed = {
        "x": ((batch, time, features), number),
        "kernel_ih": ((features, 4 * hidden), total),
        "kernel_hh": ((hidden, 4 * hidden), total),
        "bias": ((4 * hidden,), total),
        "h_0": ((batch, hidden), number),
        "c_0": ((batch, hidden), total),
        "lengths": ((batch,), jnp.dtype("int32")),
    }
    for name, (shape, dtype) in needed.items():
        array = getattr(operands, name)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}{array.shape}, not {dtype}{shape}")


def _varying_alike(arrays: Arrays) -> list[jax.Array]:
    """Under `jax.shard_map`, let each array vary over every mesh axis that one of them varies over.

    The transpose of that adds up the gradients of what all devices share.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(array, tuple(sorted(axes - own)), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


# ---- What each primitive computes, whatever else its kernels are told.


def forward(x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, *, reverse, precision, keep, **_):
    """`(outputs, h_n, c_n)`, and if `keep` what the gradients need.

    That is the activated gates, [batch, time, 4 * hidden_size], and the cell states, [batch, time,
    hidden_size], both in the accumulation dtype and zero in the padding.
    """
    dot = partial(jnp.dot, precision=precision, preferred_element_type=c_0.dtype)
    kernel_ih, kernel_hh = kernel_ih.astype(x.dtype), kernel_hh.astype(x.dtype)

    def step(carry, at_step):
        (h, c), (x_t, is_valid) = carry, at_step
        sums = dot(x_t, kernel_ih) + dot(h, kernel_hh) + bias[None]
        i, f, g, o = jnp.split(sums, 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        new_c = f * c + i * g
        new_h = (o * jnp.tanh(new_c)).astype(h.dtype)
        carry = jnp.where(is_valid, new_h, h), jnp.where(is_valid, new_c, c)
        shown = (new_h, jnp.concatenate([i, f, g, o], axis=-1), new_c) if keep else (new_h,)
        return carry, tuple(jnp.where(is_valid, y, jnp.zeros_like(y)) for y in shown)

    steps = (x.swapaxes(0, 1), is_valid_step(lengths, x.shape[1]).T[:, :, None])
    (h_n, c_n), shown = jax.lax.scan(step, (h_0, c_0), steps, reverse=reverse)
    outputs, *kept = (y.swapaxes(0, 1) for y in shown)
    return outputs, h_n, c_n, *kept


def gate_gradients(
    d_outputs, d_h_n, d_c_n, gates, cells, kernel_hh, c_0, lengths, *, reverse, precision, **_
):
    """`(d_gates, d_c_0)`: the gradients of the sums that went into the gates, and of `c_0`.

    `d_gates` is [batch, time, 4 * hidden_size] in the compute dtype, zero in the padding.
    """
    dot = partial(jnp.dot, precision=precision, preferred_element_type=c_0.dtype)
    kernel_hh = kernel_hh.astype(d_outputs.dtype)
    time = gates.shape[1]

    def step(carry, at_step):
        (d_h, d_c), (d_output, gate, cell, before, is_valid) = carry, at_step
        i, f, g, o = jnp.split(gate, 4, axis=-1)
        shown = jnp.tanh(cell)
        d_shown = d_h + d_output.astype(d_h.dtype)
        d_cell = d_c + d_shown * o * (1 - shown**2)
        d_i, d_f = d_cell * g * i * (1 - i), d_cell * before * f * (1 - f)
        d_g, d_o = d_cell * i * (1 - g**2), d_shown * shown * o * (1 - o)
        d_gate = jnp.concatenate([d_i, d_f, d_g, d_o], axis=-1).astype(d_output.dtype)
        earlier = dot(d_gate, kernel_hh.T), d_cell * f
        carry = tuple(jnp.where(is_valid, *pair) for pair in zip(earlier, carry, strict=True))
        return carry, jnp.where(is_valid, d_gate, jnp.zeros_like(d_gate))

    is_valid = is_valid_step(lengths, time)[:, :, None]
    before = _step_before(cells, c_0, lengths, reverse)
    steps = [a.swapaxes(0, 1) for a in (d_outputs, gates, cells, before, is_valid)]
    last = d_h_n.astype(d_c_n.dtype), d_c_n
    (_, d_c_0), d_gates = jax.lax.scan(step, last, tuple(steps), reverse=not reverse)
    return d_gates.swapaxes(0, 1), d_c_0


def weight_gradients(x, h_0, outputs, lengths, d_gates, *, reverse, precision, dtype, **_):
    """`(d_kernel_ih, d_kernel_hh, d_bias)`, in the accumulation dtype, which is `dtype`."""
    before = _step_before(outputs, h_0, lengths, reverse)

    def add_up(inputs):
        return jax.lax.dot_general(
            inputs,
            d_gates,
            (((0, 1), (0, 1)), ((), ())),  # over batch and time
            precision=precision,
            preferred_element_type=dtype,
            out_sharding=_columns_sharding(inputs, d_gates),
        )

    return add_up(x), add_up(before), d_gates.sum((0, 1), dtype=dtype)


def input_gradient(d_gates, kernel_ih, *, precision, **_):
    """`(d_x,)`, in the compute dtype."""
    kernel_ih = kernel_ih.astype(d_gates.dtype)
    return (jnp.dot(d_gates, kernel_ih.T, precision=precision),)


def tangents(*arrays, moving, reverse, precision, **_):
    """The tangents of `(outputs, h_n, c_n)`; linear in those of the operands.

    Args:
        *arrays: the operands, then what `forward` returned with `keep`, then tangents.
        moving: positions of the operands that the tangents are of; those of the others are zero.
        reverse, precision: as for `forward`.
    """
    operands, along = arrays[: len(Operands._fields)], arrays[len(arrays) - len(moving) :]

    def move(*moved):
        operands_there = replaced(operands, moving, moved)
        return forward(*operands_there, reverse=reverse, precision=precision, keep=False)

    return jax.jvp(move, tuple(operands[k] for k in moving), tuple(along))[1]


def is_valid_step(lengths: jax.Array, time: int) -> jax.Array:
    """Bool [batch, time]: not in the padding."""
    return jnp.arange(time, dtype=lengths.dtype)[None] < lengths[:, None]


def _step_before(states: jax.Array, initial: jax.Array, lengths: jax.Array, reverse: bool):
    """Each step's state before it: states [batch, time, size], initial [batch, size]."""
    initial = initial[:, None]
    if not reverse:
        return jnp.concatenate([initial, states[:, :-1]], axis=1)
    later = jnp.concatenate([states[:, 1:], initial], axis=1)
    is_first = jnp.arange(1, states.shape[1] + 1, dtype=lengths.dtype)[None] == lengths[:, None]
    return jnp.where(is_first[:, :, None], initial, later)


def _columns_sharding(a: jax.Array, b: jax.Array) -> NamedSharding | None:
    """Of the last axes of both, for products over the others, which an explicit mesh asks for."""
    a_type, b_type = jax.typeof(a), jax.typeof(b)
    if not any((*a_type.sharding.spec, *b_type.sharding.spec)):
        return None
    columns = PartitionSpec(a_type.sharding.spec[-1], b_type.sharding.spec[-1])
    return NamedSharding(a_type.sharding.mesh, columns)


# ---- How a definition becomes a primitive.


def primitive(
    definition: Callable, name: str = "lstm_layer", rows: Sequence[int] = ()
) -> Primitive:
    """A primitive that computes `definition`, and where there is a kernel for it, by that.

    Args:
        definition: as above. Its keyword arguments are static; its first argument has the compute
            dtype.
        name: what the primitive's begins with.
        rows: positions of the arguments whose first axis is the batch. Where they are given, the
            batch is the first axis of all results, and each row depends on its own row alone.
    """
    made = Primitive(f"{name}_{definition.__name__}")
    made.multiple_results = True
    made.def_impl(partial(_run, made, definition))
    made.def_abstract_eval(
        lambda *avals, **static: _result_types(
            definition, avals, tuple(sorted(static.items())), jax.sharding.get_abstract_mesh()
        )
    )
    mlir.register_lowering(made, mlir.lower_fun(definition, multiple_results=True))
    ad.primitive_jvps[made] = partial(_differentiated, definition)
    batching.primitive_batchers[made] = partial(_batch, made, definition, rows)
    return made


def _run(primitive: Primitive, definition: Callable, *args, **static) -> Any:
    """A call outside of `jax.jit`; where that is disabled, the definition, step by step."""
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # JAX declares no flags
        return definition(*args, **static)
    return _compiled(primitive, tuple(sorted(static.items())))(*args)


@lru_cache(maxsize=256)
def _compiled(primitive: Primitive, static: tuple) -> Callable:
    """For calls outside of `jax.jit`: compiled once for each shape, as `jax.numpy`'s are."""
    return jax.jit(lambda *args: primitive.bind(*args, **dict(static)))


@lru_cache(maxsize=1024)
def _result_types(definition: Callable, avals: tuple, static: tuple, mesh: Any) -> list:
    """Traced, so that shardings and varying axes are what they are without the primitive."""
    del mesh  # which the tracing sees too
    return list(jax.make_jaxpr(partial(definition, **dict(static)))(*avals).out_avals)


def register(platform: str, load: Callable[[], Kernels]) -> None:
    """Lower the primitives for a platform to kernels, which are loaded when the first one is."""
    for definition, primitive in PRIMITIVES.items():
        mlir.register_lowering(primitive, partial(_lower, definition, load), platform=platform)


def _lower(definition, load, ctx, *args, at_any_size, **static):
    part, kernels, reason = definition.__name__, load(), None
    if ctx.module_context.lowering_parameters.for_export and not kernels.CAN_BE_EXPORTED:
        reason = "an export promises to run elsewhere"
    elif hasattr(kernels, part):
        reason = kernels.why_not(part, ctx.avals_in)
    if reason:
        logger.info("no kernel computes %s for %s: %s", part, kernels.PLATFORM, reason)
    takes_kernel = not reason and (at_any_size or not kernels.is_slower(part, ctx.avals_in))
    chosen = getattr(kernels, part, definition) if takes_kernel else definition
    return mlir.lower_fun(chosen, multiple_results=True)(ctx, *args, **static)


def _differentiated(definition, args, args_dot, **static):
    return differentiate(partial(definition, **static), args, args_dot)


def differentiate(function: Callable, args: Arrays, args_dot: Sequence[Any]) -> Any:
    """`(results, tangents)` of a function, as JAX asks a primitive for them."""
    moving = moving_of(args_dot)

    def move(*moved):
        return function(*replaced(args, moving, moved))

    return jax.jvp(move, [args[k] for k in moving], [args_dot[k] for k in moving])


def moving_of(args_dot: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the tangents that are not known to be zero."""
    return tuple(k for k, dot in enumerate(args_dot) if not isinstance(dot, ad.Zero))


def replaced(args: Arrays, positions: Sequence[int], by: Arrays) -> list:
    """The arguments, with others at these positions."""
    args = list(args)
    for position, arg in zip(positions, by, strict=True):
        args[position] = arg
    return args


def _batch(primitive, definition, rows, args, axes, **static):
    mapped = [k for k, axis in enumerate(axes) if axis is not None]
    if not set(mapped) <= set(rows):
        results = jax.vmap(partial(definition, **static), axes)(*args)
        return results, [0] * len(results)
    size = args[mapped[0]].shape[axes[mapped[0]]]

    def fold(k):
        if k in mapped:
            arg = jnp.moveaxis(args[k], axes[k], 0)
        else:
            arg = jnp.broadcast_to(args[k][None], (size, *args[k].shape))
        return arg.reshape(size * arg.shape[1], *arg.shape[2:])

    results = primitive.bind(*replaced(args, rows, [fold(k) for k in rows]), **static)
    return [r.reshape(size, len(r) // size, *r.shape[1:]) for r in results], [0] * len(results)


forward_p = primitive(forward, rows=(0, 4, 5, 6))
gate_gradients_p = primitive(gate_gradients, rows=(0, 1, 2, 3, 4, 6, 7))
weight_gradients_p = primitive(weight_gradients)
input_gradient_p = primitive(input_gradient, rows=(0,))
tangents_p = primitive(tangents)

PRIMITIVES = {
    forward: forward_p,
    gate_gradients: gate_gradients_p,
    weight_gradients: weight_gradients_p,
    input_gradient: input_gradient_p,
}


def _native() -> Kernels:
    return native


def _pallas_tpu() -> Kernels:
    # Here, since Pallas takes longer to import than all of this library.
    from lstm_flax.models import pallas_tpu

    return pallas_tpu


KERNELS: dict[str, Callable[[], Kernels]] = {"cpu": _native, "tpu": _pallas_tpu}
"""What loads the kernels for a platform."""

for of_platform, load_kernels in KERNELS.items():
    register(of_platform, load_kernels)


def _linearize(operands, operands_dot, *, keep, **static):
    """`forward`'s derivative as `tangents_p`, whose transpose the kernels know."""
    if keep:  # of the derivative itself
        return differentiate(partial(forward, keep=keep, **static), operands, operands_dot)
    outputs, h_n, c_n, gates, cells = forward_p.bind(*operands, keep=True, **static)
    moving = moving_of(operands_dot)
    along = [operands_dot[k] for k in moving]
    moved = tangents_p.bind(*operands, outputs, gates, cells, *along, moving=moving, **static)
    return (outputs, h_n, c_n), moved


def _transpose(cotangents, *arrays, moving, **static):
    """Gradients of the operands at `moving`, from the cotangents of `(outputs, h_n, c_n)`."""
    x, kernel_ih, kernel_hh, _, h_0, c_0, lengths, outputs, gates, cells, *along = arrays
    d_outputs, d_h_n, d_c_n = (ad.instantiate_zeros(cotangent) for cotangent in cotangents)
    reverse, precision = static["reverse"], static["precision"]

    d_gates, d_c_0 = gate_gradients_p.bind(
        d_outputs, d_h_n, d_c_n, gates, cells, kernel_hh, c_0, lengths, **static
    )
    gradients: dict[str, Any] = {"c_0": d_c_0}
    needed = {Operands._fields[k] for k in moving}
    if needed & {"kernel_ih", "kernel_hh", "bias"}:
        gradients["kernel_ih"], gradients["kernel_hh"], gradients["bias"] = weight_gradients_p.bind(
            x, h_0, outputs, lengths, d_gates, dtype=c_0.dtype, **static
        )
    if "x" in needed:
        (gradients["x"],) = input_gradient_p.bind(d_gates, kernel_ih, **static)
    if "h_0" in needed:
        first = jnp.maximum(lengths - 1, 0) if reverse else jnp.zeros_like(lengths)
        at_first = jnp.take_along_axis(d_gates, first[:, None, None], axis=1)[:, 0]
        d_h_0 = jnp.dot(
            at_first,
            kernel_hh.astype(x.dtype).T,
            precision=precision,
            preferred_element_type=c_0.dtype,
        ).astype(x.dtype)
        # Without any step the state that comes out is the one that went in.
        gradients["h_0"] = jnp.where(lengths[:, None] == 0, d_h_n, d_h_0)
    return [None] * (len(arrays) - len(along)) + [
        gradients[Operands._fields[k]] if ad.is_undefined_primal(tangent) else None
        for k, tangent in zip(moving, along, strict=True)
    ]


ad.primitive_jvps[forward_p] = _linearize
ad.primitive_transposes[tangents_p] = _transpose
