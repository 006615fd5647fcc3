"""How the cost of a train step grows with batch, time, hidden size, layers and devices.

    python -m experiments.scaling

Measures a train step at four sizes of each, the others as in the MNIST experiment, and fits
`seconds ~ size ** exponent`. Takes two minutes on 2 CPU cores. Devices are virtual ones, which
share the machine's cores: they show what the division itself costs, not what more machines gain.
They scan, on one device too; all else is as `implementation="auto"` has it.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from experiments.harness.command import command
from experiments.harness.markdown import table
from experiments.harness.usage import UsageError, counted, print_status, read_flags
from lstm_flax import LSTMClassifier, training

Implementation = Literal["scan", "auto"]
BASE = {"batch": 128, "steps": 28, "hidden": 256, "layers": 2, "devices": 1}
SIZES = {
    "batch": [64, 128, 256, 512],
    "steps": [28, 56, 112, 224],
    "hidden": [128, 256, 512, 1024],
    "layers": [1, 2, 3, 4],
    "devices": [1, 2, 4, 8],
}
FEATURES = 28
RUNS = 7  # of which the median counts


def measure(
    batch: int, steps: int, hidden: int, layers: int, *, implementation: Implementation
) -> dict[str, float]:
    """Median seconds of a train step, and the bytes that it needs on a device beside its state."""
    with jax.set_mesh(training.data_mesh()):
        rng = np.random.default_rng(0)
        examples = {
            "image": rng.integers(0, 256, (batch, steps, FEATURES), dtype=np.uint8),
            "label": rng.integers(0, 10, batch, dtype=np.int32),
            "mask": np.ones(batch, bool),
        }
        data = jax.device_put(examples, NamedSharding(jax.sharding.get_mesh(), P("data")))
        key = training.replicate(jax.random.key(0))
        tx = training.onecycle_adamw(1e-3, 1000, weight_decay=1e-2, clip_norm=1.0)
        sample = jnp.zeros((1, steps, FEATURES))
        model = LSTMClassifier(hidden, layers, implementation=implementation)
        state = training.create_train_state(model, tx, sample, key)
        step = training.train_step.lower(state, data, key).compile()
        seconds = [_seconds(step, state, data, key) for _ in range(RUNS + 1)][1:]
        return {
            "seconds": float(np.median(seconds)),
            "bytes": step.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
        }


def _seconds(step, *arguments) -> float:
    started = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - started


def measure_apart(
    sizes: dict[str, int], *, implementation: Implementation = "auto"
) -> dict[str, float]:
    """`measure` in a process of its own, which has as many devices as asked for."""
    sizes = dict(sizes)
    devices = f"--xla_force_host_platform_device_count={sizes.pop('devices')}"
    command = [sys.executable, "-m", "experiments.scaling", "--only", json.dumps(sizes)]
    measured = subprocess.run(
        [*command, "--implementation", implementation],
        env=os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(measured.stdout)


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of the straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    only: str | None = None
    """Sizes as JSON, such as '{"batch": 64, "steps": 28, "hidden": 256, "layers": 2}': measure them
    on this process's devices, and print seconds and bytes as JSON."""
    implementation: Implementation = "auto"
    """With --only: scan on one CPU too, or let the native kernel stand in where it can."""


def sizes_asked_for(only: str) -> dict[str, int]:
    """Read sizes from JSON.

    Raises:
        UsageError: they are not all that `measure` takes, each at least 1.
    """
    names = [name for name in BASE if name != "devices"]
    with contextlib.suppress(ValueError):
        sizes = json.loads(only)
        is_complete = isinstance(sizes, dict) and sizes.keys() == set(names)
        if is_complete and all(isinstance(n, int) and n >= 1 for n in sizes.values()):
            return sizes
    raise UsageError(f"--only must be JSON with {', '.join(names)}, each at least 1, but is {only}")


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure all sizes, and print a table in Markdown; or measure the sizes asked for."""
    options = read_flags(Options, argv, name="scaling", description=__doc__)
    if options.only:
        sizes = sizes_asked_for(options.only)
        print(json.dumps(measure(**sizes, implementation=options.implementation)))
        return 0
    print(scaling_table())
    return 0


def scaling_table() -> str:
    """Measure all sizes of each thing that grows; a table in Markdown."""
    print_status(
        f"measuring {counted(sum(map(len, SIZES.values())), 'size')}, each in its own process"
    )
    rows = []
    for name, sizes in tqdm(SIZES.items(), disable=None):
        # The native kernel is for one device: with it there, they would not be compared alike.
        implementation: Implementation = "scan" if name == "devices" else "auto"
        measured: list[dict[str, Any]] = [
            measure_apart(BASE | {name: size}, implementation=implementation) for size in sizes
        ]
        seconds = [m["seconds"] for m in measured]
        megabytes = [m["bytes"] / 1e6 for m in measured]
        rows.append(
            [
                name,
                ", ".join(map(str, sizes)),
                ", ".join(f"{1000 * s:.0f}" for s in seconds),
                f"{exponent(sizes, seconds):.2f}",
                ", ".join(f"{m:.0f}" for m in megabytes),
                f"{exponent(sizes, megabytes):.2f}",
            ]
        )
    header = ["", "sizes", "milliseconds a train step", "exponent", "MB", "exponent"]
    return table(header, rows, text_columns=3)


if __name__ == "__main__":
    sys.exit(main())
