"""Files that anybody may have made, opened with care: no link is followed, no file is endless."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 2**20

DEEPEST = 32
"""How many folders may lie in each other; what removes thousands of them may fail half-way."""


def read_regular_file(path: Path, at_most: int, *, follow: bool = False) -> bytes:
    """Read a whole file. A named pipe might never begin, and a device might never end.

    Args:
        path: of the file.
        at_most: bytes that it may have.
        follow: read what a link leads to.

    Raises:
        OSError: it can't be read, is a link, is no regular file, or is larger; `strerror` says
            which.
    """
    with open(open_regular_file(path, os.O_RDONLY, follow=follow), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(at_most + 1) if size <= at_most else b""
    if max(size, len(content)) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most / MIB:.0f} MiB")
    return content


def open_regular_file(path: Path, flags: int, *, follow: bool = False) -> int:
    """Open a regular file as `os.open` does; returns its descriptor.

    Raises:
        OSError: it can't be opened, is a link, or is no regular file; or it is to be changed, and
            has a second name, under which it may be somebody else's.
    """
    try:  # before it is opened: to open a device can already do something
        check_regular(os.stat(path, follow_symlinks=follow))
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    no_follow = 0 if follow else os.O_NOFOLLOW
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | no_follow, 0o666)
    try:
        status = os.fstat(descriptor)
        check_regular(status)
        if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
            raise OSError(errno.EMLINK, "it is a hard link")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(status: os.stat_result) -> None:
    """Check that a status is a regular file's.

    Raises:
        OSError: it is another's.
    """
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "it is a link")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def walk(path: Path) -> Iterator[tuple[Path, int]]:
    """The files at and below a path, each with its size in bytes; none where nothing is there.

    Folders that may not be looked into are left out: nothing in them can be opened either.

    Raises:
        OSError: one is a link, or neither a file nor a folder, or lies too deep; the error names
            it.
    """
    root, waiting = path, [path]
    while waiting:
        path = waiting.pop()
        try:
            status = os.lstat(path)
            is_deep = len(path.parts) - len(root.parts) > DEEPEST
            if stat.S_ISDIR(status.st_mode) and not is_deep:
                waiting += (path / name for name in sorted(os.listdir(path), reverse=True))
                continue
        except (FileNotFoundError, PermissionError):  # who else uses the folder may remove some
            continue
        try:
            if is_deep:
                raise OSError(errno.ELOOP, "it lies too deep")
            check_regular(status)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        yield path, status.st_size


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that anybody may have written.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
