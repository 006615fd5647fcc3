"""What the benchmark computes: shapes, the same random images and weights for all, and FLOPs."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of one piece of work; the defaults are the MNIST experiment's."""

    batch: int = 128  # images
    time: int = 28  # steps of the sequence
    features: int = 28  # numbers a step
    hidden: int = 256  # units of each layer
    layers: int = 2
    mapped: int = 0  # 1: `jax.vmap` over the examples, each a batch of one
    busy: int = 0  # other processes that compute at the same time

    @property
    def name(self) -> str:
        """How tables call it."""
        steps = "1 step" if self.time == 1 else f"{self.time} steps"
        name = f"{self.layers} x {self.hidden}, batch {self.batch}, {steps} of {self.features}"
        return name + ", vmap" * bool(self.mapped) + f", {self.busy} busy" * bool(self.busy)


CENTRE = Case()

AXES = {
    "batch": [CENTRE, Case(batch=1), Case(batch=256), Case(batch=1024)],
    "time": [CENTRE, Case(time=784, features=1)],  # the same pixels, one a step
    "hidden": [CENTRE, Case(hidden=64), Case(hidden=1024)],
    "layers": [CENTRE, Case(layers=1), Case(layers=3)],
}
"""A star: from the centre, one size at a time."""

STAR = list(dict.fromkeys(case for cases in AXES.values() for case in cases))
QUICK = [CENTRE, Case(batch=1), Case(hidden=64)]

_ALL = itertools.product([16, 64, 256, 1024], [1, 16, 128, 1024], [1, 28, 1000], [1, 2])
GROUPS = {
    "star": STAR,
    "latency": [
        Case(hidden=64, layers=1, batch=1, time=1),
        Case(batch=1, time=1),
        Case(hidden=512, batch=1, time=1),
        Case(batch=1),
        Case(batch=16),
        Case(),
        Case(batch=1024),
        Case(hidden=128, layers=1, batch=64, time=784),
    ],
    "vmap": [Case(batch=256, hidden=64), Case(batch=256, hidden=64, mapped=1)],
    "busy": [Case(batch=3, time=20, hidden=64, busy=2), Case(batch=6, busy=2)],
    # All that a machine with a few GB computes in a second or so.
    "grid": [
        Case(b, t, hidden=h, layers=k) for h, b, t, k in _ALL if b * t * h * (h + 256) * k < 2**34
    ],
}
"""By the names that a command line may give for them."""


def parse_cases(text: str) -> list[Case]:
    """Read a group's name, or a case as `parse_case` does.

    Raises:
        ValueError: it is neither; the message says why.
    """
    return GROUPS[text] if text in GROUPS else [parse_case(text)]


def parse_case(text: str) -> Case:
    """Read a case as it differs from the centre: `batch=1` or `time=784,features=1`.

    Raises:
        ValueError: a size is unknown or no positive integer; the message says which.
    """
    sizes = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in {field.name for field in dataclasses.fields(Case)}:
            known = ", ".join(field.name for field in dataclasses.fields(Case))
            raise ValueError(
                f"{text!r}: {name!r} is none of {known}, nor of the groups {', '.join(GROUPS)}"
            )
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{text!r}: {name} must be a positive integer")
        sizes[name] = int(size)
    return dataclasses.replace(CENTRE, **sizes)


def forward_flops(case: Case) -> int:
    """FLOPs of the matrix products of one inference, a multiplication and an addition being two."""
    layers = sum(
        2 * case.batch * case.time * 4 * case.hidden * (inputs + case.hidden)
        for inputs in _layer_inputs(case)
    )
    return layers + 2 * case.batch * case.hidden * CLASSES


def train_flops(case: Case) -> int:
    """FLOPs of the matrix products of one train step.

    The backward pass has two products for each one of the forward pass, the gradients of its two
    factors, but nobody asks for the gradient of the images.
    """
    of_images = 2 * case.batch * case.time * 4 * case.hidden * case.features
    return 3 * forward_flops(case) - of_images


def flops(case: Case, mode: str) -> int:
    """FLOPs of one call; `mode` is "infer" or "train"."""
    return train_flops(case) if mode == "train" else forward_flops(case)


def examples(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images float32 [batch, time, features] in [0, 1), and labels int32 [batch]."""
    rng = np.random.default_rng(0)
    images = rng.random((case.batch, case.time, case.features), dtype=np.float32)
    return images, rng.integers(0, CLASSES, case.batch, dtype=np.int32)


class Weights(NamedTuple):
    """A model's weights, in the layout of `lstm_flax`: the gates i, f, g, o side by side."""

    layers: list[dict[str, np.ndarray]]
    """`kernel_ih` [inputs, 4 * hidden], `kernel_hh` [hidden, 4 * hidden], `bias` [4 * hidden]."""
    head: dict[str, np.ndarray]
    """`kernel` [hidden, classes], `bias` [classes]."""


def weights(case: Case) -> Weights:
    """Random weights, as `torch.nn.LSTM` draws them: even, up to the root of one over hidden."""
    rng = np.random.default_rng(1)
    bound = case.hidden**-0.5
    gates = 4 * case.hidden

    def draw(*shape: int) -> np.ndarray:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    layers = [
        {
            "kernel_ih": draw(inputs, gates),
            "kernel_hh": draw(case.hidden, gates),
            "bias": draw(gates),
        }
        for inputs in _layer_inputs(case)
    ]
    return Weights(layers, {"kernel": draw(case.hidden, CLASSES), "bias": draw(CLASSES)})


def _layer_inputs(case: Case) -> list[int]:
    return [case.features] + [case.hidden] * (case.layers - 1)


def as_json(case: Case) -> dict[str, Any]:
    """A case as JSON values."""
    return dataclasses.asdict(case)
