"""PyTorch's weights to and from the `params` collection, without importing PyTorch.

PyTorch keeps [gates * hidden_size, features] matrices and two biases, whose sum is all that an LSTM
or a vanilla RNN sees; here are [features, gates * hidden_size] kernels and that sum. The gates lie
in the same order.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.core import meta

from lstm_flax.models.torch_files import read_state_dict
from lstm_flax.models.weight_arrays import Arrays, Params, few, leaves, to_numpy, written

_LAYER = re.compile(r"(weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)_(l\d+(?:_reverse)?)")
_FIRST = re.compile(r"(.*\.)?weight_[ih]h(?:_l0)?", re.DOTALL)
_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_WRAPPERS = ("module.", "_orig_mod.")  # of nn.DataParallel and torch.compile
_PARTS = {  # of a layer here, and PyTorch's names for them
    "kernel_ih": "weight_ih",
    "kernel_hh": "weight_hh",
    "kernel_hr": "weight_hr",
    "bias": "bias_ih",
    "bias_hn": "bias_hh",
}

_Show = Callable[[str, tuple], tuple[str, tuple]]
"""How a message writes a key of PyTorch's and its shape."""


def from_torch(source: Any, prefix: str = "") -> Params:
    """Convert the weights of a `torch.nn` LSTM, GRU, RNN or cell, or of a classifier on a layer.

    With `module = LSTMStack(...)` built with the same sizes and options as the PyTorch layer,
    `module.apply({"params": from_torch(layer)}, x)` computes what that does. A classifier has
    its layers under `rnn.` and its dense layer under `lin.`; its params fit `SequenceClassifier`.
    The params of an `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell` fit the cell of the same name.

        >>> import numpy as np
        >>> from lstm_flax import from_torch
        >>> weights = {"rnn.weight_ih_l0": np.ones((12, 5)), "rnn.weight_hh_l0": np.ones((12, 3))}
        >>> biases = {"rnn.bias_ih_l0": np.ones(12), "rnn.bias_hh_l0": np.ones(12)}
        >>> model = weights | biases | {"embedding.weight": np.ones((100, 5))}
        >>> {k: v.shape for k, v in from_torch(model, prefix="rnn.")["l0"].items()}
        {'kernel_ih': (5, 12), 'kernel_hh': (3, 12), 'bias': (12,)}

    Args:
        source: a `torch.nn` module; a state dict, whose values are tensors or anything else that
            NumPy can read; or the path of a `.safetensors` file (needs the extra `safetensors`) or
            of a `.pt`, `.pth`, `.bin` or `.ckpt` file, which PyTorch 2.6 or newer reads with
            `weights_only=True`, so that no code in it runs. Names in nested dicts are joined by
            dots.
        prefix: where the names of the layer, cell or classifier begin in a model that holds more,
            such as "encoder.rnn."; the last dot may be left out. Not needed where there is nothing
            else. What `nn.DataParallel` and `torch.compile` put before all names may be left out.

    Returns:
        NumPy arrays that share no memory with PyTorch's, so that training may go on there. float64
        stays as it is; float16 and bfloat16 become float32, which holds their values exactly, and
        the sums of the two biases too.

    Raises:
        TypeError: this is not a module, a mapping or a path.
        ValueError: no layer has this prefix, and the message lists those that fit; or a key is
            missing or not expected, or its value is not floating or misshapen, and the message
            names the key, and the shapes expected and found; or a file is damaged.
        FileNotFoundError: there is no such file.
        ImportError: the library that reads such a file is missing.
    """
    state, start = _below(_state_dict(source), prefix)
    arrays = {key: to_numpy(start + key, value) for key, value in state.items()}
    if any(key in arrays for key in _CELL):
        return _cell_from_torch(arrays, start)
    if not any(key.startswith(("rnn.", "lin.")) for key in arrays):
        return _layers_from_torch(arrays, lambda key, shape: (start + key, shape))
    layers = {k.removeprefix("rnn."): v for k, v in arrays.items() if k.startswith("rnn.")}
    head = {k: v for k, v in arrays.items() if not k.startswith("rnn.")}
    core = _layers_from_torch(layers, lambda key, shape: (f"{start}rnn.{key}", shape))
    _check(head, _head_shapes(head, layers), lambda key, shape: (start + key, shape))
    return {
        "core": core,
        "head": {"kernel": head["lin.weight"].T.copy(), "bias": head["lin.bias"].copy()},
    }


def to_torch(params: Mapping[str, Any]) -> Arrays:
    """Convert the params of a stack, a cell or a `SequenceClassifier` to a PyTorch state dict.

    The inverse of `from_torch`, which gives back exactly these params. The bias becomes `bias_ih`,
    and `bias_hh` is zero but for the GRU's own.

        >>> import jax, jax.numpy as jnp
        >>> from lstm_flax import LSTMStack, to_torch
        >>> variables = LSTMStack(3).init(jax.random.key(0), jnp.ones((2, 7, 5)))
        >>> {k: v.shape for k, v in to_torch(variables["params"]).items() if "weight" in k}
        {'weight_hh_l0': (12, 3), 'weight_ih_l0': (12, 5)}

    Args:
        params: of an `LSTMStack`, `RNNStack` or `GRUStack` without layer norm, of one of their
            cells, or of a `SequenceClassifier` on a stack; boxes such as `nn.Partitioned` are
            opened.

    Returns:
        NumPy arrays that share no memory with JAX's, so that PyTorch may write into them. float64
        stays as it is; all else becomes float32, since NumPy hands PyTorch no bfloat16.

    Raises:
        TypeError: this is not a mapping.
        ValueError: there is a parameter that PyTorch's layers have no place for, or one is missing,
            not floating or misshapen; the message names it, and the shapes expected and found.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"to_torch takes a mapping of params, not {written(params)}")
    if "params" in params:
        raise ValueError('to_torch takes variables["params"], not all the variables')
    arrays = {path: to_numpy(path, leaf) for path, leaf in leaves(meta.unbox(params), "/")}
    if any(path in arrays for path in _PARTS):
        layer = {f"l0/{path}": array for path, array in arrays.items()}
        state = _layers_to_torch(layer, lambda path: path.removeprefix("l0/"))
        return {key.removesuffix("_l0"): value for key, value in state.items()}
    if not any(path.startswith(("core/", "head/")) for path in arrays):
        return _layers_to_torch(arrays, str)
    layers = {k.removeprefix("core/"): v for k, v in arrays.items() if k.startswith("core/")}
    state = _layers_to_torch(layers, "core/{}".format)
    paths = {"lin.weight": "head/kernel", "lin.bias": "head/bias"}
    keys = {path: key for key, path in paths.items()}
    head = {keys.get(k, k): v.T.copy() for k, v in arrays.items() if not k.startswith("core/")}
    _check(head, _head_shapes(head, state), lambda key, shape: (paths.get(key, key), shape[::-1]))
    return {f"rnn.{key}": value for key, value in state.items()} | head


def _state_dict(source: Any) -> dict[str, Any]:
    """The weights by their names, those of nested dicts joined by dots."""
    if callable(getattr(source, "state_dict", None)) and not isinstance(source, type):
        source = source.state_dict()
    if isinstance(source, str | os.PathLike):
        source = read_state_dict(Path(source))
    if not isinstance(source, Mapping):
        raise TypeError(
            "from_torch takes a torch.nn module, its state dict or a file of weights, "
            f"not {written(source)}"
        )
    return dict(leaves(source, "."))


def _below(state: dict[str, Any], prefix: str) -> tuple[dict[str, Any], str]:
    """The weights at a prefix, without it in their names; and the prefix that they really have."""
    fits = _prefixes(state)
    wrapper = _wrapper(state)
    dotted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    for start in (dotted, wrapper + dotted):
        below = {key.removeprefix(start): key for key in state if key.startswith(start)}
        within = [fit for fit in fits if fit.startswith(start)]
        if start in fits:
            break
        if len(within) == 1 and all(key.startswith(within[0]) for key in below.values()):
            return _below(state, within[0])  # nothing else lies there
    else:
        if fits:
            shown = few([repr(fit) for fit in fits], at_most=20)
            raise ValueError(
                f"from_torch needs the prefix of one layer, not {prefix!r}; these fit: {shown}"
            )
        start, below = "", {key: key for key in state}  # whose first missing key is then named
    return {name: state[key] for name, key in below.items()}, start


def _prefixes(state: dict[str, Any]) -> list[str]:
    """Where a layer's, a cell's or a classifier's names begin."""
    firsts = filter(None, map(_FIRST.fullmatch, state))
    layers = dict.fromkeys(match[1] or "" for match in firsts)
    models = [fit.removesuffix("rnn.") for fit in layers if re.search(r"(^|\.)rnn\.$", fit)]
    heads = [at for at in models if {f"{at}lin.weight", f"{at}lin.bias"} & state.keys()]
    return [*layers, *heads]


def _wrapper(state: dict[str, Any]) -> str:
    """What wrappers of modules put before all names."""
    found = ""
    while state and (
        more := [w for w in _WRAPPERS if all(key.startswith(found + w) for key in state)]
    ):
        found += more[0]
    return found


def _cell_from_torch(arrays: Arrays, start: str) -> Params:
    """A cell's parameters: those of a layer, by the cell's own names."""
    layer = {f"{key}_l0" if key in _CELL else key: value for key, value in arrays.items()}
    return _layers_from_torch(layer, lambda key, shape: (start + key.removesuffix("_l0"), shape))[
        "l0"
    ]


def _layers_from_torch(arrays: Arrays, show: _Show) -> Params:
    expected = _expected_shapes(arrays, show)
    _check(arrays, expected, show)
    num_gates, hidden_size = _gates_and_hidden(arrays)
    params: Params = {}
    for key in expected:
        part, name = _LAYER.fullmatch(key).groups()  # type: ignore[union-attr]
        layer = params.setdefault(name, {})
        if part.startswith("weight"):
            layer[part.replace("weight", "kernel")] = arrays[key].T.copy()
        elif part == "bias_hh":
            bias = arrays[key].copy()
            if num_gates == 3:  # the GRU's reset gate acts on this part of bias_hh alone
                layer["bias_hn"] = bias[2 * hidden_size :].copy()
                bias[2 * hidden_size :] = 0
            layer["bias"] = arrays[f"bias_ih_{name}"] + bias
    return params


def _layers_to_torch(arrays: Arrays, full_path: Callable[[str], str]) -> Arrays:
    """A stack's state dict; a message names a parameter by its full path."""
    paths: dict[str, str] = {}  # by PyTorch's keys
    for path in arrays:
        name, _, part = path.partition("/")
        key = f"{_PARTS.get(part)}_{name}"
        if not _LAYER.fullmatch(key):
            raise ValueError(f"PyTorch has no place for {full_path(path)}")
        paths[key] = path

    def show(key: str, shape: tuple) -> tuple[str, tuple]:
        part, name = _LAYER.fullmatch(key).groups()  # type: ignore[union-attr]
        ours = next(ours for ours, theirs in _PARTS.items() if theirs == part)
        return full_path(f"{name}/{ours}"), shape[::-1]

    state = {key: arrays[path].T.copy() for key, path in paths.items()}
    shapes = _expected_shapes(state, show)
    num_gates, hidden_size = _gates_and_hidden(state)
    second_biases = {key: shape for key, shape in shapes.items() if key.startswith("bias_hh")}
    expected = {key: shape for key, shape in shapes.items() if key not in second_biases}
    if num_gates == 3:
        expected |= dict.fromkeys(second_biases, (hidden_size,))
    _check(state, expected, show)
    for key, shape in second_biases.items():
        bias = np.zeros(shape, state[key.replace("hh", "ih")].dtype)
        bias[2 * hidden_size :] = state.get(key, 0)
        state[key] = bias
    return state


def _gates_and_hidden(arrays: Arrays) -> tuple[int, int]:
    """Tell the number of gates and the hidden size from the first layer."""
    rows, columns = arrays["weight_hh_l0"].shape
    # A projection's input is the hidden state itself.
    hidden = arrays["weight_hr_l0"].shape[1] if "weight_hr_l0" in arrays else columns
    return rows // max(hidden, 1), hidden


def _expected_shapes(arrays: Arrays, show: _Show) -> dict[str, tuple]:
    """Shapes that a state dict with this first layer, depth and options must have."""
    for key in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
        if key in arrays and arrays[key].ndim != 2:
            name, shape = show(key, arrays[key].shape)
            raise ValueError(f"{name} has shape {shape}, which is of no matrix")
        if key not in arrays and key != "weight_hr_l0":
            there = [show(key, ())[0] for key in arrays] or ["nothing"]
            raise ValueError(f"{show(key, ())[0]} is missing; there is {few(there)}")
    num_gates, hidden = _gates_and_hidden(arrays)
    has_projection = "weight_hr_l0" in arrays
    rows = num_gates * hidden
    kinds = (4,) if has_projection else (1, 3, 4)
    if num_gates not in kinds or len(arrays["weight_hh_l0"]) != rows:
        name, shape = show("weight_hh_l0", arrays["weight_hh_l0"].shape)
        raise ValueError(
            f"{name} has shape {shape}, which is of no RNN, GRU or LSTM with a hidden size of "
            f"{hidden}"
        )
    layers = [match for key in arrays if (match := _LAYER.fullmatch(key))]
    numbers = {int(match[2].removeprefix("l").removesuffix("_reverse")) for match in layers}
    depth = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if depth < max(numbers):
        name, _ = show(f"weight_ih_l{depth}", ())
        raise ValueError(f"{name} is missing, though there is a layer {max(numbers)}")
    directions = ["", "_reverse"] if any(m[2].endswith("_reverse") for m in layers) else [""]
    has_bias = any(match[1].startswith("bias") for match in layers)
    size = arrays["weight_hr_l0"].shape[0] if has_projection else hidden
    shapes: dict[str, tuple] = {}
    for layer in range(depth):
        features = arrays["weight_ih_l0"].shape[1] if layer == 0 else size * len(directions)
        for direction in directions:
            name = f"l{layer}{direction}"
            shapes[f"weight_ih_{name}"] = (rows, features)
            shapes[f"weight_hh_{name}"] = (rows, size)
            if has_projection:
                shapes[f"weight_hr_{name}"] = (size, hidden)
            if has_bias:
                shapes[f"bias_ih_{name}"] = shapes[f"bias_hh_{name}"] = (rows,)
    return shapes


def _head_shapes(head: Arrays, layers: Arrays) -> dict[str, tuple]:
    """Shapes of the dense layer that reads the output of these layers."""
    directions = ("weight_hh_l0", "weight_hh_l0_reverse")
    features = sum(layers[key].shape[1] for key in directions if key in layers)
    there = (head[key] for key in ("lin.bias", "lin.weight") if key in head and head[key].ndim)
    classes = next((len(array) for array in there), "classes")
    return {"lin.weight": (classes, features), "lin.bias": (classes,)}


def _check(arrays: Arrays, expected: dict[str, tuple], show: _Show) -> None:
    problems = []
    for key, shape in expected.items():
        name, shown = show(key, shape)
        if key not in arrays:
            problems.append(f"{name} is missing, expected with shape {shown}")
        elif (found := arrays[key].shape) != shape:
            problems.append(f"{name} has shape {show(key, found)[1]}, expected {shown}")
    for key, array in arrays.items():
        if key not in expected:
            name, shown = show(key, array.shape)
            problems.append(f"{name} is not expected, found with shape {shown}")
    if problems:
        raise ValueError("; ".join(problems))
