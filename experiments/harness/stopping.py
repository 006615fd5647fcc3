"""Stop on Ctrl-C, and on the SIGTERM that a machine sends before it goes away.

A command listens from its first import on. A separate thread receives the signals, because Python's
main thread receives none while XLA compiles, and an exception that a handler raises there may pass
through code that does not expect it. To stop immediately, a command calls `os._exit`, because a
normal exit of the interpreter would free what XLA's threads are using. Nothing already saved is
lost: checkpoints and files are renamed into place once they are complete.

This module is imported before all others, so it imports little.
"""

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run stops because a signal asked it to; `signal` is the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal = signal_number


class StopRequests:
    """The stop signals that this process has received.

    A signal ends the process immediately. Within `deferred` it only sets `received`, so that the
    program can stop at a good moment; a second signal then ends the process immediately.
    """

    def __init__(self):
        self.received = 0  # the number of the signal; 0 before one arrives
        self.hint: Callable[[], str] = lambda: ""
        """Returns the end of the line that says that the process stops: how to continue."""
        self._is_deferred = False
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Receive SIGINT and SIGTERM from now on, until the process ends."""
        for stream in (
            sys.stdout,
            sys.stderr,
        ):  # whole lines, so that `os._exit` loses and cuts none
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True, write_through=False)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _left_to_thread)
        threading.Thread(target=self._receive, args=(reading,), daemon=True, name="signals").start()
        # Registered first, so called last: by then there is nothing left to stop.
        atexit.register(self._ignore)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait until the body checks `received`.

        Raises:
            Stopped: at the end of the body, if a signal has arrived.
        """
        with self._lock:
            self._is_deferred = True
        try:
            yield
        finally:
            with self._lock:
                self._is_deferred = False
        if self.received:
            raise Stopped(self.received)

    def announce(self, stopped: Stopped) -> None:
        """Print one line that says that the process stops."""
        _print_line(f"stopped by {stopped}{self.hint()}")

    def _receive(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 1):
                # A server installs handlers of its own.
                if number in SIGNALS and signal.getsignal(number) is _left_to_thread:
                    self.request(number)

    def request(self, number: int) -> None:
        """Ask the process to stop, as this signal does; returns only while deferred."""
        with self._lock:
            if self._is_deferred and not self.received:
                self.received = number
                _print_line(
                    "stopping after this step and saving; a second signal stops immediately"
                )
                return
            self.announce(Stopped(number))
            os._exit(128 + number)

    @staticmethod
    def _ignore() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


REQUESTS = StopRequests()
"""The stop signals of this process."""


def leave(status: int) -> NoReturn:
    """End the process with a status, whatever threads are left.

    A save that can't begin leaves threads of Orbax behind, which wait for ten minutes.
    """
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    if threads == [threading.main_thread()]:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or none
            stream.flush()
    os._exit(status)


def _left_to_thread(number: int, frame: object) -> None:
    """Do nothing: this replaces Python's handlers, and `StopRequests` receives the signal."""


def _print_line(line: str) -> None:
    if sys.stderr:
        begin = "\n" if sys.stderr.isatty() else ""  # after ^C, or a progress bar
        with contextlib.suppress(OSError, ValueError):
            print(f"{begin}{line}", file=sys.stderr, flush=True)
