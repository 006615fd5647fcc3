"""How the cost of a train step grows with batch, time, hidden size, layers and devices.

    python -m experiments.scaling

Measures a train step at four sizes of each, with the other sizes as in the MNIST experiment, and
fits `seconds ~ size ** exponent`. Takes two minutes on 2 CPU cores. The devices are virtual and
share the machine's cores: they show what the division itself costs, not what more machines gain.
The rows of devices scan, on one device too; the others use `implementation="auto"`.
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
RUNS = 7  # timed steps; the table has their median


def measure(
    batch: int, steps: int, hidden: int, layers: int, *, implementation: Implementation
) -> dict[str, float]:
    """Return the median seconds of a train step, and its bytes on a device besides the state."""
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
    """Run `measure` in a new process that has this many devices."""
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
    """Return the slope of the straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    only: str | None = None
    """Sizes as JSON, such as '{"batch": 64, "steps": 28, "hidden": 256, "layers": 2}': measure them
    on this process's devices, and print seconds and bytes as JSON."""
    implementation: Implementation = "auto"
    """With --only: "scan", or "auto", which may choose the native kernel."""


def parse_sizes(only: str) -> dict[str, int]:
    """Read sizes from JSON.

    Raises:
        UsageError: a size is missing, unknown or below 1.
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
    """Measure all sizes and print a table in Markdown, or measure the sizes of --only."""
    options = read_flags(Options, argv, name="scaling", description=__doc__)
    if options.only:
        sizes = parse_sizes(options.only)
        print(json.dumps(measure(**sizes, implementation=options.implementation)))
        return 0
    print(scaling_table())
    return 0


def scaling_table() -> str:
    """Measure all sizes; returns a table in Markdown."""
    print_status(
        f"measuring {counted(sum(map(len, SIZES.values())), 'size')}, each in its own process"
    )
    rows = []
    for name, sizes in tqdm(SIZES.items(), disable=None):
        # Several devices can't share the native kernel, so one device scans too.
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
