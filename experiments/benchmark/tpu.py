"""What the compiler makes of the LSTM layers for a TPU, which need not be there; needs libtpu.

    python -m experiments.benchmark --tpu v5e

Nothing is measured: all numbers come from the compiled program. `bundles` counts the bundles of
instructions in the final schedule, which the chip issues one a cycle, with the body of each loop
counted as often as it runs. It leaves out stalls, waits for memory and the time between two
operations, so it is a lower bound. XLA's own estimate, `estimated_cycles`, charges some 1,800
cycles for every operation, however small, so it is pessimistic, and sees no Pallas kernel inside.
"""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from tqdm import tqdm

from experiments.benchmark.cases import Case, flops
from experiments.harness.markdown import table
from experiments.harness.usage import UsageError
from lstm_flax import LSTMStack

# Of a chip: bfloat16 FLOPs and bytes of HBM, a second.
PEAKS = {"v5e": (197e12, 819e9), "v6e": (918e12, 1640e9)}
PASSES = {"bfloat16": 1, "float32": 6}  # of the matrix unit, for one product
BATCHES = (128, 256, 1024)


class Program(NamedTuple):
    """A program to compile."""

    implementation: str  # "scan", or "auto", which is Pallas
    mode: str  # "train": the gradients of all parameters; "infer": the outputs
    batch: int
    dtype: str


def tables(kind: str) -> str:
    """Compile all programs for a kind of TPU, each in a process of its own.

    Raises:
        UsageError: there is no libtpu, or it can't compile for this kind.
    """
    header = [
        f"{kind}, compiled, 2 x 256", "", "", "", "bundles", "operations", "XLA's cycles beside",
        "arrays, MB", "products, µs", "HBM, µs",
    ]  # fmt: skip
    rows = []
    programs = itertools.product(("train", "infer"), PASSES, BATCHES, ("scan", "auto"))
    for mode, dtype, batch, name in tqdm(list(programs), unit=" programs", disable=None):
        found = compile_apart(kind, Program(name, mode, batch, dtype))
        flops_a_second, bytes_a_second = PEAKS[kind]
        products = flops(Case(batch=batch), mode) * PASSES[dtype] / flops_a_second
        counts = [f"{found[key]:,}" for key in ("bundles", "operations", "cycles")]
        times = [f"{products * 1e6:,.0f}", f"{found['bytes'] / bytes_a_second * 1e6:,.0f}"]
        words = [{"scan": "scan", "auto": "Pallas"}[name], mode, str(batch), dtype]
        rows.append([*words, *counts, f"{found['bytes'] / 1e6:,.1f}", *times])
    return f"""{table(header, rows, text_columns=4)}

- bundles: of the final schedule, each loop times its turns; without stalls and waits
- XLA's cycles beside: its estimate of everything but the Pallas kernels
- products, HBM: the time at the chip's peak for the products, and for one transfer of the program's
  arrays to or from HBM"""


def compile_apart(kind: str, program: Program) -> dict[str, int]:
    """Compile in a fresh process, whose libtpu writes the schedule into a folder of its own."""
    spec = importlib.util.find_spec("libtpu")
    found = spec and spec.submodule_search_locations
    library = os.environ.get("TPU_LIBRARY_PATH") or (found and f"{found[0]}/libtpu.so")
    if not library:
        raise UsageError("--tpu needs libtpu: pip install libtpu, or set TPU_LIBRARY_PATH to it")
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-m", "experiments.benchmark.tpu", kind, folder, *map(str, program)],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
                "TPU_LIBRARY_PATH": library,
                "TPU_SKIP_MDS_QUERY": "1",
            },
            capture_output=True,
            text=True,
        )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"--tpu {kind}: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def compile_here(kind: str, program: Program) -> Any:
    """Compile in this process, where `LIBTPU_INIT_ARGS` must name the folder for the schedule."""
    case = Case(batch=program.batch)
    (device,) = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:1x1", chips_per_host_bounds=[1, 1, 1]
    ).devices
    stack = LSTMStack(
        case.hidden,
        case.layers,
        dtype=program.dtype,
        precision=jax.lax.Precision.HIGHEST if program.dtype == "float32" else None,
        implementation=program.implementation,  # type: ignore[arg-type]
    )

    def last_output(variables, x):
        return stack.apply(variables, x)[0][:, -1].astype(jnp.float32)

    def loss(variables, x):
        return (last_output(variables, x) ** 2).sum()

    x = jax.ShapeDtypeStruct((case.batch, case.time, case.features), jnp.float32)
    variables = jax.eval_shape(stack.init, jax.random.key(0), x)
    sharding = jax.sharding.SingleDeviceSharding(device)
    on_chip = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (variables, x)
    )
    function = jax.grad(loss) if program.mode == "train" else last_output
    return jax.jit(function).lower(*on_chip).compile()


def read(compiled: Any, folder: Path, time: int) -> dict[str, int]:
    """Sum a program's bundles, operations and cycles, and the bytes of its arrays.

    Args:
        compiled: the program.
        folder: where libtpu wrote its schedules.
        time: how often the body of a loop runs.
    """
    computations = _computations(compiled.as_text())
    schedules = _schedules(folder)
    total = {"bundles": 0, "operations": 0, "cycles": 0}

    def add(lines: list[str], times: int) -> None:
        for line in lines:
            operation = re.match(r"\s+(?:ROOT )?%([\w.-]+) = .*?[\])}] ([\w-]+)\(", line)
            if body := re.search(r"\bbody=%([\w.-]+)", line):
                add(computations[body[1]], times * time)
            elif operation and operation[1] in schedules:
                total["bundles"] += times * schedules[operation[1]]
                total["operations"] += times
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                total["cycles"] += times * int(cycles[1])

    add(computations["ENTRY"], 1)
    memory = compiled.memory_analysis()
    arrays = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return total | {"bytes": sum(getattr(memory, name) for name in arrays)}


def _computations(program: str) -> dict[str, list[str]]:
    """Return the lines of each computation in a program's HLO text, by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if start := re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line):
            lines = found.setdefault("ENTRY" if start[1] else start[2], [])
        else:
            lines.append(line)
    return found


def _schedules(folder: Path) -> dict[str, int]:
    """Return the bundles of each scheduled operation, and of those that share its schedule."""
    bundles = {
        re.sub(r"^\d+-|-\d+-final_bundles$", "", path.stem): _bundles(path.read_text())
        for path in folder.glob("*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    }
    for path in folder.glob("*-deduplication-map.txt"):
        for block in path.read_text().split("key:")[1:]:
            alike = [line.strip() for line in block.splitlines()[3:]]
            written = next((bundles[name] for name in alike if name in bundles), None)
            if written is not None:
                bundles |= dict.fromkeys(alike, written)
    return bundles


def _bundles(schedule: str) -> int:
    """Count the bundles of a schedule, those of a loop as often as it runs."""
    steps = dict(re.findall(r"%(\w+) = sadd\.s32 (\d+), ", schedule))  # of loops' counters
    bundles = re.findall(
        r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s?([>\s]*)\{(.*)", schedule, re.MULTILINE
    )
    counts, turns = [0], [1]  # by the depth of loops

    def leave_loop() -> None:
        inner = counts.pop() * turns.pop()
        counts[-1] += inner

    for k, (label, marks, operations) in enumerate(bundles):
        depth, here = marks.count(">"), len(counts) - 1
        # A bundle that is empty, or was put in late, may not show the loop that it is in.
        goes_on = any(not m[0] and m[1].count(">") == here for m in bundles[k + 1 : k + 4])
        if depth < here and goes_on:
            depth = here
        while len(counts) > depth + (label != "LB"):
            leave_loop()
        while len(counts) <= depth:
            counts.append(0)
            turns.append(1)
        counts[-1] += 1
        for counter, limit in re.findall(
            r"scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test", operations
        ):
            # The outer loop fetches ahead and stores behind: two turns more, without the work.
            ahead = 2 if len(counts) == 2 else 0
            turns[-1] = max((int(limit) - ahead) // int(steps.get(counter, 1)), 1)
    while len(counts) > 1:
        leave_loop()
    return counts[0]


def main(kind: str, folder: str, *program: str) -> None:
    """Compile a program and print its counts as JSON."""
    implementation, mode, batch, dtype = program
    compiled = compile_here(kind, Program(implementation, mode, int(batch), dtype))
    print(json.dumps(read(compiled, Path(folder), Case().time)))


if __name__ == "__main__":
    main(*sys.argv[1:])
