"""The experiment as a user runs it: command lines in, files and lines out."""

import json
import re
import shutil
import subprocess

import pytest
from small_runs import SMALL, command, read_eval, read_lines, start

from experiments import mnist_lstm
from experiments.training_run.console import ProgressBar, duration


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


def test_dropout_that_drops_nothing_is_said_in_one_line(run, tmp_path):
    status, _, error = run("--workdir", tmp_path, *SMALL, "--epochs", 1, "--dropout", 0.1)
    assert status == 0
    assert error == (
        "warning: --dropout 0.1 drops nothing: it lies between layers, and there is one\n"
    )


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
    assert "--recipe is fast, but the run's is best" in error


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


@pytest.mark.parametrize("epochs", [9, 10, 200])
@pytest.mark.parametrize("splits", [["train", "test"], ["train", "validation", "test"]])
def test_the_lines_of_the_epochs_fit_80_columns_and_stand_below_each_other(capsys, epochs, splits):
    values = [  # loss, accuracy, images a second, seconds
        (2.30259, 0.0, 99, 0.004), (0.0000004, 1.0, 12_345.6, 9.96), (12.3456789, 0.98765, 5e5, 599)
    ]  # fmt: skip
    with ProgressBar(epochs * 60_000, 0) as progress:
        for epoch, (loss, accuracy, speed, seconds) in zip((1, 2, epochs), values, strict=True):
            record = {"epoch": epoch, "step": 469 * epoch}
            record |= {f"{split}_loss": loss for split in splits}
            record |= {f"{split}_accuracy": accuracy for split in splits}
            record |= {"images_per_second": speed, "seconds": seconds}
            progress.print_epoch(record, epochs)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "step"
    assert header.count("loss %") == len(splits)
    assert len(lines) == 3
    ends = [[end.end() for end in re.finditer(r"\S+(?= |$)", line)] for line in lines]
    assert {len(line) for line in [header, *lines]} == {len(header)}
    assert len(header) <= 80
    assert ends[0][2:-2] == ends[1][2:-2] == ends[2][2:-2]
    assert "4 ms" in lines[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0042, "4 ms"), (0.099, "99 ms"), (0.0999, "0.1 s"), (9.949, "9.9 s"), (9.96, "10 s"),
     (599.4, "599 s"), (599.6, "10 min"), (86_400, "24.0 h")],
)  # fmt: skip
def test_a_time_is_said_in_few_characters(seconds, text):
    assert duration(seconds) == text


def test_one_is_said_as_one(run, tmp_path):
    _, output, _ = run("--workdir", tmp_path, *SMALL, "--epochs", 1)
    assert "model   1 layer x 24" in output
    assert "\nlayer 1 28 -> 24, 5,088 parameters\nhead    24 -> 10, 250 parameters\n" in output
    assert "trained        1 epoch in " in output
    assert output.index("compiling, ") < output.index("compiled in ")


@pytest.mark.parametrize("columns", [80, 100])
def test_a_summary_is_flaxs_table_and_needs_no_data(columns, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", str(columns))
    workdir = tmp_path / "run"
    places = ["--dataset", "mnist", "--manual-dir", str(tmp_path / "none")]
    assert mnist_lstm.main(["--summary", "--workdir", str(workdir), *places]) == 0
    output, error = capsys.readouterr()
    assert error == ""
    assert not workdir.exists()
    lines = output.splitlines()
    assert max(map(len, lines)) == columns
    assert "SequenceClassifier Summary" in lines[0]
    assert lines[-1].strip() == "Total Parameters: 819,722 (3.3 MB)"
    assert [path for path in re.findall(r"^│ (\S+)", output, re.MULTILINE) if "l" in path] == [
        "core/l0", "core/l1"
    ]  # fmt: skip
    assert not set("\x1b…") & set(output)  # neither colours nor anything cut short


def test_a_summary_of_a_run_has_the_runs_sizes(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"hidden_size": 24, "num_layers": 1}')
    assert mnist_lstm.main(["--summary", "--workdir", str(tmp_path)]) == 0
    assert "Total Parameters: 5,338 " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_run_in_64_bits_without_a_compiler_says_that_it_scans_and_can_go_on_in_32(
    run, data_dir, tmp_path
):
    workdir = tmp_path / "run"
    unusual = {"JAX_ENABLE_X64": "1", "CXX": "no-such", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    output, _ = start(data_dir, workdir, "--epochs", 1, **unusual).communicate()
    assert output.count("scan (there is no C++ compiler") == 1
    status, output, error = run("--workdir", workdir, "--epochs", 2)
    assert (status, error) == (0, "")
    environment = (workdir / "environment.jsonl").read_text()
    starts = [json.loads(line) for line in environment.splitlines()]
    assert starts[0]["implementation"].startswith("scan (there is no C++ compiler")
    assert f", {starts[1]['implementation']}\n" in output
    evaluation = read_eval(workdir)
    output, _ = start(data_dir, workdir, "--eval-only", "--epochs", 2, **unusual).communicate()
    assert read_eval(workdir)["params_sha256"] == evaluation["params_sha256"], output
    assert read_eval(workdir)["correct"] == pytest.approx(evaluation["correct"], abs=2)


@pytest.mark.slow
def test_a_run_for_which_nothing_is_compiled_trains_slowly(data_dir, tmp_path):
    flags = ["--epochs", 1, "--batch-size", 4000, "--hidden-size", 2]
    output, _ = start(data_dir, tmp_path, *flags, JAX_DISABLE_JIT="1").communicate()
    assert output.count("warning: JAX_DISABLE_JIT is set") == 1
    assert read_eval(tmp_path)["step"] == 1, output


def contents(folder):
    """All that a folder holds, and when each file was last written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def cut_off(data_dir, tmp_path_factory):
    """The workdir of a run of four epochs that was cut off in its third one."""
    workdir = tmp_path_factory.mktemp("cut_off") / "run"
    places = ["--data-dir", str(data_dir), "--workdir", str(workdir)]
    assert mnist_lstm.main([*places, *SMALL, "--epochs", "4", "--checkpoint-every", "5"]) == 0
    checkpoints = workdir / "checkpoints"
    for path in checkpoints.iterdir():  # 50, 55, 56
        if path.name != "50":
            shutil.rmtree(path)
    return workdir


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ([], "eval.json"),
        (["--eval-only"], "eval.json"),
        (["--tensorboard"], "eval.json"),
        (SMALL, "config.json"),
        ([], "metrics.jsonl"),
    ],
)
def test_fewer_epochs_are_refused_and_nothing_is_written(
    run, cut_off, tmp_path, epochs, flags, missing
):
    """Whichever of its files still knows what the run has reached; also at the second try."""
    workdir = shutil.copytree(cut_off, tmp_path / "run")
    (workdir / missing).unlink()
    before = contents(workdir)
    for _ in range(2):
        status, output, error = run("--workdir", workdir, "--epochs", epochs, *flags)
        assert (status, output) == (2, "")
        done = 3 if missing == "metrics.jsonl" else 4
        message = f"error: --epochs is {epochs}, but the run in {workdir} has trained {done} of 4; "
        assert error.startswith(message)
        assert error.count("\n") == 1
        assert contents(workdir) == before


def test_a_workdir_of_another_run_is_refused_with_each_difference(run, tmp_path):
    assert run("--workdir", tmp_path, *SMALL, "--epochs", 1)[0] == 0
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    status, _, error = run("--workdir", tmp_path, "--hidden-size", 32, "--num-layers", 2)
    assert status == 2
    assert "--hidden-size is 32, but the run's is 24" in error
    assert "--num-layers is 2, but the run's is 1" in error
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
        (["--gamma", "0.5"], "--gamma must be at least 1"),
        (["--warmup", "1"], "--warmup must be more than 0 and less than 1"),
        (["--distortion", "6"], "--distortion must be at least 0 and at most 5"),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and less than 1"),
        (["--dropout", "1"], "--dropout must be at least 0 and less than 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--validation-size", "-1"], "--validation-size must be at least 0"),
        (["--validation-size", "4000"], "--validation-size must be from 10 to 3990, but is 4000"),
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
