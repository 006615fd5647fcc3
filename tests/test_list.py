from experiments.__main__ import list_experiments


def test_every_experiment_is_listed_with_what_it_does():
    found = list_experiments()
    assert found["experiments.mnist_lstm"].startswith("Train an LSTM")
    assert found["experiments.benchmark"].startswith("Compare LSTM implementations")
    assert "experiments.config" not in found
