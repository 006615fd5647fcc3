"""The decorator of every command: expected failures end it with one line and an exit status."""

import functools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from experiments.harness import streams, usage
from experiments.harness.usage import UsageError

Main = Callable[..., int]
Fail = Callable[[Exception], int]


def command(*refusals: type[Exception], fail: Fail = usage.fail) -> Callable[[Main], Main]:
    """Decorate a command's `main`, so that an expected failure prints one line and returns 2.

    Expected failures are `UsageError`, the errors in `refusals`, errors of the operating system,
    too little memory, and a missing platform in `JAX_PLATFORMS`. When nobody reads the output any
    more, the command ends silently, with the status of a process that SIGPIPE ended.

    Args:
        refusals: errors whose message says what to do.
        fail: prints why the command ends, and returns its status.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            streams.open_missing()
            streams.replace_unencodable()
            quieten()
            try:
                return _in_one_line(main, argv, (UsageError, *refusals), fail)
            except BrokenPipeError:
                return 128 + signal.SIGPIPE
            finally:
                streams.silence()  # otherwise unwritten output would raise when Python exits

        return run

    return decorate


def quieten() -> None:
    """Silence log messages that repeat what a library raises, or that don't help a user."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax and tfds
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    logging.getLogger("google.auth").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax's event loop
    # A failed save of Orbax leaves these.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the path of its font list


def _in_one_line(
    main: Main, argv: Sequence[str] | None, refusals: tuple[type[Exception], ...], fail: Fail
) -> int:
    try:
        try:
            return main(argv)
        finally:
            streams.flush()
    except BrokenPipeError:
        raise
    except refusals as error:
        return fail(error)
    except OSError as error:
        return fail(UsageError(os_reason(error)))
    except Exception as error:
        reason = why_out_of_memory(error) or why_no_platform()
        if reason is None:
            raise
        return fail(UsageError(reason))


def os_reason(error: OSError) -> str:
    """Return the operating system's reason, and the file that it names, in one line."""
    reason = " ".join(str(error.strerror or error).split())
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def why_out_of_memory(error: Exception) -> str | None:
    """Return what to do if an error means too little memory; None for any other error."""
    if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
        what = " ".join(str(error).split()) or type(error).__name__
        return f"there is too little memory ({what[:200]}); make the model or the batch smaller"
    return None


def why_no_platform() -> str | None:
    """Return what to do if JAX can't start on `JAX_PLATFORMS`; None if it can.

    This is called after a failure: JAX itself reports it differently for each platform, or only
    raises a bare AssertionError.
    """
    jax: Any = sys.modules.get("jax")
    asked = jax and jax.config.jax_platforms
    if not asked:
        return None
    jax.config.update("jax_platforms", "")  # allow all platforms
    missing = [name for name in asked.split(",") if not _has_platform(jax, name)]
    if not missing:
        return None
    there_are = " and ".join(dict.fromkeys([jax.default_backend(), "cpu"]))
    return (
        f"JAX_PLATFORMS is {asked}, but this machine has no {' and no '.join(missing)}; "
        f"set it to an available platform ({there_are}), or unset it"
    )


def _has_platform(jax, name: str) -> bool:
    try:
        return bool(jax.devices(name))
    except RuntimeError:
        return False
