"""With what software and on what machine this process computes."""

import datetime
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("lstm_flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
"""What a run's figures may depend on."""


def of_start(step: int) -> dict[str, Any]:
    """What environment.jsonl holds about a start of training, as JSON values."""
    return {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "system": platform.platform(),
        "processor": processor(),
        "platform": jax.default_backend(),
        "devices": device_name(),
        "processes": jax.process_count(),
    }


def device_name() -> str:
    """Kind and number of the devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def version(package: str) -> str | None:
    """Version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()
