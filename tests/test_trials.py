"""The ideas that are compared with the recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from printed import table_rows

from experiments.training_run import from_config
from experiments.training_run.config import RECIPES, Config
from experiments.trials.__main__ import main
from experiments.trials.ideas import IDEAS
from experiments.trials.learn import answer, config_of, train
from lstm_flax import training
from lstm_flax.training import Keys, Metrics

RECIPE = Config(hidden_size=6, batch_size=20, **RECIPES["best"] | {"epochs": 2})


def some_digits(number: int) -> dict[str, jax.Array]:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (number, 28, 28), np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(number) % 10}


def test_the_first_idea_is_what_the_recipe_does():
    data, keys = some_digits(60), Keys.from_seed(4)
    config = config_of(IDEAS["recipe"], RECIPE, 4)
    state = from_config.train_state(config, 60, keys.init)
    for _ in range(2):
        state, _ = training.train_steps(
            state, Metrics.empty(), data, keys, 3, batch_size=20,
            augment=from_config.augment(config), label_smoothing=config.label_smoothing,
        )  # fmt: skip
    found = train(IDEAS["recipe"], config, data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, state.params)


DATA = some_digits(50)  # the last batch of an epoch is not full


@pytest.fixture(scope="module")
def recipe():
    """The parameters that the recipe leads to."""
    return train(IDEAS["recipe"], config_of(IDEAS["recipe"], RECIPE, 0), DATA)


@pytest.mark.parametrize("name", [name for name in IDEAS if name != "recipe"])
def test_each_idea_trains_another_model(recipe, name):
    config = config_of(IDEAS[name], RECIPE, 0)
    params = train(IDEAS[name], config, DATA, [recipe] * IDEAS[name].has_teachers)
    assert bool(training.is_finite(params))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, IDEAS[name].extend(recipe))
    assert max(jax.tree.leaves(moved)) > 1e-4
    answers = answer(IDEAS[name], config, params, DATA)
    assert answers.is_correct.shape == answers.loss.shape == (50,)
    assert 0 < answers.loss.mean() < 5


@pytest.mark.slow
def test_ideas_are_compared_and_kept(data_dir, tmp_path, capsys):
    flags = ["--dataset", "mnist5k", "--data-dir", str(data_dir), "--workdir", str(tmp_path)]
    flags += ["--hidden-size", "8", "--epochs", "1", "--held-out", "500", "--seeds", "0", "1"]
    assert main([*flags, "--ideas", "distilled", "--teachers", "1", "5"]) == 0
    rows = table_rows(capsys.readouterr().out)
    assert [row[0] for row in rows[1:]] == ["recipe", "distilled"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 5  # seeds 0, 1 and 5 of the recipe, two students
    assert main([*flags, "--ideas", "distilled", "--teachers", "1", "5"]) == 0
    assert table_rows(capsys.readouterr().out) == rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept
    assert main([*flags, "--ideas", "luck"]) == 2
    assert "--ideas: 'luck' is none of recipe, fading" in capsys.readouterr().err
