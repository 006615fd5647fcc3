"""Start and end the processes that train one model, often just one."""

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
"""How long a process may show no sign of life before the others end."""


@contextlib.contextmanager
def distributed_context(config: Config) -> Iterator[None]:
    """Set a mesh over the devices of all processes; only the first process prints."""
    if config.distributed:
        # Otherwise JAX would handle SIGTERM; `ChunkScheduler` shares it with all processes.
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
    """Return where the first process listens: its own address, or None for all interfaces.

    Anyone who reaches it can take part in the training. A name may mean a different address on each
    host, so only `localhost` and numbers identify one.
    """
    host, _, port = (coordinator or "").rpartition(":")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family) as probe:
            probe.bind((str(address), 0))
    except (ValueError, OSError):  # not a number, or the address of another machine
        return None
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def fail(error: Exception) -> int:
    """Print in one line why the experiment ends, and return or end with the exit status."""
    if jax.process_count() == 1:
        return usage.fail(error)
    hint = "if another process was lost, start all of them again: they resume from the last save"
    print(f"error: {error}; {hint}", file=sys.stderr, flush=True)
    os._exit(2)  # JAX would wait for the other processes, which may wait for this one
