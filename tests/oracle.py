"""What PyTorch computes for a case, and what we compute for it, in the same form.

A case is a dict of options. Its arrays are a dict by name: the inputs "x", "lengths", "h_0", "c_0"
and "param.*", the results "y", "h_n" and "c_n", their cotangents "d.*", and the gradients "grad.*"
of the inputs and the parameters under those cotangents. All are float64.
"""

import numpy as np

from lstm_flax import (
    GRUCell,
    GRUStack,
    LSTMCell,
    LSTMStack,
    PeepholeLSTMCell,
    ResetBeforeGRUCell,
    RNNCell,
    RNNStack,
    from_torch,
    to_torch,
)

CELLS = {"LSTM": LSTMCell, "GRU": GRUCell, "RNN": RNNCell}
STACKS = {"LSTM": LSTMStack, "GRU": GRUStack, "RNN": RNNStack}
DEFAULTS = {
    "kind": "LSTM", "num_layers": 1, "bidirectional": False, "proj_size": 0, "use_bias": True,
    "lengths": False, "nonlinearity": "tanh", "batch": 3, "time": 6, "features": 5, "hidden": 4,
    "activation": None, "peephole": False, "reset_after": True, "reverse": False,
}  # fmt: skip

GOLDEN_CASES = {
    "lstm": {},
    "lstm_deep": {"num_layers": 4},
    "lstm_bidirectional_lengths": {"num_layers": 2, "bidirectional": True, "lengths": True},
    "lstm_projection": {"num_layers": 2, "proj_size": 3, "bidirectional": True, "lengths": True},
    "lstm_no_bias": {"num_layers": 2, "use_bias": False},
    "lstm_one_step": {"time": 1, "batch": 1},
    "lstm_long": {"time": 200, "hidden": 8},
    "lstm_wide_batch": {"batch": 64, "num_layers": 2, "lengths": True},
    "rnn_tanh": {"kind": "RNN", "num_layers": 3, "bidirectional": True, "lengths": True},
    "rnn_relu": {"kind": "RNN", "num_layers": 2, "nonlinearity": "relu"},
    "gru": {"kind": "GRU", "num_layers": 2, "bidirectional": True, "lengths": True},
    "gru_no_bias": {"kind": "GRU", "use_bias": False},
}


def states(case, h, c):
    return {"h": h, "c": c} if case["kind"] == "LSTM" else {"h": h}


def make_torch(case):
    """PyTorch's layer for a case, its parameters drawn from PyTorch's own generator."""
    import torch

    options = {"RNN": {"nonlinearity": case["nonlinearity"]}}.get(case["kind"], {})
    if case["proj_size"]:
        options["proj_size"] = case["proj_size"]
    return getattr(torch.nn, case["kind"])(
        case["features"],
        case["hidden"],
        case["num_layers"],
        bias=case["use_bias"],
        batch_first=True,
        bidirectional=case["bidirectional"],
        dtype=torch.float64,
        **options,
    )


def run_torch(case, seed=0):
    """A case's inputs, drawn from a seed, and what PyTorch makes of them in float64."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    case = DEFAULTS | case
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    layer = make_torch(case)
    rows = case["num_layers"] * (1 + case["bidirectional"])
    size = case["proj_size"] or case["hidden"]

    def draw(*shape):
        return torch.tensor(rng.normal(size=shape), requires_grad=True)

    x = draw(case["batch"], case["time"], case["features"])
    carry = states(case, draw(rows, case["batch"], size), draw(rows, case["batch"], case["hidden"]))
    lengths = np.full(case["batch"], case["time"])
    if case["lengths"]:
        lengths = rng.integers(1, case["time"] + 1, case["batch"])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    else:
        packed = x
    given = tuple(carry.values())
    y, final = layer(packed, given if case["kind"] == "LSTM" else given[0])
    if case["lengths"]:
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=case["time"])
    final = final if case["kind"] == "LSTM" else (final,)

    results = {"y": y} | {f"{name}_n": state for name, state in zip(carry, final, strict=True)}
    cotangents = {name: torch.tensor(rng.normal(size=r.shape)) for name, r in results.items()}
    inputs = {"x": x} | {f"{name}_0": state for name, state in carry.items()}
    inputs |= {f"param.{name}": p for name, p in layer.named_parameters()}
    gradients = torch.autograd.grad(
        list(results.values()), list(inputs.values()), list(cotangents.values())
    )
    tensors = (
        inputs
        | results
        | {f"d.{name}": d for name, d in cotangents.items()}
        | {f"grad.{name}": g for name, g in zip(inputs, gradients, strict=True)}
    )
    return {name: t.detach().numpy() for name, t in tensors.items()} | {"lengths": lengths}


def cell_options(case):
    options = {"use_bias": case["use_bias"]}
    if case["kind"] == "RNN":
        options["nonlinearity"] = case["nonlinearity"]
    if case["kind"] == "LSTM":
        options["proj_size"] = case["proj_size"]
    if case["activation"] and case["nonlinearity"] == "tanh":
        options["activation"] = case["activation"]
    return options


def make_cell(case):
    case = DEFAULTS | case
    kind = CELLS[case["kind"]]
    if case["kind"] == "LSTM" and case["peephole"]:
        kind = PeepholeLSTMCell
    if case["kind"] == "GRU" and not case["reset_after"]:
        kind = ResetBeforeGRUCell
    return kind(case["hidden"], **cell_options(case))


def make_stack(case, **more):
    case = DEFAULTS | case
    own = {"LSTM": ["peephole"], "GRU": ["reset_after"]}.get(case["kind"], [])
    options = {name: case[name] for name in ("num_layers", "bidirectional", "reverse", *own)}
    return STACKS[case["kind"]](case["hidden"], **options, **cell_options(case), **more)


def run_ours(case, arrays, dtype):
    """Our results and gradients for a case's inputs, by the names that `run_torch` gives them."""
    import jax
    import jax.numpy as jnp

    case = DEFAULTS | case
    stack = make_stack(case, param_dtype=dtype)
    params = from_torch(
        {k.removeprefix("param."): v.astype(dtype) for k, v in arrays.items() if "param." in k[:6]}
    )
    lengths = jnp.asarray(arrays["lengths"], jnp.int32) if case["lengths"] else None

    def cast(prefix="", suffix=""):
        named = {"h": f"{prefix}h{suffix}", "c": f"{prefix}c{suffix}"}
        parts = [jnp.asarray(arrays[n], dtype) for n in named.values() if n in arrays]
        return tuple(parts) if case["kind"] == "LSTM" else parts[0]

    def apply(params, x, carry):
        return stack.apply({"params": params}, x, carry, seq_lengths=lengths)

    (y, final), pull_back = jax.vjp(
        jax.jit(apply), params, jnp.asarray(arrays["x"], dtype), cast(suffix="_0")
    )
    by_params, by_x, by_carry = pull_back((jnp.asarray(arrays["d.y"], dtype), cast("d.", "_n")))

    results = {"y": y, "grad.x": by_x}
    for name, state, gradient in zip(
        "hc", jax.tree.leaves(final), jax.tree.leaves(by_carry), strict=False
    ):
        results |= {f"{name}_n": state, f"grad.{name}_0": gradient}
    for name, gradient in to_torch(by_params).items():
        # The two biases are one here: each of PyTorch's has the gradient of the sum, and of the
        # GRU's second only the new gate's part is a parameter of its own.
        if not name.startswith("bias_hh"):
            results[f"grad.param.{name}"] = gradient
        elif case["kind"] == "GRU":
            results[f"grad.param.{name}"] = gradient[2 * case["hidden"] :]
    return results


def assert_agree(ours, arrays, tolerance):
    """The largest error of each array is at most `tolerance` of its largest entry."""
    for name, value in ours.items():
        expected = arrays[name]
        if "bias_hh" in name:
            expected = expected[-len(value) :]
        assert value.shape == expected.shape, name
        scale = np.abs(expected).max()
        error = np.abs(np.asarray(value, np.float64) - expected).max() / (scale or 1)
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"
