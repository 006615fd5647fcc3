"""The files that a run keeps in its workdir, beside Orbax's checkpoints."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np


def config_path(workdir: Path) -> Path:
    """The resolved configuration."""
    return workdir / "config.json"


def metrics_path(workdir: Path) -> Path:
    """A line an epoch."""
    return workdir / "metrics.jsonl"


def eval_path(workdir: Path) -> Path:
    """The latest evaluation."""
    return workdir / "eval.json"


def checkpoints_path(workdir: Path) -> Path:
    """Orbax's folder."""
    return workdir / "checkpoints"


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Return the configuration of the run in `workdir`, or None where there is none."""
    path = config_path(workdir)
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file so that at every moment the old or the new one is there, whole."""
    _replace(path, json.dumps(values, indent=2) + "\n")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the epochs' metrics so far; a last line that was cut off is left out."""
    path = metrics_path(workdir)
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last line end is cut off
    return [json.loads(line) for line in lines]


def append_metrics(workdir: Path, record: dict[str, Any]) -> None:
    """Add an epoch's metrics."""
    with metrics_path(workdir).open("a") as file:
        file.write(json.dumps(record) + "\n")


def rewind_metrics(workdir: Path, last: dict[str, Any] | None) -> None:
    """Bring the metrics to where a run resumes: up to and with the checkpoint's own record.

    Args:
        workdir: the run's.
        last: the record in the checkpoint; None, where there is none, leaves no line.
    """
    records = []
    if last is not None:
        records = [r for r in read_metrics(workdir) if r["step"] < last["step"]] + [last]
    _replace(metrics_path(workdir), "".join(json.dumps(r) + "\n" for r in records))


def params_sha256(params: Any) -> str:
    """SHA-256 over each parameter's name, shape, dtype and bytes, in the order of the names."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for name in sorted(named):
        array = np.asarray(named[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
