"""Read a file that anybody may have made: never wait for it, and never take more than expected."""

import errno
import os
import stat
from pathlib import Path

MIB = 2**20


def read_regular_file(path: Path, at_most: int) -> bytes:
    """Read a whole file. A named pipe might never begin, and a device might never end.

    Args:
        path: of the file, or of a link to it.
        at_most: bytes that it may have.

    Raises:
        OSError: it can't be read, is no regular file, or is larger; `strerror` says which.
    """
    _check_regular(os.stat(path))  # before it is opened: to open a device can already do something
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        _check_regular(status)
        content = file.read(at_most + 1) if status.st_size <= at_most else b""
    if max(status.st_size, len(content)) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most / MIB:.0f} MiB")
    return content


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
