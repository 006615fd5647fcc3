"""Runs of the MNIST experiment, as small as they can be, and what they leave behind."""

import json
import os
import subprocess
import sys

SMALL = [
    "--dataset", "mnist5k", "--hidden-size", "24", "--num-layers", "1", "--batch-size", "300",
    "--no-augment",
]  # fmt: skip


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(workdir):
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_lines(workdir)]


def read_eval(workdir):
    return json.loads((workdir / "eval.json").read_text())


def assert_ended_alike(workdir, other):
    assert read_eval(workdir) == read_eval(other)  # the SHA-256 of the weights included
    assert without_times(workdir) == without_times(other)


def command(data_dir, workdir, *flags):
    return [
        sys.executable, "-m", "experiments.mnist_lstm", "--data-dir", str(data_dir),
        "--workdir", str(workdir), *SMALL, *map(str, flags),
    ]  # fmt: skip


def start(data_dir, workdir, *flags, **environment):
    """Start a run as a process of its own, whose output comes line by line."""
    return subprocess.Popen(
        command(data_dir, workdir, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
    )


def finish(data_dir, workdir, *flags):
    """Run to the end in a process of its own; returns its output."""
    return subprocess.run(
        command(data_dir, workdir, *flags), capture_output=True, text=True, check=True
    ).stdout


def read_until(process, beginning):
    """Read lines up to the first one that begins so; returns them, all if there is none."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            break
    return lines
