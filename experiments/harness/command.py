"""What stands around every command: whatever the machine lacks ends it in one line and a status."""

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
    """Decorate a command's `main`, so that it returns 2 after one line where it can't go on.

    Such are a `UsageError`, the errors that are named here, those of the operating system, too
    little memory, and a platform of `JAX_PLATFORMS` that is not there. Where nobody reads the
    output any more it ends without a word, with the status of a process that SIGPIPE ended.

    Args:
        refusals: errors whose message says what to do.
        fail: says why the command ends, and returns its status.
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
                streams.silence()  # else what waits would be an error at Python's own end

        return run

    return decorate


def quieten() -> None:
    """Silence what libraries log beside what they raise, or of no use to who runs a command."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax and tfds
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax's event loop
    # What a failed save of Orbax leaves.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its list of fonts


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
    """What the operating system objects to, and in which file, in one line."""
    reason = " ".join(str(error.strerror or error).split())
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def why_out_of_memory(error: Exception) -> str | None:
    """What to do where an error says that there is too little memory; None for any other."""
    if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
        what = " ".join(str(error).split()) or type(error).__name__
        return f"there is too little memory ({what[:200]}); make the model or the batch smaller"
    return None


def why_no_platform() -> str | None:
    """What to do where JAX can't start as `JAX_PLATFORMS` asks; None where it can.

    Called when something failed: JAX itself says it in as many ways as there are platforms, or by a
    bare AssertionError.
    """
    jax: Any = sys.modules.get("jax")
    asked = jax and jax.config.jax_platforms
    if not asked:
        return None
    jax.config.update("jax_platforms", "")  # what there is, may start
    missing = [name for name in asked.split(",") if not _has_platform(jax, name)]
    if not missing:
        return None
    there_are = " and ".join(dict.fromkeys([jax.default_backend(), "cpu"]))
    return (
        f"JAX_PLATFORMS is {asked}, but there is no {' and no '.join(missing)} here; "
        f"set it to what there is ({there_are}), or leave it out"
    )


def _has_platform(jax, name: str) -> bool:
    try:
        return bool(jax.devices(name))
    except RuntimeError:
        return False
