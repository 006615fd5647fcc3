"""ONNX Runtime, which has no training. Its LSTM packs the weights once and keeps them packed."""

import numpy as np
import onnxruntime

from experiments.benchmark.cases import Case, examples, weights
from experiments.benchmark.peers import Call, Framework, Unavailable, require_package

require_package("onnx")
import onnx  # noqa: E402
from onnx.helper import make_node  # noqa: E402


def framework() -> Framework:
    """Return ONNX Runtime on the CPU."""

    def matmul(a: np.ndarray, b: np.ndarray) -> Call:
        return _session([make_node("MatMul", ["a", "b"], ["c"])], {"a": a, "b": b}, {}, "c")

    return Framework("cpu", onnxruntime.get_device(), lambda array: None, matmul, lambda: 0)


def build_onnx(case: Case, mode: str) -> Call:
    """Build one `LSTM` a layer, and a dense layer.

    Raises:
        Unavailable: it would have to train, to map over examples, or to multiply in bfloat16.
    """
    if mode == "train":
        raise Unavailable("has no training")
    if case.mapped:
        raise Unavailable("has no vmap")
    if case.bfloat16:
        raise Unavailable("has no bfloat16 on a CPU")
    of_torch = weights(case)
    constants = {"w": of_torch["lin.weight"], "b": of_torch["lin.bias"]}
    constants |= {"axis0": np.array([0]), "axis1": np.array([1])}
    nodes = [make_node("Transpose", ["images"], ["x0"], perm=[1, 0, 2])]

    def in_its_order(name: str) -> np.ndarray:
        i, f, g, o = np.split(of_torch[f"rnn.{name}"], 4)
        return np.concatenate([i, o, f, g])

    for k in range(case.layers):
        biases = [in_its_order(f"bias_{of}_l{k}") for of in ("ih", "hh")]
        constants |= {
            f"w{k}": in_its_order(f"weight_ih_l{k}")[None],
            f"r{k}": in_its_order(f"weight_hh_l{k}")[None],
            f"b{k}": np.concatenate(biases)[None],
        }
        inputs = [f"x{k}", f"w{k}", f"r{k}", f"b{k}"]
        outputs = [f"y{k}", f"h{k}"]  # [time, 1, batch, hidden] and [1, batch, hidden]
        nodes.append(make_node("LSTM", inputs, outputs, hidden_size=case.hidden))
        nodes.append(make_node("Squeeze", [f"y{k}", "axis1"], [f"x{k + 1}"]))
    nodes += [
        make_node("Squeeze", [f"h{case.layers - 1}", "axis0"], ["last"]),
        make_node("Gemm", ["last", "w", "b"], ["logits"], transB=1),
    ]
    return _session(nodes, {"images": examples(case)[0]}, constants, "logits")


def _session(
    nodes: list, inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray], output: str
) -> Call:
    """Return a function that computes `output` from these inputs."""
    float32 = onnx.TensorProto.FLOAT
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "benchmark",
        [tensor(name, float32, array.shape) for name, array in inputs.items()],
        [tensor(output, float32, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda: session.run([output], inputs)[0]
