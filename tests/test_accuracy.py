import pytest
from printed import table_rows
from small_runs import SMALL, read_eval

from experiments import accuracy


@pytest.mark.slow
def test_seeds_are_runs_of_the_experiment_and_their_mean_is_told(data_dir, tmp_path, capsys):
    flags = " ".join(["--data-dir", str(data_dir), "--epochs 1", *SMALL])
    argv = ["--workdir", str(tmp_path), "--recipe", "fast", "--seeds", "3", "8"]
    assert accuracy.main([*argv, f"--flags={flags}"]) == 0
    a, b = (read_eval(tmp_path / f"fast-seed{seed}") for seed in (3, 8))
    assert a["params_sha256"] != b["params_sha256"]
    rows = table_rows(capsys.readouterr().out)
    assert rows[1] == ["3", f"{a['correct']} of 1,000", f"{a['test_accuracy']:.2%}"]
    half = abs(a["test_accuracy"] - b["test_accuracy"]) / 2
    mean, spread = (a["test_accuracy"] + b["test_accuracy"]) / 2, half * 2**0.5
    # The test set has 1,000 images, so more than one digit would mean nothing.
    assert rows[-1][-1] == f"{100 * mean:.1f} ± {100 * spread:.1f} %"
    assert (tmp_path / "fast.csv").read_text().count("\n") == 3


def test_a_run_that_fails_ends_it_with_its_status(tmp_path, capsys):
    argv = ["--workdir", str(tmp_path), "--flags=--epochs 0"]
    assert accuracy.main(argv) == 2
    assert "error: --epochs must be at least 1" in capsys.readouterr().err
