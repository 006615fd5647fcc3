"""Read and open untrusted files: follow no links, open regular files only, limit their size.

Reading and walking also take paths in buckets, which know no links.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lstm_flax import buckets

MIB = 2**20
"""Bytes in a mebibyte."""

MAX_DEPTH = 32
"""How deeply folders may be nested; programs that remove thousands of levels may fail half-way."""


def read_regular_file(path: Path, at_most: int, *, follow: bool = False) -> bytes:
    """Read a whole regular file: a named pipe might never begin, a device might never end.

    Args:
        path: the file to read.
        at_most: largest size in bytes.
        follow: whether to follow a link.

    Raises:
        OSError: the file can't be read, is a link, is not a regular file, or is too large;
            `strerror` says which.
    """
    if buckets.is_bucket(path):
        return buckets.read(path, at_most)
    with open(open_regular_file(path, os.O_RDONLY, follow=follow), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(at_most + 1) if size <= at_most else b""
    if max(size, len(content)) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most / MIB:.0f} MiB")
    return content


def open_regular_file(path: Path, flags: int, *, follow: bool = False) -> int:
    """Open a regular file as `os.open` does, and return its descriptor.

    Raises:
        OSError: the file can't be opened, is a link, or is not a regular file; or the flags allow
            writing and the file has a second hard link, which may be somebody else's.
    """
    try:  # before the file is opened, because opening a device can have effects
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
    """Check that a status is that of a regular file.

    Raises:
        OSError: it is not.
    """
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "it is a link")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def walk(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files at and below a path, with their sizes in bytes; none if the path is missing.

    Folders that can't be listed are skipped: nothing in them can be opened either.

    Raises:
        OSError: an entry is a link, is neither a file nor a folder, or is nested too deeply; the
            error names it.
    """
    if buckets.is_bucket(path):
        yield from buckets.walk(path)
        return
    root, waiting = path, [path]
    while waiting:
        path = waiting.pop()
        try:
            status = os.lstat(path)
            is_deep = len(path.parts) - len(root.parts) > MAX_DEPTH
            if stat.S_ISDIR(status.st_mode) and not is_deep:
                waiting += (path / name for name in sorted(os.listdir(path), reverse=True))
                continue
        except (FileNotFoundError, PermissionError):  # another process may remove entries
            continue
        try:
            if is_deep:
                raise OSError(errno.ELOOP, "it is nested too deeply")
            check_regular(status)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        yield path, status.st_size


def parse_json(text: str | bytes) -> Any:
    """Parse untrusted JSON.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
