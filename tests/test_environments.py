"""Every command on machines that lack something: a status, a line, and nothing half-written."""

import dataclasses
import errno
import importlib
import io
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_runs import SMALL
from small_runs import command as command_of_small_run

from experiments import mnist_lstm
from experiments.__main__ import list_experiments
from experiments.harness.command import command
from experiments.harness.output_files import replacing
from experiments.harness.usage import UsageError, command_line, counted, read_flags
from experiments.training_run.config import Config

COMMANDS = [name.removeprefix("experiments.") for name in list_experiments()]
TINY_SIZES = '{"batch": 8, "steps": 4, "hidden": 16, "layers": 1}'


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The workdir of a finished run, a picture with an accent in its name beside it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--data-dir", data_dir, "--workdir", workdir, *SMALL, "--epochs", 1]
    assert mnist_lstm.main([*map(str, flags)]) == 0
    pixels = Image.new("L", (40, 40))
    pixels.paste(255, (18, 8, 22, 32))
    pixels.save(workdir.parent / "één.png")
    return workdir


@pytest.fixture
def start(tmp_path):
    """Run a command line as a user does, from a folder and with temporary files of its own."""

    def start(name, *flags, shell='exec "$@"', **environment):
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        project = Path(__file__).parents[1]
        outcome = subprocess.run(
            ["bash", "-c", shell, "shell", sys.executable, "-m", "experiments", name]
            + [str(flag) for flag in flags],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            # XLA may remark on what it loads from the tests' cache.
            env=os.environ
            | {"PYTHONPATH": str(project), "TMPDIR": str(scratch), "TF_CPP_MIN_LOG_LEVEL": "3"}
            | {key: str(value) for key, value in environment.items()},
        )
        assert "Traceback" not in outcome.stdout + outcome.stderr
        assert list(scratch.iterdir()) == []
        return outcome

    return start


def error_of(outcome):
    """The one line of a command that refused; progress has `...` at its end."""
    assert outcome.returncode == 2, outcome
    lines = [line for line in outcome.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, outcome.stderr
    return lines[0].removeprefix("error: ")


UNKNOWN_PLATFORMS = {
    "mnist_lstm": (["--dataset", "mnist5k", *SMALL], "cuda"),
    "scaling": (["--only", TINY_SIZES], "nonsense"),
    "draw": (["--no-browser", "--port", 0], "tpu"),
    "benchmark": (["--peers", "--cases", "batch=1,hidden=4,layers=1", "--rounds", 1], "cuda"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNKNOWN_PLATFORMS)
def test_a_platform_that_is_not_there(start, trained, data_dir, tmp_path, name):
    flags, platform = UNKNOWN_PLATFORMS[name]
    if name == "mnist_lstm":
        flags = [*flags, "--data-dir", data_dir]
    if name == "draw":
        flags = [*flags, "--workdir", trained]
    error = error_of(start(name, *flags, JAX_PLATFORMS=platform))
    assert f"JAX_PLATFORMS is {platform}, but this machine has no {platform}; set it to" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_home_that_can_not_be_written(start, tmp_path):
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    error = error_of(start("depth", "--dataset", "mnist5k", HOME=home))
    assert error == (
        f"data can't be prepared in {home}/tensorflow_datasets/mnist5k/pixels (Not a directory); "
        f"pass another folder with --data-dir"
    )


@pytest.mark.slow
def test_without_a_home_stdout_or_a_place_for_fonts_a_report_is_written(
    start, trained, data_dir, tmp_path
):
    flags = [trained, "--data-dir", data_dir, "--output", tmp_path / "new" / "report.html"]
    outcome = start("report", *flags, shell='unset HOME; exec "$@" >&-', MPLCONFIGDIR="/dev/null/x")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert (tmp_path / "new" / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.slow
def test_without_a_compiler_and_with_ascii_all_is_trained_and_said(start, data_dir, tmp_path):
    of_each = " ".join(["--data-dir", str(data_dir), "--epochs 1", *SMALL])
    flags = ["--recipe", "fast", "--seeds", 1, 2, f"--flags={of_each}"]
    nowhere = {"CXX": "/nowhere/c++", "XDG_CACHE_HOME": tmp_path / "cache"}
    outcome = start("accuracy", *flags, PYTHONIOENCODING="ascii", **nowhere)
    assert outcome.returncode == 0, outcome.stderr
    assert "| mean ? standard deviation |" in outcome.stdout
    assert "trained        1 epoch in " in outcome.stdout
    assert (tmp_path / "runs" / "accuracy" / "fast.csv").read_text().count("\n") == 3


@pytest.mark.slow
def test_a_name_that_the_terminal_lacks_is_printed_all_the_same(start, trained):
    flags = ["--workdir", trained, trained.parent / "één.png"]
    outcome = start("predict", *flags, PYTHONIOENCODING="ascii:strict")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "n.png" in outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["| head -1", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream(start, trained, data_dir, closed):
    """A reader that leaves ends the command, as it ends other programs; a closed one does not."""
    written = trained / "eval.json"
    before = written.stat().st_mtime_ns
    flags = ["--workdir", trained, "--data-dir", data_dir, "--eval-only"]
    ended = start("mnist_lstm", *flags, shell=f'"$@" {closed}; exit ${{PIPESTATUS[0]}}')
    assert ended.stderr == ""
    if "head" in closed:
        assert ended.returncode == 141
        assert ended.stdout.startswith("data    mnist5k: 4,000 train")
        assert ended.stdout.count("\n") == 1
    else:
        assert ended.returncode == 0
        assert written.stat().st_mtime_ns > before


@pytest.mark.slow
def test_training_goes_on_when_its_terminal_is_closed(data_dir, tmp_path):
    master, slave = pty.openpty()
    argv = command_of_small_run(data_dir, tmp_path / "run", "--epochs", 2)
    process = subprocess.Popen(argv, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.read(master, 10)
    os.close(master)
    assert process.wait() == 0
    assert (tmp_path / "run" / "eval.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_while_data_are_prepared(start, tmp_path):
    flags = ["--dataset", "mnist5k", "--data-dir", tmp_path / "data", "--figures", tmp_path / "f"]
    outcome = start("gradient_flow", *flags, shell='ulimit -f 100; exec "$@"')
    assert error_of(outcome).startswith("mnist5k could not be prepared: ")
    assert "File too large" in outcome.stderr
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {".lock", "metadata.json"}


@pytest.mark.slow
def test_a_disk_that_is_full_while_figures_are_drawn(start, trained, data_dir, tmp_path):
    figures = tmp_path / "figures"
    flags = ["--workdir", trained, "--data-dir", data_dir, "--figures", figures]
    outcome = start("read_digit", *flags, shell='ulimit -f 10; exec "$@"')
    assert error_of(outcome) == f"{figures}/read_digit.png: File too large"
    assert list(figures.iterdir()) == []


@pytest.mark.slow
def test_certificates_that_are_not_there_count_as_no_way_out(start, tmp_path):
    """And a `~` after `=`, which no shell makes a home."""
    flags = ["--workdir=~/my run", "--data-dir=~/data", *SMALL[2:], "--epochs", 1]
    compiled = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")  # else it takes 30 s more
    lacking = {"HOME": tmp_path, "REQUESTS_CA_BUNDLE": "/nowhere"}
    outcome = start("mnist_lstm", *flags, **lacking, XDG_CACHE_HOME=compiled)
    assert outcome.returncode == 0, outcome.stderr
    assert "WARNING: MNIST can't be downloaded (no answer from " in outcome.stdout
    assert not (tmp_path / "~").exists()
    line = outcome.stdout.splitlines()[-1]
    assert line.startswith(f"evaluate it    {sys.executable} -m experiments.mnist_lstm --workdir '")
    written = tmp_path / "my run" / "eval.json"
    written.unlink()
    pasted = line.removeprefix("evaluate it")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(pasted, shell=True, cwd="/", check=True, capture_output=True, env=env)
    assert written.exists()


IN_A_FILE = {
    "accuracy": ["--workdir", "FILE/x", "--flags=--dataset mnist5k --data-dir DATA"],
    "benchmark": ["--json", "FILE/x.json"],
    "depth": ["--figures", "FILE/x"],
    "draw": ["--workdir", "FILE/x", "--port", "0"],
    "export": ["--workdir", "RUN", "--format", "onnx", "FILE/x", "--data-dir", "DATA"],
    "gradient_flow": ["--figures", "FILE/x"],
    "mnist_lstm": ["--workdir", "FILE/x", "--dataset", "mnist5k", "--data-dir", "DATA"],
    "predict": ["--workdir", "FILE/x", "picture.png"],
    "read_digit": ["--workdir", "RUN", "--figures", "FILE/x", "--data-dir", "DATA"],
    "report": ["RUN", "--output", "FILE/x.html", "--data-dir", "DATA"],
    "trials": ["--workdir", "FILE/x", "--dataset", "mnist5k", "--data-dir", "DATA"],
}
"""Flags of each command that names a folder, with a file where a folder must be."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_where_a_folder_must_be(name, trained, data_dir, tmp_path, capsys):
    """Stands for a missing permission too, which root would have all the same."""
    if name not in IN_A_FILE:
        assert not any("Path" in str(field.type) for field in dataclasses.fields(flags_of(name)))
        return
    file = tmp_path / "file"
    file.write_text("kept")
    places = {"FILE": file, "DATA": data_dir, "RUN": trained}
    flags = IN_A_FILE[name]
    for word, place in places.items():
        flags = [flag.replace(word, str(place)) for flag in flags]
    assert main_of(name)(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(file) in error
    assert file.read_text() == "kept"


def main_of(name):
    module = importlib.import_module(f"experiments.{name}")
    return getattr(module, "main", None) or main_of(f"{name}.__main__")


def flags_of(name):
    if name == "mnist_lstm":
        return Config
    return sys.modules[main_of(name).__module__].Options


@pytest.mark.parametrize("name", COMMANDS)
def test_a_home_is_found_in_every_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    flags = flags_of(name)
    of_export = ["~/a.onnx", "--format=onnx"]
    in_order = {"predict": ["~/a.png"], "report": ["~/run"], "export": of_export}.get(name, [])
    paths = [
        field.name
        for field in dataclasses.fields(flags)
        if "Path" in str(field.type)
        and field.name not in ("pictures", "workdirs")
        and (name, field.name) != ("export", "output")
    ]
    given = [f"--{path.replace('_', '-')}=~/a b" for path in paths]
    read = read_flags(flags, [*in_order, *given], name=name)
    assert [getattr(read, path) for path in paths] == [Path("/home/of/a b")] * len(paths)
    if in_order:
        field = {"predict": "pictures", "report": "workdirs", "export": "output"}[name]
        of_home = Path("/home/of") / in_order[0][2:]
        assert getattr(read, field) in (of_home, (of_home,))


def test_a_printed_command_can_be_pasted():
    line = command_line("predict", "--workdir", Path("my run's"), "a;b")
    said = subprocess.run(f"printf '%s\\n' {line}", shell=True, capture_output=True, text=True)
    assert said.stdout.splitlines() == [
        *(sys.executable, "-m", "experiments.predict"),
        *("--workdir", str(Path.cwd() / "my run's"), "a;b"),
    ]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("no such thing"), "no such thing"),
        (KeyError("named"), "'named'"),
        (PermissionError(13, "Permission denied", "a.json"), "a.json: Permission denied"),
        (OSError("two\nlines"), "two lines"),
        (MemoryError(), "there is too little memory (MemoryError); make the model or the batch"),
    ],
)
def test_what_a_machine_lacks_is_one_line(capsys, error, line):
    @command(KeyError)
    def main(argv=None):
        raise error

    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_a_fault_of_our_own_is_not_hidden():
    @command()
    def main(argv=None):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_output_to_a_full_device_is_one_line(monkeypatch, capsys):
    @command()
    def main(argv=None):
        print("result")
        return 0

    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    assert main() == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.csv"
    with replacing(path) as new:
        new.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"table\.csv") as error, replacing(path) as new:
            new.write_text("longer than the limit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.strerror == "File too large"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.csv", "old")]


def test_numbers_are_said_as_people_do():
    assert [counted(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
