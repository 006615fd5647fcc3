"""Time all peers on all cases, in turn: A B C A B C, so that what the machine does meets each."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.benchmark.cases import Case, as_json
from experiments.benchmark.peers import ENVIRONMENT

Mode = Literal["infer", "train"]
MODES: tuple[Mode, ...] = ("infer", "train")
BUSY = """
import os, sys, threading
threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
while True: pass
"""
"""A process that computes until its stdin ends, as it does when this one is killed."""
TOLERANCE = 1e-4
"""Largest difference of two peers' logits, or of their first losses."""


class PeerError(Exception):
    """A peer can't do what it was asked to; the message says why."""


class Settings(NamedTuple):
    """How to measure."""

    rounds: int = 7
    seconds: float = 0.5  # a turn of a peer takes about so long, or one call
    memory: bool = True
    modes: Sequence[str] = MODES


class Measurement(NamedTuple):
    """What was measured of one peer, for one case and mode."""

    case: Case
    mode: str
    peer: str
    rounds: list[dict[str, float]]
    """Each has `calls`, `seconds` for all of these calls, and `slow`, the 95th percentile of the
    calls' seconds where other processes are busy."""
    first_call_seconds: float
    peak_flops: float  # FLOP/s of the best matrix product in the same process
    peak_bytes: int | None  # by which the memory's peak grew, in a process of its own

    @property
    def call_seconds(self) -> list[float]:
        """Seconds of a call, in each round."""
        return [turn["seconds"] / turn["calls"] for turn in self.rounds]


class Results(NamedTuple):
    """All that came out."""

    measurements: list[Measurement]
    peers: dict[str, dict[str, Any]]  # of those that ran: `version` and `device`
    notes: dict[str, str]  # of those that did not, or not everywhere: why


class Worker:
    """A peer's process, from the parent's side."""

    def __init__(self, peer: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark.worker", peer],
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

    def hello(self) -> dict[str, Any]:
        """Wait for it to be ready; returns its `version` and `device`.

        Raises:
            PeerError: the peer is not to be had here.
        """
        return self._read()

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone, perhaps for want of memory."""
        return self._process.poll() is not None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            PeerError: it could not be done.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError("its process has ended") from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"its process has ended, with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


def measure(
    peers: Sequence[str], cases: Sequence[Case], settings: Settings, advance: Callable[[str], Any]
) -> Results:
    """Measure every peer on every case, for inference and for a train step.

    A peer that can't run, or that computes something else than the first one, is left out, where
    that is so, with a note.

    Args:
        peers: names; the first is what the others are compared with.
        cases: the work.
        settings: how.
        advance: called with what was just done, after each case and mode.

    Raises:
        PeerError: the first peer can't run.
    """
    measurements: list[Measurement] = []
    versions, notes = {}, {}
    with ExitStack() as stack:
        workers = {peer: stack.enter_context(Worker(peer)) for peer in peers}
        for peer in peers:
            try:
                versions[peer] = workers[peer].hello()
            except PeerError as error:
                if peer == peers[0]:
                    raise
                notes[peer] = str(error)
                del workers[peer]
        for case in cases:
            for mode in settings.modes:
                for peer in [peer for peer, worker in workers.items() if worker.has_ended]:
                    workers[peer] = stack.enter_context(Worker(peer))
                    workers[peer].hello()  # it could run here before
                for peer, measured in _measure_in_turn(workers, case, mode, settings):
                    if isinstance(measured, PeerError):
                        notes[f"{peer}, {mode}, {case.name}"] = str(measured)
                    else:
                        measurements.append(measured)
                advance(f"{mode}, {case.name}")
    return Results(measurements, versions, notes)


def _measure_in_turn(
    workers: dict[str, Worker], case: Case, mode: str, settings: Settings
) -> Iterator[tuple[str, Measurement | PeerError]]:
    """One case and mode: build all, then let each have its turn, round after round."""
    work = {"case": as_json(case), "mode": mode}
    built: dict[str, dict[str, Any]] = {}
    rounds: dict[str, list[dict[str, float]]] = {}
    for peer, worker in workers.items():
        try:
            answer = worker.ask("build", **work)
            check_same(answer["result"], next(iter(built.values()), answer)["result"])
            built[peer], rounds[peer] = answer, []
        except PeerError as error:
            yield peer, error
    with busy_processes(case.busy):
        for _ in range(settings.rounds):
            for peer in list(rounds):
                calls = max(1, round(settings.seconds / built[peer]["call_seconds"]))
                try:
                    turn = workers[peer].ask("time", calls=calls, each=case.busy > 0)
                    rounds[peer].append(turn)
                except PeerError as error:
                    del rounds[peer]
                    yield peer, error
    for peer, turns in rounds.items():
        yield (
            peer,
            Measurement(
                case,
                mode,
                peer,
                turns,
                built[peer]["first_call_seconds"],
                built[peer]["peak_flops"],
                peak_bytes(peer, work) if settings.memory else None,
            ),
        )


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep so many processes computing until the body ends."""
    with ExitStack() as stack:
        for _ in range(number):
            command = [sys.executable, "-c", BUSY]
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE))  # closes it
        yield


def check_same(result: Any, expected: Any) -> None:
    """Compare logits [rows, classes], or losses.

    Raises:
        PeerError: they are not of the same model.
    """
    difference = float(np.max(np.abs(np.subtract(result, expected))))
    if not difference <= TOLERANCE:  # so that NaN is caught too
        raise PeerError(f"computes something else: its results differ by {difference:.2g}")


def peak_bytes(peer: str, work: dict[str, Any]) -> int | None:
    """Growth of the memory's peak in a fresh process; None where that can't be told."""
    with Worker(peer) as worker:
        try:
            worker.hello()
            return worker.ask("memory", **work)["peak_bytes"]
        except PeerError:
            return None
