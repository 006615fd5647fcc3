"""Run folders as a stranger may make them: each command ends in one line or with its result, soon
and in little memory, starts nothing, and changes nothing outside."""

import ast
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import tensorstore as ts
from PIL import Image
from small_runs import SMALL

from experiments import mnist_lstm
from experiments.draw.__main__ import main as draw_main
from experiments.predict import __main__ as predict
from experiments.read_digit.__main__ import main as read_digit_main
from experiments.report.__main__ import main as report_main

STEP = 14  # of the run's only checkpoint
SECONDS, MIB = (
    60,
    2000,
)  # that a command may take, on a busy machine; MiB beyond what is held before

STARTED = []  # programs and connections; an audit hook can't be taken back
WATCHED = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork",
           "socket.connect", "socket.bind")  # fmt: skip
sys.addaudithook(lambda event, _: STARTED.append(event) if event in WATCHED else None)


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A finished run of one epoch."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--data-dir", data_dir, "--workdir", workdir, *SMALL, "--epochs", 1]
    assert mnist_lstm.main([*map(str, flags)]) == 0
    return workdir


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of the run beside a home, which is nobody's to change."""
    home = tmp_path / "home"
    for step in ("14", "7", "15.orbax-checkpoint-tmp-1"):
        (home / "numbers" / step).mkdir(parents=True)
        (home / "numbers" / step / "precious").write_text("mine")
    (home / ".bashrc").write_text("alias ls='ls -F'\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("~/.cache").expanduser()))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))  # matplotlib's
    monkeypatch.setenv("HOME", str(home))
    picture = Image.new("L", (40, 40))
    picture.paste(255, (18, 8, 22, 32))
    picture.save(tmp_path / "digit.png")
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def end(folder, data_dir, capfd):
    """Let a command end; returns its status, and its lines on standard error."""
    commands = {
        "train": (mnist_lstm.main, ["--workdir", folder, "--data-dir", data_dir]),
        "evaluate": (mnist_lstm.main, ["--workdir", folder, "--data-dir", data_dir, "--eval-only"]),
        "predict": (predict.main, ["--workdir", folder, folder.parent / "digit.png"]),
        "read_digit": (read_digit_main, ["--workdir", folder, "--data-dir", data_dir]),
        "report": (report_main, [folder, "--data-dir", data_dir]),
        "draw": (draw_main, ["--workdir", folder, "--no-browser", "--port", "0"]),
    }

    def end(name):
        main, flags = commands[name]
        home, held = digest(folder.parent / "home"), reset_peak()
        capfd.readouterr()
        STARTED.clear()
        with within(SECONDS):
            status = main([str(flag) for flag in flags])
        if held is not None:
            assert memory("VmHWM") < held + MIB
        allowed = ["socket.bind"] if name == "draw" else []  # its port is looked for first
        assert allowed[: len(STARTED)] == STARTED
        assert digest(folder.parent / "home") == home
        return status, capfd.readouterr().err.splitlines()

    return end


def digest(folder):
    """Of all names, links and contents."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path} {path.lstat().st_mode}".encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


def reset_peak():
    """Let the kernel measure the peak anew; returns what is held, in MiB, None where it can't."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return memory("VmRSS")
    except OSError:
        return None


def memory(name):
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def within(seconds):
    def give_up(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_refused(outcome, says):
    status, lines = outcome
    assert status == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert says in lines[0]


def replace(path, make):
    """Put something else in the place of a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)


ALL = ("train", "evaluate", "predict", "read_digit", "report", "draw")
TO_FILES = (
    "config.json", "metrics.jsonl", "eval.json", "environment.jsonl", ".lock", "report.html",
    "figures/gates.png", "tensorboard/events.out.tfevents.1", f"checkpoints/{STEP}/about/metadata",
)  # fmt: skip
TO_FOLDERS = (
    "checkpoints", "damaged", "tensorboard", "figures", f"checkpoints/{STEP}",
    f"checkpoints/{STEP}/tree", "checkpoints/15.orbax-checkpoint-tmp",
)  # fmt: skip


def test_links_in_each_place_are_refused_by_every_command(folder, end):
    home = folder.parent / "home"
    for names, target in ((TO_FILES, home / ".bashrc"), (TO_FOLDERS, home / "numbers")):
        for name in names:
            shutil.copytree(folder, folder.parent / "kept")
            replace(folder / name, lambda path, target=target: path.symlink_to(target))
            for command in ALL:
                assert_refused(end(command), f"{folder}/{name} can't be used (it is a link)")
            shutil.rmtree(folder)
            (folder.parent / "kept").rename(folder)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: socket_at(path)])
def test_what_is_no_file_is_refused_by_every_command(folder, end, make):
    for name in ("config.json", "eval.json", f"checkpoints/{STEP}/tree/_METADATA"):
        original = (folder / name).read_bytes()
        replace(folder / name, make)
        for command in ALL:
            says = f"{folder}/{name} can't be used (it is not a regular file)"
            assert_refused(end(command), says)
        replace(folder / name, lambda path, content=original: path.write_bytes(content))


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


def test_folders_that_can_not_be_removed_are_refused(folder, end):
    deepest = folder / "checkpoints" / "15.orbax-checkpoint-tmp" / "/".join("d" * 40)
    deepest.mkdir(parents=True)
    for command in ALL:
        assert_refused(end(command), "can't be used (it is nested too deeply)")


def test_the_workdir_itself_may_be_a_link(folder, end):
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")
    assert end("evaluate") == (0, [])
    assert end("predict") == (0, [])


def test_planted_partial_files_are_not_written_through(folder, end):
    for name in ("config.json", "metrics.jsonl", "eval.json", "environment.jsonl", "report.html"):
        (folder / f"{name}.partial").symlink_to(folder.parent / "home" / ".bashrc")
    for command in ("train", "evaluate", "report"):
        assert end(command)[0] == 0


def test_a_lock_with_a_second_name_is_not_emptied(folder, end):
    replace(folder / ".lock", lambda path: os.link(folder.parent / "home" / ".bashrc", path))
    assert_refused(end("train"), f"{folder}/.lock can't be written (it is a hard link)")


def change_config(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def huge(path):
    path.touch()
    os.truncate(path, 2**35)


def write(text):
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("name", "make", "commands", "says"),
    [
        ("config.json", huge, ALL, "has more than 8 MiB"),
        ("config.json", write("[" * 200_000), ALL, "nested too deeply"),
        ("config.json", write('{"seed": ' + "9" * 400 + "}"), ALL, "'seed' must be at most"),
        ("config.json", change_config(coordinator="127.0.0.1:1"), ALL, "'coordinator' is unknown"),
        ("config.json", change_config(distributed=True), ALL, "'distributed' is unknown"),
        ("config.json", change_config(precision="evil"), ALL, "'precision' must be"),
        ("config.json", change_config(hidden_size=-3), ALL, "'hidden_size' must be at least 1"),
        ("config.json", change_config(num_layers=3000), ALL, "'num_layers' must be at most"),
        ("config.json", change_config(batch_size=10**10), ALL, "'batch_size' must be at most"),
        ("config.json", change_config(hidden_size=11_000), ("predict",), "is of another model"),
        ("metrics.jsonl", huge, ("report",), "has more than 8 MiB"),
        ("eval.json", write('{"step": 1, "correct": 9, "total": 4}'), ("report",), "is larger"),
    ],
)  # fmt: skip
def test_files_that_cost_much_or_can_not_be_true(folder, end, name, make, commands, says):
    make(folder / name)
    for command in commands:
        assert_refused(end(command), says)


def change_description(change):
    """An edit of what a checkpoint says of itself, whose digest is made anew."""

    def edit(step):
        path = step / "about" / "metadata"
        values = json.loads(path.read_text())
        del values["sha256"]
        change(values)
        text = json.dumps(values, sort_keys=True)
        path.write_text(json.dumps(values | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))

    return edit


def declare(**values):
    """An edit of what TensorStore is told of one of its arrays."""

    def edit(step):
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{step}/tree/"}).result()
        key = next(key for key in store.list().result() if b"kernel_hh/.zarray" in key)
        declared = json.loads(store.read(key).result().value) | values
        store.write(key, json.dumps(declared).encode()).result()

    return edit


def change(name, **values):
    """An edit of one of Orbax's own files."""
    return lambda step: change_config(**values)(step / name)


def of_the_run(**values):
    return change_description(lambda all_: all_["about"].update(values))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda step: write("[" * 200_000)(step / "about" / "metadata"), "nested too deeply"),
        (lambda step: huge(step / "about" / "metadata"), "has more than 16 MiB"),
        (lambda step: huge(step / "tree" / "_METADATA"), "has more than 16 MiB"),
        (lambda step: huge(step / "tree" / "d" / "more"), "its files have 32,768 MiB"),
        (lambda step: (step / "tree" / ".zarray").touch(), "is none of a checkpoint's files"),
        (change("_CHECKPOINT_METADATA", metrics=5), "checkpoints can't be opened (Object must be"),
        (lambda step: write("[" * 200_000)(step / "_CHECKPOINT_METADATA"), "can't be opened (max"),
        (change("tree/_METADATA", use_zarr3=True), "of another format"),
        (change("tree/_METADATA", use_ocdbt=False), "of another format"),
        (change_description(lambda all_: all_.update(about="x")), "none that `save` writes"),
        (change_description(lambda all_: all_.update(leaves=5)), "can't be read"),
        (
            change_description(lambda all_: all_["metrics"].update(validation_accuracy="x")),
            "none that `save` writes",
        ),
        (
            change_description(
                lambda all_: all_["leaves"]["state/params/core/l0/bias"].update(shape=[10**10])
            ),
            "another model",
        ),
        (of_the_run(config={"epochs": "x"}), "not those of a run"),
        (of_the_run(records=5), "not those of a run"),
        (of_the_run(records=[{"epoch": 1, "step": 14, "seconds": float("nan")}]), "not those of"),
        (of_the_run(training_seconds=float("inf")), "not those of a run"),
        (declare(chunks=[10**4, 2 * 10**5]), "has chunks of [10000, 200000]"),
        (declare(chunks=[10**6, 10**7]), "has chunks of [1000000, 10000000]"),
        (declare(shape=[10**5, 10**5]), "should be"),
        (declare(dtype="<f8"), "should be"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_none_of_ours_are_refused_before_their_arrays_are_read(
    folder, end, harm, says
):
    harm(folder / "checkpoints" / str(STEP))
    assert_refused(end("evaluate"), says)


OPENERS = (
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "rename", "touch", "symlink_to",
    "unlink", "rmtree", "os.replace",
)  # fmt: skip
ELSEWHERE = {
    "harness/streams.py": {"os.open", "open"},  # the null device
    "training_run/processes.py": {"open"},  # the same
    "training_run/rescue.py": {"shutil.rmtree"},  # of a folder that is this user's alone
    "training_run/environment.py": {"info.read_text"},  # the processor's name
    "training_run/lock.py": {"ts.KvStore.open", "boot.read_text"},  # a bucket; this boot's name
    "training_run/metric_writer.py": {  # the copies of a bucket's files in a folder of its own
        "path.read_bytes",
        "(self._local / path.name).write_bytes",
    },
    "__main__.py": {"Path(spec.origin).read_text"},  # the experiments' own sources
    "predict/digit_image.py": {"Image.open"},  # bytes that were read
    "report/page.py": {"files(__package__).joinpath('page.html').read_text"},  # its template
    # `replacing`, and the files that it hands out to be written.
    "harness/output_files.py": {"os.replace", "Path(name).unlink", "new.read_bytes"},
    "report/__main__.py": {"new.write_text"},
    "export/__main__.py": {"new.write_bytes", "new_page.write_text"},
    "harness/plots.py": {"table.open"},
    "accuracy.py": {"table_file.open"},
    "trials/__main__.py": {"file.write_bytes"},
}
"""What opens files that are no run's, or not by their names, by module."""


def test_one_module_opens_and_replaces_the_files_of_a_run():
    experiments = Path(mnist_lstm.__file__).parent
    modules = {str(path.relative_to(experiments)): path for path in experiments.rglob("*.py")}
    found = {
        name: calls
        for name, path in modules.items()
        # The benchmark's files are its own, of a moment before.
        if not name.startswith(("training_run/run_files.py", "benchmark/"))
        and (calls := openers(path))
    }
    assert found == ELSEWHERE
    assert openers(experiments.parent / "lstm_flax" / "checkpoints.py") == {
        "ts.open", "ts.KvStore.open",
    }  # fmt: skip


def openers(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    opening = {name for name in names if name in OPENERS or name.rpartition(".")[2] in OPENERS}
    return {name for name in opening if not name.startswith("run_files.")}
