"""Equal to PyTorch, outputs, states and gradients: by golden files, and live where torch is."""

import importlib.util
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEFAULTS, GOLDEN_CASES, assert_agree, make_cell, make_stack, run_ours, run_torch

from lstm_flax import LSTMClassifier, from_torch, to_torch

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TOLERANCES = {np.float32: 1e-5, np.float64: 1e-10}
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="live parity needs torch"
)
# Of PyTorch itself: it has no oneDNN kernel for projections, and takes another.
quiet_torch = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def check(case, arrays, dtype):
    with jax.enable_x64(dtype is np.float64):
        assert_agree(run_ours(case, arrays, dtype), arrays, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_files(name, dtype):
    arrays = dict(np.load(Path(__file__).parent / "golden" / f"{name}.npz"))
    check(GOLDEN_CASES[name], arrays, dtype)


@needs_torch
@quiet_torch
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_files_are_what_torch_computes(name):
    golden = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    live = run_torch(GOLDEN_CASES[name])
    assert set(golden) == set(live)
    for key, value in live.items():
        np.testing.assert_allclose(golden[key], value, rtol=1e-9, atol=1e-12)


def cases(max_batch, max_time):
    return st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["LSTM", "LSTM", "RNN", "GRU"]),
            "num_layers": st.integers(1, 4),
            "bidirectional": st.booleans(),
            "proj_size": st.sampled_from([0, 0, 2, 3]),
            "use_bias": st.booleans(),
            "lengths": st.booleans(),
            "nonlinearity": st.sampled_from(["tanh", "relu"]),
            "batch": st.integers(1, max_batch),
            "time": st.integers(1, max_time),
            "features": st.integers(1, 6),
            "hidden": st.integers(4, 9),
        }
    ).map(lambda case: case if case["kind"] == "LSTM" else case | {"proj_size": 0})


@pytest.mark.slow
@needs_torch
@given(case=cases(64, 200), seed=st.integers(0, 99), dtype=st.sampled_from(list(TOLERANCES)))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_combination_equals_torch(case, seed, dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported")
        arrays = run_torch(case, seed)
    check(case, arrays, dtype)


def with_options(case):
    """A case with more options, none of which PyTorch has."""
    more = {
        "activation": st.sampled_from([None, nn.relu]),
        "peephole": st.booleans(),
        "reset_after": st.booleans(),
        "direction": st.sampled_from(["forward", "reverse", "both"]),
        "batch_axes": st.integers(0, 2),
        "mask": st.booleans(),
        "resets": st.booleans(),
        "hold_outputs": st.booleans(),
        "time_major": st.booleans(),
        "implementation": st.sampled_from(["scan", "auto", "native"]),
    }
    return st.fixed_dictionaries(more).map(
        lambda drawn: (
            case
            | drawn
            | {
                "bidirectional": drawn["direction"] == "both",
                "reverse": drawn["direction"] == "reverse",
            }
        )
    )


def loop_over_one_sequence(case, params, x, counts, resets, carries):
    """One sequence [time, features] as plain Python loops over the cell; a carry a cell."""
    cell, final = make_cell(case), []
    for layer in range(case["num_layers"]):
        sides = []
        for side in ("", "_reverse")[: 1 + case["bidirectional"]]:
            variables = {"params": params[f"l{layer}{side}"]}
            is_reverse = case["reverse"] or side == "_reverse"
            start = carry = jax.tree.map(lambda a: a[None], carries[len(final)])
            shown, outputs = cell.hidden(carry)[0], []
            for t in range(len(x))[:: -1 if is_reverse else 1]:
                if counts[t]:
                    if resets[t]:
                        carry = jax.tree.map(jnp.zeros_like, start)
                    carry, (shown,) = cell.apply(variables, carry, x[t][None])
                is_shown = counts[t] or (case["hold_outputs"] and layer == case["num_layers"] - 1)
                outputs.append(shown if is_shown else jnp.zeros_like(shown))
            sides.append(jnp.stack(outputs[:: -1 if is_reverse else 1]))
            final.append(jax.tree.map(lambda a: a[0], carry))
        x = jnp.concatenate(sides, axis=-1)
    return x, final


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:implementation='native' scans")
@given(case=cases(4, 6).flatmap(with_options), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_combination_equals_a_loop_over_the_cell(case, seed):
    """Each sequence by itself, step by step: no batch, no padding, no scan."""
    case = DEFAULTS | case
    rng = np.random.default_rng(seed)
    batch = ((), (case["batch"],), (2, case["batch"]))[case["batch_axes"]]
    rows, time = int(np.prod(batch)), case["time"]
    x = rng.normal(size=(rows, time, case["features"])).astype(np.float32)
    lengths = rng.integers(0, time + 1, rows) if case["lengths"] else np.full(rows, time)
    mask = rng.random((rows, time)) < (0.6 if case["mask"] else 2)
    resets = rng.random((rows, time)) < (0.3 if case["resets"] else 0)
    x[~mask] = np.nan  # reaches nothing

    def seen(array):
        """As the stack is given it."""
        array = array.reshape(*batch, *array.shape[1:])
        return jnp.asarray(np.moveaxis(array, len(batch), 0) if case["time_major"] else array)

    names = ("time_major", "hold_outputs", "implementation")
    stack = make_stack(case, **{name: case[name] for name in names})
    variables = stack.init(jax.random.key(seed), seen(x))
    noise = iter(jax.random.split(jax.random.key(seed), 99))
    variables = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(noise), a.shape), variables)
    zeros = stack.initialize_carry(None, seen(x).shape)
    initial = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), zeros)
    outputs, final = stack.apply(
        variables,
        seen(x),
        initial,
        seq_lengths=jnp.asarray(lengths.reshape(batch)) if case["lengths"] else None,
        mask=seen(mask) if case["mask"] else None,
        resets=seen(resets) if case["resets"] else None,
    )

    outputs = np.moveaxis(outputs, 0, len(batch)) if case["time_major"] else np.asarray(outputs)
    outputs = outputs.reshape(rows, time, -1)
    initial, final = (
        jax.tree.map(lambda a: np.reshape(a, (len(a), rows, a.shape[-1])), carry)
        for carry in (initial, final)
    )
    counts = mask & (np.arange(time) < lengths[:, None])
    for b in range(rows):
        carries = [
            jax.tree.map(lambda a, k=k, b=b: jnp.asarray(a[k, b]), initial)
            for k in range(len(jax.tree.leaves(initial)[0]))
        ]
        expected, last = loop_over_one_sequence(
            case, variables["params"], x[b], counts[b], resets[b], carries
        )
        np.testing.assert_allclose(outputs[b], expected, atol=2e-5)
        for k, carry in enumerate(last):
            for state, want in zip(jax.tree.leaves(final), jax.tree.leaves(carry), strict=True):
                np.testing.assert_allclose(state[k, b], want, atol=2e-5)


@needs_torch
def test_the_reference_classifier_gives_the_same_logits():
    import torch

    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(28, 32, 3, batch_first=True)
            self.lin = torch.nn.Linear(32, 10)

        def forward(self, x):
            return self.lin(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    reference, x = Reference(), torch.rand(8, 28, 28)
    params = from_torch(reference.state_dict())
    logits = LSTMClassifier(32, 3).apply({"params": params}, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(logits, reference(x).detach().numpy(), atol=1e-6)
    # And back: the weights that we give PyTorch make it compute the same.
    reference.load_state_dict({k: torch.tensor(v) for k, v in to_torch(params).items()})
    np.testing.assert_allclose(logits, reference(x).detach().numpy(), atol=1e-6)
