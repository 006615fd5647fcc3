"""Draw a digit in the browser and watch a trained run read it, row by row, while you draw.

    python -m experiments.draw --workdir runs/mnist_lstm [--port 8080]

Opens a page on this machine: what the model sees, the probabilities after each of the 28 rows, and
the gates and the cell state of every unit. Nothing that is drawn leaves the machine.
"""

import contextlib
import dataclasses
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.command import command
from experiments.restored import RestoredRun, restore_row_reader
from experiments.run_files import RunFilesError
from experiments.usage import UsageError, check_packages, fail, read_flags
from lstm_flax.checkpoints import CheckpointError


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    workdir: Path = Path("runs/mnist_lstm")
    """Where the trained run lives."""
    host: str = "127.0.0.1"
    """Address to serve; this one can be reached from this machine alone, 0.0.0.0 from all."""
    port: int = 8080
    """Port to serve; 0: any that is free."""
    browser: bool = True
    """Open the page in a browser."""


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page from a command line, until Ctrl-C; returns the exit status."""
    options = read_flags(Options, argv, name="draw", description=__doc__)
    try:
        check_packages("draw", "nicegui", "matplotlib")
        port = find_port(options)
        trained = restore_row_reader(options.workdir)
    except (UsageError, RunFilesError, CheckpointError) as error:
        return fail(error)
    serve(trained, options.host, port, options.browser)
    return 0


def find_port(options: Options) -> int:
    """Return the port to serve.

    Raises:
        UsageError: it is in use or can't be had, or the host is none of this machine's.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((options.host, options.port))
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--host {options.host} --port {options.port} can't be served ({reason}); "
            f"--port 0 takes any that is free"
        ) from error


def serve(trained: RestoredRun, host: str, port: int, open_browser: bool) -> None:
    """Serve the page until a signal ends it."""
    from nicegui import app, ui  # an extra

    from experiments.draw.page import Page, watch

    watch(trained, None)  # compiled now, so that the first stroke need not wait for it
    address = f"http://{host}:{port}"
    app.on_startup(
        lambda: print(
            f"step {trained.step} of {trained.config.workdir} reads what you draw at {address}  "
            f"(Ctrl-C ends this)",
            flush=True,
        )
    )
    with contextlib.suppress(KeyboardInterrupt):  # that is how it is meant to end
        ui.run(
            lambda: Page(trained).build(),
            host=host,
            port=port,
            title="Draw a digit",
            language="en-US",
            dark=None,  # as the reader's system is
            show=open_browser,
            reload=False,
            tailwind=False,
            show_welcome_message=False,
        )


if __name__ == "__main__":
    sys.exit(main())
