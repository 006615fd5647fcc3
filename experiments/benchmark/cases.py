"""What the benchmark computes: shapes, the same random images and weights for all, and FLOPs."""

import itertools
from typing import NamedTuple

import numpy as np

CLASSES = 10


class Case(NamedTuple):
    """Sizes of one piece of work; the defaults are the MNIST experiment's."""

    batch: int = 128  # images
    time: int = 28  # steps of the sequence
    features: int = 28  # numbers a step
    hidden: int = 256  # units of each layer
    layers: int = 2
    mapped: int = 0  # 1: `jax.vmap` over the examples, each a batch of one
    busy: int = 0  # other processes that compute at the same time
    bfloat16: int = 0  # 1: products in bfloat16, sums and parameters in float32

    @property
    def name(self) -> str:
        """The case in words, for tables."""
        steps = "1 step" if self.time == 1 else f"{self.time} steps"
        name = f"{self.layers} x {self.hidden}, batch {self.batch}, {steps} of {self.features}"
        name += ", bfloat16" * bool(self.bfloat16)
        return name + ", vmap" * bool(self.mapped) + f", {self.busy} busy" * bool(self.busy)


CENTRE = Case()

AXES = {
    "batch": [CENTRE, Case(batch=1), Case(batch=256), Case(batch=1024)],
    "time": [CENTRE, Case(time=784, features=1)],  # the same pixels, one a step
    "hidden": [CENTRE, Case(hidden=64), Case(hidden=1024)],
    "layers": [CENTRE, Case(layers=1), Case(layers=3)],
}
"""A star: from the centre, one size at a time."""

QUICK = [CENTRE, Case(batch=1), Case(hidden=64)]

_ALL = itertools.product([16, 64, 256, 1024], [1, 16, 128, 1024], [1, 28, 1000], [1, 2])
GROUPS = {
    "star": list(dict.fromkeys(case for cases in AXES.values() for case in cases)),
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
    "bfloat16": [
        case._replace(bfloat16=1)
        for case in (Case(batch=1), Case(batch=16), CENTRE, Case(batch=1024), Case(hidden=64))
    ]
    + [Case(hidden=1024, layers=1, bfloat16=1)],
    # Everything that a machine with a few GB computes in a second or so.
    "grid": [
        Case(b, t, hidden=h, layers=k) for h, b, t, k in _ALL if b * t * h * (h + 256) * k < 2**34
    ],
}
"""Cases by the names that `--cases` takes."""


def parse_cases(text: str) -> list[Case]:
    """Parse the name of a group, or a case by its differences from the centre: `batch=1,time=784`.

    Raises:
        ValueError: a name is unknown, or a size is no positive integer; the message says which.
    """
    if text in GROUPS:
        return GROUPS[text]
    sizes = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in Case._fields:
            sizes_and_groups = f"{', '.join(Case._fields)}, nor of the groups {', '.join(GROUPS)}"
            raise ValueError(f"{text!r}: {name!r} is none of {sizes_and_groups}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{text!r}: {name} must be a positive integer")
        sizes[name] = int(size)
    return [CENTRE._replace(**sizes)]


def flops(case: Case, mode: str) -> int:
    """Return the FLOPs of the matrix products in one call; a multiply-add counts as two.

    The backward pass has two products for each product of the forward pass, one for the gradient of
    each factor. The gradient of the images is not computed.

    Args:
        case: the sizes.
        mode: "infer" or "train".
    """
    per_input = 2 * case.batch * case.time * 4 * case.hidden  # all four gates
    inputs = case.features + case.hidden * (2 * case.layers - 1)  # x and h of every layer
    forward = per_input * inputs + 2 * case.batch * case.hidden * CLASSES
    return forward if mode == "infer" else 3 * forward - per_input * case.features


def examples(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return random images float32 [batch, time, features] in [0, 1), and labels int32 [batch]."""
    rng = np.random.default_rng(0)
    images = rng.random((case.batch, case.time, case.features), dtype=np.float32)
    return images, rng.integers(0, CLASSES, case.batch, dtype=np.int32)


def weights(case: Case) -> dict[str, np.ndarray]:
    """Return a state dict, float32, of `nn.LSTM` under `rnn.` and `nn.Linear` under `lin.`.

    The values are drawn as PyTorch draws them: uniform, up to 1 / sqrt(hidden).
    """
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {}
    for k in range(case.layers):
        gates, inputs = 4 * case.hidden, case.hidden if k else case.features
        shapes |= {
            f"rnn.weight_ih_l{k}": (gates, inputs),
            f"rnn.weight_hh_l{k}": (gates, case.hidden),
        }
        shapes |= {f"rnn.bias_ih_l{k}": (gates,), f"rnn.bias_hh_l{k}": (gates,)}
    shapes |= {"lin.weight": (CLASSES, case.hidden), "lin.bias": (CLASSES,)}
    bound = case.hidden**-0.5
    return {n: rng.uniform(-bound, bound, shape).astype(np.float32) for n, shape in shapes.items()}
