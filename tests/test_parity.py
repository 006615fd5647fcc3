"""Equal to PyTorch, outputs, states and gradients: by golden files, and live where torch is."""

import importlib.util
import warnings
from pathlib import Path

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


def loop_over_one_sequence(case, params, x, carries):
    """One sequence [time, features] as plain Python loops over the cell; a carry a cell."""
    cell, final = make_cell(case), []
    for layer in range(case["num_layers"]):
        sides = []
        for direction in ("", "_reverse")[: 1 + case["bidirectional"]]:
            variables = {"params": params[f"l{layer}{direction}"]}
            carry = jax.tree.map(lambda a: a[None], carries[len(final)])
            outputs = []
            for x_t in x[::-1] if direction else x:
                carry = cell.apply(variables, carry, x_t[None])
                outputs.append(cell.hidden(carry)[0])
            sides.append(jnp.stack(outputs[::-1] if direction else outputs))
            final.append(jax.tree.map(lambda a: a[0], carry))
        x = jnp.concatenate(sides, axis=-1)
    return x, final


@pytest.mark.slow
@given(case=cases(4, 6), seed=st.integers(0, 99), time_major=st.booleans())
@settings(max_examples=5, deadline=None, derandomize=True)
def test_any_combination_equals_a_loop_over_the_cell(case, seed, time_major):
    """Each sequence by itself, cut to its length: no batch, no padding, no scan."""
    case = DEFAULTS | case
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(case["batch"], case["time"], case["features"])), jnp.float32)
    lengths = rng.integers(1, case["time"] + 1, case["batch"])
    stack = make_stack(case, time_major=time_major)
    seen = jnp.swapaxes(x, 0, 1) if time_major else x
    (_, zeros), variables = stack.init_with_output(jax.random.key(seed), seen)
    initial = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), zeros)

    outputs, final = stack.apply(variables, seen, initial, seq_lengths=jnp.asarray(lengths))
    outputs = jnp.swapaxes(outputs, 0, 1) if time_major else outputs
    for b, length in enumerate(lengths):
        carries = [
            jax.tree.map(lambda a, k=k, b=b: a[k, b], initial)
            for k in range(jax.tree.leaves(initial)[0].shape[0])
        ]
        expected, last = loop_over_one_sequence(case, variables["params"], x[b, :length], carries)
        np.testing.assert_allclose(outputs[b, :length], expected, atol=1e-5)
        assert (outputs[b, length:] == 0).all()
        for k, carry in enumerate(last):
            for state, want in zip(jax.tree.leaves(final), jax.tree.leaves(carry), strict=True):
                np.testing.assert_allclose(state[k, b], want, atol=1e-5)


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
