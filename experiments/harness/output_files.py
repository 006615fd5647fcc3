"""Files that a command writes: whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lstm_flax import buckets
from lstm_flax.files import check_regular


def exists(path: Path) -> bool:
    """Return whether there is a file, a folder or a link, or in a bucket an object below a path.

    Raises:
        OSError: the bucket can't be listed.
    """
    return any(buckets.walk(path)) if buckets.is_bucket(path) else os.path.lexists(path)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless they exist; a bucket needs none.

    Raises:
        OSError: it can't be made.
    """
    if not buckets.is_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a new file beside `path`, of the same ending, that takes its place after the body.

    It is removed where the body fails; what `path` held then stays. For a path in a bucket, the new
    file is on this machine and then becomes the object.

    Raises:
        OSError: it can't be written, or `path` is a link or no regular file; the error names
            `path`.
    """
    if buckets.is_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / path.name
            yield new
            buckets.write(path, new.read_bytes())
        return
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
