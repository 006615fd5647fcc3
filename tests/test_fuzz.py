"""Calls with right and wrong arguments, at random: an implementation computes or refuses as the
scan does, and whatever refuses is a clear error of ours or flax's.

Each batch of cases has a process of its own: one that crashes is a failure, and its case is shown.
"""

import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import FlaxError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import lstm_flax

MORE_CASES = float(os.environ.get("FUZZ_MORE", "1"))  # times as many


def rows(array, axis, size):
    """The array, with so many entries along an axis."""
    return np.resize(array.swapaxes(0, axis), (size, *np.delete(array.shape, axis))).swapaxes(
        0, axis
    )


def edit_leaf(name, change, layer="l0"):
    """An edit of one parameter, where there is one."""

    def edit(call):
        params = call["params"]
        if name in params.get(layer, {}):
            leaves = params[layer] | {name: change(params[layer][name])}
            call["params"] = params | {layer: leaves}

    return edit


def without(name, layer="l0"):
    def edit(call):
        leaves = call["params"].get(layer, {})
        call["params"] = call["params"] | {layer: {k: v for k, v in leaves.items() if k != name}}

    return edit


def change(key, how):
    """An edit of x, of both states or of the lengths, where they are given."""

    def edit(call):
        if call[key] is not None:
            call[key] = jax.tree.map(how, call[key])

    return edit


def extra_bias(call):
    leaves = call["params"].get("l0", {})
    size = leaves["kernel_ih"].shape[-1] if "kernel_ih" in leaves else 4
    call["params"] = call["params"] | {"l0": leaves | {"bias": np.ones(size, np.float32)}}


def one_state(call):
    if isinstance(call["carry"], tuple):
        call["carry"] = call["carry"][0]


def of_another_size(factor):
    def edit(call):
        call["params"] = jax.tree.map(
            lambda p: np.resize(p, np.int64(p.shape) * factor), call["params"]
        )

    return edit


def as_type(dtype):
    return lambda array: array.astype(dtype)


EDITS = {
    "parameters of twice the units": of_another_size(2),
    "no parameters": lambda call: call.update(params={}),
    "no layer": lambda call: call.update(
        params={k: v for k, v in call["params"].items() if k != "l0"}
    ),
    "no bias": without("bias"),
    "no kernel_ih": without("kernel_ih"),
    "no kernel_hh": without("kernel_hh"),
    "a bias": extra_bias,
    "a scalar kernel_hh": edit_leaf("kernel_hh", lambda p: np.float32(1)),
    "one row of kernel_ih": edit_leaf("kernel_ih", lambda p: p[:1]),
    "kernel_hh of fewer rows": edit_leaf("kernel_hh", lambda p: p[:-1]),
    "kernel_ih of fewer columns": edit_leaf("kernel_ih", lambda p: p[:, :-1]),
    "a shorter bias": edit_leaf("bias", lambda p: p[:-1]),
    "a bias of one": edit_leaf("bias", lambda p: p[:1]),
    **{
        f"{layer} {name} transposed": edit_leaf(name, np.transpose, layer)
        for name in ("kernel_ih", "kernel_hh")
        for layer in ("l0", "l1", "l0_reverse")
    },
    **{
        f"parameters in {np.dtype(dtype)}": change("params", as_type(dtype))
        for dtype in (jnp.bfloat16, np.int32)
    },
    **{
        f"x in {np.dtype(dtype)}": change("x", as_type(dtype))
        for dtype in (jnp.bfloat16, np.float16, np.float64, np.int32, bool, np.complex64)
    },
    **{
        f"x of {size} features": change("x", lambda x, size=size: rows(x, -1, size))
        for size in (1, 4, 6, 900)
    },
    **{f"x of {size} rows": change("x", lambda x, size=size: rows(x, 0, size)) for size in (1, 40)},
    **{
        f"no axis {axis} of x": change("x", lambda x, axis=axis: x.take(0, axis))
        for axis in range(3)
    },
    **{
        f"axis {axis} of x empty": change("x", lambda x, axis=axis: x.take([], axis))
        for axis in range(3)
    },
    "x of rank 4": change("x", lambda x: x[None]),
    "x of rank 0": change("x", lambda x: np.float32(1)),
    "one state": one_state,
    "a carry of one row": change("carry", lambda s: s[:, :1]),
    "a carry of one unit": change("carry", lambda s: s[:, :, :1]),
    "a carry of more units": change("carry", lambda s: rows(s, 2, 64)),
    "a carry of fewer layers": change("carry", lambda s: s[:-1]),
    "a carry of rank 2": change("carry", lambda s: s[0]),
    "a carry in bfloat16": change("carry", as_type(jnp.bfloat16)),
    "lengths of one row": change("lengths", lambda n: n[:1]),
    "lengths of rank 2": change("lengths", lambda n: n[:, None]),
    "lengths in float32": change("lengths", as_type(np.float32)),
    "lengths in uint8": change("lengths", as_type(np.uint8)),
    "lengths of 0": change("lengths", lambda n: n * 0),
    "negative lengths": change("lengths", lambda n: -n),
    "lengths beyond time": change("lengths", lambda n: n + 100),
}


def make_call(case):
    """The module, and the arguments of a call of it, after the edits."""
    batch, time, features = case["shape"]
    stack = getattr(lstm_flax, case["stack"])(implementation="scan", **case["options"])
    x = jax.ShapeDtypeStruct((batch, time, features), np.float32)
    random = np.random.default_rng(0)

    def fill(like):
        return jax.tree.map(lambda a: random.normal(size=a.shape).astype(a.dtype), like)

    shapes = jax.eval_shape(stack.init, jax.random.key(0), x)["params"]
    carry = jax.eval_shape(lambda p, x: stack.apply({"params": p}, x)[1], shapes, x)
    call = {"x": fill(x), "params": fill(shapes), "carry": None, "lengths": None}
    if case["carry"]:
        call["carry"] = fill(carry)
    if case["lengths"]:
        call["lengths"] = random.integers(1, time + 1, batch).astype(np.int32)
    for name in case["edits"]:
        EDITS[name](call)
    return stack, call


def attempt(stack, call, jitted):
    """What the call returns, or the error that it raises."""

    def apply(params, x, carry, lengths):
        return stack.apply({"params": params}, x, carry, seq_lengths=lengths)

    arguments = [call[name] for name in ("params", "x", "carry", "lengths")]
    try:
        return jax.device_get((jax.jit(apply) if jitted else apply)(*arguments))
    except Exception as error:
        return error


def is_clear(error):
    """Whether our code or flax's raised it, for whoever called it wrongly."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    kinds = (ValueError, TypeError, FlaxError)
    return isinstance(error, kinds) and bool({"lstm_flax", "flax"} & set(Path(where).parts))


def check(case, implementation):
    stack, call = make_call(case)
    expected = attempt(stack, call, case["jitted"])
    found = attempt(stack.clone(implementation=implementation), call, case["jitted"])
    for outcome in (expected, found):
        if isinstance(outcome, Exception):
            assert case["edits"], "a right call is refused"
            assert is_clear(outcome), f"not a clear error: {outcome!r:.300}"
    refused = isinstance(found, Exception)
    assert refused == isinstance(expected, Exception), (
        f"{implementation} {'refuses' if refused else 'answers'}: {found!r:.300}"
        f" and the scan does not: {expected!r:.300}"
    )
    if not refused:
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for ours, scans in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert (ours.shape, ours.dtype) == (scans.shape, scans.dtype)
            np.testing.assert_allclose(
                ours.astype(np.float32), scans.astype(np.float32), rtol=0, atol=tolerance(ours)
            )


def tolerance(array):
    return 2e-5 if array.dtype == np.float32 else 0.03


def cases(kind):
    """Right calls of one kind of stack, and those with one or two edits."""
    options = {
        "hidden_size": st.sampled_from([1, 8]),
        "num_layers": st.sampled_from([1, 2]),
        "bidirectional": st.booleans(),
        "use_bias": st.booleans(),
    }
    some_edits = st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=2, unique=True)
    return st.fixed_dictionaries(
        {
            "stack": st.just(kind),
            "options": st.fixed_dictionaries(options),
            "shape": st.sampled_from([(1, 1, 1), (3, 4, 5)]),
            "carry": st.booleans(),
            "lengths": st.booleans(),
            "jitted": st.sampled_from([True, True, False]),
            "edits": st.one_of(st.just([]), some_edits, some_edits, some_edits),
        }
    )


def run_cases(kind, implementation, count):
    """Run so many cases in this process; prints each beforehand, and all that fail."""
    warnings.simplefilter("ignore")  # that "native" scans
    jax.config.update("jax_traceback_filtering", "off")
    failed = {}

    # In one example, whose cases have nothing to do with each other: Hypothesis makes further
    # examples of earlier ones. Its first is the simplest, over and over.
    @seed(0)
    @settings(
        max_examples=2,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(cases(kind), min_size=count, max_size=count))
    def run(drawn):
        for case in {str(case): case for case in drawn}.values():
            print(case, flush=True)
            try:
                check(case, implementation)
            except AssertionError as error:
                failed[str(case)] = " ".join(str(error).split())[:700]

    run()
    if failed:
        sys.exit("\n".join(f"{case}\n  {error}" for case, error in failed.items()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "implementation", "count"),
    [
        ("LSTMStack", "native", 30),
        ("LSTMStack", "auto", 20),
        ("GRUStack", "auto", 12),
        ("RNNStack", "native", 12),
    ],
)
def test_it_computes_or_refuses_as_the_scan_does(kind, implementation, count):
    arguments = f"{kind!r}, {implementation!r}, {round(count * MORE_CASES)}"
    done = subprocess.run(
        [sys.executable, "-c", f"import test_fuzz; test_fuzz.run_cases({arguments})"],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    last = (done.stdout.splitlines() or ["none yet"])[-1]
    assert done.returncode >= 0, f"signal {-done.returncode} in {last}\n{done.stderr[-1000:]}"
    assert done.returncode == 0, done.stderr
