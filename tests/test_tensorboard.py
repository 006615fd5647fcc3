"""What a run leaves behind for those who watch it: curves, read back with TensorBoard's own reader,
and what it was trained with."""

import json
import shutil
import struct
import sys

import jax
import pytest
from small_runs import SMALL, read_eval
from small_runs import read_lines as read_metrics

from experiments import mnist_lstm
from experiments.harness.usage import install_command
from experiments.training_run.config import Config
from experiments.training_run.metric_writer import (
    RUNNING,
    TAGS,
    MetricWriter,
    cut_after,
    event_files,
)
from experiments.training_run.run_files import RunFilesError, environment_path, read_lines

FLAGS = ["--epochs", "2", "--validation-size", "400", "--tensorboard"]  # 12 steps an epoch


def curves(workdir):
    """The points `(step, value)` of each tag that TensorBoard finds in the run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in tags}


def assert_shows(workdir):
    """The curves are those of metrics.jsonl, each point once and in order."""
    found, lines = curves(workdir), read_metrics(workdir)
    assert found.keys() == {RUNNING, *TAGS.values()}
    for name, tag in TAGS.items():
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert found[tag] == expected, tag
    steps = [step for step, _ in found[RUNNING]]
    assert steps == sorted(set(steps))
    running = dict(found[RUNNING])
    for line in lines:  # an epoch's last running loss is the epoch's
        assert running[line["step"]] == pytest.approx(line["train_loss"], rel=1e-6)
    return running


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    """The workdir of a run that nobody disturbed; its calls end at every third step."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = ["--data-dir", data_dir, "--workdir", workdir, *SMALL, *FLAGS]
    assert mnist_lstm.main([*map(str, flags), "--checkpoint-every", "3"]) == 0
    return workdir


@pytest.fixture
def cut_off(uninterrupted, tmp_path):
    """A copy of it as a kill might leave it: points on disk from after the last checkpoint."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    for step in (21, 24):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    (file,) = event_files(workdir / "tensorboard")
    file.write_bytes(file.read_bytes()[:-7])  # killed while it wrote
    with (workdir / "environment.jsonl").open("a") as environment:
        environment.write('{"step": 9, "ti')
    return workdir


def test_the_curves_are_the_runs_figures(uninterrupted):
    running = assert_shows(uninterrupted)
    assert {3, 6, 9, 12, 21} <= running.keys()
    assert "tensorflow" not in sys.modules
    # It is no part of what the run is, and may be given or left out at each start.
    assert "tensorboard" not in json.loads((uninterrupted / "config.json").read_text())


def test_a_run_that_goes_on_from_an_earlier_step_has_clean_curves(run, uninterrupted, cut_off):
    status, output, error = run("--workdir", cut_off, *FLAGS, "--checkpoint-every", 4)
    assert (status, error) == (0, "")
    assert "resuming from step 18" in output
    assert read_eval(cut_off) == read_eval(uninterrupted)
    assert len(event_files(cut_off / "tensorboard")) == 2
    starts = read_lines(environment_path(cut_off))
    assert [start["step"] for start in starts] == [0, 18]
    assert starts[1]["versions"]["jax"] == jax.__version__
    assert starts[1]["devices"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    running, expected = assert_shows(cut_off), assert_shows(uninterrupted)
    assert {3, 12, 18, 20} <= running.keys()
    assert 21 not in running  # this time no call ended there
    assert all(running[step] == expected[step] for step in running.keys() & expected.keys())


def test_the_epochs_that_the_files_lack_are_added(uninterrupted, tmp_path):
    """As where the flag is given late, or where a kill took what was not yet on disk."""
    lines, folder = read_metrics(uninterrupted), tmp_path / "tensorboard"
    with MetricWriter(folder, 12, lines[:1]):
        pass
    for _ in range(2):  # and only once
        with MetricWriter(folder, 24, lines):
            pass
    found = curves(tmp_path)
    assert found[TAGS["test_loss"]] == [(n["step"], pytest.approx(n["test_loss"])) for n in lines]
    assert RUNNING not in found


def test_a_reader_that_is_open_forgets_what_is_taken_back(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path))
    for start, steps in ((0, (1, 4, 7)), (4, (6, 8))):
        with MetricWriter(tmp_path, start, []) as writer:
            for step in steps:
                writer.write_running_loss(step, 1.0)
        reader.Reload()
    assert [point.step for point in reader.Tensors(RUNNING)] == [1, 4, 6, 8]


def test_what_is_broken_in_an_event_file_is_cut_off(uninterrupted, tmp_path):
    (original,) = event_files(uninterrupted / "tensorboard")
    whole, path = original.read_bytes(), tmp_path / "events.out.tfevents.1"
    path.write_bytes(whole)
    events = cut_after(path, 24)
    assert path.read_bytes() == whole
    assert [event.step for event in events] == sorted(event.step for event in events)
    for broken in (whole[:-1], whole + b"\xff" * 5, whole + b"\xff" * 40, whole[:-30] + b"x" * 30):
        path.write_bytes(broken)
        assert len(cut_after(path, 24)) in (len(events), len(events) - 1)
        assert cut_after(path, 24) == events[: len(cut_after(path, 24))]
        assert whole.startswith(path.read_bytes())
    assert cut_after(path, -1) == []
    assert path.read_bytes() == b""


def test_an_event_file_that_claims_much_or_holds_no_event_is_cut_off(tmp_path):
    from tensorboardX.record_writer import masked_crc32c

    for size, event in ((2**60, b""), (9, b"\xff" * 9)):
        parts = (struct.pack("<Q", size), event)
        content = [part + struct.pack("<I", masked_crc32c(part)) for part in parts]
        (tmp_path / "events").write_bytes(b"".join(content))
        assert cut_after(tmp_path / "events", 99) == []
        assert (tmp_path / "events").read_bytes() == b""


def test_without_the_package_there_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    status, _, error = run("--workdir", tmp_path / "run", "--tensorboard")
    assert status == 2
    command = install_command("tensorboard")
    assert error == f"error: --tensorboard needs tensorboardX: {command}\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_that_can_not_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFilesError, match=r"/file can't be written \(File exists\)"):
        MetricWriter(tmp_path / "file", 0, [])


def test_a_run_trains_on_where_its_start_can_not_be_kept(tmp_path, capsys):
    environment_path(tmp_path).mkdir()
    mnist_lstm.record_start(Config(workdir=tmp_path), 0)
    error = capsys.readouterr().err
    assert error.startswith("warning: ")
    assert "environment.jsonl can't be written" in error
    assert error.count("\n") == 1
