"""Being asked to stop: Ctrl-C, and the SIGTERM that a machine sends before it goes away."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Stopped(BaseException):
    """The run stops because a signal asked it to; `signal` is its number.

    Like KeyboardInterrupt no `Exception`, which whatever code the signal falls into may swallow.
    """

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal = signal_number


class StopRequests:
    """Signals that came in: they end the run at once, or at its next good moment while `deferred`.

    While deferred, a second signal ends the process on the spot; nothing that was saved suffers,
    for checkpoints and files are renamed into place when they are whole.
    """

    def __init__(self):
        self.asked = 0  # the signal's number
        self._is_deferred = False

    def __call__(self, signal_number: int, frame: object) -> None:
        """Handle a signal."""
        if self.asked:
            os._exit(128 + signal_number)
        self.asked = signal_number
        if not self._is_deferred:
            # Should this be lost, as in a destructor, where Python drops what is raised, then
            # training will still see `asked`.
            raise Stopped(signal_number)
        # Not print(), which may be what the signal interrupted.
        os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait until the body looks at `asked`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Turn SIGINT and SIGTERM into stop requests, as long as the body runs."""
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests  # Python handles signals in its main thread alone
        return
    before = {number: signal.signal(number, requests) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
