"""A run that was cut off, in whatever way, ends as one that was not."""

import contextlib
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_runs import (
    SMALL,
    assert_ended_alike,
    finish,
    read_lines,
    read_until,
    start,
)

from experiments.harness.stopping import Stopped, StopRequests

FLAGS = ["--epochs", "15", "--num-layers", "2", "--dropout", "0.1", "--checkpoint-every", "5"]


@pytest.fixture(scope="module")
def uninterrupted(data_dir, made_once):
    """The workdir of a run that nobody disturbed."""
    return made_once("uninterrupted", lambda workdir: finish(data_dir, workdir, *FLAGS))


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(uninterrupted, tmp_path):
    """From the first preparation of the data to the last save, wherever the kill may fall."""
    workdir, data_dir = tmp_path / "run", tmp_path / "data"
    rng = random.Random(0)
    # Up to which line the run is let go on, and for how many seconds after it.
    moments = [("preparing", 0.5), ("", 4.0)]
    moments += [("data", 2.0), ("compiled", 0.4), ("epoch", 0.2)] * 6
    outputs = []
    for beginning, longest in moments:
        process = start(data_dir, workdir, *FLAGS)
        lines = read_until(process, beginning) if beginning else []
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0, longest))
        process.kill()
        outputs.append("".join(lines) + process.stdout.read())
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL, outputs[-1]
    assert sum("resuming from step" in output for output in outputs) >= 8
    assert not any("error" in output or "warning" in output for output in outputs), outputs

    assert "resuming from step" in finish(data_dir, workdir, *FLAGS)
    assert_ended_alike(workdir, uninterrupted)
    kept = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert kept == ["200", "205", "210"]  # and nothing half-written


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_exits(data_dir, uninterrupted, tmp_path, number, status):
    flags = [*FLAGS, "--checkpoint-every", "0"]
    process = start(data_dir, tmp_path, *flags)
    read_until(process, "epoch  3/15")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"stopped by {number.name}: run the same command to resume" in output
    assert "Traceback" not in output

    assert "resuming from step" in finish(data_dir, tmp_path, *flags)
    assert_ended_alike(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_loses_nothing_saved(data_dir, uninterrupted, tmp_path):
    process = start(data_dir, tmp_path, *FLAGS)
    read_until(process, "epoch  3/15")
    process.send_signal(signal.SIGINT)
    read_until(process, "stopping after this step")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "resuming from step" in finish(data_dir, tmp_path, *FLAGS)
    assert_ended_alike(tmp_path, uninterrupted)


def wait_until_it_listens(process):
    """Wait until a process has a handler of SIGTERM, or has ended."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return


# Up to which line the run is let go on, and for how many seconds after it: the imports, the reading
# of the data, the first state, compiling, the first step and training.
MOMENTS = [
    ("", 0.0), ("", 0.1), ("", 0.4), ("", 1.0), ("", 2.0), ("", 3.0),
    ("data", 0.0), ("device", 0.0), ("device", 0.1), ("device", 0.3),
    ("compiling", 0.0), ("compiling", 0.1), ("compiling", 0.2), ("compiling", 0.5),
    ("compiling", 1.0), ("compiled", 0.0), ("compiled", 0.1), ("compiled", 0.3), ("epoch", 0.0),
    ("epoch", 0.1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads in /proc whether a process listens")
def test_a_signal_at_any_of_twenty_moments_stops_the_run_in_one_line(
    data_dir, uninterrupted, tmp_path
):
    def stop_at(number):
        (beginning, seconds), is_twice = MOMENTS[number], number % 3 == 2
        kind = (signal.SIGINT, signal.SIGTERM)[number % 2]
        workdir = tmp_path / str(number)
        is_compiled_before = beginning != "compiling"
        process = start(
            data_dir, workdir, "--epochs", "30",
            JAX_ENABLE_COMPILATION_CACHE=str(is_compiled_before).lower(),
        )  # fmt: skip
        wait_until_it_listens(process)
        lines = read_until(process, beginning) if beginning else []
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        for _ in range(1 + is_twice):
            process.send_signal(kind)
        output = "".join(lines) + process.communicate(timeout=100)[0]
        what = f"{MOMENTS[number]}, {kind.name}: {process.returncode}\n{output}"
        assert process.returncode == 128 + kind, what
        assert "Traceback" not in output, what
        stopped = [line for line in output.splitlines() if line.startswith("stopped by")]
        assert len(stopped) == 1, what
        assert stopped[0].startswith(f"stopped by {kind.name}"), what
        is_saved = any(path.name.isdecimal() for path in workdir.glob("checkpoints/*"))
        assert ("to resume" in stopped[0]) == is_saved, what

    with ThreadPoolExecutor(4) as together:
        list(together.map(stop_at, range(len(MOMENTS))))


def test_a_stop_that_was_deferred_comes_at_the_latest_at_the_end():
    stop = StopRequests()
    with pytest.raises(Stopped, match="SIGTERM"), stop.deferred():
        stop.request(signal.SIGTERM)


def test_checkpoints_within_an_epoch_are_taken_by_steps_or_by_time(run, tmp_path):
    def saved(workdir, every):
        flags = [*SMALL, "--epochs", 1, "--checkpoint-every", every]
        assert run("--workdir", workdir, *flags)[0] == 0
        return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())

    assert saved(tmp_path / "steps", 4) == [8, 12, 14]
    assert saved(tmp_path / "never", 0) == [14]
    assert len(saved(tmp_path / "seconds", "0.000001s")) > 1


@pytest.mark.slow
def test_epoch_figures_of_a_run_cut_within_it_cover_the_whole_epoch(
    data_dir, uninterrupted, tmp_path
):
    """The loss is summed over all its images, the time over both of its parts."""
    process = start(data_dir, tmp_path, *FLAGS)
    read_until(process, "epoch  1/15")
    process.kill()
    process.communicate()
    finish(data_dir, tmp_path, *FLAGS)
    ours, whole = read_lines(tmp_path), read_lines(uninterrupted)
    for line, expected in zip(ours, whole, strict=True):
        assert line["train_loss"] == expected["train_loss"]
        assert line["images_per_second"] > 0
        assert line["seconds"] > 0
