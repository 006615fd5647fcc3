"""Datasets in a bucket, from which tfds without TensorFlow can't read.

A prepared dataset is copied to this machine. One that is not prepared yet is prepared here and then
copied to the bucket, its description last: without it, a dataset there counts as incomplete.
"""

from pathlib import Path

from lstm_flax import buckets

DESCRIPTION = "dataset_info.json"
"""tfds's file that a prepared dataset has."""


def download(data_dir: Path, name: str, folder: Path) -> None:
    """Copy what a bucket holds of a prepared dataset into a folder on this machine.

    Raises:
        OSError: the bucket can't be read, or the folder can't be written.
    """
    objects = dict(buckets.walk(data_dir / name))
    if any(path.name == DESCRIPTION for path in objects):
        for path, size in objects.items():
            target = folder / path.relative_to(data_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(buckets.read(path, at_most=size))


def upload(folder: Path, prepared: Path, data_dir: Path) -> None:
    """Copy a dataset that was prepared in a folder on this machine to a bucket.

    Args:
        folder: the folder that stands for `data_dir`.
        prepared: the dataset's own folder in it.
        data_dir: folder in the bucket.

    Raises:
        OSError: the bucket can't be written.
    """
    files = [path for path in prepared.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == DESCRIPTION):
        buckets.write(data_dir / path.relative_to(folder).as_posix(), path.read_bytes())
