"""The experiment as a user runs it: command lines in, files and lines out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import SMALL, command, read_eval, read_lines

from experiments import mnist_lstm
from experiments.console import duration, epoch_line


def test_train_evaluate_and_run_again(run, tmp_path):
    status, output, error = run("--workdir", tmp_path, *SMALL, "--epochs", 2)
    assert (status, error) == (0, "")
    assert "test accuracy" in output
    assert "95% interval" in output

    lines = read_lines(tmp_path)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 14), (2, 28)]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert set(lines[0]) == {
        "epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
        "images_per_second", "seconds", "dataset", "device",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dataset"], config["hidden_size"], config["epochs"]) == ("mnist5k", 24, 2)

    evaluation = read_eval(tmp_path)
    assert evaluation["step"] == 28
    assert evaluation["total"] == 1000
    assert evaluation["test_loss"] == lines[1]["test_loss"]
    assert evaluation["test_accuracy"] == lines[1]["test_accuracy"] == evaluation["correct"] / 1000

    # The same command once more: the run is finished, is evaluated, and stays as it is.
    before = (tmp_path / "metrics.jsonl").read_text()
    status, output, _ = run("--workdir", tmp_path, *SMALL, "--epochs", 2)
    assert status == 0
    assert "finished at step 28" in output
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert read_eval(tmp_path) == evaluation

    # Evaluation alone needs no flag of the run's, and an earlier step can be asked for.
    assert run("--workdir", tmp_path, "--eval-only")[0] == 0
    assert read_eval(tmp_path) == evaluation
    assert run("--workdir", tmp_path, "--eval-only", "--step", 14)[0] == 0
    assert read_eval(tmp_path)["step"] == 14
    assert read_eval(tmp_path)["test_loss"] == lines[0]["test_loss"]
    status, _, error = run("--workdir", tmp_path, "--eval-only", "--step", 15)
    assert status == 2
    assert "there are: 14, 28" in error


def test_a_recipe_sets_what_is_left_out(run, tmp_path):
    assert run("--workdir", tmp_path, *SMALL, "--recipe", "best", "--epochs", 1)[0] == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["recipe"] == "best"
    assert config["epochs"] == 1
    assert config["hidden_size"] == 24
    assert config["elastic"] > 0
    assert config["label_smoothing"] > 0
    # The run goes on with its own recipe, and refuses another.
    assert run("--workdir", tmp_path)[0] == 0
    assert run("--workdir", tmp_path, "--eval-only")[0] == 0
    status, _, error = run("--workdir", tmp_path, "--recipe", "fast")
    assert status == 2
    assert "--recipe is fast, the run's is best" in error


def test_a_run_from_before_a_flag_goes_on_with_the_flags_default(run, tmp_path):
    assert run("--workdir", tmp_path, *SMALL, "--epochs", 1)[0] == 0
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["elastic"]
    path.write_text(json.dumps(config))
    assert run("--workdir", tmp_path)[0] == 0


@pytest.mark.parametrize("sequence", ["pixels", "permuted"])
def test_digits_are_read_pixel_by_pixel(run, tmp_path, sequence):
    flags = ["--hidden-size", 8, "--epochs", 1, "--sequence", sequence]
    assert run("--workdir", tmp_path, *SMALL, *flags)[0] == 0
    evaluation = read_eval(tmp_path)
    assert run("--workdir", tmp_path, "--eval-only")[0] == 0
    assert read_eval(tmp_path) == evaluation
    # The order of the pixels is the whole difference between the two.
    assert run("--workdir", tmp_path, "--sequence", "rows")[0] == 2


def test_evaluation_in_a_new_process_gives_the_same_figures(run, data_dir, tmp_path):
    assert run("--workdir", tmp_path, *SMALL, "--epochs", 1)[0] == 0
    evaluation = read_eval(tmp_path)
    subprocess.run(
        command(data_dir, tmp_path, "--epochs", "1", "--eval-only"), check=True, capture_output=True
    )
    assert read_eval(tmp_path) == evaluation


def test_the_validation_set_chooses_the_checkpoint_and_the_test_set_never(run, tmp_path):
    flags = [*SMALL, "--epochs", 6, "--validation-size", 50, "--learning-rate", 0.05]
    assert run("--workdir", tmp_path, *flags)[0] == 0
    lines = read_lines(tmp_path)
    best = max(lines, key=lambda line: (line["validation_accuracy"], line["step"]))
    assert read_eval(tmp_path)["step"] == best["step"]
    assert read_eval(tmp_path)["test_loss"] == best["test_loss"]


def test_more_epochs_can_be_asked_of_a_finished_run(run, tmp_path):
    assert run("--workdir", tmp_path, *SMALL, "--epochs", 1)[0] == 0
    status, output, _ = run("--workdir", tmp_path, "--epochs", 2)
    assert status == 0
    assert "resuming from step 14, in epoch 2" in output
    assert [line["epoch"] for line in read_lines(tmp_path)] == [1, 2]


def test_a_workdir_of_another_run_is_refused_with_each_difference(run, tmp_path):
    assert run("--workdir", tmp_path, *SMALL, "--epochs", 1)[0] == 0
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    status, _, error = run("--workdir", tmp_path, "--hidden-size", 32, "--num-layers", 2)
    assert status == 2
    assert "--hidden-size is 32, the run's is 24" in error
    assert "--num-layers is 2, the run's is 1" in error
    assert "--batch-size" not in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_what_was_saved(run, tmp_path):
    flags = [*SMALL, "--learning-rate", 1e37, "--checkpoint-every", 1]
    status, _, error = run("--workdir", tmp_path, *flags)
    assert status == 2
    assert error.startswith("error: the loss became")
    assert "lower --learning-rate" in error
    assert error.count("\n") == 1
    # The step before was saved, with weights that are huge and finite.
    assert run("--workdir", tmp_path, "--eval-only")[0] == 0
    assert read_eval(tmp_path)["step"] >= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, but is 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, but is -1"),
        (["--batch-size", "4001"], "--batch-size is 4001, but there are only 4000"),
        (["--hidden-size", "0"], "--hidden-size must be at least 1"),
        (["--num-layers", "0"], "--num-layers must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate must be a positive number, but is nan"),
        (["--learning-rate", "0"], "--learning-rate must be a positive number"),
        (["--clip-norm", "-1"], "--clip-norm must be a positive number"),
        (["--weight-decay", "inf"], "--weight-decay must be at least 0"),
        (["--elastic", "-1"], "--elastic must be at least 0"),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and less than 1"),
        (["--dropout", "1"], "--dropout must be at least 0 and less than 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--validation-size", "-1"], "--validation-size must be at least 0"),
        (["--validation-size", "4000"], "of 4000 training images 10 to 3990 can be held out"),
        (["--seed", str(2**32)], "--seed must be at most 4294967295"),
        (["--hidden-size", "16385"], "--hidden-size must be at most 16384"),
        (["--checkpoint-every", "1m"], "--checkpoint-every must be steps, as in 500, or seconds"),
        (["--checkpoint-every", "-5"], "--checkpoint-every must be steps"),
        (["--checkpoint-every", "nans"], "--checkpoint-every must be steps"),
        (["--process-id", "1"], "--process-id must be given with --distributed"),
        (["--step", "3"], "--step must be given with --eval-only"),
        (["--eval-only"], "there is no run in"),
        (["--manual-dir", "/nowhere", "--dataset", "kmnist"], "--manual-dir /nowhere lacks"),
    ],
)
def test_bad_values_are_refused_by_name_in_one_line(run, tmp_path, flags, message):
    workdir = tmp_path / "run"
    status, output, error = run("--workdir", workdir, "--dataset", "mnist5k", *flags)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in output + error
    assert not workdir.exists()


def test_a_workdir_that_is_no_folder_is_refused(run, tmp_path):
    (tmp_path / "file").touch()
    status, _, error = run("--workdir", tmp_path / "file")
    assert status == 2
    assert error == f"error: --workdir must be a folder, but is {tmp_path / 'file'}\n"


@pytest.mark.parametrize("flags", [["--epochs", "x"], ["--precision", "float16"], ["--no-such"]])
def test_flags_that_cannot_be_read_are_refused(run, tmp_path, flags):
    status, _, error = run("--workdir", tmp_path, *flags)
    assert status == 2
    assert flags[0] in error


def test_help_gives_every_flag(run):
    status, output, _ = run("--help")
    assert status == 0
    for flag in ("--workdir", "--dataset", "--validation-size", "--precision", "--eval-only"):
        assert flag in output


def test_help_gives_the_recipes_own_defaults(run):
    for flags in (["--recipe", "best", "--help"], ["--help", "--epochs", 5, "--recipe=best"]):
        status, output, _ = run(*flags)
        assert status == 0
        assert "(default: 20)" in output
    assert "(default: 20)" not in run("--help")[1]


@pytest.mark.parametrize("has_held_out", [False, True])
def test_an_epochs_line_fits_a_narrow_terminal_and_its_columns_stay(has_held_out):
    splits = ["train", "test", *["validation"][:has_held_out]]

    def line(epoch, rate):
        record = {"epoch": epoch, "step": 469 * epoch, "images_per_second": rate}
        record |= {f"{name}_loss": 2.3456 / epoch for name in splits}
        return epoch_line(record | {f"{name}_accuracy": 0.99123 for name in splits}, 20)

    first, last = line(1, 712.3), line(20, 123456.0)
    assert len(last) <= 80
    assert [at for at, c in enumerate(first) if c == "%"] == [
        at for at, c in enumerate(last) if c == "%"
    ]
    assert last.startswith("epoch 20/20  step 9380  train ")
    assert last.endswith("  test 99.12%  123,456 img/s" if has_held_out else "%  123,456 img/s")


def test_durations_are_said_as_people_do():
    assert [duration(s) for s in (0.34, 12.6, 59.7, 1000)] == [
        "0.3 s", "13 s", "1 min 0 s", "16 min 40 s",
    ]  # fmt: skip


def test_the_library_trains_without_tfds():
    """The model, training and checkpoints must be of use where tfds is not installed."""
    code = (
        "import sys, lstm_flax, lstm_flax.checkpoints; print('tensorflow_datasets' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


def test_no_file_of_the_project_is_imported_against_the_one_direction():
    """Leaves import neither training nor each other; the library imports no experiment."""
    root = Path(mnist_lstm.__file__).parents[1]
    for path in (root / "lstm_flax").rglob("*.py"):
        source = path.read_text()
        assert "experiments" not in source.replace("Experiments", ""), path
        if path.parent.name in ("models", "data") or path.stem == "checkpoints":
            assert "lstm_flax.training" not in source, path
