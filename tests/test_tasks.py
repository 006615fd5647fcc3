"""The tasks to copy, run short: they learn, and PyTorch's weights move as ours do."""

import re
from pathlib import Path

import numpy as np
import pytest

from experiments import adding, characters, sunspots, vowels

TASKS = ("adding", "characters", "sunspots", "vowels")


@pytest.fixture
def run(capsys):
    """Run a task; returns the numbers that it printed, by what stands before them."""

    def run(task, *flags):
        assert task.main([*map(str, flags)]) == 0
        lines = re.findall(
            r"^(always 1|5-gram|AR\(9\)|\w+) +([\d.]+)(?: ± [\d.]+)?$",
            capsys.readouterr().out,
            re.MULTILINE,
        )
        return {name: float(number) for name, number in lines}

    return run


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_short_enough_to_read(name):
    path = Path(adding.__file__).with_name(f"{name}.py")
    assert len(path.read_text().splitlines()) <= 120


def test_adding_comes_close_to_the_sum(run):
    printed = run(adding, "--steps", 300)
    assert printed["lstm_flax"] < 0.3 * printed["always 1"]


def test_adding_in_pytorch_follows_the_same_steps(run):
    pytest.importorskip("torch")
    printed = run(adding, "--steps", 10, "--hidden-size", 8, "--torch")
    assert printed["PyTorch"] == pytest.approx(printed["lstm_flax"], rel=1e-3)


def test_characters_learn_from_the_carry_that_they_keep(run):
    few = run(characters, "--steps", 1, "--hidden-size", 32)
    more = run(characters, "--steps", 40, "--hidden-size", 32)
    assert more["lstm_flax"] < 5 < few["lstm_flax"]
    assert more["5-gram"] == few["5-gram"] > 1


def test_n_grams_of_a_text_that_repeats_itself_are_sure():
    assert characters.n_gram_bits("ab" * 1000, "ab" * 100) < 0.1
    assert characters.n_gram_bits("ab", "ab" * 100, order=0) == 1


def test_sunspots_are_forecast_better_than_by_the_last_cycle(run):
    pytest.importorskip("statsmodels")
    printed = run(sunspots)
    assert printed["lstm_flax"] < printed["cycle"] < printed["last"]
    assert 0.6 < printed["covered"] < 0.95


def test_an_autoregression_goes_on_with_a_wave():
    wave = 50 + 50 * np.sin(np.arange(100) * 0.6)
    origins = np.array([60, 75])
    expected = np.stack([wave[o : o + sunspots.HORIZON] for o in origins], axis=1)
    np.testing.assert_allclose(sunspots.autoregression(wave, 50, origins), expected, atol=1e-3)


def test_speakers_are_told_apart_by_their_vowels(run):
    pytest.importorskip("sktime")
    few = run(vowels, "--steps", 1, "--hidden-size", 16, "--seeds", 2)
    more = run(vowels, "--steps", 100, "--hidden-size", 16, "--seeds", 2)
    assert few["lstm_flax"] < 50 < 90 < more["lstm_flax"] < 100
    assert more["logistic"] == few["logistic"] > 95


def test_the_split_of_the_vowels_is_the_published_one():
    pytest.importorskip("sktime")
    (heard, speakers), (new, answers) = vowels.read("train"), vowels.read("test")
    assert np.bincount(speakers).tolist() == [30] * 9
    assert np.bincount(answers).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert {u.shape[1] for u in [*heard, *new]} == {12}
    lengths = [len(u) for u in [*heard, *new]]
    assert (min(lengths), max(lengths)) == (7, 29)


def test_a_standard_deviation_needs_two_seeds(capsys):
    assert vowels.main(["--seeds", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: --seeds must be at least 2, for a standard deviation, but is 1\n"
    )


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--seed", "-1"], ["--seed", str(2**70)]])
def test_a_flag_out_of_bounds_gets_one_line(flags, capsys):
    assert adding.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flags[0]} must be at ")
    assert error.count("\n") == 1
