"""Files in a bucket, such as `gs://bucket/run`: whole objects that are read, replaced and moved.

A bucket has no links and no devices, and no way to rename or to change a part of an object. Readers
see an old object or the new one, never half of one. Paths in buckets are `etils.epath.Path`s, which
have pathlib's methods; `pathlib.Path("gs://bucket")` would mean a folder called `gs:`.

The packages that talk to the service are imported when the first bucket is used.
"""

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

SCHEME = "gs://"
"""How the path of a bucket begins."""

_WHY = {
    401: "the service doesn't know you: log in, or set GOOGLE_APPLICATION_CREDENTIALS",
    403: "access is denied",
    404: "there is no such bucket",
    429: "the service is overloaded",
    503: "the service is unavailable",
}


def is_bucket(path: Path | str) -> bool:
    """Return whether a path lies in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def as_path(text: str) -> Path:
    """Return the path that a text names, on a disk or in a bucket.

    Raises:
        ValueError: the path begins with `gs://`, but names no bucket.
    """
    if not is_bucket(text):
        return Path(text)
    from etils import epath

    if not text.removeprefix(SCHEME).strip("/"):
        raise ValueError(f"{text} names no bucket")
    # Where a path is used, these few methods are: /, name, parent, parts, str.
    return cast(Path, epath.Path(text.rstrip("/")))


def read(path: Path, at_most: int) -> bytes:
    """Read an object.

    Args:
        path: its path.
        at_most: largest size in bytes.

    Raises:
        OSError: there is no such object, it can't be read, or it is too large; `strerror` says why.
    """
    with _errors(path):
        files = _files()
        if files.info(str(path))["size"] > at_most:
            raise OSError(errno.EFBIG, f"it has more than {at_most / 2**20:.0f} MiB")
        return files.cat_file(str(path))


def write(path: Path, content: bytes) -> None:
    """Replace an object, or make it.

    Raises:
        OSError: it can't be written; `strerror` says why.
    """
    with _errors(path):
        _files().pipe_file(str(path), content)


def walk(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield the objects at and below a path, with their sizes in bytes; none if there are none.

    Raises:
        OSError: they can't be listed; `strerror` says why.
    """
    with _errors(path):
        try:
            found = _files().find(str(path), detail=True)
        except FileNotFoundError as error:
            raise OSError(errno.ENOENT, _WHY[404]) from error
    for name, about in sorted(found.items()):
        yield as_path(f"{SCHEME}{name}"), about["size"]


def move(source: Path, target: Path) -> None:
    """Move the objects below `source` to `target`: copies first, so that an end of it loses none.

    Raises:
        OSError: they can't be moved; `strerror` says why.
    """
    with _errors(source):
        names = sorted(_files().find(str(source)))
        below = len(str(source).removeprefix(SCHEME))
        for name in names:
            _files().cp_file(name, f"{target}{name[below:]}")
        _files().rm(names)


def last_changed(path: Path) -> float:
    """Return when an object was last written, in seconds since 1970, by the service's clock.

    Raises:
        OSError: there is no such object, or it can't be asked for; `strerror` says why.
    """
    with _errors(path):
        return _files().modified(str(path)).timestamp()


@functools.cache
def _files() -> Any:
    """The file system of all buckets."""
    if "STORAGE_EMULATOR_HOST" in os.environ:  # it has one kind of bucket; asking takes credentials
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # TensorStore, Orbax and other processes write beside us: no listing may be remembered.
    settings = fsspec.config.conf.setdefault("gcs", {})
    settings.setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn whatever the service and its client raise into an OSError in one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not error.strerror:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path)) from error
        why = error.strerror or reason(error)
        raise OSError(error.errno or errno.EIO, why, str(path)) from error
    except ImportError:
        raise
    except Exception as error:  # of aiohttp, requests, google.auth and gcsfs
        raise OSError(errno.EIO, reason(error), str(path)) from error


def reason(error: Exception) -> str:
    """Return in a few words why the service, or TensorStore for it, refused or did not answer."""
    text = " ".join(str(error).split())
    code = str(getattr(error, "code", None) or getattr(error, "status", None))
    if named := re.search(r"http_response_code='(\d+)'", text):
        code = named[1]
    elif text.startswith("Forbidden"):
        code = "403"
    if code.isdecimal():
        return _WHY.get(int(code), f"the service answers {code}")
    return text[:200] or type(error).__name__
