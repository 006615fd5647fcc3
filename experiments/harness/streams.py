"""Make the standard streams safe to use. This is imported first, so it imports little.

A shell may have closed a stream (`2>&-`), its encoding may lack characters, and its reader may be
gone (`| head -1`).
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator


def open_missing() -> None:
    """Open closed streams on the null device, so that no other file takes their descriptors.

    Otherwise what a library writes to stderr would go into the next file that is opened.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def replace_unencodable() -> None:
    """Print `?` for characters that the encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Terminal(io.FileIO):
    """A terminal that may go away; later writes to it are discarded."""

    def write(self, content, /) -> int:
        """Write bytes, as `io.FileIO.write` does."""
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(content)


def outlive_terminal() -> None:
    """Let the command continue after its terminal is closed, as under `nohup` or `setsid`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED leaves no buffer
        if isinstance(raw, io.FileIO) and stream.isatty():
            lasting = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            text = io.TextIOWrapper(lasting, stream.encoding, "replace", line_buffering=True)
            setattr(sys, name, text)


@contextlib.contextmanager
def discarding_stderr() -> Iterator[None]:
    """Discard what libraries in C++ write to this process's stderr, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def flush() -> None:
    """Flush both output streams while an error can still be handled."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def silence() -> None:
    """Discard what a stream can't take, now and when Python exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
