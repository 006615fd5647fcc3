import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from printed import read_csv, table_rows

from experiments.depth.__main__ import main
from experiments.depth.measure import first_of_each_class, step_seconds, t_interval
from experiments.depth.parameters import KINDS, count, formula, make_model, total
from experiments.harness.short_training import Recipe, accuracy, on_device, train
from experiments.harness.usage import install_command
from experiments.training_run.run_files import params_sha256
from lstm_flax.data import Split
from lstm_flax.training import Keys, create_train_state, to_floats


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("hidden_size", [1, 8, 128])
def test_the_formula_counts_the_parameters(kind, num_layers, hidden_size):
    model = make_model(kind, num_layers, hidden_size)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 5, 28)))["params"]
    counted = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert formula(kind, num_layers, hidden_size) == counted
    assert total(count(kind, num_layers, hidden_size)) == counted


def test_the_formula_in_numbers():
    # 4 (256 (28 + 256) + 256) + 4 (256 (256 + 256) + 256) + 2570
    assert formula("LSTM", 2, 256) == 291_840 + 525_312 + 2_570
    assert formula("GRU", 1, 2) == 3 * (2 * 30 + 2) + 2 + 30
    assert formula("RNN", 1, 2) == 2 * 30 + 2 + 30


def test_parameters_are_counted_where_they_are():
    assert count("LSTM", 2, 3) == {
        "layer 1": {"input to hidden": 28 * 12, "hidden to hidden": 3 * 12, "bias": 12},
        "layer 2": {"input to hidden": 3 * 12, "hidden to hidden": 3 * 12, "bias": 12},
        "dense layer": {"dense layer": 3 * 10 + 10},
    }
    assert count("GRU", 1, 3)["layer 1"]["bias"] == 9 + 3


def test_an_interval_is_students():
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    # The 97.5% quantile of t with two degrees of freedom, from its table, times 1 / sqrt(3).
    assert mean == pytest.approx(2)
    assert high - mean == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    intervals = [t_interval(values) for values in draws]
    assert np.mean([low < 0 < high for _, low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_a_subset_has_as_many_of_each_class():
    labels = np.array([1, 1, 1, 0, 0, 2, 0], np.int32)
    split = Split(np.arange(7, dtype=np.uint8)[:, None, None], labels)
    subset = first_of_each_class(split, 5)
    assert subset.labels.tolist() == [1, 1, 0, 0, 2]
    assert subset.images.ravel().tolist() == [0, 1, 3, 4, 5]
    assert first_of_each_class(split, 100).labels.tolist() == labels.tolist()


def stripes(count):
    """Images whose bright row says their class, late enough that the end remembers it."""
    labels = np.arange(count, dtype=np.int32) % 10
    images = np.zeros((count, 28, 28), np.uint8)
    images[np.arange(count), 18 + labels] = 255
    return on_device(Split(images, labels))


def initial_state(model, recipe, train_set, keys):
    sample = to_floats(train_set["image"][:1])
    return create_train_state(model, recipe.optimizer(train_set), sample, keys.init)


def test_training_learns_and_is_the_seeds_own():
    recipe, model, train_set = Recipe(12, 50, 2e-2), make_model("GRU", 1, 16), stripes(200)
    trained = []
    for keys in map(Keys.from_seed, (0, 1, 0)):
        state = initial_state(model, recipe, train_set, keys)
        trained.append(train(state, recipe, train_set, keys))
    assert [int(state.step) for state in trained] == [12 * 4] * 3
    assert min(accuracy(state, stripes(70)) for state in trained) > 0.5
    first, other, again = (params_sha256(state.params) for state in trained)
    assert first == again != other


def test_timing_a_step_leaves_the_state_to_be_trained():
    recipe, train_set = Recipe(1, 30, 1e-3), stripes(100)
    state = initial_state(make_model("RNN", 1, 4), recipe, train_set, Keys.from_seed(0))
    seconds = step_seconds({4: state}, recipe, train_set, rounds=2)
    assert seconds[4] > 0
    assert int(state.step) == 0


@pytest.mark.slow
def test_the_command_reports_what_it_measured(data_dir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sizes = ["--layers", 1, "--hidden-size", 8, "--epochs", 1, "--seeds", 0, 1, "--rounds", 2]
    amount = ["--train-images", 200, "--batch-size", 100, "--dataset", "mnist5k"]
    places = ["--data-dir", data_dir, "--figures", tmp_path / "figures"]
    assert main([*map(str, [*sizes, *amount, *places])]) == 0
    printed = capsys.readouterr().out
    assert "mnist5k: 200 training and 1,000 test images" in printed
    for name in ("depth", "depth_parameters"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    results = read_csv(tmp_path / "figures" / "depth.csv")
    assert [line["kind"] for line in results] == list(KINDS)
    seeds = [[float(line[f"accuracy_seed_{seed}"]) for seed in (0, 1)] for line in results]
    for line, of_line in zip(results, seeds, strict=True):
        assert all(0 < accuracy <= 1 for accuracy in of_line)
        mean, low, high = (100 * value for value in t_interval(of_line))
        assert float(line["accuracy_low"]) == pytest.approx(low / 100, rel=1e-5)
        (row,) = (row for row in table_rows(printed) if row[0] == line["kind"])
        assert row[1:4] == ["1", *[f"{formula(line['kind'], 1, 8):,}"] * 2]
        assert row[5] == f"{float(line['milliseconds']):.1f}"
        assert row[6] == f"{mean:.2f} ({low:.2f} to {high:.2f})"

    parameters = read_csv(tmp_path / "figures" / "depth_parameters.csv")
    totals = [line for line in parameters if line["place"] == "all"]
    assert all(line["parameters"] == line["formula"] for line in totals)
    parts = [int(line["parameters"]) for line in parameters if line["place"] != "all"]
    assert sum(parts) == formula("LSTM", 1, 8)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--layers", "0"], "--layers must be numbers of at least 1"),
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--hidden-size", "0"], "--hidden-size must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate must be a positive number"),
        (["--figures", __file__], "can't be created"),
    ],
)
def test_flags_that_can_not_be_used_get_one_line(flags, says, capsys):
    pytest.importorskip("matplotlib")
    assert_refused(flags, says, capsys)


def test_a_batch_that_the_data_can_not_fill_gets_one_line(data_dir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    places = ["--dataset", "mnist5k", "--data-dir", str(data_dir), "--figures", str(tmp_path)]
    flags = ["--train-images", "20", "--batch-size", "21"]
    assert_refused([*places, *flags], "--batch-size is 21, but there are only 20", capsys)


def test_without_matplotlib_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert_refused([], f"this needs matplotlib: {install_command('figures')}", capsys)


def assert_refused(flags, says, capsys):
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
