"""Experiments that compose the library; each is run as `python -m experiments.NAME`."""

import sys

from experiments.harness import stopping, streams

if sys.argv[:1] == ["-m"]:  # while Python looks for the command's module, before its long imports
    streams.open_missing()
    streams.outlive_terminal()
    stopping.REQUESTS.listen()
