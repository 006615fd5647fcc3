"""The pretrained model: what it is, and that commands read with it where there is no run."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw
from small_runs import read_until

from experiments.draw.__main__ import main as draw
from experiments.export.card import training_flags
from experiments.export.reading import read_export
from experiments.predict.__main__ import main as predict
from experiments.predict.by_kind import main as by_kind
from experiments.predict.calibration import UNSURE, calibrated, temperature_for
from experiments.pretrained import model
from experiments.pretrained.model import CORRECT, FILE, SHA256, STEP, TOTAL, pretrained
from experiments.read_digit.__main__ import main as read_digit
from experiments.training_run.restored import classify

pytest.importorskip("safetensors")

CARD = FILE.with_name(f"{FILE.name}.md")
SAYS = (
    f"model   experiments/pretrained, as there is no run in runs/mnist_lstm (recipe best, "
    f"{CORRECT / TOTAL:.2%} of MNIST's test images); train your own: "
    f"python -m experiments.mnist_lstm"
)


@pytest.fixture(scope="module")
def trained():
    return pretrained()


@pytest.fixture
def seven(tmp_path, monkeypatch):
    """A picture of a 7 in a folder without any run, which is the current one."""
    picture = Image.new("L", (90, 120), 230)
    ImageDraw.Draw(picture).line([(20, 25), (70, 25), (45, 100)], fill=40, width=9)
    picture.save(tmp_path / "7.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "7.png"


@pytest.fixture
def offline(monkeypatch):
    """A proxy that refuses every connection: port 9, discard, has no listener."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


def test_the_card_is_that_of_the_file(trained):
    card = CARD.read_text()
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256
    assert f"`{SHA256}`" in card
    assert f"{CORRECT:,} of {TOTAL:,} test images, 95% interval" in card
    assert f"checkpoint of step {STEP:,} " in card
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(trained.params)):,} parameters" in card
    flags = " ".join(training_flags(trained.config))
    assert f"python -m experiments.mnist_lstm {flags} --workdir" in card
    assert not re.search(r"(^|[ `(])/\w+/", card, re.MULTILINE)  # no paths of a machine


def read_images(path, header):
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


@pytest.mark.slow
def test_it_reads_as_many_test_images_as_it_says(trained, mnist_dir):
    images = read_images(mnist_dir / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_images(mnist_dir / "t10k-labels-idx1-ubyte.gz", 8)
    assert len(images) == TOTAL
    probabilities = classify(trained, images)
    right = probabilities.argmax(-1) == labels
    assert right.sum() == CORRECT
    # Label smoothing teaches it to be 95% sure at most; calibrated, it is as sure as it is right.
    assert probabilities.max(-1).mean() < 0.96
    sure = calibrated(probabilities, temperature_for(trained.config.label_smoothing)).max(-1)
    assert sure.mean() == pytest.approx(right.mean(), abs=0.003)
    assert (sure < UNSURE).sum() == 40


def test_pytorch_computes_the_same(trained):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    rnn, lin = torch.nn.LSTM(28, 256, 2, batch_first=True), torch.nn.Linear(256, 10)
    module = torch.nn.ModuleDict({"rnn": rnn, "lin": lin})
    module.load_state_dict(load_file(FILE))
    with torch.inference_mode():
        logits = lin(rnn(torch.from_numpy(np.float32(images) / 255))[0][:, -1])
    np.testing.assert_allclose(classify(trained, images), logits.softmax(-1).numpy(), atol=1e-5)
    np.testing.assert_allclose(read_export(FILE).logits(images), logits.numpy(), atol=1e-4)


def test_predict_reads_with_it_where_there_is_no_run(seven, capsys):
    assert predict([str(seven)]) == 0
    output, error = capsys.readouterr()
    assert output.split()[:2] == [str(seven), "7"]
    assert error == f"{SAYS}\n"
    assert predict(["--json", str(seven)]) == 0
    output, error = capsys.readouterr()
    assert json.loads(output)["label"] == 7
    assert error == f"{SAYS}\n"
    assert os.listdir() == ["7.png"]
    assert predict(["--workdir", "runs/mnist_lstm", str(seven)]) == 2
    assert capsys.readouterr().err.startswith("error: there is no run in runs/mnist_lstm; ")


def test_a_run_of_ones_own_comes_first(seven, reader, capsys):
    own = shutil.copytree(reader, "runs/mnist_lstm")
    capsys.readouterr()
    assert predict(["--json", "7.png"]) == 0
    by_default = capsys.readouterr()
    assert predict(["--json", "--workdir", own, "7.png"]) == 0
    assert capsys.readouterr() == by_default
    assert by_default.err == ""
    shutil.rmtree("runs/mnist_lstm/checkpoints")  # of a run that has saved nothing yet
    assert predict(["7.png"]) == 2
    assert "has saved no checkpoint yet" in capsys.readouterr().err


def test_pictures_by_kind_are_read_with_it_too(seven, capsys):
    (seven.parent / "pictures" / "drawn").mkdir(parents=True)
    seven.rename(seven.parent / "pictures" / "drawn" / "0_7.png")
    assert by_kind(["pictures"]) == 0
    output, error = capsys.readouterr()
    assert re.search(r"\| drawn +\| +1 \| 100.0% \|", output)
    assert error == f"{SAYS}\n"


@pytest.mark.slow
def test_read_digit_shows_how_it_reads(seven, tmp_path, offline, capsys):
    pytest.importorskip("matplotlib")
    assert read_digit(["--index", "8", "--data-dir", str(tmp_path / "data")]) == 0
    output, error = capsys.readouterr()
    model_, knows = error.splitlines()
    assert model_ == SAYS
    assert knows == (
        "warning: the pretrained model was trained on the digits of mnist5k; it knows them"
    )
    assert "WARNING: MNIST can't be downloaded" in output
    assert re.search(rf"Test image 8 of mnist5k, a \d; read by step {STEP} of ", output)
    assert re.search(r"\d of 1,000 test images (is|are) misread", output)
    assert "figures in runs/pretrained: read_digit.png, gates.png" in output
    drawn = {path.name for path in (seven.parent / "runs" / "pretrained").iterdir()}
    assert {"read_digit.png", "read_digit.csv", "gates.png", "gates.csv"} <= drawn
    assert not any(path.is_dir() for path in FILE.parent.iterdir() if path.name != "__pycache__")


def test_draw_serves_it(seven):
    pytest.importorskip("nicegui")
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.draw", "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # NiceGUI takes a process with this variable for a test of its own kind.
        env={name: v for name, v in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    )  # fmt: skip
    lines = read_until(process, "step ")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert lines[1] == f"{SAYS}\n"
    assert lines[2].startswith(f"step {STEP} of {FILE.parent} reads what you draw at http://")
    assert len(lines) == 3


def test_a_file_that_was_changed_or_lost_is_refused(seven, tmp_path, monkeypatch, capsys):
    pytest.importorskip("nicegui")
    pytest.importorskip("matplotlib")
    changed = bytearray(FILE.read_bytes())
    changed[-1] ^= 1  # the least bit of a weight
    monkeypatch.setattr(model, "FILE", tmp_path / FILE.name)
    for content, because in ((changed, "was changed: its SHA-256 is not"), (None, "No such file")):
        if content is None:
            model.FILE.unlink()
        else:
            model.FILE.write_bytes(content)
        for main, flags in (
            (predict, ["7.png"]),
            (read_digit, []),
            (draw, ["--port", "0", "--no-browser"]),
        ):
            assert main(flags) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"error: {model.FILE} ")
            assert because in error
            assert "git checkout experiments/pretrained" in error
            assert error.count("\n") == 1


def test_without_safetensors_the_extra_is_named(seven, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    assert predict(["7.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the pretrained model needs safetensors: ")
    assert "[experiments]" in error
    assert error.count("\n") == 1
