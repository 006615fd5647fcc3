"""PyTorch's weights to and from the `params` collection, without importing PyTorch.

PyTorch keeps [gates * hidden_size, features] matrices and two biases, whose sum is all that an LSTM
or a vanilla RNN sees; here are [features, gates * hidden_size] kernels and that sum. The gates lie
in the same order.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax.core import meta
from jax.dtypes import issubdtype

Params = dict[str, Any]
Arrays = dict[str, np.ndarray]

_LAYER = re.compile(r"(weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)_(l\d+(?:_reverse)?)")
_PARTS = {  # of a layer here, and PyTorch's names for them
    "kernel_ih": "weight_ih",
    "kernel_hh": "weight_hh",
    "kernel_hr": "weight_hr",
    "bias": "bias_ih",
    "bias_hn": "bias_hh",
}

_Show = Callable[[str, tuple], tuple[str, tuple]]
"""How a message writes a key of PyTorch's and its shape."""


def from_torch(state_dict: Any) -> Params:
    """Convert the weights of a `torch.nn.LSTM`, `GRU` or `RNN`, or of a classifier on one.

    With `module = LSTMStack(...)` built with the same sizes and options as the PyTorch layer,
    `module.apply({"params": from_torch(layer)}, x)` computes what that does. A classifier has
    its layers under `rnn.` and its dense layer under `lin.`; its params fit `SequenceClassifier`.

        >>> import numpy as np
        >>> from lstm_flax import from_torch
        >>> weights = {"weight_ih_l0": np.ones((12, 5)), "weight_hh_l0": np.ones((12, 3))}
        >>> biases = {"bias_ih_l0": np.ones(12), "bias_hh_l0": np.ones(12)}
        >>> {k: v.shape for k, v in from_torch(weights | biases)["l0"].items()}
        {'kernel_ih': (5, 12), 'kernel_hh': (3, 12), 'bias': (12,)}

    Args:
        state_dict: tensors, or anything else that NumPy can read, by PyTorch's names; or a module,
            which has them in its `state_dict()`.

    Returns:
        NumPy arrays that share no memory with PyTorch's, so that training may go on there. float64
        stays as it is; float16 and bfloat16 become float32, which holds their values exactly, and
        the sums of the two biases too.

    Raises:
        TypeError: this is neither a module nor a mapping.
        ValueError: a key is missing or not expected, or its value is not floating or misshapen; the
            message names the key, and the shapes expected and found.
    """
    if callable(getattr(state_dict, "state_dict", None)) and not isinstance(state_dict, type):
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"from_torch takes a torch.nn module or its state dict, not {_written(state_dict)}"
        )
    arrays = {str(key): _to_numpy(str(key), value) for key, value in state_dict.items()}
    if not any(key.startswith(("rnn.", "lin.")) for key in arrays):
        return _layers_from_torch(arrays, prefix="")
    layers = {k.removeprefix("rnn."): v for k, v in arrays.items() if k.startswith("rnn.")}
    head = {k: v for k, v in arrays.items() if not k.startswith("rnn.")}
    core = _layers_from_torch(layers, prefix="rnn.")
    _check(head, _head_shapes(head, layers), lambda key, shape: (key, shape))
    return {
        "core": core,
        "head": {"kernel": head["lin.weight"].T.copy(), "bias": head["lin.bias"].copy()},
    }


def to_torch(params: Mapping[str, Any]) -> Arrays:
    """Convert the params of a stack or of a `SequenceClassifier` to a PyTorch state dict.

    The inverse of `from_torch`, which gives back exactly these params. The bias becomes `bias_ih`,
    and `bias_hh` is zero but for the GRU's own.

    Args:
        params: of an `LSTMStack`, `RNNStack` or `GRUStack` without layer norm, or of a
            `SequenceClassifier` on one; boxes such as `nn.Partitioned` are opened.

    Returns:
        NumPy arrays that share no memory with JAX's, so that PyTorch may write into them. float64
        stays as it is; all else becomes float32, since NumPy hands PyTorch no bfloat16.

    Raises:
        TypeError: this is not a mapping.
        ValueError: there is a parameter that PyTorch's layers have no place for, or one is missing,
            not floating or misshapen; the message names it, and the shapes expected and found.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"to_torch takes a mapping of params, not {_written(params)}")
    if "params" in params:
        raise ValueError('to_torch takes variables["params"], not all the variables')
    arrays = {path: _to_numpy(path, leaf) for path, leaf in _leaves(meta.unbox(params))}
    if not any(path.startswith(("core/", "head/")) for path in arrays):
        return _layers_to_torch(arrays, prefix="")
    layers = {k.removeprefix("core/"): v for k, v in arrays.items() if k.startswith("core/")}
    state = _layers_to_torch(layers, prefix="core/")
    paths = {"lin.weight": "head/kernel", "lin.bias": "head/bias"}
    keys = {path: key for key, path in paths.items()}
    head = {keys.get(k, k): v.T.copy() for k, v in arrays.items() if not k.startswith("core/")}
    _check(head, _head_shapes(head, state), lambda key, shape: (paths.get(key, key), shape[::-1]))
    return {f"rnn.{key}": value for key, value in state.items()} | head


def _to_numpy(name: str, value: Any) -> np.ndarray:
    """A tensor or an array in float32 or float64, perhaps still a view of it."""
    try:
        if hasattr(value, "detach"):  # a tensor, perhaps on a GPU, perhaps a trained parameter
            value = value.detach().cpu()
            if value.is_floating_point() and value.element_size() < 4:
                value = value.float()  # NumPy knows no bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} can't be read as an array: {_first_line(error)}") from error
    if not issubdtype(array.dtype, np.floating):
        found = _written(value) if array.dtype == object else array.dtype
        raise ValueError(f"{name} is {found}, not a floating array")
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


def _leaves(params: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value


def _layers_from_torch(arrays: Arrays, prefix: str) -> Params:
    def show(key: str, shape: tuple) -> tuple[str, tuple]:
        return prefix + key, shape

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


def _layers_to_torch(arrays: Arrays, prefix: str) -> Arrays:
    paths: dict[str, str] = {}  # by PyTorch's keys
    for path in arrays:
        name, _, part = path.partition("/")
        key = f"{_PARTS.get(part)}_{name}"
        if not _LAYER.fullmatch(key):
            raise ValueError(f"PyTorch has no place for {prefix}{path}")
        paths[key] = path

    def show(key: str, shape: tuple) -> tuple[str, tuple]:
        part, name = _LAYER.fullmatch(key).groups()  # type: ignore[union-attr]
        ours = next(ours for ours, theirs in _PARTS.items() if theirs == part)
        return f"{prefix}{name}/{ours}", shape[::-1]

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
            raise ValueError(f"{show(key, ())[0]} is missing; there is {_few(there)}")
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


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _written(value: Any) -> str:
    return str(value) if value is None or isinstance(value, type) else type(value).__name__


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
