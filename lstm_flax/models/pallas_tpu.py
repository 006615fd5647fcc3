"""An LSTM layer as two Pallas kernels for TPUs, one each way, behind `implementation="pallas"`.

XLA's loop over time reads the weights anew at each step and leaves every step's small fusions to be
launched one after another. Here one kernel runs the whole sequence: a grid over tiles of the batch
and, within each, over chunks of time. The weights and the carry stay in the chip's vector memory,
VMEM, and all of the gates' arithmetic happens where the sums are.

The gradients of the weights and of the inputs are single products over the whole sequence already,
which XLA runs at the full speed of the matrix unit. `lstm_layer.py` says what each function
computes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lstm_flax.models.precision import asked_precision

PLATFORM = "tpu"
CAN_BE_EXPORTED = True
DTYPES = ("float32", "bfloat16")
LANES = 128  # of a vector register; a gate starts at a multiple of it
SUBLANES = 16  # rows that a tile of the batch is a multiple of: those of a bfloat16 register
MAX_ROWS = 256  # of a tile; beyond, a kernel gains little and takes long to compile
MAX_STEPS = 16  # of a chunk of time
UNROLL = 2  # steps in a loop's body: the end of one overlaps the next
VMEM_BYTES = 48 * 2**20  # for a kernel, of the 64 MiB and more that all TPUs since the v5e have


def why_not(part: str, operands: Any) -> str | None:
    """Say in a few words why a part of the layer can't run here for such operands; None: it can.

    Args:
        part: the name of one of `lstm_layer`'s definitions.
        operands: its arguments, or anything with their shapes and dtypes.
    """
    numbers = operands[0].dtype
    if numbers.name not in DTYPES:
        return f"products in {numbers.name}"
    try:
        if part == "forward":
            (batch, time, features), hidden = operands[0].shape, operands[4].shape[-1]
            _forward_tiles(batch, time, features, hidden, numbers, keep=True)
        else:
            batch, time, hidden = operands[4].shape
            _backward_tiles(batch, time, hidden, numbers)
    except _TooLargeError as error:
        return str(error)
    return None


def is_slower(part: str, operands: Any) -> bool:
    """See `lstm_layer.Kernels`: no figure of a TPU is known that says so."""
    return False


def forward(x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, *, reverse, precision, keep):
    """`lstm_layer.forward` by a kernel."""
    (batch, time, features), hidden = x.shape, h_0.shape[-1]
    tiles = _forward_tiles(batch, time, features, hidden, x.dtype, keep)
    rows, units = tiles.batch(batch), _up(hidden, LANES)
    per_step, per_row, whole = _specs(tiles, time, is_backward=reverse)

    numbers, totals = x.dtype, c_0.dtype
    results: list[Any] = [(per_step(units), (time, rows, units), numbers)]
    results += [(per_row(units), (rows, units), dtype) for dtype in (numbers, totals)]
    if keep:
        results += [(per_step(n), (time, rows, n), totals) for n in (4 * units, units)]
    specs, shapes, dtypes = zip(*results, strict=True)
    outputs, h_n, c_n, *kept = pl.pallas_call(
        partial(_forward, time=time, tiles=tiles, reverse=reverse, precision=_passes(precision, x)),
        grid=tiles.grid(batch, time),
        in_specs=[per_step(features), *[whole] * 3, per_row(units), per_row(units), per_row(1)],
        out_specs=specs,
        out_shape=_like(x, shapes, dtypes),
        compiler_params=_PARAMS,
        name="lstm_forward",
    )(
        _padded(x.swapaxes(0, 1), 1, rows),
        _padded_gates(kernel_ih.astype(numbers), hidden, units),
        _padded(_padded_gates(kernel_hh.astype(numbers), hidden, units), 0, units),
        _padded_gates(bias[None], hidden, units),
        *[_padded(_padded(state, 0, rows), 1, units) for state in (h_0, c_0)],
        _padded(lengths[:, None], 0, rows),
    )

    outputs, h_n, c_n = outputs[:, :batch, :hidden], h_n[:batch, :hidden], c_n[:batch, :hidden]
    if keep:
        gates, cells = kept
        kept = [_cut_gates(gates[:, :batch], hidden, units), cells[:, :batch, :hidden]]
    return outputs.swapaxes(0, 1), h_n, c_n, *[array.swapaxes(0, 1) for array in kept]


def _forward(
    x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, outputs, h_n, c_n, *kept,
    time, tiles, reverse, precision,
):  # fmt: skip
    """A chunk of time of a tile of the batch; `h_n` and `c_n` hold the carry between chunks."""
    start, steps = _chunk(time, tiles, is_backward=reverse)
    dot = partial(jnp.dot, precision=precision, preferred_element_type=c_0.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        h_n[:], c_n[:] = h_0[:], c_0[:]

    def step(done, _):
        k = steps - 1 - done if reverse else done
        h, c = h_n[:], c_n[:]
        i, f, g, o = _split(dot(x[k], kernel_ih[:]) + dot(h, kernel_hh[:]) + bias[:])
        i, f, g, o = _sigmoid(i), _sigmoid(f), jnp.tanh(g), _sigmoid(o)
        new_c = f * c + i * g
        new_h = (o * jnp.tanh(new_c)).astype(h.dtype)
        is_valid = start + k < lengths[:]
        h_n[:], c_n[:] = jnp.where(is_valid, new_h, h), jnp.where(is_valid, new_c, c)
        outputs[k] = jnp.where(is_valid, new_h, jnp.zeros_like(new_h))
        if kept:
            gates, cells = kept
            gates[k] = jnp.concatenate([jnp.where(is_valid, y, 0.0) for y in (i, f, g, o)], -1)
            cells[k] = jnp.where(is_valid, new_c, 0.0)
        return ()

    jax.lax.fori_loop(0, steps, step, (), unroll=UNROLL)


def gate_gradients(
    d_outputs, d_h_n, d_c_n, gates, cells, kernel_hh, c_0, lengths, *, reverse, precision
):
    """`lstm_layer.gate_gradients` by a kernel."""
    (batch, time, hidden), numbers, totals = cells.shape, d_outputs.dtype, c_0.dtype
    tiles = _backward_tiles(batch, time, hidden, numbers)
    rows, units = tiles.batch(batch), _up(hidden, LANES)
    per_step, per_row, whole = _specs(tiles, time, is_backward=not reverse)

    def last_before(tile, chunk):
        """The step of `cells` that comes before a chunk of time."""
        start, steps = _chunk(time, tiles, is_backward=not reverse, done=chunk)
        return jnp.clip(start + steps if reverse else start - 1, 0, time - 1), tile, 0

    def to_kernel(array, size):
        return _padded(_padded(array.swapaxes(0, 1), 1, rows), 2, size)

    cells = to_kernel(cells, units)
    gates = _padded_gates(_padded(gates.swapaxes(0, 1), 1, rows), hidden, units)
    kernel_hh = _padded(_padded_gates(kernel_hh.astype(numbers), hidden, units), 0, units)
    states = [d_h_n.astype(totals), d_c_n, c_0]
    shapes = [(time, rows, 4 * units), (rows, units)]
    d_gates, d_c_0 = pl.pallas_call(
        partial(
            _backward, time=time, tiles=tiles, reverse=reverse,
            precision=_passes(precision, d_outputs),
        ),
        grid=tiles.grid(batch, time),
        in_specs=[
            per_step(units), per_step(4 * units), per_step(units),
            pl.BlockSpec((1, tiles.rows, units), last_before),
            whole, *[per_row(units)] * 3, per_row(1),
        ],
        out_specs=[per_step(4 * units), per_row(units)],
        out_shape=_like(d_outputs, shapes, (numbers, totals)),
        scratch_shapes=[pltpu.VMEM((tiles.rows, units), totals)],
        compiler_params=_PARAMS,
        name="lstm_backward",
    )(
        to_kernel(d_outputs, units), gates, cells, cells, kernel_hh.T,
        *[_padded(_padded(state, 0, rows), 1, units) for state in states],
        _padded(lengths[:, None], 0, rows),
    )  # fmt: skip
    d_gates = _cut_gates(d_gates[:, :batch], hidden, units)
    return d_gates.swapaxes(0, 1), d_c_0[:batch, :hidden]


def _backward(
    d_outputs, gates, cells, cell_before, kernel, d_h_n, d_c_n, c_0, lengths, d_gates, d_c, d_h,
    *, time, tiles, reverse, precision,
):  # fmt: skip
    """A chunk of time of a tile of the batch; `d_h` and `d_c` hold the carry between chunks."""
    start, steps = _chunk(time, tiles, is_backward=not reverse)
    dot = partial(jnp.dot, precision=precision, preferred_element_type=d_h.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        d_h[:], d_c[:] = d_h_n[:], d_c_n[:]

    def back(k, before):
        is_valid = start + k < lengths[:]
        i, f, g, o = _split(gates[k])
        shown = jnp.tanh(cells[k])
        d_shown = jnp.where(is_valid, d_h[:] + d_outputs[k].astype(d_h.dtype), 0.0)
        d_cell = jnp.where(is_valid, d_c[:] + d_shown * o * (1 - shown * shown), 0.0)
        d_i, d_f = d_cell * g * (i * (1 - i)), d_cell * before * (f * (1 - f))
        d_g, d_o = d_cell * i * (1 - g * g), d_shown * shown * (o * (1 - o))
        d_gate = jnp.concatenate([d.astype(d_gates.dtype) for d in (d_i, d_f, d_g, d_o)], -1)
        d_gates[k] = d_gate
        d_h[:] = jnp.where(is_valid, dot(d_gate, kernel[:]), d_h[:])
        d_c[:] = jnp.where(is_valid, d_cell * f, d_c[:])

    def step(done, _):
        k = done if reverse else steps - 1 - done
        before = cells[k + 1 if reverse else k - 1]
        if reverse:  # a sequence may end, which is where it starts, at any step
            before = jnp.where(start + k >= lengths[:] - 1, c_0[:], before)
        back(k, before)
        return ()

    jax.lax.fori_loop(0, steps - 1, step, (), unroll=UNROLL)
    k = steps - 1 if reverse else 0
    is_first = start + k >= lengths[:] - 1 if reverse else start + k == 0
    back(k, jnp.where(is_first, c_0[:], cell_before[0]))


# ---- How the work is cut up.


class _TooLargeError(ValueError):
    """The weights leave no place for anything else."""


class _Tiles(NamedTuple):
    """Rows of the batch and steps of time that a kernel has in VMEM at once."""

    rows: int
    steps: int

    def batch(self, batch: int) -> int:
        """The batch, filled up to whole tiles."""
        return _up(batch, self.rows)

    def grid(self, batch: int, time: int) -> tuple[int, int]:
        """How many tiles there are, and chunks of time in each."""
        return pl.cdiv(batch, self.rows), pl.cdiv(time, self.steps)


def _forward_tiles(batch, time, features, hidden, numbers, keep) -> _Tiles:
    width, units = numbers.itemsize, _up(hidden, LANES)
    weights = 4 * units * (_up(features, LANES) + units) * width
    # What comes in and goes out has two buffers, one for the kernel and one on its way.
    step = 2 * (_up(features, LANES) + units) * width + keep * 2 * 5 * units * 4
    return _fit(batch, time, weights, step)


def _backward_tiles(batch, time, hidden, numbers) -> _Tiles:
    width, units = numbers.itemsize, _up(hidden, LANES)
    return _fit(batch, time, 4 * units**2 * width, 2 * units * (5 * width + 5 * 4))


def _fit(batch: int, time: int, weights: int, step: int) -> _Tiles:
    """The largest tiles that fit beside weights of so many bytes, with so many for a row's step.

    Raises:
        _TooLargeError: none do.
    """
    tiles = pl.cdiv(batch, MAX_ROWS)
    rows = _up(pl.cdiv(batch, tiles), SUBLANES)
    while rows >= SUBLANES:
        # What is there once a row, and what the kernel has between two lines, is some steps more.
        steps = (VMEM_BYTES - weights) // (rows * step) - 4
        if steps >= 1:
            chunks = pl.cdiv(time, min(steps, MAX_STEPS))
            return _Tiles(rows, pl.cdiv(time, chunks))
        rows = rows // 2 // SUBLANES * SUBLANES
    raise _TooLargeError(
        f"weights of {weights / 2**20:.0f} MiB do not fit into {VMEM_BYTES // 2**20} MiB of VMEM"
    )


def _chunk(time: int, tiles: _Tiles, is_backward: bool, done: Any = None) -> tuple[Any, int]:
    """The first step of the chunk of time that the grid is at, and how many it has."""
    done = pl.program_id(1) if done is None else done
    chunk = pl.cdiv(time, tiles.steps) - 1 - done if is_backward else done
    return chunk * tiles.steps, tiles.steps


def _specs(tiles: _Tiles, time: int, is_backward: bool):
    """Blocks of [time, batch, size], of [batch, size], and arrays that are there as a whole."""
    chunks = pl.cdiv(time, tiles.steps)

    def per_step(size):
        block = (tiles.steps, tiles.rows, size)
        return pl.BlockSpec(block, lambda b, t: (chunks - 1 - t if is_backward else t, b, 0))

    def per_row(size):
        return pl.BlockSpec((tiles.rows, size), lambda b, t: (b, 0))

    return per_step, per_row, pl.BlockSpec(memory_space=pltpu.VMEM)


_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
)


def _like(array: jax.Array, shapes, dtypes) -> list[jax.ShapeDtypeStruct]:
    """Results that vary over the mesh axes that `array` varies over."""
    kind = jax.typeof(array).manual_axis_type
    return [
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


# ---- Small things.


def _passes(precision: Any, operand: jax.Array) -> jax.lax.Precision:
    """The precision of products in the kernel, which has the lowest and the highest alone."""
    if operand.dtype == jnp.bfloat16:
        return jax.lax.Precision.DEFAULT  # exact, since the sums have float32
    return asked_precision(precision, operand.dtype)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.tanh(0.5 * x) + 0.5  # one transcendental function, not two


def _split(gates: jax.Array) -> list[jax.Array]:
    return jnp.split(gates, 4, axis=-1)


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _padded(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros at the end of an axis, up to a size."""
    pads = [(0, 0)] * array.ndim
    pads[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, pads) if pads[axis][1] else array


def _padded_gates(array: jax.Array, hidden: int, units: int) -> jax.Array:
    """The same at the end of each of the four gates along the last axis."""
    if hidden == units:
        return array
    gates = array.reshape(*array.shape[:-1], 4, hidden)
    return _padded(gates, gates.ndim - 1, units).reshape(*array.shape[:-1], 4 * units)


def _cut_gates(array: jax.Array, hidden: int, units: int) -> jax.Array:
    """Undo `_padded_gates`."""
    if hidden == units:
        return array
    gates = array.reshape(*array.shape[:-1], 4, units)[..., :hidden]
    return gates.reshape(*array.shape[:-1], 4 * hidden)
