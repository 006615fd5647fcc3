"""The processes that train one model, often just one: how they join, and how one ends."""

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator

import jax

from experiments.harness import usage
from experiments.training_run.config import Config
from lstm_flax import training

LOST_PROCESS_SECONDS = 30
"""How long a process that shows no sign of life may stay away before the others give up."""


@contextlib.contextmanager
def joined(config: Config) -> Iterator[None]:
    """Put a mesh of all processes' devices in force; the first process speaks for all."""
    if config.distributed:
        # Else JAX would take SIGTERM for itself; `Pace` tells all processes of it.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=LOST_PROCESS_SECONDS,
            coordinator_bind_address=bind_address(config.coordinator),
        )
    with contextlib.ExitStack() as stack:
        if jax.process_index() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(jax.set_mesh(training.data_mesh()))
        yield


def bind_address(coordinator: str | None) -> str | None:
    """Where the first process listens: at an address of its own, or else on all interfaces (None).

    Whoever reaches it can take part in the training. A name may stand for another address on each
    host, so only `localhost` and numbers tell which one is meant.
    """
    host, _, port = (coordinator or "").rpartition(":")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family) as probe:
            probe.bind((str(address), 0))
    except (ValueError, OSError):  # no number, or an address of another machine
        return None
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def fail(error: Exception) -> int:
    """Say in one line why the experiment ends; returns the exit status, where it returns."""
    if jax.process_count() == 1:
        return usage.fail(error)
    hint = "if another process was lost, start all of them again: they go on from the last save"
    print(f"error: {error}; {hint}", file=sys.stderr, flush=True)
    os._exit(2)  # JAX would wait for the other processes, and those perhaps for this one
