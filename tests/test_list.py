from experiments.__main__ import list_experiments, main


def test_every_experiment_is_listed_with_what_it_does():
    found = list_experiments()
    assert found["experiments.mnist_lstm"].startswith("Train an LSTM")
    assert found["experiments.benchmark"].startswith("Compare LSTM implementations")
    names = {name.removeprefix("experiments.") for name in found}
    assert names == {
        "accuracy", "adding", "benchmark", "characters", "depth", "draw", "export", "gradient_flow",
        "mnist_lstm", "predict", "read_digit", "report", "scaling", "sunspots", "trials", "vowels",
    }  # fmt: skip


def test_a_name_of_none_is_refused_with_those_that_there_are(capsys):
    assert main(["mnist"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: there is no experiment mnist; choose one of: accuracy, adding, bench"
    )
    assert error.count("\n") == 1
    assert main(["--help"]) == 0
    assert "python -m experiments.mnist_lstm" in capsys.readouterr().out
