"""The kernel's own handlers, called past the layer: what they refuse, threads, and a fork."""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_flax.models.native import build

SIZES = {"b": 3, "t": 4, "f": 6, "h": 5}
"""Of batch, time, features and hidden; g stands for the 4 h gates."""


# XLA raises one or the other, as it waits for the result or not.
ERRORS = (ValueError, jax.errors.JaxRuntimeError)


@dataclass(frozen=True)
class Handler:
    """One of the kernel's functions; the letters of a buffer are its dimensions."""

    part: str
    operands: dict[str, str]
    results: dict[str, str]
    attributes: tuple[tuple[str, bool], ...] = (("reverse", False),)

    def shapes(self, **sizes):
        sizes = SIZES | sizes
        sizes["g"] = 4 * sizes["h"]
        buffers = self.operands | self.results
        return {name: tuple(sizes[d] for d in letters) for name, letters in buffers.items()}

    def call(self, shapes, dtypes=(), **values):
        """Its results for random operands, but for `values`."""
        assert build.unavailable("float32") is None
        dtypes = {"lengths": np.int32} | dict(dtypes)

        def operand(name):
            shape, dtype = shapes[name], dtypes.get(name, np.float32)
            if name == "lengths":
                return np.full(shape, SIZES["t"], dtype)
            return np.random.default_rng(0).normal(size=shape).astype(dtype)

        operands = [values[name] if name in values else operand(name) for name in self.operands]
        results = [
            jax.ShapeDtypeStruct(shapes[name], dtypes.get(name, np.float32))
            for name in self.results
        ]
        kernel = jax.ffi.ffi_call(build.TARGET.format(part=self.part, dtype="float32"), results)
        return kernel(*operands, **dict(self.attributes))

    def __call__(self, shapes, dtypes=(), **values):
        """The same, by name, once they are there."""
        found = map(np.asarray, self.call(shapes, dtypes, **values))
        return dict(zip(self.results, found, strict=True))


FORWARD = Handler(
    "forward",
    {
        "x": "btf", "kernel_ih": "fg", "kernel_hh": "hg", "bias": "g", "h_0": "bh", "c_0": "bh",
        "lengths": "b",
    },
    {"outputs": "bth", "h_n": "bh", "c_n": "bh", "gates": "btg", "cells": "bth"},
)  # fmt: skip
GATE_GRADIENTS = Handler(
    "gate_gradients",
    {
        "kernel_hh": "hg", "c_0": "bh", "lengths": "b", "gates": "btg", "cells": "bth",
        "d_outputs": "bth", "d_h_n": "bh", "d_c_n": "bh",
    },
    {"d_gates": "btg", "d_c_0": "bh"},
)  # fmt: skip
WEIGHT_GRADIENTS = Handler(
    "weight_gradients",
    {"x": "btf", "h_0": "bh", "outputs": "bth", "lengths": "b", "d_gates": "btg"},
    {"d_kernel_ih": "fg", "d_kernel_hh": "hg", "d_bias": "g"},
)
INPUT_GRADIENT = Handler(
    "input_gradient", {"d_gates": "btg", "kernel_ih": "fg"}, {"d_x": "btf"}, ()
)
WITH_LENGTHS = [FORWARD, GATE_GRADIENTS, WEIGHT_GRADIENTS]
HANDLERS = {handler.part: handler for handler in (*WITH_LENGTHS, INPUT_GRADIENT)}
every_handler = pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)

# The first buffers of a call say what the sizes are, so others may get the blame for theirs.
SET_SIZES = {"x", "kernel_hh", "cells", "h_0", "d_gates", "kernel_ih"}


def misshapen(shape):
    """The shape with an axis too many, one too few, and each of them longer or empty."""
    yield (*shape, 1)
    yield shape[1:]
    for axis, size in enumerate(shape):
        for wrong in (size + 1, 0):
            yield (*shape[:axis], wrong, *shape[axis + 1 :])


@every_handler
def test_a_buffer_of_a_wrong_shape_is_named(handler):
    right = handler.shapes()
    handler(right)
    for name, shape in right.items():
        for wrong in misshapen(shape):
            if name == "d_x" and 0 in wrong:
                continue  # XLA leaves out a call without results
            shapes = right | {name: wrong}
            with pytest.raises(ERRORS) as raised:
                handler(shapes)
            blamed, says = str(raised.value).split("lstm_flax's kernel: ")[1].split(" ", 1)
            assert blamed == name or name in SET_SIZES
            assert f"has shape {list(shapes[blamed])}, not [" in says
            assert "\n" not in says


@pytest.mark.parametrize("length", [-1, SIZES["t"] + 1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("handler", WITH_LENGTHS, ids=lambda handler: handler.part)
def test_a_length_out_of_range_is_named(handler, length):
    lengths = np.array([1, length, 4], np.int32)
    with pytest.raises(ERRORS, match=rf"lengths\[1\] is {length}, not in 0\.\.4"):
        handler(handler.shapes(), lengths=lengths)


@every_handler
def test_another_type_is_refused(handler):
    for name in [*handler.operands, *handler.results]:
        with pytest.raises(ERRORS, match="Wrong buffer dtype"):
            handler(handler.shapes(), {name: jnp.bfloat16})


def test_sizes_whose_products_overflow_are_refused():
    many = 2**24
    some = {"gates": (1,)}  # XLA leaves out a call all of whose results are empty
    shapes = FORWARD.shapes(b=0, h=0) | some
    with pytest.raises(ERRORS, match=r"x .* has shape .* is too large"):
        FORWARD(shapes | {"x": (0, many, many)})
    with pytest.raises(ERRORS, match=r"x .* not \[0, \?, 6\]"):
        FORWARD(shapes | {"x": (0, 2**50, 6)})
    shapes = {"d_gates": (0, many, many), "kernel_ih": (0, many), "d_x": (1,)}
    with pytest.raises(ERRORS, match=r"d_gates .* is too large"):
        INPUT_GRADIENT(shapes)


@pytest.mark.parametrize("size", ["b", "t", "f", "h"])
def test_of_nothing_it_computes_what_there_is(size):
    """Without steps the states stay, without rows there is no gradient; without inputs it steps."""
    none = {size: 0}
    lengths = {"lengths": np.zeros(SIZES["b"], np.int32)} if size == "t" else {}
    forward = FORWARD(FORWARD.shapes(**none), **lengths)
    backward = GATE_GRADIENTS(GATE_GRADIENTS.shapes(**none), **lengths)
    if size != "h":  # without which XLA leaves the call out
        backward |= WEIGHT_GRADIENTS(WEIGHT_GRADIENTS.shapes(**none), **lengths)
    input_gradient = INPUT_GRADIENT(INPUT_GRADIENT.shapes(**none))
    assert all(np.isfinite(value).all() for value in (*forward.values(), *backward.values()))
    if size == "t":
        given = np.random.default_rng(0).normal(size=(SIZES["b"], SIZES["h"])).astype(np.float32)
        for state in (forward["h_n"], forward["c_n"], backward["d_c_0"]):
            np.testing.assert_array_equal(state, given)
    if size in "bt":
        for name in ("d_kernel_ih", "d_kernel_hh", "d_bias"):
            np.testing.assert_array_equal(backward[name], 0)
    if size == "f":
        assert np.abs(forward["outputs"]).min() > 0
        assert np.abs(backward["d_kernel_hh"]).min() > 0
    if size == "h":  # so that there are no gates either
        np.testing.assert_array_equal(input_gradient["d_x"], np.zeros((3, 4, 6)))


def test_gates_are_kept_whole_or_not_at_all():
    whole = FORWARD.shapes()
    kept = FORWARD(whole)
    bare = FORWARD(whole | {"gates": (0,), "cells": (0,)})
    for name in ("outputs", "h_n", "c_n"):
        np.testing.assert_array_equal(bare[name], kept[name])
    for name, shape in {"gates": (0,), "cells": (2, 0)}.items():
        with pytest.raises(ERRORS, match=f"kernel: {name} "):
            FORWARD(whole | {name: shape})


def test_threads_that_call_it_at_once_get_what_one_gets():
    operands = [np.random.default_rng(seed).normal(size=(40, 9, 6)) for seed in range(2)]
    shapes = FORWARD.shapes(b=40, t=9)
    lengths = np.full(40, 9, np.int32)

    @jax.jit
    def forward(x):
        return FORWARD.call(shapes, x=x, lengths=lengths)[0]

    def many(x):
        return [np.asarray(forward(x.astype(np.float32))) for _ in range(50)]

    expected = [many(x)[0] for x in operands]
    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(many, operands), expected, strict=True):
            for value in found:
                np.testing.assert_array_equal(value, wanted)


WITH_FORKED_WORKERS = """
import multiprocessing, warnings
import jax, numpy as np
from lstm_flax import LSTMStack

def batch(seed):
    return np.random.default_rng(seed).normal(size=(9, 8, 6)).astype(np.float32)

lstm = LSTMStack(16, implementation="native")
variables = lstm.init(jax.random.key(0), batch(0))
gradient = jax.jit(jax.grad(lambda x: (lstm.apply(variables, x)[0] ** 2).sum()))
expected = [np.asarray(gradient(batch(seed))) for seed in range(3)]
warnings.simplefilter("ignore")  # JAX's, that forks are not for it
for _ in range(3):
    with multiprocessing.get_context("fork").Pool(2) as workers:
        found = [gradient(x) for x in workers.imap(batch, [0, 1, 2] * 10)]
    np.testing.assert_array_equal(found, expected * 10)
print("done")
"""


def run_python(code, timeout=120):
    """The last line that fresh Python prints; what it says goes with a failure."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_it_computes_while_forked_workers_make_its_batches():
    """Workers that run XLA's programs themselves may wait for its threads for ever: not ours."""
    assert run_python(WITH_FORKED_WORKERS) == "done"


HEADERS = [f"-I{build.KERNEL.parent}", f"-I{jax.ffi.include_dir()}"]
COMPILER = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-w", *HEADERS]


def test_absent_helpers_refused_memory_and_forks(tmp_path):
    """The driver tells; also where a sanitizer's flags are in the environment."""
    driver = Path(__file__).with_name("kernel_driver.cc")
    flags = ["-O1", "-march=native", *shlex.split(os.environ.get(build.MORE_FLAGS, ""))]
    command = [*COMPILER, *flags, driver, "-pthread", "-o", tmp_path / "driver"]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86's processors")
@pytest.mark.parametrize("processor", ["x86-64", "sapphirerapids"])
def test_it_compiles_for_processors_without_and_with_bfloat16(processor):
    flags = ["-fsyntax-only", f"-march={processor}"]
    subprocess.run([*COMPILER, *flags, build.KERNEL], check=True)
