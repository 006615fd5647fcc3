"""A run that lives in a bucket: trained, resumed, killed, shared, damaged, and out of reach."""

import contextlib
import json
import random
import re
import signal
import subprocess
import threading

import pytest
from bucket import NAME, bucket
from small_runs import (
    SMALL,
    assert_ended_alike,
    finish,
    read_eval,
    read_until,
    start,
)
from test_tensorboard import curves

from experiments.mnist_lstm import main
from experiments.predict.__main__ import main as predict
from experiments.report.__main__ import main as report
from experiments.training_run import lock
from experiments.training_run.run_files import RunFilesError
from lstm_flax import buckets

FLAGS = ["--epochs", "3", "--augment", "--checkpoint-every", "5"]


@pytest.fixture(scope="module")
def served():
    """A bucket that this process and those that it starts use."""
    with bucket() as it, pytest.MonkeyPatch.context() as patch:
        for name, value in it.environment.items():
            patch.setenv(name, value)
        yield it


@pytest.fixture
def workdir(served, request):
    """An empty folder in the bucket."""
    return buckets.as_path(f"gs://{NAME}/{re.sub('[^a-z0-9]+', '_', request.node.name)}")


@pytest.fixture(scope="module")
def on_disk(data_dir, made_once):
    """The workdir of the same run on a disk."""
    return made_once("on_disk", lambda workdir: finish(data_dir, workdir, *FLAGS))


def names(served, workdir):
    """Names of the objects below a workdir."""
    folder = f"{workdir.name}/"
    return [name.removeprefix(folder) for name in served.names(folder)]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(served, workdir, on_disk, run, capsys, tmp_path):
    flags = ["--workdir", workdir, *SMALL]
    status, _, error = run(*flags, *FLAGS)
    assert status == 0, error
    assert_ended_alike(workdir, on_disk)
    there = names(served, workdir)
    assert {name for name in there if not name.startswith("checkpoints/")} == {
        "config.json", "environment.jsonl", "eval.json", "metrics.jsonl",
    }  # fmt: skip
    steps = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert steps == {path.name for path in (on_disk / "checkpoints").iterdir()}

    assert run("--workdir", workdir, "--eval-only")[0] == 0
    assert read_eval(workdir) == read_eval(on_disk)
    assert report([str(workdir)]) == 0
    assert b"<html" in served.read(f"{workdir.name}/report.html")[:200]
    picture = tmp_path / "digit.png"
    digit().save(picture)
    capsys.readouterr()
    for place in (workdir, on_disk):
        assert predict(["--workdir", str(place), str(picture)]) == 0
    from_bucket, from_disk = capsys.readouterr().out.splitlines()
    assert from_bucket == from_disk


def digit():
    """A picture of a one."""
    from PIL import Image, ImageDraw

    picture = Image.new("L", (60, 60), 255)
    ImageDraw.Draw(picture).line([(32, 10), (28, 50)], fill=0, width=6)
    return picture


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(served, workdir, on_disk, data_dir):
    rng = random.Random(0)
    moments = [("data", 2.0), ("compiled", 0.5), ("epoch", 0.3), ("compiled", 0.5), ("epoch", 0.3)]
    outputs = []
    for beginning, longest in moments:
        process = start(data_dir, workdir, *FLAGS)
        lines = read_until(process, beginning)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0, longest))
        process.kill()
        outputs.append("".join(lines) + process.stdout.read())
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL, outputs[-1]
    assert not any("error" in output or "warning" in output for output in outputs), outputs
    finish(data_dir, workdir, *FLAGS)
    assert_ended_alike(workdir, on_disk)
    there = names(served, workdir)
    steps = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert all(f"checkpoints/{step}/commit_success.txt" in there for step in steps)
    assert ".lock" not in there


def test_a_second_run_is_told_who_has_the_bucket(served, workdir, run):
    with lock.hold(workdir):
        owner = json.loads(served.read(f"{workdir.name}/.lock"))
        status, _, error = run("--workdir", workdir, *SMALL)
        assert status == 2
        assert f"process {owner['pid']} on {owner['host']}" in error
        assert error.count("\n") == 1
    assert names(served, workdir) == []  # the lock is gone, and nothing else was written


def test_a_dead_run_on_another_machine_loses_its_lock_after_five_minutes(served, workdir):
    name = f"{workdir.name}/.lock"
    buckets.write(workdir / ".lock", b'{"pid": 7, "host": "elsewhere", "boot": "x"}')
    with pytest.raises(RunFilesError, match=r"process 7 on elsewhere.*loses it after 300 seconds"):
        lock.hold(workdir).__enter__()
    served.make_older(name, seconds=301)
    with lock.hold(workdir):
        assert json.loads(served.read(name))["host"] != "elsewhere"


def test_a_dead_run_on_this_machine_loses_its_lock_at_once(served, workdir):
    with lock.hold(workdir):
        content = json.loads(served.read(f"{workdir.name}/.lock"))
    ended = subprocess.Popen(["true"])
    ended.wait()
    buckets.write(workdir / ".lock", json.dumps(content | {"pid": ended.pid}).encode())
    with lock.hold(workdir):
        pass


def test_of_two_that_take_a_lock_at_once_one_gets_it(served, workdir):
    start_together, taken, refused = threading.Barrier(4), [], []

    def take():
        start_together.wait()
        try:
            taken.append(lock._Lease(workdir))
        except RunFilesError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 3)
    taken[0].release()


def test_a_run_whose_lock_was_taken_over_writes_nothing_more(served, workdir, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    with lock.hold(workdir) as held:
        held.check()
        other = json.dumps({"pid": 7, "host": "elsewhere", "boot": "x"}).encode()
        buckets.write(workdir / ".lock", other)
        for thread in threading.enumerate():
            if thread.name == "lock":
                thread.join(timeout=30)
        with pytest.raises(RunFilesError, match=r"process 7 on elsewhere.*nothing more is written"):
            held.check()
    assert served.read(f"{workdir.name}/.lock") == other  # released is only what is one's own


def test_a_damaged_checkpoint_is_moved_away(served, workdir, run):
    flags = ["--workdir", workdir, *SMALL]
    assert run(*flags, "--epochs", 2)[0] == 0
    before = read_eval(workdir)
    arrays = workdir / "checkpoints" / str(before["step"]) / "tree" / "d"
    for path, size in buckets.walk(arrays):
        buckets.write(path, bytes(size))
    status, _, error = run(*flags, "--epochs", 2)
    assert status == 0, error
    assert f"moved damaged checkpoints to {workdir}/damaged" in error
    assert read_eval(workdir) == before  # trained again from the one before
    assert f"damaged/{before['step']}/commit_success.txt" in names(served, workdir)


def test_tensorboard_curves_are_complete_after_resuming(served, workdir, run, tmp_path):
    flags = ["--workdir", workdir, "--tensorboard", *SMALL]
    for epochs in (1, 2):
        assert run(*flags, "--epochs", epochs)[0] == 0
    for name in served.names(f"{workdir.name}/tensorboard/"):
        path = tmp_path / "tensorboard" / name.rpartition("/")[2]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(served.read(name))
    assert [step for step, _ in curves(tmp_path)["loss/test"]] == [14, 28]


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # what gcsfs does
def test_data_are_prepared_once_for_all_machines(served, workdir, run, tmp_path):
    flags = ["--data-dir", workdir / "data", *SMALL]
    status, first, error = run("--workdir", tmp_path / "a", "--epochs", 1, *flags)
    assert status == 0, error
    _, second, _ = run("--workdir", tmp_path / "b", "--epochs", 1, *flags)
    assert "preparing mnist5k" in first
    assert f"copying mnist5k to {workdir}/data" in first
    assert "preparing" not in second
    assert read_eval(tmp_path / "a") == read_eval(tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--workdir", "gs://nowhere/run"], "there is no such bucket"),
        (["--workdir", "gs://"], "gs:// names no bucket"),
        (["--workdir", "s3://runs/run"], "--workdir can't be s3://runs/run"),
        (["--manual-dir", "gs://runs/files"], "--manual-dir can't be gs://runs/files"),
        (["--data-dir", "gs://nowhere/data", "--workdir", "new"], "there is no such bucket"),
    ],
)
def test_a_bucket_that_can_not_be_used_is_named_in_one_line(
    served, run, flags, why, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, _, error = run(*SMALL, *flags)
    assert status == 2
    assert why in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "gs:").exists()


def test_an_overloaded_service_is_asked_again(served, workdir):
    buckets.write(workdir / "file", b"content")
    served.failures = 2
    assert buckets.read(workdir / "file", 100) == b"content"
    assert served.failures == 0


@pytest.mark.parametrize(("status", "why"), [(403, "access is denied"), (401, "doesn't know you")])
def test_a_service_that_refuses_is_quoted_in_one_line(served, workdir, run, status, why):
    served.status = status
    try:
        ended, _, error = run("--workdir", workdir, *SMALL)
    finally:
        served.status = None
    assert (ended, error.count("\n")) == (2, 1)
    assert why in error


@pytest.mark.slow
def test_a_service_that_refuses_for_a_while_does_not_end_a_run(
    served, workdir, on_disk, data_dir, tmp_path
):
    process = start(data_dir, workdir, *FLAGS, "--rescue-dir", tmp_path, "--tensorboard")
    read_until(process, "epoch 1/3")
    process.send_signal(signal.SIGSTOP)
    served.status = 403
    process.send_signal(signal.SIGCONT)
    try:
        warning = read_until(process, "warning: ")[-1]
    finally:
        served.status = None
    output, _ = process.communicate(timeout=200)
    assert warning.startswith(f"warning: {workdir}/checkpoints can't be ")
    assert f"the last state is kept in {tmp_path}/lstm_flax_" in warning
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert f"in {workdir} again" in output
    assert list(tmp_path.iterdir()) == []
    assert_ended_alike(workdir, on_disk)


@pytest.mark.slow
def test_a_service_that_is_away_is_named_in_one_line(served, workdir, tmp_path, capsys):
    served.stop()
    try:
        status = main(["--workdir", str(workdir), *SMALL])
    finally:
        served.start()
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert "try again when the bucket can be reached" in error
