"""A process that has one peer and, line by line, does what it is asked to.

    python -m experiments.benchmark.worker PEER

PyTorch and JAX in one process disturb each other's threads, so each peer has a process of its own.
Requests and answers are JSON, a line each, on stdin and stdout. Between two requests it blocks on
stdin and takes no time from the others. The end of stdin ends it.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from experiments.benchmark.cases import Case
from experiments.benchmark.framework import Call, Framework, Unavailable
from experiments.benchmark.peers import Peer, open_peer
from experiments.harness.command import why_no_platform

PRODUCTS = [(2048, 2048, 2048), (7168, 512, 1024)]
"""Rows, inner size and columns of the products that the peak is taken from; a GPU needs more."""
LARGE_PRODUCTS = [(8192, 8192, 8192), (28672, 512, 2048)]
PRODUCT_RUNS = 5  # of which the fastest counts
SMALLEST = Case(batch=1, time=2, features=2, hidden=4, layers=1)
ROWS_TO_COMPARE = 8  # of the logits


def main() -> None:
    """Serve requests until stdin ends."""
    answers = _own_stdout()
    try:
        peer, framework = open_peer(sys.argv[1])
        framework.wait(peer.build(SMALLEST, "infer")())  # imports what it needs
    except Exception as error:  # whatever it is, the others can go on without it
        _answer(answers, {"error": why_no_platform() or _reason(error)})
        return
    _answer(answers, {"device": framework.device, "version": _version(peer.package)})
    serve(peer, framework, answers)


def serve(peer: Peer, framework: Framework, answers: TextIO) -> None:
    """Answer each request; what it can't do it answers with an error, and goes on."""
    call: Call | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            match request["do"]:
                case "build":
                    call = None  # frees the one before
                    call, answer = build(peer, framework, *_case(request))
                case "time":
                    assert call is not None, "asked to time what was not built"
                    answer = timed(call, framework.wait, request["calls"], request["each"])
                case "memory":
                    answer = memory(peer, framework, *_case(request))
        except Exception as error:  # of this case alone, perhaps
            answer = {"error": _reason(error)}
        _answer(answers, answer)


def build(peer: Peer, framework: Framework, case: Case, mode: str) -> tuple[Call, dict[str, Any]]:
    """Make the peer's function, and say how long its first and its next calls took, in seconds.

    The answer also has what the first call returned, so that it can be compared, and the fastest
    matrix product of this process at this moment, in FLOP/s.
    """
    call = peer.build(case, mode)
    first, result = _seconds(call, framework.wait)
    values = np.asarray(result.cpu() if hasattr(result, "cpu") else result)
    later = [_seconds(call, framework.wait)[0] for _ in range(2)]
    return call, {
        "first_call_seconds": first,
        "call_seconds": min(later),
        "result": values[:ROWS_TO_COMPARE].tolist() if values.ndim else values.item(),
        "peak_flops": peak_flops(framework),
    }


def timed(call: Call, wait: Callable[[Any], Any], calls: int, each: bool) -> dict[str, float]:
    """Seconds of so many calls together, after one that is not counted: others used the caches.

    With `each` they are timed one by one, and `slow` is the 95th percentile of their seconds.
    """
    wait(call())
    if each:
        seconds = [_seconds(call, wait)[0] for _ in range(calls)]
        return {"calls": calls, "seconds": sum(seconds), "slow": np.percentile(seconds, 95).item()}
    started = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return {"calls": calls, "seconds": time.perf_counter() - started}


def memory(peer: Peer, framework: Framework, case: Case, mode: str) -> dict[str, int | None]:
    """Bytes by which the peak grows from before the peer is built to after its second call.

    On a CPU this is the process's resident set, compilation included; else what the framework's
    allocator handed out. The process must be a fresh one.
    """
    framework.wait(peer.build(SMALLEST, mode)())  # imports and starts what needs memory only once
    on_host = framework.platform == "cpu"
    peak = resident_peak if on_host else framework.allocator_peak
    if on_host:
        _forget_resident_peak()
    before = peak()
    call = peer.build(case, mode)
    for _ in range(2):
        framework.wait(call())
    after = peak()
    return {"peak_bytes": None if before is None or after is None else after - before}


def resident_peak() -> int | None:
    """Most bytes that this process ever had in memory, or None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def _forget_resident_peak() -> None:
    """Let the peak start anew from what is in memory now; importing may have needed more."""
    # Where the system forbids it, the peak counts from that of the imports.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_flops(framework: Framework) -> float:
    """FLOP/s of the fastest of a few float32 matrix products."""
    shapes = PRODUCTS if framework.platform == "cpu" else PRODUCTS + LARGE_PRODUCTS
    return max(_product_flops(framework, *shape) for shape in shapes)


def _product_flops(framework: Framework, rows: int, inner: int, columns: int) -> float:
    rng = np.random.default_rng(0)
    multiply = framework.product(
        rng.random((rows, inner), dtype=np.float32), rng.random((inner, columns), dtype=np.float32)
    )
    _seconds(multiply, framework.wait)  # compiles
    seconds = min(_seconds(multiply, framework.wait)[0] for _ in range(PRODUCT_RUNS))
    return 2 * rows * inner * columns / seconds


def _seconds(call: Call, wait: Callable[[Any], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    wait(result)
    return time.perf_counter() - started, result


def _case(request: dict[str, Any]) -> tuple[Case, str]:
    return Case(**request["case"]), request["mode"]


def _reason(error: Exception) -> str:
    """Say in one line why something failed."""
    if isinstance(error, Unavailable):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # this project, run from a clone


def _own_stdout() -> TextIO:
    """Keep stdout for the answers; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
