"""ONNX Runtime, which has no training: its LSTM keeps packed weights from call to call."""

from functools import partial

import numpy as np

from experiments.benchmark.cases import Case, examples, weights
from experiments.benchmark.framework import Call, Framework, Unavailable


def onnx_framework() -> Framework:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    def product(a: np.ndarray, b: np.ndarray) -> Call:
        node = _onnx().helper.make_node("MatMul", ["a", "b"], ["c"])
        return _session([node], {"a": a, "b": b}, {}, "c")

    return Framework("cpu", onnxruntime.get_device(), lambda array: None, product, lambda: 0)


def build_onnx(case: Case, mode: str) -> Call:
    """One `LSTM` a layer, and a product with the head's kernel.

    Raises:
        Unavailable: it is asked to train, or to map over examples.
    """
    if mode == "train":
        raise Unavailable("has no training")
    if case.mapped:
        raise Unavailable("has no vmap")
    node = _onnx().helper.make_node
    layers, head = weights(case)
    constants = {"head": head["kernel"], "bias": head["bias"], "first": np.array([0])}
    constants["direction"] = np.array([1])
    nodes = [node("Transpose", ["images"], ["x0"], perm=[1, 0, 2])]
    for k, layer in enumerate(layers):
        # Its gates lie in the order i, o, f, g, and it has a bias for each product.
        i, f, g, o = range(4)
        ordered = {
            name: np.concatenate([np.split(array.T, 4)[gate] for gate in (i, o, f, g)])
            for name, array in layer.items()
        }
        constants |= {
            f"w{k}": ordered["kernel_ih"][None],
            f"r{k}": ordered["kernel_hh"][None],
            f"b{k}": np.concatenate([ordered["bias"], np.zeros_like(ordered["bias"])])[None],
        }
        inputs = [f"x{k}", f"w{k}", f"r{k}", f"b{k}"]
        results = [f"y{k}", f"h{k}"]  # [time, 1, batch, hidden] and [1, batch, hidden]
        nodes.append(node("LSTM", inputs, results, hidden_size=case.hidden))
        nodes.append(node("Squeeze", [f"y{k}", "direction"], [f"x{k + 1}"]))
    nodes += [
        node("Squeeze", [f"h{len(layers) - 1}", "first"], ["last"]),
        node("Gemm", ["last", "head", "bias"], ["logits"]),
    ]
    return _session(nodes, {"images": examples(case)[0]}, constants, "logits")


def _session(
    nodes, inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray], result
) -> Call:
    """A function that computes `result` from these inputs."""
    import onnxruntime

    onnx = _onnx()
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph(
        nodes,
        "benchmark",
        [value(name, shape=array.shape) for name, array in inputs.items()],
        [value(result, shape=None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda: session.run([result], inputs)[0]


def _onnx():
    try:
        import onnx
    except ImportError as error:
        raise Unavailable("not installed: pip install onnx") from error
    return onnx
