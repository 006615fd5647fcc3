"""The curves of a run for TensorBoard, written by tensorboardX, which needs no TensorFlow.

A run that goes on from an earlier step takes those of its points that lie after it out of the event
files, for it will pass there again, and adds the epochs that are missing. So the curves are the
run's, however often it was cut off, whatever reads them, and also where the flag was given late.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.training_run import run_files

LONGEST_EVENT = 2**20
"""Bytes; a scalar takes 60."""

FLUSH_SECONDS = 5
"""How long a point may wait in memory; what a killed run loses is at most that."""

RUNNING = "loss/train_running"
"""Mean over the epoch so far, about once a second."""

TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "test_loss": "loss/test",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "test_accuracy": "accuracy/test",
    "images_per_second": "speed/images_per_second",
}
"""Of an epoch's figures, by their names in metrics.jsonl; what comes before / is a group."""


class Board:
    """Writes a run's scalars, by step, from a thread of its own; without a folder, nothing."""

    def __init__(self, folder: Path | None, step: int, records: list[dict[str, Any]]):
        """Bring the event files in `folder` to where the run is.

        Args:
            folder: of the event files; made where there is none.
            step: from which the run goes on.
            records: its epochs so far, as in metrics.jsonl.

        Raises:
            RunFilesError: the folder can't be written.
        """
        self._folder, self._writer = folder, None
        if folder is None:
            return
        from tensorboardX import SummaryWriter  # few need it, and it imports PyTorch where it can

        with run_files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            kept = [event for path in event_files(folder) for event in cut_after(path, step)]
            self._writer = SummaryWriter(
                str(folder),
                # A TensorBoard that is open has read what was cut out: this makes it forget that,
                # if it has seen the mark of an earlier start, so that the first needs one too.
                purge_step=step + 1,
                max_queue=0,  # unbounded: training never waits for the disk
                flush_secs=FLUSH_SECONDS,
                # Two starts in one second are two files, and sort as they came.
                filename_suffix=f".{step:012}.{os.getpid()}",
            )
        done = {event.step for event in kept if TAGS["test_loss"] in tags(event)}
        for record in records:
            if record["step"] not in done:
                self.epoch(record)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *exception) -> None:
        if self._folder and self._writer:
            with run_files.writing(self._folder):
                self._writer.close()

    def advance(self, step: int, loss: float) -> None:
        """Add the training loss over the epoch so far."""
        self._add({RUNNING: loss}, step)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Add an epoch's figures."""
        values = {tag: record[name] for name, tag in TAGS.items() if name in record}
        self._add(values, record["step"])

    def _add(self, values: Mapping[str, float], step: int) -> None:
        if self._writer:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)


def event_files(folder: Path) -> list[Path]:
    """The event files in a folder, as TensorBoard orders them."""
    return sorted(folder.glob("*.tfevents.*"))


def tags(event) -> list[str]:
    """Names of the scalars in an event."""
    return [value.tag for value in event.summary.value]


def cut_after(path: Path, step: int) -> list[Any]:
    """Cut an event file off where it leaves a step behind, or is broken; return what stays."""
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
    """Read events, each after its length, until one is not as it was written."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboardX.proto.event_pb2 import Event

    while (length := _checked(file, 8)) is not None:
        size = struct.unpack("<Q", length)[0]
        event = _checked(file, size) if size <= LONGEST_EVENT else None
        if event is None:
            return
        try:
            yield Event.FromString(event)
        except DecodeError:
            return


def _checked(file, size: int) -> bytes | None:
    """Read so many bytes, and the checksum after them; None where they don't match it."""
    from tensorboardX.record_writer import masked_crc32c

    data, checksum = file.read(size), file.read(4)
    return data if checksum == struct.pack("<I", masked_crc32c(data)) else None
