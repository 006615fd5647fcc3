"""PyTorch's weights to and from the `params` collection, without importing PyTorch.

PyTorch keeps [gates * hidden_size, features] matrices and two biases, whose sum is all that an LSTM
or a vanilla RNN sees; here are [features, gates * hidden_size] kernels and that sum. The gates lie
in the same order.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Params = dict[str, Any]

_LAYER = re.compile(r"(weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)_(l\d+(?:_reverse)?)")


def from_torch(state_dict: Mapping[str, Any]) -> Params:
    """Convert the state dict of a `torch.nn.LSTM`, `GRU` or `RNN`, or of a classifier on one.

    With `module = LSTMStack(...)` built with the same sizes and options as the PyTorch layer,
    `module.apply({"params": from_torch(state_dict)}, x)` computes what that does. A classifier has
    its layers under `rnn.` and its dense layer under `lin.`; its params fit `SequenceClassifier`.

        >>> import numpy as np
        >>> from lstm_flax import from_torch
        >>> weights = {"weight_ih_l0": np.ones((12, 5)), "weight_hh_l0": np.ones((12, 3))}
        >>> biases = {"bias_ih_l0": np.ones(12), "bias_hh_l0": np.ones(12)}
        >>> {k: v.shape for k, v in from_torch(weights | biases)["l0"].items()}
        {'kernel_ih': (5, 12), 'kernel_hh': (3, 12), 'bias': (12,)}

    Args:
        state_dict: tensors, or anything else that NumPy can read, by PyTorch's names.

    Raises:
        ValueError: a key is missing or not expected, or a shape does not fit; the message names
            the key, the shape expected and the shape found.
    """
    arrays = {key: _to_numpy(value) for key, value in state_dict.items()}
    if not any(key.startswith(("rnn.", "lin.")) for key in arrays):
        return _layers_from_torch(arrays, prefix="")
    layers = {k.removeprefix("rnn."): v for k, v in arrays.items() if k.startswith("rnn.")}
    others = {k: v for k, v in arrays.items() if not k.startswith("rnn.")}
    core = _layers_from_torch(layers, prefix="rnn.")

    features = sum(_output_size(core[name]) for name in ("l0", "l0_reverse") if name in core)
    classes = len(others["lin.bias"]) if "lin.bias" in others else "classes"
    expected = {"lin.weight": (classes, features), "lin.bias": (classes,)}
    _check(others, expected, prefix="")
    head = {"kernel": others["lin.weight"].T, "bias": others["lin.bias"]}
    return {"core": core, "head": head}


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert the params of a stack or of a `SequenceClassifier` to a PyTorch state dict.

    The inverse of `from_torch`, which gives back exactly these params. The bias becomes `bias_ih`,
    and `bias_hh` is zero but for the GRU's own.

    Args:
        params: of an `LSTMStack`, `RNNStack` or `GRUStack` without layer norm, or of a
            `SequenceClassifier` on one.

    Raises:
        ValueError: there is a parameter that PyTorch's layers have no place for.
    """
    if "core" in params:
        state = {f"rnn.{key}": value for key, value in to_torch(params["core"]).items()}
        state["lin.weight"] = np.asarray(params["head"]["kernel"]).T
        state["lin.bias"] = np.asarray(params["head"]["bias"])
        return state
    state = {}
    for layer, weights in params.items():
        unknown = weights.keys() - {"kernel_ih", "kernel_hh", "kernel_hr", "bias", "bias_hn"}
        if unknown:
            raise ValueError(f"PyTorch has no place for {layer}/{sorted(unknown)[0]}")
        for kind in ("ih", "hh", "hr"):
            if f"kernel_{kind}" in weights:
                state[f"weight_{kind}_{layer}"] = np.asarray(weights[f"kernel_{kind}"]).T
        if "bias" in weights:
            bias_ih = np.asarray(weights["bias"])
            bias_hh = np.zeros_like(bias_ih)
            if "bias_hn" in weights:
                bias_hh[-len(weights["bias_hn"]) :] = weights["bias_hn"]
            state |= {f"bias_ih_{layer}": bias_ih, f"bias_hh_{layer}": bias_hh}
    return state


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor, perhaps on a GPU, perhaps a trained parameter
        value = value.detach().cpu()
    return np.asarray(value)


def _output_size(layer: Params) -> int:
    return layer["kernel_hh"].shape[0]


def _layers_from_torch(arrays: dict[str, np.ndarray], prefix: str) -> Params:
    expected = _expected_shapes(arrays, prefix)
    _check(arrays, expected, prefix)
    names = dict.fromkeys(match[2] for key in expected if (match := _LAYER.fullmatch(key)))
    num_gates, hidden_size = _gates_and_hidden(arrays)
    params: Params = {}
    for name in names:
        layer = params[name] = {}
        for kind in ("ih", "hh", "hr"):
            if (key := f"weight_{kind}_{name}") in arrays:
                layer[f"kernel_{kind}"] = arrays[key].T
        if f"bias_ih_{name}" in arrays:
            bias_ih, bias_hh = arrays[f"bias_ih_{name}"], arrays[f"bias_hh_{name}"]
            if num_gates == 3:  # the GRU's reset gate acts on this part of bias_hh alone
                layer["bias_hn"] = bias_hh[2 * hidden_size :]
                bias_hh = np.concatenate([bias_hh[: 2 * hidden_size], 0 * layer["bias_hn"]])
            layer["bias"] = bias_ih + bias_hh
    return params


def _gates_and_hidden(arrays: dict[str, np.ndarray]) -> tuple[int, int]:
    """Tell the number of gates and the hidden size from the first layer."""
    rows, columns = arrays["weight_hh_l0"].shape
    # A projection's input is the hidden state itself.
    hidden = arrays["weight_hr_l0"].shape[1] if "weight_hr_l0" in arrays else columns
    return rows // hidden, hidden


def _expected_shapes(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, tuple]:
    """Shapes that a state dict with this first layer, depth and options must have."""
    for key in ("weight_ih_l0", "weight_hh_l0"):
        if key not in arrays:
            raise ValueError(f"{prefix}{key} is missing, of shape (gates * hidden, features)")
        if arrays[key].ndim != 2:
            raise ValueError(
                f"{prefix}{key} has shape {arrays[key].shape}, not (gates * hidden, features)"
            )
    num_gates, hidden = _gates_and_hidden(arrays)
    if num_gates not in (1, 3, 4):
        raise ValueError(
            f"{prefix}weight_hh_l0 has shape {arrays['weight_hh_l0'].shape}, which is of no RNN, "
            f"GRU or LSTM: its rows must be 1, 3 or 4 times {hidden}"
        )
    layers = [match for key in arrays if (match := _LAYER.fullmatch(key))]
    depth = 1 + max(int(match[2].removeprefix("l").removesuffix("_reverse")) for match in layers)
    directions = ["", "_reverse"] if any(m[2].endswith("_reverse") for m in layers) else [""]
    has_bias = any(match[1].startswith("bias") for match in layers)
    has_projection = "weight_hr_l0" in arrays
    size = arrays["weight_hr_l0"].shape[0] if has_projection else hidden
    width = num_gates * hidden
    shapes: dict[str, tuple] = {}
    for layer in range(depth):
        features = arrays["weight_ih_l0"].shape[1] if layer == 0 else size * len(directions)
        for direction in directions:
            name = f"l{layer}{direction}"
            shapes[f"weight_ih_{name}"] = (width, features)
            shapes[f"weight_hh_{name}"] = (width, size)
            if has_projection:
                shapes[f"weight_hr_{name}"] = (size, hidden)
            if has_bias:
                shapes[f"bias_ih_{name}"] = shapes[f"bias_hh_{name}"] = (width,)
    return shapes


def _check(arrays: dict[str, np.ndarray], expected: dict[str, tuple], prefix: str) -> None:
    problems = []
    for key, shape in expected.items():
        if key not in arrays:
            problems.append(f"{prefix}{key} is missing, expected with shape {shape}")
        elif arrays[key].shape != shape:
            problems.append(f"{prefix}{key} has shape {arrays[key].shape}, expected {shape}")
    problems += [
        f"{prefix}{key} is not expected, found with shape {array.shape}"
        for key, array in arrays.items()
        if key not in expected
    ]
    if problems:
        raise ValueError("; ".join(problems))
