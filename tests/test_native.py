"""The native kernel against the scan that it replaces, and when it steps back."""

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_flax import GRUStack, LSTMStack
from lstm_flax.models import native
from lstm_flax.models.native import build


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def pair(x, **options):
    """The same stack by the kernel and by the scan, and parameters for both."""
    scan = LSTMStack(implementation="scan", **options)
    params = jax.jit(scan.init)(jax.random.key(0), x)["params"]
    moved = jax.tree.map(lambda p: p + 0.1 * normal(p.size, *p.shape), params)
    return scan.clone(implementation="native"), scan, moved


def assert_close(actual, expected, tolerance=2e-6):
    """Entries differ by little beside the largest one of their array."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max()),
        actual,
        expected,
    )


# Sizes below, at and beyond the kernel's tiles of 6 or 16 rows and 16 units, and its chunks of 128
# or 512.
@pytest.mark.parametrize(
    ("batch", "time", "features", "hidden"),
    [(1, 1, 1, 1), (3, 5, 7, 5), (6, 4, 28, 16), (13, 11, 9, 37), (40, 28, 28, 64)],
)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "time_major": True}])
def test_values_and_gradients_are_the_scans(batch, time, features, hidden, options):
    shape = (time, batch, features) if options else (batch, time, features)
    x = normal(1, *shape)
    states = 2  # layers, or directions
    kernel, scan, params = pair(x, hidden_size=hidden, num_layers=1 if options else 2, **options)
    carry = (normal(2, states, batch, hidden), normal(3, states, batch, hidden))
    lengths = jax.random.randint(jax.random.key(4), (batch,), 1, time + 1)

    @partial(jax.jit, static_argnums=0)
    def run(stack):
        def apply(params, x, carry):
            return stack.apply({"params": params}, x, carry, seq_lengths=lengths)

        values, pullback = jax.vjp(apply, params, x, carry)
        cotangents = jax.tree.map(lambda v: normal(v.size, *v.shape), values)
        return values, pullback(cotangents)

    assert_close(run(kernel), run(scan), 1e-5)


@pytest.mark.parametrize(
    ("batch", "time", "features", "hidden"),
    [(1, 1, 1, 2), (6, 4, 28, 16), (13, 11, 9, 38), (40, 28, 28, 64)],
)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_scan(batch, time, features, hidden):
    if reason := native.unavailable(jnp.bfloat16):
        pytest.skip(reason)
    x = normal(1, batch, time, features)
    kernel, scan, params = pair(x, hidden_size=hidden, bidirectional=True, dtype=jnp.bfloat16)
    lengths = jax.random.randint(jax.random.key(4), (batch,), 1, time + 1)

    def run(stack):
        def loss(params, x):
            outputs, (h_n, c_n) = stack.apply({"params": params}, x, seq_lengths=lengths)
            loss = (outputs.astype(jnp.float32) ** 2).sum() + (c_n**3).sum()
            return loss, (outputs, h_n, c_n)

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x))

    exact = run(scan.clone(dtype=jnp.float32))
    for ours, theirs, expected in zip(run(kernel), run(scan), exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = (np.abs(a.astype(np.float32) - expected).max() for a in (ours, theirs))
        assert error <= 1.5 * allowed + 0.004 * np.abs(expected).max()  # bfloat16 has 8 bits


WITHOUT_TILES = """
import ctypes, json
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(2048)
small = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(small), None) == 0

import jax, jax.numpy as jnp, numpy as np
from lstm_flax import LSTMStack
from lstm_flax.models.native import build
found = build.load()
x = jax.random.normal(jax.random.key(1), (20, 6, 4))
stack = LSTMStack(8, dtype=jnp.bfloat16, implementation="native")
outputs, _ = stack.apply(stack.init(jax.random.key(0), x), x)
print(json.dumps([found, np.float32(outputs).tolist()]))
"""


def test_where_the_system_refuses_tiles_it_multiplies_bfloat16_by_vectors():
    """Linux refuses them to a thread whose stack for signals has no room for them."""
    if build.TILES not in build.load():
        pytest.skip("this processor has no tiles, or the system refuses them")
    done = subprocess.run([sys.executable, "-c", WITHOUT_TILES], capture_output=True, check=True)
    found, outputs = json.loads(done.stdout)
    assert found == ["float32", "bfloat16"]
    x = normal(1, 20, 6, 4)
    stack = LSTMStack(8, dtype=jnp.bfloat16, implementation="native")
    expected, _ = stack.apply(stack.init(jax.random.key(0), x), x)
    assert_close(np.array(outputs), np.float32(expected), 0.01)


@pytest.mark.parametrize(
    "options", [{"use_bias": False}, {"dropout": 0.4}, {"dropout": 0.4, "bidirectional": True}]
)
def test_options_that_it_accepts_change_nothing_in_training(options):
    x = normal(1, 5, 9, 4)
    kernel, scan, params = pair(x, hidden_size=8, num_layers=3, **options)

    def loss(params, stack):
        outputs, _ = stack.apply(
            {"params": params}, x, deterministic=False, rngs={"dropout": jax.random.key(5)}
        )
        return (outputs**2).sum()

    assert_close(jax.grad(loss)(params, kernel), jax.grad(loss)(params, scan), 1e-5)


def test_the_default_takes_it_and_makes_the_same_parameters():
    x = normal(1, 4, 6, 3)
    stack = LSTMStack(8, 2)
    assert stack.why_not_native(x) is None
    assert_close(
        stack.init(jax.random.key(0), x),
        stack.clone(implementation="scan").init(jax.random.key(0), x),
        0,
    )
    # What it computes differs in the last bits, so that one can tell.
    variables = stack.init(jax.random.key(0), x)
    text = jax.jit(stack.apply).lower(variables, x).as_text()
    assert native.TARGET.format(part="forward", dtype="float32") in text


def test_the_default_leaves_to_xla_what_that_computes_faster():
    def kernels_in(batch, time, implementation="auto", **options):
        stack = LSTMStack(implementation=implementation, **{"hidden_size": 8} | options)
        x = jax.ShapeDtypeStruct((batch, time, 3), jnp.float32)
        variables = jax.eval_shape(stack.init, jax.random.key(0), x)
        program = jax.jit(jax.grad(lambda v, x: stack.apply(v, x)[0].sum()))
        return program.lower(variables, x).as_text().count("lstm_flax_")

    parts = kernels_in(4, 6)
    assert parts >= 3  # forward and the gradients of gates and weights
    assert kernels_in(400, 1) == kernels_in(2, 6) == 0
    assert kernels_in(1, 24) == parts
    assert kernels_in(100, 6, hidden_size=1024) == parts - 1
    assert kernels_in(400, 1, "native") == kernels_in(2, 6, "native") == parts


def test_padding_is_never_read():
    x = normal(1, 3, 6, 4)
    kernel, _, params = pair(x, hidden_size=8, num_layers=2, bidirectional=True)
    lengths = jnp.array([6, 2, 4])
    spoilt = x.at[1, 2:].set(jnp.nan).at[2, 4:].set(jnp.inf)

    def loss(params, x):
        outputs, _ = kernel.apply({"params": params}, x, seq_lengths=lengths)
        return (outputs**2).sum()

    values = jax.value_and_grad(loss, (0, 1))
    assert_close(values(params, spoilt), values(params, x), 0)


@pytest.mark.parametrize("length", [-3, 0, 7, 1000])
def test_lengths_out_of_range_under_jit_read_nothing_beyond_the_arrays(length):
    x = normal(1, 2, 6, 4)
    kernel, scan, params = pair(x, hidden_size=8, bidirectional=True)
    lengths = jnp.array([length, 3])

    @jax.jit
    def run(lengths):
        return kernel.apply({"params": params}, x, seq_lengths=lengths)

    @jax.jit
    def expected(lengths):
        return scan.apply({"params": params}, x, seq_lengths=lengths)

    assert_close(run(lengths), expected(lengths))


def test_not_a_number_stays_one():
    x = normal(1, 2, 6, 4).at[0, 3, 1].set(jnp.nan)
    kernel, _, params = pair(x, hidden_size=8)
    outputs, _ = kernel.apply({"params": params}, x)
    np.testing.assert_array_equal(jnp.isnan(outputs).all(-1), [[0, 0, 0, 1, 1, 1], [0] * 6])


def test_extreme_inputs_saturate_as_the_scan_does():
    x = jnp.array([-1e30, -200.0, -1e-20, 0.0, 1e-20, 200.0, 1e30]).reshape(7, 1, 1)
    kernel, scan, params = pair(x, hidden_size=8)
    assert_close(kernel.apply({"params": params}, x), scan.apply({"params": params}, x))


def test_vmap_and_checkpoint_and_scan_go_through_it():
    x = normal(1, 3, 2, 5, 4)
    kernel, scan, params = pair(x[0], hidden_size=8)

    def losses(stack):
        @jax.checkpoint
        def loss(params, x):
            return stack.apply({"params": params}, x)[0].sum()

        mapped = jax.vmap(jax.grad(loss), (None, 0))(params, x)
        looped = jax.lax.map(lambda x: jax.grad(loss)(params, x), x)
        return mapped, looped

    assert_close(losses(kernel), losses(scan), 1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layer_norm": True}, "layer_norm"),
        ({"proj_size": 3}, "proj_size"),
        ({"zoneout": 0.1}, "zoneout"),
        ({"zoneout_cell": 0.1}, "zoneout"),
        ({"dtype": jnp.bfloat16, "hidden_size": 7}, "an odd hidden_size in bfloat16"),
        ({"dtype": jnp.float16}, "products in float16"),
    ],
)
def test_it_says_why_it_scans_instead(options, reason):
    x = normal(1, 2, 5, 4)
    kernel, scan, params = pair(x, **{"hidden_size": 8} | options)
    with pytest.warns(UserWarning, match=f"implementation='native' scans: {reason}"):
        actual = kernel.apply({"params": params}, x)
    assert_close(actual, scan.apply({"params": params}, x), 0)


def test_the_gates_are_shown_by_the_scan():
    x = normal(1, 2, 5, 4)
    kernel, _, params = pair(x, hidden_size=8)
    with pytest.warns(UserWarning, match="gates are asked for"):
        _, kept = kernel.apply({"params": params}, x, mutable="gates")
    assert kept["gates"]["l0"]["forget"].shape == (2, 5, 8)


def test_other_cells_have_none():
    x = normal(1, 2, 5, 4)
    stack = GRUStack(8, implementation="native")
    variables = stack.init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match="there is none for GRUStack"):
        stack.apply(variables, x)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation is 'fast', not one of"):
        LSTMStack(8, implementation="fast")


def test_without_a_compiler_it_scans(tmp_path):
    code = """
import jax
from lstm_flax import LSTMStack
stack, x = LSTMStack(4, implementation="native"), jax.numpy.ones((2, 3, 5))
print(stack.init_with_output(jax.random.key(0), x)[0][0].shape)
print(stack.why_not_native(x))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    shape, reason = result.stdout.splitlines()
    assert shape == "(2, 3, 4)"
    assert reason == "there is no C++ compiler (c++, or what CXX names)"


def test_under_shard_map_each_device_runs_it():
    code = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from lstm_flax import LSTMStack
stack, x = LSTMStack(8, 2), jax.random.normal(jax.random.key(1), (8, 30, 5))
variables = stack.init(jax.random.key(0), x)
loss = lambda v, x: (stack.apply(v, x)[0] ** 2).sum()
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.shard_map(lambda v, x: jax.lax.psum(loss(v, x), "data"), mesh=mesh,
                       in_specs=(P(), P("data")), out_specs=P())
gradient = jax.jit(jax.grad(spread))
print(gradient.lower(variables, x).as_text().count("lstm_flax_") > 0)
error = jax.tree.map(lambda a, b: abs(a - b).max() / abs(b).max(),
                     gradient(variables, x), jax.grad(loss)(variables, x))
print(max(jax.tree.leaves(error)) < 1e-5)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["True", "True"], result.stderr
