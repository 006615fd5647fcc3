"""Time all peers on all cases, taking turns: A B C A B C, so that the machine's load meets each."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.benchmark.cases import Case
from experiments.benchmark.peers import ENVIRONMENT, PEERS
from experiments.training_run.environment import version

Mode = Literal["infer", "train"]
MODES: tuple[Mode, ...] = ("infer", "train")
BUSY = """
import os, sys, threading
threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
while True: pass
"""
"""A process that computes until its stdin ends, as it does when this one is killed."""
TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 0.02
"""Largest difference between two peers' logits, or between their first losses."""


class PeerError(Exception):
    """A peer can't do what it was asked to do; the message says why."""


class Settings(NamedTuple):
    """How to measure."""

    rounds: int
    seconds: float  # approximate length of a peer's turn, which is at least one call
    memory: bool
    modes: Sequence[str]


class Measurement(NamedTuple):
    """What was measured of one peer, for one case and mode."""

    case: Case
    mode: str
    peer: str
    rounds: list[dict[str, float]]
    """Each has `calls`, `seconds` for all of these calls, and `slow`, the 95th percentile of the
    calls' seconds if other processes are busy."""
    first_call_seconds: float
    peak_flops: float  # FLOP/s of the fastest matrix product in the same process
    peak_bytes: int | None  # by how much the memory's peak grew, in a process of its own

    @property
    def call_seconds(self) -> list[float]:
        """Seconds of a call, in each round."""
        return [turn["seconds"] / turn["calls"] for turn in self.rounds]


class Results(NamedTuple):
    """All measurements."""

    measurements: list[Measurement]
    peers: dict[str, dict[str, Any]]  # `version` and `device` of the peers that ran
    notes: dict[str, str]  # what did not run, and why


class Worker:
    """A peer's process, seen from the parent."""

    def __init__(self, peer: str):
        self._peer = peer
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        if exception[0] is not None:
            self._process.kill()  # it may be in the middle of something long
        self._process.communicate()

    def open(self) -> dict[str, Any]:
        """Start the peer; returns its `version` and `device`.

        Raises:
            PeerError: the peer can't run here.
        """
        package = PEERS[self._peer.partition(":")[0]].package
        return {"device": self.ask("open", self._peer), "version": version(package)}

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone, perhaps because memory ran out."""
        return self._process.poll() is not None

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `worker.Bench` in the process, and return its answer.

        Raises:
            PeerError: it failed, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps([method, *arguments]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["answer"]


def measure(
    peers: Sequence[str], cases: Sequence[Case], settings: Settings, advance: Callable[[str], Any]
) -> Results:
    """Measure every peer on every case and in every mode.

    A peer that can't run, or whose results differ from the first peer's, is left out of that case,
    with a note.

    Args:
        peers: names; the first is what the others are compared with.
        cases: the work.
        settings: how to measure.
        advance: called after each case and mode, with their names.

    Raises:
        PeerError: the first peer can't run.
    """
    results = Results([], {}, {})
    with ExitStack() as stack:
        workers = {peer: stack.enter_context(Worker(peer)) for peer in peers}
        for peer in peers:
            try:
                results.peers[peer] = workers[peer].open()
            except PeerError as error:
                if peer == peers[0]:
                    raise
                results.notes[peer] = str(error)
                del workers[peer]
        for case, mode in itertools.product(cases, settings.modes):
            for peer in [peer for peer, worker in workers.items() if worker.has_ended]:
                workers[peer] = stack.enter_context(Worker(peer))
                workers[peer].open()
            measure_case(workers, case, mode, settings, results)
            advance(f"{mode}, {case.name}")
    return results


def measure_case(
    workers: dict[str, Worker], case: Case, mode: str, settings: Settings, results: Results
) -> None:
    """Build all peers for a case, let them take turns, and add what was measured to `results`."""
    builds: dict[str, dict[str, Any]] = {}
    rounds: dict[str, list[dict[str, float]]] = {peer: [] for peer in workers}

    @contextlib.contextmanager
    def noting(peer: str) -> Iterator[None]:
        try:
            yield
        except PeerError as error:
            builds.pop(peer, None)
            results.notes[f"{peer}, {mode}, {case.name}"] = str(error)

    for peer, worker in workers.items():
        with noting(peer):
            built = worker.ask("build", case, mode)
            expected = next(iter(builds.values()), built)["result"]
            tolerance = BFLOAT16_TOLERANCE if case.bfloat16 else TOLERANCE
            check_same(built["result"], expected, tolerance)
            builds[peer] = built
    with busy_processes(case.busy):
        for _, peer in itertools.product(range(settings.rounds), workers):
            if peer in builds:
                calls = max(1, round(settings.seconds / builds[peer]["call_seconds"]))
                with noting(peer):
                    rounds[peer].append(workers[peer].ask("time", calls, case.busy > 0))
    for peer, built in builds.items():
        memory = peak_bytes(peer, case, mode) if settings.memory else None
        first, peak = built["first_call_seconds"], built["peak_flops"]
        found = Measurement(case, mode, peer, rounds[peer], first, peak, memory)
        results.measurements.append(found)


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep this many processes computing until the body ends."""
    with ExitStack() as stack:
        for _ in range(number):
            command = [sys.executable, "-c", BUSY]
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE))  # closes it
        yield


def check_same(result: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Compare logits [rows, classes], or losses, which are all around 1.

    Raises:
        PeerError: they are not of the same model.
    """
    difference = float(np.max(np.abs(np.subtract(result, expected))))
    if not difference <= tolerance:  # catches NaN too
        raise PeerError(f"computes something else: its results differ by {difference:.2g}")


def peak_bytes(peer: str, case: Case, mode: str) -> int | None:
    """Return the growth of the memory's peak in a fresh process; None if it can't be measured."""
    with Worker(peer) as worker, contextlib.suppress(PeerError):
        worker.open()
        return worker.ask("memory", case, mode)
    return None
