"""Draw a digit in the browser and watch a trained run read it, row by row, while you draw.

    python -m experiments.draw [--workdir runs/mnist_lstm] [--port 8080]

Opens a page on this machine. It shows what the model sees, the probabilities after each of the 28
rows, and the gates and the cell state of every unit. Drawings stay on this machine. To draw on a
phone, serve a network that you trust: --host 0.0.0.0
"""

import contextlib
import dataclasses
import logging
import signal
import socket
import sys
from collections.abc import Sequence

from experiments.harness.command import command
from experiments.harness.usage import Folder, UsageError, check_packages, printable, read_flags
from experiments.pretrained.model import restore_or_pretrained
from experiments.training_run.restored import RestoredRun, restore_row_reader
from experiments.training_run.run_files import RunFilesError
from lstm_flax.checkpoints import CheckpointError

ANY_HOST = ("0.0.0.0", "")
"""Hosts that serve all machines; a browser can't open them."""

LOOPBACK = ("127.0.0.1", "localhost")
"""Hosts that serve only this machine."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    workdir: Folder | None = None
    """Folder of the trained run; None is runs/mnist_lstm, or the pretrained model without it."""
    host: str = "127.0.0.1"
    """Address to serve; the default is open to this machine only, 0.0.0.0 to all machines."""
    port: int = 8080
    """Port to serve; 0 takes any free port."""
    browser: bool = True
    """Open the page in a browser."""


@command(RunFilesError, CheckpointError)
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page from a command line until Ctrl-C, and return the exit status."""
    options = read_flags(Options, argv, name="draw", description=__doc__)
    check_packages("draw", "nicegui", "ifaddr", "matplotlib")
    port = find_port(options)
    print("restoring the model, and compiling it for the page", flush=True)
    trained = restore_or_pretrained(options.workdir, restore_row_reader)
    serve(trained, options.host, port, options.browser)
    return 0


def find_port(options: Options) -> int:
    """Return the port to serve.

    Raises:
        UsageError: the port is in use or not allowed, or the host is not this machine.
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
            f"--port 0 takes any free port"
        ) from error


def own_addresses(host: str) -> list[str]:
    """Return the addresses at which a browser can open the page."""
    import ifaddr  # NiceGUI, an extra, needs it too

    if host not in ANY_HOST:
        return [host]
    adapters = ifaddr.get_adapters()
    found = [str(ip.ip) for adapter in adapters for ip in adapter.ips if ip.is_IPv4]
    return [address for address in found if address not in LOOPBACK] or [LOOPBACK[0]]


def serve(trained: RestoredRun, host: str, port: int, open_browser: bool) -> None:
    """Serve the page until a signal ends it."""
    from nicegui import app, core, ui  # an extra
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from experiments.draw.drawing import Drawing
    from experiments.draw.page import Page, watch

    watch(trained, Drawing())  # compile now, so that the first stroke does not wait
    addresses = own_addresses(host)
    # Another site could point a name of its own at this machine, and read the page as its own.
    names = [*addresses, *LOOPBACK, socket.gethostname(), f"{socket.gethostname()}.local"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    core.sio.eio.cors_allowed_origins = None  # only the page's own origin; NiceGUI allows all
    core.sio.eio.logger.setLevel(logging.CRITICAL)  # don't log refused connections
    app.on_startup(
        lambda: print(
            f"step {trained.step} of {printable(trained.config.workdir)} reads what you draw at "
            f"{' or '.join(f'http://{address}:{port}' for address in addresses)}  "
            f"(Ctrl-C ends this)",
            flush=True,
        )
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # the normal end
        ui.run(
            lambda: Page(trained).build(),
            host=host,
            port=port,
            title="Draw a digit",
            language="en-US",
            dark=None,  # follow the reader's system
            show=open_browser,
            reload=False,
            tailwind=False,
            show_welcome_message=False,
        )


if __name__ == "__main__":
    sys.exit(main())
