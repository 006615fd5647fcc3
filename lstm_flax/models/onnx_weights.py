"""The layers and the classifier as a graph of ONNX's own recurrent operators."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lstm_flax.arguments import check_choice
from lstm_flax.models.torch_weights import to_torch

if TYPE_CHECKING:
    import onnx

OPSET = 17
"""Version of ONNX's operators, from 2022. Its `LSTM` is that of version 14."""

IR_VERSION = 8
"""Version of ONNX's file format that came with those operators."""


class _Operator(NamedTuple):
    name: str
    gates: tuple[int, ...]  # where PyTorch has the gates that ONNX has in this place
    attributes: dict[str, Any]


_OPERATORS = {  # by the number of gates
    4: _Operator("LSTM", (0, 3, 1, 2), {}),
    3: _Operator("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    1: _Operator("RNN", (0,), {}),
}


def to_onnx(
    params: Mapping[str, Any], *, seq_lengths: bool = False, nonlinearity: str = "tanh"
) -> "onnx.ModelProto":
    """Convert the params of a stack or of a `SequenceClassifier` to an ONNX model.

    Each layer is one `LSTM`, `GRU` or `RNN` of opset 17, with both directions in it if there are
    two. The states begin at zero, and dropout is off. `onnx.save(to_onnx(params), "model.onnx")`
    writes the model to a file.

    The model's inputs are `x`, float32 [batch, time, features], and with `seq_lengths=True` also
    `seq_lengths`, int32 [batch]. Of a classifier the output is `logits`, float32 [batch, classes].
    Of a stack the outputs are `outputs` [batch, time, directions * size], zero after the end of a
    sequence, and `h_n` and, of LSTMs, `c_n` [layers * directions, batch, size].

        >>> import jax
        >>> from lstm_flax import LSTMClassifier, to_onnx
        >>> variables = LSTMClassifier(8, 2).init(jax.random.key(0), jax.numpy.ones((3, 5, 4)))
        >>> [node.op_type for node in to_onnx(variables["params"]).graph.node][:3]
        ['Transpose', 'LSTM', 'Transpose']

    Args:
        params: as `to_torch` takes them, in any floating dtype; the model has them in float32. They
            don't tell a layer's other options, which must be those that PyTorch has.
        seq_lengths: whether the model takes the length of each sequence.
        nonlinearity: that of an `RNNStack`, "tanh" or "relu".

    Raises:
        ImportError: onnx is not installed.
        TypeError: this is not a mapping.
        ValueError: `to_torch` refuses the params, or ONNX has no place for one: its LSTM has no
            projection.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ImportError('to_onnx needs onnx: pip install "lstm_flax[export]"') from error
    check_choice("nonlinearity", nonlinearity, ("tanh", "relu"))
    state = {key: np.asarray(value, np.float32) for key, value in to_torch(params).items()}
    head = [state.pop(key) for key in ("lin.weight", "lin.bias") if key in state]
    state = {key.removeprefix("rnn."): value for key, value in state.items()}
    if "weight_hr_l0" in state:
        raise ValueError("params have a kernel_hr, but ONNX's LSTM has no projection")
    rows, hidden_size = state["weight_hh_l0"].shape
    operator = _OPERATORS[rows // hidden_size]
    directions = ["", "_reverse"] if "weight_hh_l0_reverse" in state else [""]
    num_layers = sum(key.startswith("weight_hh") for key in state) // len(directions)
    attributes = operator.attributes | {
        "hidden_size": hidden_size,
        "direction": "bidirectional" if len(directions) == 2 else "forward",
    }
    if operator.name == "RNN":
        attributes["activations"] = [nonlinearity.capitalize()] * len(directions)

    constants = {"merged": np.array([0, 0, -1]), "flat": np.array([0, -1])}
    nodes = [helper.make_node("Transpose", ["x"], ["x_0"], perm=[1, 0, 2])]
    for k in range(num_layers):
        names = [f"l{k}{direction}" for direction in directions]
        inputs = [f"x_{k}", f"W_{k}", f"R_{k}", "", "seq_lengths" if seq_lengths else ""]
        constants[f"W_{k}"] = _stacked(state, "weight_ih", names, operator)
        constants[f"R_{k}"] = _stacked(state, "weight_hh", names, operator)
        if f"bias_ih_{names[0]}" in state:
            inputs[3] = f"B_{k}"
            both = [_stacked(state, part, names, operator) for part in ("bias_ih", "bias_hh")]
            constants[f"B_{k}"] = np.concatenate(both, axis=1)
        while not inputs[-1]:
            inputs.pop()  # optional ones at the end are left out
        # [time, directions, batch, size], then [directions, batch, size].
        results = [f"y_{k}", f"h_{k}", f"c_{k}"][: 3 if operator.name == "LSTM" else 2]
        nodes.append(helper.make_node(operator.name, inputs, results, **attributes))
        if k < num_layers - 1 or not head:
            nodes += [
                helper.make_node("Transpose", [f"y_{k}"], [f"t_{k}"], perm=[0, 2, 1, 3]),
                helper.make_node("Reshape", [f"t_{k}", "merged"], [f"x_{k + 1}"]),
            ]
    if head:
        constants |= {"weight": head[0], "bias": head[1]}
        nodes += [
            helper.make_node("Transpose", [f"h_{num_layers - 1}"], ["by_batch"], perm=[1, 0, 2]),
            helper.make_node("Reshape", ["by_batch", "flat"], ["last"]),
            helper.make_node("Gemm", ["last", "weight", "bias"], ["logits"], transB=1),
        ]
        outputs = {"logits": ["batch", len(head[1])]}
    else:
        width = len(directions) * hidden_size
        outputs = {"outputs": ["batch", "time", width]}
        nodes.append(
            helper.make_node("Transpose", [f"x_{num_layers}"], ["outputs"], perm=[1, 0, 2])
        )
        for name in ("h", "c") if operator.name == "LSTM" else ("h",):
            finals = [f"{name}_{k}" for k in range(num_layers)]
            nodes.append(helper.make_node("Concat", finals, [f"{name}_n"], axis=0))
            outputs[f"{name}_n"] = [num_layers * len(directions), "batch", hidden_size]

    def value(name: str, shape: list, dtype: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, dtype, shape)

    inputs = [value("x", ["batch", "time", state["weight_ih_l0"].shape[1]])]
    if seq_lengths:
        inputs.append(value("seq_lengths", ["batch"], TensorProto.INT32))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "lstm_flax",
        inputs,
        [value(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(
        graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="lstm_flax"
    )


def _stacked(
    state: Mapping[str, np.ndarray], part: str, names: list[str], operator: _Operator
) -> np.ndarray:
    """A weight or a bias of a layer's directions, its gates in ONNX's order."""
    by_gate = [np.split(state[f"{part}_{name}"], len(operator.gates)) for name in names]
    return np.stack([np.concatenate([of[k] for k in operator.gates]) for of in by_gate])
