"""Being asked to stop: Ctrl-C, and the SIGTERM that a machine sends before it goes away.

A command listens from its first import on. A thread of its own hears the signals: Python's main
thread hears none while XLA compiles, and what a handler raises there may pass through code that was
not written for it. A command that stops at once does so by `os._exit`: the interpreter's own end
would take away what XLA's threads are using. Nothing that was saved suffers, for checkpoints and
files are renamed into place when they are whole.

This is imported before all else, so it imports little.
"""

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run stops because a signal asked it to; `signal` is its number."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal = signal_number


class StopRequests:
    """Signals that came in: they end the process at once, or at a good moment while `deferred`.

    While deferred, a second signal ends it at once.
    """

    def __init__(self):
        self.asked = 0  # the signal's number
        self.outlook: Callable[[], str] = lambda: ""
        """What a person who stops it should know, for the end of the line that says so."""
        self._is_deferred = False
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Hear SIGINT and SIGTERM from now on, to the end of the process."""
        for stream in (sys.stdout, sys.stderr):  # whole lines: leaving at once loses and cuts none
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True, write_through=False)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _heard_elsewhere)
        threading.Thread(target=self._hear, args=(reading,), daemon=True, name="signals").start()
        # Registered first, so called last: when all is done, there is nothing to stop.
        atexit.register(self._ignore)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait until the body looks at `asked`.

        Raises:
            Stopped: at the end of the body, where it was asked to stop.
        """
        with self._lock:
            self._is_deferred = True
        try:
            yield
        finally:
            with self._lock:
                self._is_deferred = False
        if self.asked:
            raise Stopped(self.asked)

    def say(self, stopped: Stopped) -> None:
        """Say in one line that the process stops."""
        _tell(f"stopped by {stopped}{self.outlook()}")

    def _hear(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 1):
                # A server has handlers of its own.
                if number in SIGNALS and signal.getsignal(number) is _heard_elsewhere:
                    self.ask(number)

    def ask(self, number: int) -> None:
        """Ask the process to stop, as this signal does; this returns where it is deferred."""
        with self._lock:
            if self._is_deferred and not self.asked:
                self.asked = number
                _tell("stopping after this step and saving; once more to stop at once")
                return
            self.say(Stopped(number))
            os._exit(128 + number)

    @staticmethod
    def _ignore() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


REQUESTS = StopRequests()
"""Of this process."""


def _heard_elsewhere(number: int, frame: object) -> None:
    """Stand in for Python's own handlers; `StopRequests` hears the signal."""


def _tell(line: str) -> None:
    if sys.stderr:
        begin = "\n" if sys.stderr.isatty() else ""  # after ^C, or a progress bar
        with contextlib.suppress(OSError, ValueError):
            print(f"{begin}{line}", file=sys.stderr, flush=True)
