"""The software and the machine that this process runs on."""

import datetime
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("lstm_flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
"""Packages that a run's metrics may depend on."""


def start_record(step: int) -> dict[str, Any]:
    """Return the line of environment.jsonl for a start of training at this step."""
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
    """Return the number and kind of the devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()
