"""Write a run's metrics for TensorBoard with tensorboardX, which needs no TensorFlow.

A run that resumes from an earlier step removes the points beyond that step from the event files,
because it will write them again, and adds the epochs that are missing. The curves are then complete
in every reader, however often the run was interrupted, and even if the flag was added late.

In a bucket no file can be appended to, so the files are written on this machine, and copied after
each epoch.
"""

import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from experiments.training_run import run_files
from experiments.training_run.console import warn
from lstm_flax import buckets

MAX_EVENT_BYTES = 2**20
"""Largest size of an event in bytes; a scalar takes 60."""

FLUSH_SECONDS = 5
"""How long a point may wait in memory; a killed run loses at most that."""

RUNNING = "loss/train_running"
"""Tag of the mean loss over the epoch so far, written about once a second."""

TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "test_loss": "loss/test",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "test_accuracy": "accuracy/test",
    "images_per_second": "speed/images_per_second",
}
"""Tags of an epoch's metrics, by name in metrics.jsonl; the part before / is a group."""


_SCHEME = "kept"
"""What tensorboardX opens with `_EventFiles`."""


class _EventFiles:
    """Opens event files for tensorboardX, and keeps the first failure of any of them.

    Its threads would print a traceback and end.
    """

    def __init__(self):
        self.failure: Exception | None = None

    def directory_check(self, path: str) -> None:
        """Do nothing: the folder was made."""

    def open(self, path: str) -> "_EventFile":
        """Open a new file, by its path after the scheme."""
        name = path.removeprefix(f"{_SCHEME}:")
        return _EventFile(self, run_files.open_to_change(Path(name), os.O_CREAT))


class _EventFile:
    """An event file as tensorboardX uses one; after a failure it does nothing."""

    def __init__(self, files: _EventFiles, file: IO[bytes]):
        self._files, self._file = files, file

    def write(self, data: bytes) -> None:
        """Write into the buffer."""
        self._try(lambda: self._file.write(data))

    def flush(self) -> None:
        """Write the buffer to the disk."""
        self._try(self._sync)

    def close(self) -> None:
        """Close the file."""
        self._try(self._file.close)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _try(self, action: Callable[[], object]) -> None:
        if self._files.failure is None:
            try:
                action()
            except OSError as error:
                self._files.failure = error


class MetricWriter:
    """Writes a run's scalars by step, in a background thread; without a folder, does nothing.

    Where they can't be written any more, `repair` says so, tries again and adds what is missing.
    """

    def __init__(self, folder: Path | None, step: int, records: list[dict[str, Any]]):
        """Open the event files in `folder` and bring them to the state of the run.

        Args:
            folder: folder of the event files, created if missing; None writes nothing.
            step: the step that the run resumes from.
            records: the epochs of the run so far, as in metrics.jsonl.

        Raises:
            RunFilesError: the folder can't be written.
        """
        self._folder, self._writer, self._temporary = folder, None, None
        self._files = _EventFiles()
        self._upload_failure: Exception | None = None
        self._is_told = False
        if folder is None:
            return
        self._local = folder
        if buckets.is_bucket(folder):
            self._temporary = tempfile.TemporaryDirectory()
            self._local = Path(self._temporary.name)
            with run_files.writing(folder, "read"):
                for path, _ in buckets.walk(folder):
                    (self._local / path.name).write_bytes(run_files.read_bytes(path))
        self._open(step, records)

    def _open(self, step: int, records: list[dict[str, Any]]) -> None:
        # Few runs need it, and it imports PyTorch if it can.
        from tensorboardX import SummaryWriter
        from tensorboardX.record_writer import register_writer_factory

        register_writer_factory(_SCHEME, self._files)
        with run_files.writing(self._local):
            self._local.mkdir(parents=True, exist_ok=True)
            kept = [event for path in event_files(self._local) for event in cut_after(path, step)]
            self._files.failure = None
            self._writer = SummaryWriter(
                f"{_SCHEME}:{self._local}",
                # A running TensorBoard has read the removed points. This makes it drop them, if it
                # has seen such a mark before, so the first start writes one too.
                purge_step=step + 1,
                max_queue=0,  # unbounded, so that training never waits for the disk
                flush_secs=FLUSH_SECONDS,
                # Two starts in one second write two files, which sort in their order.
                filename_suffix=f".{step:012}.{os.getpid()}",
            )
        done = {event.step for event in kept if TAGS["test_loss"] in tags(event)}
        for record in records:
            if record["step"] not in done:
                self.write_epoch(record)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._upload()
        self._close()
        if self._failure and not self._is_told:
            self._warn("the last points are missing")
        if self._temporary:
            self._temporary.cleanup()

    def repair(
        self, step: int, records: list[dict[str, Any]], is_back: bool, failure: Exception | None
    ) -> None:
        """Write what is missing, if the event files failed or the workdir did.

        Args:
            step: the step of the run.
            records: its epochs.
            is_back: whether the workdir can be written again.
            failure: why the workdir can't be written, which was told; None if it can.
        """
        if self._folder is None or failure or not (is_back or self._failure):
            return
        if self._temporary:
            self._upload()
        else:
            self._close()
            try:
                self._open(step, records)
            except run_files.RunFilesError as error:
                self._files.failure = error
        if self._failure is None:
            self._is_told = False
        elif not self._is_told:
            self._warn("training goes on and tries again at each save")

    @property
    def _failure(self) -> Exception | None:
        return self._files.failure or self._upload_failure

    def _warn(self, consequence: str) -> None:
        self._is_told = True
        reason = getattr(self._failure, "strerror", None) or self._failure
        warn(f"the curves for TensorBoard can't be written ({reason}); {consequence}")

    def _close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def write_running_loss(self, step: int, loss: float) -> None:
        """Write the mean training loss over the epoch so far."""
        self._add({RUNNING: loss}, step)

    def write_epoch(self, record: Mapping[str, Any]) -> None:
        """Write an epoch's metrics."""
        values = {tag: record[name] for name, tag in TAGS.items() if name in record}
        self._add(values, record["step"])
        self._upload()

    def _upload(self) -> None:
        """Copy the event files to the bucket, if they belong into one."""
        if not (self._folder and self._writer and self._temporary):
            return
        self._writer.flush()
        self._upload_failure = None
        try:
            for path in event_files(self._local):
                buckets.write(self._folder / path.name, path.read_bytes())
        except OSError as error:
            self._upload_failure = error

    def _add(self, values: Mapping[str, float], step: int) -> None:
        if self._writer:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)


def event_files(folder: Path) -> list[Path]:
    """Return the event files in a folder, in TensorBoard's order."""
    return sorted(folder.glob("*.tfevents.*"))


def tags(event) -> list[str]:
    """Return the tags of the scalars in an event."""
    return [value.tag for value in event.summary.value]


def cut_after(path: Path, step: int) -> list[Any]:
    """Cut an event file at the first event that is beyond a step or damaged; return the rest."""
    kept = []
    with run_files.open_to_change(path) as file:
        end = 0
        for event in _events(file):
            if event.step > step:
                break
            kept.append(event)
            end = file.tell()
        file.truncate(end)
    return kept


def _events(file) -> Iterator[Any]:
    """Read events, each after its length, until one is damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboardX.proto.event_pb2 import Event

    while (length := _checked(file, 8)) is not None:
        size = struct.unpack("<Q", length)[0]
        event = _checked(file, size) if size <= MAX_EVENT_BYTES else None
        if event is None:
            return
        try:
            yield Event.FromString(event)
        except DecodeError:
            return


def _checked(file, size: int) -> bytes | None:
    """Read bytes and the checksum after them; None if they don't match."""
    from tensorboardX.record_writer import masked_crc32c

    data, checksum = file.read(size), file.read(4)
    return data if checksum == struct.pack("<I", masked_crc32c(data)) else None
