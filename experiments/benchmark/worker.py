"""A process that runs one peer, as `measure` asks it to.

    python -m experiments.benchmark.worker

PyTorch and JAX in one process disturb each other's threads, so each peer has a process of its own.
A request is a line of JSON on stdin, `[method, *arguments]`, and its answer a line on stdout.
Between requests the process waits for stdin and uses no processor. It ends with stdin.
"""

import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.cases import Case
from experiments.benchmark.peers import Call, Unavailable, open_peer
from experiments.harness.command import why_no_platform

PRODUCTS = [(2048, 2048, 2048), (7168, 512, 1024)]
"""Rows, inner size and columns of the matrix products that the peak is measured with."""
LARGE_PRODUCTS = [(8192, 8192, 8192), (28672, 512, 2048)]
"""The same, on accelerators too."""
PRODUCT_RUNS = 5  # of which the fastest counts
SMALLEST = Case(batch=1, time=2, features=2, hidden=4, layers=1)
ROWS_TO_COMPARE = 8  # of the logits


class Bench:
    """One peer, and the function that it built last. Every public method answers a request."""

    def open(self, name: str) -> str:
        """Start the peer, and import what it needs; returns the name of its device."""
        self._framework, self._build = open_peer(name)
        self._seconds(self._build(SMALLEST, "infer"))
        return self._framework.device

    def build(self, sizes: list[int], mode: str) -> dict[str, Any]:
        """Build the function of a case, and time its first calls.

        Returns:
            `first_call_seconds`; `call_seconds`, of a later call; `result`, the first logits or the
            loss, to compare with other peers; and `peak_flops`, FLOP/s of the fastest matrix
            product in this process at this moment.
        """
        self._call: Call | None = None  # frees the previous one
        self._call = self._build(Case(*sizes), mode)
        first, result = self._seconds(self._call)
        values = np.asarray(result.cpu() if hasattr(result, "cpu") else result)
        return {
            "first_call_seconds": first,
            "call_seconds": min(self._seconds(self._call)[0] for _ in range(2)),
            "result": values[:ROWS_TO_COMPARE].tolist() if values.ndim else values.item(),
            "peak_flops": self._peak_flops(),
        }

    def time(self, calls: int, each: bool) -> dict[str, float]:
        """Time some calls together, after one that fills the caches; returns their `seconds`.

        With `each` it times them one by one, and adds `slow`, the 95th percentile of their seconds.
        """
        assert self._call is not None
        self._seconds(self._call)
        if each:
            seconds = [self._seconds(self._call)[0] for _ in range(calls)]
            slow = np.percentile(seconds, 95).item()
            return {"calls": calls, "seconds": sum(seconds), "slow": slow}
        started = time.perf_counter()
        for _ in range(calls):
            result = self._call()
        self._framework.wait(result)
        return {"calls": calls, "seconds": time.perf_counter() - started}

    def memory(self, sizes: list[int], mode: str) -> int:
        """Return by how many bytes the peak grows while a case is built and called twice.

        On a CPU this is the resident set of the process, which must be a fresh one, compilation
        included; otherwise it is what the framework's allocator has in use.
        """
        self._seconds(self._build(SMALLEST, mode))  # imports and allocates what is needed once
        peak = self._framework.allocator_peak
        if self._framework.platform == "cpu":
            peak = resident_peak
            with contextlib.suppress(OSError):  # without permission, the peak of the imports counts
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = peak()
        call = self._build(Case(*sizes), mode)
        for _ in range(2):
            self._seconds(call)
        return peak() - before

    def _seconds(self, call: Call) -> tuple[float, Any]:
        started = time.perf_counter()
        result = call()
        self._framework.wait(result)
        return time.perf_counter() - started, result

    def _peak_flops(self) -> float:
        on_cpu = self._framework.platform == "cpu"
        rng, best = np.random.default_rng(0), 0.0
        for rows, inner, columns in PRODUCTS if on_cpu else PRODUCTS + LARGE_PRODUCTS:
            a, b = (rng.random(shape, np.float32) for shape in ((rows, inner), (inner, columns)))
            multiply = self._framework.matmul(a, b)
            seconds = [self._seconds(multiply)[0] for _ in range(1 + PRODUCT_RUNS)]
            best = max(best, 2 * rows * inner * columns / min(seconds[1:]))  # the first compiles
        return best


def resident_peak() -> int:
    """Return the most bytes that this process had in memory.

    Raises:
        Unavailable: the system doesn't say; only Linux does.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found is None:
        raise Unavailable("the system doesn't tell the peak of a process's memory")
    return int(found[1]) * 1024


def main() -> None:
    """Answer requests until stdin ends. A failed request gets its error as the answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    bench = Bench()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = {"answer": getattr(bench, method)(*arguments)}
        except Exception as error:  # whatever it is, other peers and cases can go on
            kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
            answer = {"error": why_no_platform() or f"{kind}{error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
