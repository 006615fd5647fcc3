"""Files that a command writes: whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lstm_flax.files import check_regular


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a new file beside `path`, of the same ending, that takes its place after the body.

    It is removed where the body fails; what `path` held then stays.

    Raises:
        OSError: it can't be written, or `path` is a link or no regular file; the error names
            `path`.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            check_regular(os.lstat(path))
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp's is for this user alone
        os.close(handle)
        try:
            yield Path(name)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
