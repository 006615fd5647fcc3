"""The report of real runs, read as a browser would: what is on the page, and what is not."""

import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from small_runs import SMALL, read_eval, read_lines

from experiments import mnist_lstm
from experiments.harness.usage import install_command
from experiments.report.__main__ import main

STRANGE = "_<b>&amp;'\"{{ 7*7 }} $x^2$"


class Page(HTMLParser):
    """The tables of a page by their caption, each a list of rows of texts, and its pictures."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.pictures, self.text, self._cell = {}, [], "", None
        self.html = path.read_text()
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell = ""
        elif tag == "img":
            self.pictures.append(dict(attributes))

    def handle_endtag(self, tag):
        if tag == "caption":
            self.tables.setdefault(self._cell.strip(), []).append(self._rows)
        elif tag in ("td", "th"):
            self._rows[-1].append(" ".join(self._cell.split()))

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += data

    def table(self, beginning):
        """The only table whose caption begins so, as a dict of rows by their first cell."""
        ((rows,),) = [of for caption, of in self.tables.items() if caption.startswith(beginning)]
        return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """The workdirs of two finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {STRANGE: ["--epochs", 2], "small": ["--epochs", 1, "--hidden-size", 8, "--seed", 5]}
    for name, of in flags.items():
        places = ["--data-dir", data_dir, "--workdir", folder / name]
        assert mnist_lstm.main([*map(str, [*places, *SMALL, *of])]) == 0
    return [folder / name for name in flags]


def report(*flags):
    return main([*map(str, flags)])


def test_the_page_says_what_the_runs_came_to(runs, data_dir, capsys):
    assert report(*runs, "--data-dir", data_dir) == 0
    output, error = capsys.readouterr()
    path = runs[0] / "report.html"
    said = [line.split()[0] for line in output.splitlines()]
    assert (said, error) == (["data", "reading", "reading", "report"], "")
    assert output.endswith(f"report   {path}\n")
    page = Page(path)

    summary = page.table("Test accuracy with its 95% interval")
    assert summary["Run"][1] == "Test accuracy"
    for number, workdir in enumerate(runs, 1):
        evaluation, lines = read_eval(workdir), read_lines(workdir)
        dataset, accuracy, correct, step, epochs, _, speed, parameters = summary[
            f"{number} {workdir.name}"
        ]
        assert dataset == "mnist5k"
        assert accuracy.startswith(f"{evaluation['test_accuracy']:.2%} (")
        assert correct == f"{evaluation['correct']} of 1,000"
        assert step == str(evaluation["step"])
        assert epochs == f"{len(lines)} of {len(lines)}"
        assert speed == f"{np.median([line['images_per_second'] for line in lines]):,.0f}"
        hidden = (24, 8)[number - 1]
        assert parameters == f"{4 * hidden * (28 + hidden + 1) + 10 * (hidden + 1):,}"

        confusion = page.table(
            f"{evaluation['correct']} of 1,000 test images are classified correctly"
        )
        counts = np.array([confusion[str(label)] for label in range(10)], int)
        assert counts.trace() == evaluation["correct"]
        assert counts.sum() == 1000
        # The others are the mistakes, of which those that are shown are told.
        assert f"The 12 most confident of {1000 - evaluation['correct']}." in page.text

    assert page.table("The flags that differ") == {
        "Flag": [f"1 {STRANGE}", "2 small"],
        "--epochs": ["2", "1"],
        "--hidden-size": ["24", "8"],
        "--seed": ["0", "5"],
    }
    assert page.table("Flags that are the same")["--batch-size"] == ["300"]
    for rows in page.tables["The software and machine that trained it"]:
        assert ["jax", jax.__version__] in rows
        assert rows[0] == ["from step", "0"]

    pictures = {picture["alt"]: picture["src"] for picture in page.pictures}
    first, last = (f"{read_lines(runs[0])[k]['test_loss']:.3g}" for k in (0, -1))
    assert any(f"run 1 from {first} to {last} over epochs 1 to 2" in alt for alt in pictures)
    assert sum(alt.startswith("Test image") for alt in pictures) >= 12
    assert_holds_all_that_it_shows(page)
    assert STRANGE in page.text
    assert "<b>" not in page.html
    assert "1 layer of 24 units" in page.text
    assert "not checked" not in page.text


def assert_holds_all_that_it_shows(page):
    assert not re.search(r"https?://", page.html)
    assert "<script" not in page.html
    assert "<link" not in page.html
    assert "url(" not in page.html
    addresses = re.findall(r"\b(?:src|srcset|href)=(.{6})", page.html)
    assert set(addresses) == {'"data:'}
    assert all(picture["alt"] for picture in page.pictures)


def test_one_run_is_compared_with_none(runs, data_dir, tmp_path):
    workdir, path = tmp_path / "run", tmp_path / "new" / "page.html"
    shutil.copytree(runs[0], workdir, ignore=shutil.ignore_patterns("checkpoints"))
    assert report(workdir, "--data-dir", data_dir, "--output", path) == 0
    page = Page(path)
    assert_holds_all_that_it_shows(page)
    assert "differ" not in page.text
    assert page.table("The run's flags")["--hidden-size"] == ["24"]


def test_runs_are_reported_as_far_as_they_go(runs, data_dir, tmp_path, capsys):
    young, broken, other = (tmp_path / name for name in ("young", "broken", "other"))
    config = json.loads((runs[0] / "config.json").read_text())
    young.mkdir()
    (young / "config.json").write_text(json.dumps(config | {"sequence": "pixels"}))
    shutil.copytree(runs[0], broken, ignore=shutil.ignore_patterns("checkpoints"))
    metrics = (broken / "metrics.jsonl").read_text()
    metrics = metrics.replace("device", "machine")
    (broken / "metrics.jsonl").write_text(f'{{"epoch": 1,\n[]\n{{"epoch": 1}}\n{metrics[-400:]}')
    (broken / "environment.jsonl").write_bytes(b"\xff\n{}")
    (broken / "eval.json").write_text('{"step": 28')
    shutil.copytree(runs[0], other)
    (other / "config.json").write_text(json.dumps(config | {"dataset": "kmnist", "epochs": 9}))

    places = ["--data-dir", data_dir, "--manual-dir", tmp_path / "nowhere"]
    assert report(young, broken, other, *places) == 0
    output, error = capsys.readouterr()
    assert error == ""
    says = [line.split(": ", 1)[1] for line in output.splitlines() if line.startswith("missing")]
    unsaved = "its confusion matrix and its mistakes: the run in {} has saved no checkpoint yet"
    assert says[0].startswith("all epochs: none is finished yet")
    assert says[1].startswith("the software and machine it was trained on")
    assert says[2] == unsaved.format(young)
    assert says[3] == "the curves of epoch 1: damaged in metrics.jsonl"
    assert says[4] == unsaved.format(broken)
    assert says[5].startswith("7 of 9 epochs: the run is still training, or was stopped")
    assert says[6].startswith(f"its confusion matrix and its mistakes: --manual-dir {tmp_path}")
    assert len(says) == 7

    page = Page(young / "report.html")
    assert all(line in page.text for line in says)
    assert "The runs learned different datasets (mnist5k, kmnist)" in page.text
    summary = page.table("Test accuracy")
    assert summary["1 young"][:4] == ["mnist5k", "–", "–", "–"]
    # Of a damaged evaluation the last epoch's accuracy is left, of a whole one all.
    evaluation = read_eval(other)
    unchecked = ", as recorded, not checked"
    assert summary["2 broken"][1:3] == [f"{evaluation['test_accuracy']:.2%}{unchecked}", "–"]
    assert summary["3 other"][1].startswith(f"{evaluation['test_accuracy']:.2%} (")
    assert summary["3 other"][1].endswith(f"){unchecked}")
    assert any("Test error by epoch: run 2" in picture["alt"] for picture in page.pictures)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["no/such/run"], "there is no run in no/such/run"),
        ([], "pass the workdir of a run"),
    ],
)
def test_what_can_not_be_reported_gets_one_line(flags, says, capsys):
    assert report(*flags) == 2
    assert_one_line(capsys, says)


@pytest.fixture(scope="module")
def stranger(runs, tmp_path_factory):
    """A copy of a run without its checkpoints, to be filled with what no run writes."""
    workdir = tmp_path_factory.mktemp("stranger") / "run"
    shutil.copytree(runs[0], workdir, ignore=shutil.ignore_patterns("checkpoints"))
    return workdir


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", "10000000000"),
        ("epoch", "-5"),
        ("epoch", "1.5"),
        ("epoch", "true"),
        ("epoch", "9" * 400),
        ("test_accuracy", "5.0"),
        ("test_accuracy", '"0.9"'),
        ("seconds", "NaN"),
        ("seconds", "9" * 400),
        ("train_loss", "-Infinity"),
        ("images_per_second", "1e999"),
    ],
)
def test_numbers_that_no_run_has_are_refused(stranger, data_dir, capsys, name, value):
    line = read_lines(stranger)[0] | {name: "HERE"}
    metrics = (stranger / "metrics.jsonl").read_text()
    (stranger / "metrics.jsonl").write_text(json.dumps(line).replace('"HERE"', value))
    assert report(stranger, "--data-dir", data_dir) == 2
    assert_one_line(capsys, f"metrics.jsonl, line 1: {name} must be a")
    (stranger / "metrics.jsonl").write_text(metrics)


def nest(path):
    path.write_text('{"epoch": ' + "[" * 200_000 + "]" * 200_000 + "}")


def repeat(path):
    path.write_text(2 * path.read_text())


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("metrics.jsonl", nest, "nested too deeply"),
        ("metrics.jsonl", repeat, "line 3: its epoch is out of order"),
        ("metrics.jsonl", os.mkfifo, "not a regular file"),
        ("metrics.jsonl", lambda path: path.symlink_to("/dev/zero"), "it is a link"),
        ("metrics.jsonl", lambda path: (path.touch(), os.truncate(path, 2**33)), "than 8 MiB"),
        ("eval.json", nest, "nested too deeply"),
        ("eval.json", os.mkfifo, "not a regular file"),
        ("eval.json", lambda path: path.write_text('{"step": 1, "correct": 9, "total": 4}'),
         "correct is larger than total"),
        ("eval.json", lambda path: path.write_text('{"step": 1, "correct": 1, "total": 0}'),
         "total must be an integer"),
        ("environment.jsonl", os.mkfifo, "not a regular file"),
        ("environment.jsonl", lambda path: path.write_text("{}\n" * 2000), "more starts"),
    ],
)  # fmt: skip
def test_files_that_no_run_writes_are_refused(stranger, data_dir, capsys, name, make, says):
    path = stranger / name
    content = path.read_bytes()
    if make is not repeat:
        path.unlink()
    make(path)
    assert report(stranger, "--data-dir", data_dir) == 2
    assert_one_line(capsys, says)
    path.unlink()
    path.write_bytes(content)


def test_what_can_not_be_read_or_written_gets_one_line(runs, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert report(runs[1], tmp_path) == 2
    assert_one_line(capsys, f"{tmp_path}/config.json can't be read")


def test_without_the_packages_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as if it were not installed
    assert report("run") == 2
    assert_one_line(capsys, f"this needs jinja2: {install_command('report')}")


def assert_one_line(capsys, says):
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
