"""The notebook for Colab, executed outside of Colab as it is, but for the values in its form."""

import base64
import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from small_runs import SMALL, read_eval, read_lines

from experiments.read_digit.__main__ import Options
from experiments.training_run.config import Config

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "colab.ipynb"
FIRST_EPOCHS, ALL_EPOCHS = 2, 3
FORM = {"repository": "", "dataset": "mnist5k", "recipe": "fast", "resume_to": ALL_EPOCHS}
FLAGS = [*SMALL[2:], "--epochs", str(FIRST_EPOCHS)]  # without the dataset, which has a field


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def fill_in(notebook, form):
    """Put other values in place of all those in the form."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert re.findall(r"^(\w+) = .*# @param", cell.source, re.MULTILINE) == list(form)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in form.items())


def execute(client, last=None):
    """Run all cells, or all up to one of that name; returns them as they are then, by name."""
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)
        if cell.id == last:
            break
    return {cell.id: copy.deepcopy(cell) for cell in client.nb.cells}


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    shown = [output.data for output in cell.outputs if output.output_type == "display_data"]
    return [base64.b64decode(data["image/png"]) for data in shown]


def epochs_printed(cell):
    """`(epoch, step, test accuracy)` of each epoch that the command in a cell trained."""
    line = r"epoch +(\d+)/\d+ +(\d+)  [\d.]+ +[\d.]+  [\d.]+ +(\d+\.\d\d) "
    return re.findall(line, printed(cell))


def epochs_recorded(lines):
    """The same, from the lines of metrics.jsonl."""
    return [
        (str(line["epoch"]), str(line["step"]), f"{100 * line['test_accuracy']:.2f}")
        for line in lines
    ]


@pytest.mark.slow
def test_run_all_trains_evaluates_resumes_and_shows_and_run_again_trains_nothing(
    notebook, data_dir, tmp_path
):
    workdir = tmp_path / "my run"
    places = {"workdir": str(workdir), "data_dir": str(data_dir)}
    fill_in(notebook, FORM | {"flags": " ".join(FLAGS)} | places)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    with client.setup_kernel():
        first = execute(client)
        lines, evaluation = read_lines(workdir), read_eval(workdir)
        again = execute(client, last="train")
        notebook.cells.append(
            nbformat.v4.new_code_cell('run(sys.executable, "-m", "experiments.nothing")')
        )
        with pytest.raises(CellExecutionError, match="the command ended with status 1"):
            client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
    assert "No module named experiments.nothing" in printed(notebook.cells[-1])

    epochs = epochs_recorded(lines)
    assert len(epochs) == ALL_EPOCHS
    assert epochs_printed(first["train"]) == epochs[:FIRST_EPOCHS]
    resumed = printed(first["resume"])
    step = lines[FIRST_EPOCHS - 1]["step"]
    assert f"resuming from step {step}, in epoch {FIRST_EPOCHS + 1}" in resumed
    assert epochs_printed(first["resume"]) == epochs[FIRST_EPOCHS:]
    origins = re.findall(r"^epoch.*  (from before|new)\s*$", resumed, re.MULTILINE)
    assert origins == ["from before"] * FIRST_EPOCHS + ["new"]

    shown = printed(first["evaluate"])
    shown = json.loads(shown[shown.index("{") :])
    trained = {name: lines[FIRST_EPOCHS - 1][name] for name in shown.keys() & lines[0].keys()}
    assert trained.keys() == {"step", "dataset", "test_loss", "test_accuracy"}
    assert shown == shown | trained
    assert evaluation["step"] == lines[-1]["step"]
    correct = f"{evaluation['test_accuracy']:.2%} .* {evaluation['correct']} of 1,000 correct"
    assert re.search(correct, resumed)

    assert f"finished at step {evaluation['step']}" in printed(again["train"])
    assert (read_lines(workdir), read_eval(workdir)) == (lines, evaluation)

    folder = workdir / "figures"
    figures = [(folder / f"{name}.png").read_bytes() for name in ("read_digit", "gates")]
    assert pictures(first["inspect"]) == figures
    used = printed(first["use"])
    final = re.search(r"^final   (\d)", printed(first["inspect"]), re.MULTILINE)[1]
    assert re.search(r"read as \[(.*)\]", used)[1].split()[8] == final
    shapes = dict(re.findall(r"^([\w.]+) +(\(.*\))$", used, re.MULTILINE))
    assert shapes == {
        "rnn.weight_ih_l0": "(96, 28)", "rnn.weight_hh_l0": "(96, 24)", "rnn.bias_ih_l0": "(96,)",
        "rnn.bias_hh_l0": "(96,)", "lin.weight": "(10, 24)", "lin.bias": "(10,)",
    }  # fmt: skip


def test_it_is_kept_small_and_as_nobody_has_run_it(notebook):
    nbformat.validate(notebook)
    assert len(code_cells(notebook)) < 10
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert cell.metadata.keys() <= {"tags"}
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text())


def test_every_flag_in_it_is_one_that_its_command_has(notebook):
    found = set()
    for cell in notebook.cells:
        options = Options if "experiments.read_digit" in cell.source else Config
        known = {field.name.replace("_", "-") for field in dataclasses.fields(options)}
        flags = set(re.findall(r"--([a-z-]+)", cell.source))
        assert flags <= known
        found |= flags
    assert found >= {"workdir", "data-dir", "dataset", "recipe", "eval-only", "epochs", "index"}


def test_the_address_follows_from_pyproject(tmp_path):
    files = [".ci/address", "pyproject.toml", "README.md", "experiments/colab.ipynb"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def write(urls):
        text = (ROOT / "pyproject.toml").read_text()
        (tmp_path / "pyproject.toml").write_text(text.replace("[project.urls]", urls))
        subprocess.run([sys.executable, tmp_path / ".ci" / "address"], check=True)
        first = code_cells(nbformat.read(tmp_path / files[-1], as_version=4))[0].source
        return first.splitlines()[0], (tmp_path / "README.md").read_text()

    # The tree is as its own pyproject.toml says.
    write("[project.urls]")
    assert all((tmp_path / name).read_text() == (ROOT / name).read_text() for name in files)
    address = "https://github.com/somebody/somewhere"
    for spelled in (address, f"{address}.git"):
        field, readme = write(f'[project.urls]\nRepository = "{spelled}"')
        assert field.startswith(f'repository = "{spelled}"  # @param')
        path = "github/somebody/somewhere/blob/main/experiments/colab.ipynb"
        assert f'<a href="https://colab.research.google.com/{path}">' in readme
    write("[project.urls]")
    assert all((tmp_path / name).read_text() == (ROOT / name).read_text() for name in files)
