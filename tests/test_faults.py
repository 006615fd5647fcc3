"""Faults: each gets one clear line and exit status 2, and what was saved stays good."""

import json
import os
import random
import shutil
import subprocess

import orbax.checkpoint as ocp
import pytest
from small_runs import SMALL, assert_ended_alike, command, read_eval, start, without_times

from experiments.predict import __main__ as predict
from experiments.training_run import lock, run_files

FLAGS = [*SMALL, "--epochs", 3]


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it, to be harmed."""
    return shutil.copytree(finished, tmp_path / "run")


def refused(outcome, message):
    """Whether a run ended with this message, in one line."""
    status, output, error = outcome
    assert status == 2, output + error
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in output + error
    return True


def flip_bits(folder):
    """One in each KiB of the file with the arrays, for not all that it holds is in use."""
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    for at in range(0, len(content), 1024):
        content[at + random.Random(at).randrange(min(1024, len(content) - at))] ^= 4
    largest.write_bytes(content)


def cut_off(folder):
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])


@pytest.mark.parametrize("harm", [flip_bits, cut_off])
def test_a_damaged_checkpoint_is_said_and_the_one_before_goes_on(run, finished, workdir, harm):
    harm(workdir / "checkpoints" / "42")
    status, output, error = run("--workdir", workdir)
    assert status == 0
    assert error.startswith(f"warning: moved damaged checkpoints to {workdir}/damaged (step 42: ")
    assert error.count("\n") == 1
    assert "resuming from step 28, in epoch 3" in output
    assert_ended_alike(workdir, finished)
    assert (workdir / "damaged" / "42").is_dir()  # moved, not deleted


def remove_description(folder):
    shutil.rmtree(folder / "about")


def flip_a_bit_of_the_description(folder):
    path = folder / "about" / "metadata"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [remove_description, flip_a_bit_of_the_description])
def test_a_damaged_description_is_said_by_every_command(run, finished, workdir, capsys, harm):
    harm(workdir / "checkpoints" / "42")
    status, _, error = run("--workdir", workdir, "--eval-only")
    assert (status, error.count("\n")) == (0, 1)
    assert error.startswith("warning: evaluating step 28 (step 42: its description ")
    assert predict.main([str(workdir / "no picture"), "--workdir", str(workdir)]) == 2
    assert "warning: using step 28 (step 42: its description " in capsys.readouterr().err
    status, _, error = run("--workdir", workdir)
    assert (status, error.count("\n")) == (0, 1)
    assert error.startswith(f"warning: moved damaged checkpoints to {workdir}/damaged (step 42: ")
    assert read_eval(workdir) == read_eval(finished)


def test_the_best_checkpoint_is_missed_where_its_description_is_damaged(run, tmp_path):
    flags = [*SMALL, "--epochs", 5, "--validation-size", 50, "--learning-rate", 0.05]
    assert run("--workdir", tmp_path, *flags)[0] == 0
    best = read_eval(tmp_path)["step"]
    others = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} - {best}
    remove_description(tmp_path / "checkpoints" / str(best))
    status, _, error = run("--workdir", tmp_path, "--eval-only")
    assert (status, error.count("\n")) == (0, 1)
    assert f"(step {best}: its description " in error
    assert read_eval(tmp_path)["step"] in others


def test_evaluation_falls_back_too_and_changes_nothing(run, workdir):
    flip_bits(workdir / "checkpoints" / "42")
    status, _, error = run("--workdir", workdir, "--eval-only")
    assert status == 0
    assert error.startswith("warning: evaluating step 28 (step 42: ")
    assert error.count("step 42") == 1
    assert read_eval(workdir)["step"] == 28
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["14", "28", "42"]
    refused(run("--workdir", workdir, "--eval-only", "--step", 42), "step 42: ")


def test_where_all_checkpoints_are_damaged_each_is_named(run, workdir):
    for step in (14, 28, 42):
        flip_bits(workdir / "checkpoints" / str(step))
    before = sorted(workdir.rglob("*"))
    refused(run("--workdir", workdir), "can be restored: step 42: ")
    assert sorted(workdir.rglob("*")) == before


def test_evaluation_where_no_checkpoint_can_be_read_names_each(run, workdir):
    for step in (14, 28, 42):
        (workdir / "checkpoints" / str(step) / "about" / "metadata").unlink()
    refused(run("--workdir", workdir, "--eval-only"), "can be restored: step 42: ")


def test_a_step_that_is_not_there(run, workdir):
    refused(run("--workdir", workdir, "--eval-only", "--step", 41), "there are: 14, 28, 42")


def test_a_checkpoint_of_another_run(run, finished, workdir):
    """With the run's own config.json gone, the checkpoints still know whose they are."""
    (workdir / "config.json").unlink()
    refused(run("--workdir", workdir, *FLAGS, "--seed", 1), "--seed is 1, but the run's is 0")
    refused(run("--workdir", workdir, *FLAGS, "--hidden-size", 32), "of another model")
    assert run("--workdir", workdir, *FLAGS)[0] == 0
    assert (workdir / "config.json").read_text() == (finished / "config.json").read_text()


def test_a_checkpoint_of_an_unknown_layout(run, workdir):
    shutil.rmtree(workdir / "checkpoints")
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        manager.save(5, args=ocp.args.StandardSave({"weights": [1.0, 2.0]}))
    refused(run("--workdir", workdir), "step 5: its description can't be read")


def test_a_config_that_cannot_be_read(run, workdir):
    path = workdir / "config.json"
    path.write_text(path.read_text()[:50])
    refused(run("--workdir", workdir), f"{path} can't be read")


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"hidden_size": "10"}, "'hidden_size' must be int, but is '10'"),
        ({"hidden_size": True}, "'hidden_size' must be int, but is True"),
        ({"hidden_size": 1.5}, "'hidden_size' must be int, but is 1.5"),
        ({"hidden_size": -3}, "'hidden_size' must be at least 1, but is -3"),
        ({"hidden_size": 16000, "num_layers": 50}, "'hidden_size' must be less with 50 layers"),
        ({"num_layers": 3000}, "'num_layers' must be at most 100, but is 3000"),
        ({"batch_size": 10**10}, "'batch_size' must be at most 1000000, but is 10000000000"),
        ({"epochs": None}, "'epochs' must be int, but is None"),
        (
            {"sequence": "columns"},
            "'sequence' must be rows or pixels or permuted, but is 'columns'",
        ),
        ({"precision": ["float32"]}, "'precision' must be float32 or bfloat16, but is ['float32']"),
        ({"learning_rate": 10**400}, "'learning_rate' must be a positive number, but is 1000"),
        ({"dropout": float("nan")}, "'dropout' must be at least 0 and less than 1, but is nan"),
        ({"augment": 1}, "'augment' must be bool, but is 1"),
        ({"no_such_flag": 1}, "'no_such_flag' is unknown"),
        # Not the run's: a stranger's run must not say whom to connect to.
        ({"distributed": True}, "'distributed' is unknown"),
        ([1], "does not hold a JSON object"),
        (None, "does not hold a JSON object"),
    ],
)
def test_a_config_with_a_value_that_no_flag_takes(run, tmp_path, stored, says, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stored))
    refused(run("--workdir", tmp_path, "--eval-only"), says)
    assert predict.main(["--workdir", str(tmp_path), "a.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert says in error
    assert len(error) < 400


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[" * 200_000, b'{"seed": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_no_json(run, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    refused(run("--workdir", tmp_path, "--eval-only"), f"{tmp_path}/config.json can't be read")


@pytest.mark.parametrize("name", ["config.json", "environment.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_a_device_in_place_of_a_file_is_not_read(run, workdir, name, make):
    (workdir / name).unlink()
    make(workdir / name)
    if name == "config.json":
        refused(run("--workdir", workdir), f"{workdir}/config.json can't be used (it is ")
    else:
        assert run_files.read_lines(workdir / name) == []


def test_metrics_that_were_harmed_are_written_anew_from_the_checkpoint(run, finished, workdir):
    (workdir / "metrics.jsonl").write_text('{"epoch": 1, "st')
    assert run("--workdir", workdir)[0] == 0
    assert without_times(workdir) == without_times(finished)
    shutil.rmtree(workdir / "checkpoints" / "42")  # so that there is something to train
    (workdir / "metrics.jsonl").unlink()
    assert run("--workdir", workdir)[0] == 0
    assert without_times(workdir) == without_times(finished)


def test_a_workdir_in_use_is_refused_until_its_owner_is_dead(data_dir, run, tmp_path):
    process = start(data_dir, tmp_path, "--epochs", 1000)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    outcome = run("--workdir", tmp_path, *FLAGS, "--epochs", 1000)
    process.kill()
    process.communicate()
    refused(outcome, f"is in use by another run (process {process.pid} on ")
    with lock.hold(tmp_path):  # a dead owner's lock is free
        pass


def test_a_workdir_that_cannot_be_made(run):
    refused(run("--workdir", "/proc/self/run", *FLAGS), "/proc/self/run can't be written (")


def test_a_workdir_that_is_a_link_to_nowhere(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(run("--workdir", tmp_path / "link", *FLAGS), "--workdir must be a folder")
    assert not (tmp_path / "nowhere").exists()


def test_an_evaluation_that_cannot_be_written_is_printed_all_the_same(run, workdir):
    (workdir / "eval.json").unlink()
    (workdir / "eval.json").mkdir()  # as root may write what is read-only
    status, output, error = run("--workdir", workdir, "--eval-only")
    assert status == 0
    assert "test accuracy" in output
    assert error == f"warning: {workdir}/eval.json can't be written (it is not a regular file)\n"


@pytest.mark.parametrize(
    ("path", "training", "evaluation"),
    [
        (
            "checkpoints/42",
            "error: {}/checkpoints/42 can't be moved away, though it is damaged (Perm",
            "warning: evaluating step 28 (step 42: ",
        ),
        *[
            (path, message, message)
            for path, message in [
                ("checkpoints", "error: {}/checkpoints can't be opened (Permission denied)"),
                (".", "error: {}/config.json can't be read ("),
            ]
        ],
    ],
)
def test_a_folder_that_may_not_be_read(data_dir, workdir, path, training, evaluation):
    """Root may read all, unless what allows it that is taken away."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may read every folder here")
    may_not = drop if os.geteuid() == 0 else []
    (workdir / path).chmod(0)
    try:
        for flags, message in (([], training), (["--eval-only"], evaluation)):
            begun = [*may_not, *command(data_dir, workdir, "--epochs", 3, *flags)]
            ended = subprocess.run(begun, capture_output=True, text=True)
            assert ended.stderr.startswith(message.format(workdir)), ended.stderr
            assert ended.stderr.count("\n") == 1
            assert ended.returncode == (2 if message.startswith("error") else 0)
    finally:
        (workdir / path).chmod(0o755)


def test_a_full_disk_during_a_save(data_dir, run, finished, workdir):
    """The system's own limit on the size of a file, below that of a checkpoint's arrays."""
    shutil.rmtree(workdir / "checkpoints" / "42")
    limited = ["bash", "-c", 'ulimit -f 15; exec "$@"', "limited", *command(data_dir, workdir)]
    # As a user has it: XLA may remark on what it loads from the tests' cache.
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    ended = subprocess.run(limited, capture_output=True, text=True, env=env)
    outcome = (ended.returncode, ended.stdout, ended.stderr)
    refused(outcome, f"a checkpoint can't be written to {workdir}/checkpoints (File too large)")
    # With room again the run goes on from the last good one, and ends as if nothing had been.
    status, output, _ = run("--workdir", workdir)
    assert status == 0
    assert "resuming from step 28" in output
    assert read_eval(workdir) == read_eval(finished)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["14", "28", "42"]
