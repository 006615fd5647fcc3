"""The peers that run on PyTorch: `nn.LSTM` and `nn.Linear`, also compiled and as a CUDA graph."""

from functools import partial

import numpy as np
import torch

from experiments.benchmark.cases import Case, examples, weights
from experiments.benchmark.peers import LEARNING_RATE, Call, Framework, Unavailable
from experiments.benchmark.torch_reference import Classifier

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def framework() -> Framework:
    """Return PyTorch, on CUDA if there is any."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's LSTM uses TensorFloat-32 by default

    def matmul(a: np.ndarray, b: np.ndarray) -> Call:
        return partial(torch.mm, torch.from_numpy(a).to(DEVICE), torch.from_numpy(b).to(DEVICE))

    if DEVICE == "cpu":
        return Framework("cpu", "cpu", lambda array: None, matmul, lambda: 0)
    return Framework(
        "gpu",
        torch.cuda.get_device_name(),
        lambda array: torch.cuda.synchronize(),
        matmul,
        torch.cuda.max_memory_allocated,
    )


def build_torch(case: Case, mode: str, how: str = "eager") -> Call:
    """Build `nn.LSTM` and `nn.Linear`; `how` is "eager", and on CUDA also "compile" or "graph"."""
    if case.mapped:
        raise Unavailable("nn.LSTM has no vmap")
    if case.bfloat16 and DEVICE == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unavailable("nn.LSTM has no bfloat16 on this processor")
    images, labels = (torch.from_numpy(array).to(DEVICE) for array in examples(case))
    labels = labels.long()
    initial = {name: torch.from_numpy(array) for name, array in weights(case).items()}
    model = Classifier(case.hidden, case.layers, case.features).to(DEVICE)
    model.load_state_dict(initial)
    compiled = torch.compile(model) if how == "compile" else model

    def forward(images):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bool(case.bfloat16)):
            return compiled(images).float()

    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, capturable=how == "graph")

    def infer():
        with torch.inference_mode():
            return forward(images)

    def train():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    call = train if mode == "train" else infer
    if how == "graph":
        call = _as_cuda_graph(call)
        model.load_state_dict(initial)  # recording has trained
    return call


build_compiled = partial(build_torch, how="compile")
build_cuda_graph = partial(build_torch, how="graph")


def _as_cuda_graph(call: Call) -> Call:
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):  # what is allocated once must be allocated before the recording
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay
