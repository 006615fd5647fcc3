"""The standard streams, however a command finds them; this imports little, to come before all else.

A shell may have closed one (`2>&-`), its encoding may lack characters, and who reads it may be gone
(`| head -1`).
"""

import contextlib
import errno
import io
import os
import sys


def open_missing() -> None:
    """Open to nowhere what is closed, or the next file that is opened would stand in its place.

    What a library writes to stderr would then go into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def replace_unencodable() -> None:
    """Let characters that the encoding lacks come out as `?`, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Terminal(io.FileIO):
    """A terminal that may go away; what is written to it from then on is lost, and nothing else."""

    def write(self, content, /) -> int:
        """Write bytes, as `io.FileIO.write`."""
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(content)


def outlive_terminal() -> None:
    """Let the command go on where its terminal is closed, as under `nohup` or `setsid`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # without a buffer under PYTHONUNBUFFERED
        if isinstance(raw, io.FileIO) and stream.isatty():
            lasting = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            text = io.TextIOWrapper(lasting, stream.encoding, "replace", line_buffering=True)
            setattr(sys, name, text)


def flush() -> None:
    """Write out what waits in both, while an error can still be dealt with."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def silence() -> None:
    """Let what a stream can't take, now and at Python's end, go nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
