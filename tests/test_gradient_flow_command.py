"""The command line of experiments.gradient_flow."""

import sys

import pytest
from printed import read_csv, table_rows

from experiments.gradient_flow.__main__ import main
from experiments.harness.usage import install_command

SMALL = [
    "--hidden-size", "4", "--images", "20", "--test-images", "10", "--batch-size", "10",
    "--probes", "2", "--clipping-steps", "3", "--dataset", "mnist5k",
]  # fmt: skip


def test_the_command_draws_and_prints_a_part(tmp_path, data_dir, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--data-dir", str(data_dir), "--figures", str(tmp_path / "new"), "--part", "clipping"]
    assert main([*flags, *SMALL]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "clipping.csv",
        "clipping.png",
    ]
    lines = read_csv(tmp_path / "new" / "clipping.csv")
    assert [line["step"] for line in lines] == ["0", "1", "2"] * 4
    rows = table_rows(capsys.readouterr().out)
    assert [row[:2] for row in rows].count(["RNN, gain 1.5", "yes"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, but is 0"),
        (["--seed", "-1"], "--seed must be at least 0, but is -1"),
        (
            ["--seeds", "1", "1"],
            "--seeds must be at least 1 number from 0 to 4294967295, no duplicates, but is 1 1",
        ),
        (["--learning-rate", "nan"], "--learning-rate must be a positive number, but is nan"),
    ],
)
def test_bad_values_are_refused_in_one_line(capsys, flags, message):
    assert main(flags) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*SMALL, "--batch-size", "21"], "--batch-size is 21, but there are only 20 training"),
        (["--dataset", "kmnist", "--manual-dir", "/nowhere"], "--manual-dir /nowhere lacks"),
        (["--figures", __file__], f"--figures {__file__} can't be created (File exists)"),
    ],
)
def test_what_can_not_be_read_or_written_is_said_in_one_line(
    tmp_path, capsys, data_dir, flags, message
):
    pytest.importorskip("matplotlib")
    assert main(["--data-dir", str(data_dir), "--figures", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([]) == 2
    error = f"error: this needs matplotlib: {install_command('figures')}\n"
    assert capsys.readouterr().err == error
