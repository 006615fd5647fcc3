"""The peers that run on PyTorch: `nn.LSTM` and `nn.Linear`, as they are and as one CUDA graph."""

from functools import partial

import numpy as np

from experiments.benchmark.cases import Case, examples, weights
from experiments.benchmark.framework import LEARNING_RATE, Call, Framework, Unavailable


def torch_framework() -> Framework:
    """PyTorch, on CUDA where there is any."""
    import torch

    has_cuda = torch.cuda.is_available()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # the default of its LSTM is TensorFloat-32

    def product(a: np.ndarray, b: np.ndarray) -> Call:
        device = _torch_device()
        return partial(torch.mm, torch.from_numpy(a).to(device), torch.from_numpy(b).to(device))

    return Framework(
        "gpu" if has_cuda else "cpu",
        torch.cuda.get_device_name() if has_cuda else "cpu",
        (lambda array: torch.cuda.synchronize()) if has_cuda else (lambda array: None),
        product,
        torch.cuda.max_memory_allocated,
    )


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def build_torch(case: Case, mode: str, how: str = "eager") -> Call:
    """`nn.LSTM` and `nn.Linear`; `how` is "eager", and on CUDA also "compile" or "graph"."""
    import torch

    if case.mapped:
        raise Unavailable("nn.LSTM has no vmap")
    device = _torch_device()
    images = torch.from_numpy(examples(case)[0]).to(device)
    labels = torch.from_numpy(examples(case)[1]).long().to(device)
    rnn = torch.nn.LSTM(case.features, case.hidden, case.layers, batch_first=True).to(device)
    lin = torch.nn.Linear(case.hidden, len(weights(case)[1]["bias"])).to(device)
    _load_weights(case, rnn, lin)

    def logits():
        return lin(rnn(images)[0][:, -1])

    forward = torch.compile(logits) if how == "compile" else logits
    parameters = [*rnn.parameters(), *lin.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, capturable=how == "graph")

    def infer():
        with torch.inference_mode():
            return forward()

    def train():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    call = train if mode == "train" else infer
    if how != "graph":
        return call
    replay = _as_cuda_graph(call)
    _load_weights(case, rnn, lin)  # recording has trained
    return replay


def _load_weights(case: Case, rnn, lin) -> None:
    """Set an `nn.LSTM` and an `nn.Linear` to the weights that all peers start from."""
    import torch

    layers, head = weights(case)
    with torch.no_grad():
        for k, layer in enumerate(layers):
            for name in ("ih", "hh"):
                kernel = torch.from_numpy(layer[f"kernel_{name}"].T)
                getattr(rnn, f"weight_{name}_l{k}").copy_(kernel)
            getattr(rnn, f"bias_ih_l{k}").copy_(torch.from_numpy(layer["bias"]))
            getattr(rnn, f"bias_hh_l{k}").zero_()
        lin.weight.copy_(torch.from_numpy(head["kernel"].T))
        lin.bias.copy_(torch.from_numpy(head["bias"]))


def _as_cuda_graph(call: Call) -> Call:
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is allocated once must be there before it is recorded
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay
