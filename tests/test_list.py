import sys

import pytest

from experiments.__main__ import list_experiments, main


def test_every_experiment_is_listed_with_what_it_does():
    found = list_experiments()
    assert found["experiments.mnist_lstm"].startswith("Train an LSTM")
    assert found["experiments.benchmark"].startswith("Compare LSTM implementations")
    assert "experiments.config" not in found


def test_an_experiment_is_run_by_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments"])
    with pytest.raises(SystemExit) as ended:
        main(["scaling", "--only", "{"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --only must be JSON with batch")


def test_a_name_of_none_is_refused_with_those_that_there_are(capsys):
    assert main(["mnist"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no experiment mnist; there are: accuracy, benchmark, ")
    assert error.count("\n") == 1
    assert main(["--help"]) == 0
    assert "python -m experiments.mnist_lstm" in capsys.readouterr().out
