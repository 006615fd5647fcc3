"""Experiments that use the library; run each as `python -m experiments.NAME`."""

import sys
from importlib.util import find_spec
from pathlib import Path

from experiments.harness import stopping, streams

if sys.argv[:1] == ["-m"]:  # Python is looking for the command's module, before its long imports
    streams.open_missing()
    streams.outlive_terminal()
    stopping.REQUESTS.listen()
    if find_spec("tyro") is None:
        project = f"{Path(__file__).absolute().parents[1]}[experiments]"
        command = f"{sys.executable} -m pip install -e '{project}'"
        print(f"error: the experiments' packages are not installed: {command}", file=sys.stderr)
        sys.exit(2)
