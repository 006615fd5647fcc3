import pytest

from experiments.training_run.console import accuracy_interval


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 10_000), (9_961, 10_000)])
def test_an_accuracys_interval_is_scipys(correct, total):
    from scipy import stats

    expected = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert accuracy_interval(correct, total) == pytest.approx(tuple(expected), abs=1e-12)
