"""A run's result, restored to be used: what was trained, with nothing changed in the workdir."""

import json
import shutil

import pytest
from small_runs import SMALL, read_eval, read_lines

from experiments import mnist_lstm
from experiments.training_run import lock, run_files
from experiments.training_run.restored import restore_run
from experiments.training_run.run_files import RunFilesError, params_sha256
from lstm_flax.checkpoints import CheckpointError


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The workdir of a run whose result, by its held-out images, need not be its last step."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--epochs", 5, "--validation-size", 50, "--learning-rate", 0.05]
    places = ["--data-dir", data_dir, "--workdir", workdir]
    assert mnist_lstm.main([*map(str, [*places, *SMALL, *flags])]) == 0
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of it, to be harmed."""
    return shutil.copytree(trained, tmp_path / "run")


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_result_is_what_was_evaluated_and_stays_as_it_was(trained):
    before = files(trained)
    with lock.hold(trained):  # as a run that is training has it
        restored = restore_run(trained)
    assert files(trained).keys() == before.keys()
    changed = [path for path, time in files(trained).items() if time != before[path]]
    assert [path.name for path in changed] == [".lock"]

    evaluation, lines = read_eval(trained), read_lines(trained)
    best = max(lines, key=lambda line: (line["validation_accuracy"], line["step"]))
    assert restored.step == evaluation["step"] == best["step"]
    assert params_sha256(restored.params) == evaluation["params_sha256"]
    assert (restored.config.hidden_size, restored.config.learning_rate) == (24, 0.05)
    assert restored.config.workdir == trained


def test_a_damaged_result_is_said_and_the_next_best_stands_in(workdir, capsys):
    best = read_eval(workdir)["step"]
    shutil.rmtree(workdir / "checkpoints" / str(best) / "tree")
    others = {int(path.name) for path in (workdir / "checkpoints").iterdir()} - {best}
    assert restore_run(workdir).step == max(others)
    error = capsys.readouterr().err
    assert error.startswith(f"warning: using step {max(others)} (step {best}: ")
    assert error.count("\n") == 1


def test_what_can_not_be_restored_is_said(workdir, tmp_path):
    with pytest.raises(RunFilesError, match=r"there is no run in .*/nowhere; .* or train a run"):
        restore_run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()

    config = json.loads((workdir / "config.json").read_text())
    run_files.write_json(workdir / "config.json", config | {"hidden_size": 8})
    with pytest.raises(CheckpointError, match="is of another model"):
        restore_run(workdir)
    run_files.write_json(workdir / "config.json", config | {"shape": "round"})
    with pytest.raises(RunFilesError, match=r"config\.json: .*'shape'"):
        restore_run(workdir)
    run_files.write_json(workdir / "config.json", config)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(CheckpointError, match="has saved no checkpoint yet"):
        restore_run(workdir)
    assert not (workdir / "checkpoints").exists()
