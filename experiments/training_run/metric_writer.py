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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.training_run import run_files
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


class MetricWriter:
    """Writes a run's scalars by step, in a background thread; without a folder, does nothing."""

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
        if folder is None:
            return
        self._local = folder
        if buckets.is_bucket(folder):
            self._temporary = tempfile.TemporaryDirectory()
            self._local = Path(self._temporary.name)
            with run_files.writing(folder, "read"):
                for path, _ in buckets.walk(folder):
                    (self._local / path.name).write_bytes(run_files.read_bytes(path))
        from tensorboardX import SummaryWriter  # few runs need it, and it imports PyTorch if it can

        with run_files.writing(folder):
            self._local.mkdir(parents=True, exist_ok=True)
            kept = [event for path in event_files(self._local) for event in cut_after(path, step)]
            self._writer = SummaryWriter(
                str(self._local),
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
        if self._folder and self._writer:
            with run_files.writing(self._folder):
                self._writer.close()
                self._copy()
        if self._temporary:
            self._temporary.cleanup()

    def write_running_loss(self, step: int, loss: float) -> None:
        """Write the mean training loss over the epoch so far."""
        self._add({RUNNING: loss}, step)

    def write_epoch(self, record: Mapping[str, Any]) -> None:
        """Write an epoch's metrics."""
        values = {tag: record[name] for name, tag in TAGS.items() if name in record}
        self._add(values, record["step"])
        if self._folder and self._writer:
            with run_files.writing(self._folder):
                self._copy()

    def _copy(self) -> None:
        """Copy the event files to the bucket, if they belong into one."""
        if self._folder and self._writer and self._folder is not self._local:
            self._writer.flush()
            for path in event_files(self._local):
                buckets.write(self._folder / path.name, path.read_bytes())

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
