import json

import pytest

from experiments import scaling

TINY = {"batch": 8, "steps": 4, "hidden": 16, "layers": 1}


def test_exponents_are_those_of_the_powers():
    sizes = [64, 128, 256]
    assert scaling.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert scaling.exponent(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0)


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_is_divided_among_devices():
    small, large = (
        scaling.measure_apart(TINY | {"batch": batch, "devices": 1}, implementation="scan")
        for batch in (128, 1024)
    )
    shared = scaling.measure_apart(TINY | {"batch": 1024, "devices": 2}, implementation="scan")
    assert all(measured["seconds"] > 0 for measured in (small, large, shared))
    assert large["bytes"] / small["bytes"] == pytest.approx(8, rel=0.2)
    assert large["bytes"] / shared["bytes"] == pytest.approx(2, rel=0.2)


def test_one_size_is_measured_here(capsys):
    assert scaling.main(["--only", json.dumps(TINY)]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["seconds"] > 0
    assert measured["bytes"] > 0


@pytest.mark.parametrize("only", ["{", "[8]", '{"batch": 8}', json.dumps(TINY | {"steps": 0})])
def test_sizes_that_can_not_be_measured_get_one_line(only, capsys):
    assert scaling.main(["--only", only]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --only must be JSON with batch, steps, hidden, layers, each")
    assert error.count("\n") == 1
