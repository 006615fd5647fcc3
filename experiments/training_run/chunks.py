"""Choose how long a run trains before it shows its progress, saves or stops."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.stopping import StopRequests

CHUNK_SECONDS = 1.0
"""Approximate duration of a chunk, the steps of one compiled call."""


class ChunkScheduler:
    """Chooses how many steps the next chunk takes, whether to save before it, and whether to stop.

    Chunks grow to about `CHUNK_SECONDS`, and end where a checkpoint is due. All processes follow
    the choice of the first one. A request to stop may reach any of them.
    """

    def __init__(self, every_steps: int | None, every_seconds: float | None, stop: StopRequests):
        self.steps = 1
        self.is_save_due = False
        self.stop_signal = 0
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._stop = stop
        self._saved = time.perf_counter()

    def after_chunk(self, step: int, steps: int, seconds: float) -> None:
        """Choose the next chunk after one that ended at `step`, after `steps` and `seconds`."""
        steps = max(1, round(steps * CHUNK_SECONDS / seconds))
        is_due = False
        if self._every_steps:
            is_due = step % self._every_steps == 0
            steps = min(steps, self._every_steps - step % self._every_steps)
        elif self._every_seconds:
            is_due = time.perf_counter() - self._saved >= self._every_seconds
        agreed = _allgather(steps, is_due, self._stop.received)
        self.steps, self.is_save_due = int(agreed[0, 0]), bool(agreed[0, 1])
        self.stop_signal = int(agreed[:, 2].max())
        if self.is_save_due:
            self._saved = time.perf_counter()

    def after_training(self) -> None:
        """Check for a request to stop after the last chunk."""
        self.stop_signal = int(_allgather(self._stop.received).max())


def _allgather(*values: int) -> np.ndarray:
    """Return these values of every process, [processes, values]."""
    own = np.array(values)
    return multihost_utils.process_allgather(own) if jax.process_count() > 1 else own[None]
