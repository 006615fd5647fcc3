import sys

import jax
import numpy as np
import pytest
from printed import read_csv, table_rows
from small_runs import SMALL, read_eval

from experiments import mnist_lstm
from experiments.harness.usage import install_command
from experiments.read_digit.__main__ import main
from experiments.read_digit.reading import (
    answers,
    find_mistakes,
    gates_by_row,
    probabilities_by_row,
    report,
    settled_row,
    unit_order,
)
from experiments.training_run.config import Config
from experiments.training_run.restored import RestoredRun, classify, restore_run
from lstm_flax import LSTMClassifier, data
from lstm_flax.training import to_floats

ROWS = 28


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--data-dir", data_dir, "--workdir", workdir, *SMALL, "--epochs", 2]
    assert mnist_lstm.main([*map(str, flags)]) == 0
    return workdir


@pytest.fixture(scope="module")
def model():
    """Two layers with random parameters that are not so small that nothing happens."""
    model = LSTMClassifier(hidden_size=8, num_layers=2)
    params = model.init(jax.random.key(0), np.zeros((1, ROWS, ROWS), np.float32))["params"]
    return model, jax.tree.map(lambda leaf: 2 * leaf, params)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (ROWS, ROWS), np.uint8)


def has_ink(path):
    """Whether there is more than a title in a picture."""
    from matplotlib.image import imread

    return (imread(path)[..., :3].mean(-1) < 0.5).mean() > 0.02


def test_after_each_row_the_model_has_seen_that_much(model, image):
    classifier, params = model
    probabilities = probabilities_by_row(classifier, params, image)
    assert probabilities.shape == (ROWS, 10)
    for rows in (1, 2, 15, ROWS):
        logits = classifier.apply({"params": params}, to_floats(image[None, :rows]))
        expected = np.exp(logits[0]) / np.exp(logits[0]).sum()
        np.testing.assert_allclose(probabilities[rows - 1], expected, atol=1e-6)
    # In batches that need not come out even.
    rows_run = RestoredRun(Config(batch_size=2), classifier, params, 0)
    read = classify(rows_run, np.stack([image] * 3))
    np.testing.assert_allclose(read, np.stack([expected] * 3), atol=1e-6)


def test_a_run_classifies_images_as_it_was_trained_to_read_them(image):
    classifier = LSTMClassifier(hidden_size=4, num_layers=1)
    pixels = to_floats(image.reshape(1, -1, 1))
    params = classifier.init(jax.random.key(0), pixels)["params"]
    expected = jax.nn.softmax(classifier.apply({"params": params}, pixels))
    run = RestoredRun(Config(batch_size=2, sequence="pixels"), classifier, params, 0)
    np.testing.assert_allclose(classify(run, image[None]), expected, atol=1e-6)


def test_the_gates_are_those_that_lead_to_the_answer(model, image):
    classifier, params = model
    layers = gates_by_row(classifier, params, image)
    assert len(layers) == 2
    x = image / 255
    for k, gates in enumerate(layers):
        layer = params["core"][f"l{k}"]
        c, h, outputs = np.zeros(8), np.zeros(8), []
        for t in range(ROWS):
            total = x[t] @ layer["kernel_ih"] + h @ layer["kernel_hh"] + layer["bias"]
            sums = dict(zip(("input", "forget", "candidate", "output"), np.split(total, 4)))  # noqa: B905
            candidate = np.tanh(sums.pop("candidate"))
            i, f, o = (1 / (1 + np.exp(-sums[name])) for name in ("input", "forget", "output"))
            c = f * c + i * candidate
            h = o * np.tanh(c)
            outputs.append(h)
            for name, value in {"input": i, "forget": f, "output": o, "cell": c}.items():
                np.testing.assert_allclose(gates[name][t], value, atol=1e-5)
        x = np.array(outputs)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    probabilities = probabilities_by_row(classifier, params, image)
    np.testing.assert_allclose(
        probabilities, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), atol=1e-5
    )


def test_units_are_ordered_by_when_they_are_most_active():
    cell = np.array(
        [
            # unit: 0, 1, 2, 3
            [0.1, 0.9, -0.2, 0.0],
            [0.2, 0.1, -0.3, 0.0],
            [0.8, 0.0, -0.7, 0.1],
        ]
    )
    assert unit_order(cell).tolist() == [2, 1, 0, 3]


def believing(*answers):
    """Probabilities of a model that is 60% sure of these answers, one after the other."""
    probabilities = np.full((len(answers), 10), 0.4 / 9)
    probabilities[range(len(answers)), answers] = 0.6
    return probabilities


def test_when_an_answer_is_right_and_stays_right():
    assert settled_row(believing(1, 7, 1, 7, 7), 7) == 4
    assert settled_row(believing(7, 7), 7) == 1
    assert settled_row(believing(7, 7, 1), 7) is None
    assert list(answers(believing(1, 7, 7, 1))) == [(1, 1, 1), (2, 3, 7), (4, 4, 1)]
    lines = report(believing(1, 7, 7), 7).splitlines()
    rows = table_rows("\n".join(lines))
    assert rows[1:] == [["1", "1", "60.0%"], ["2 to 3", "7", "60.0% to 60.0%"]]
    assert "right   from row 2 on" in lines
    assert lines[-1].startswith("final   7: 60.00%, 0: 4.44%")
    assert "right   no" in report(believing(7, 1), 7)


def test_mistakes_come_with_the_most_confident_first():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    mistakes = find_mistakes(probabilities, np.array([0, 0, 0, 1]))
    assert mistakes.image.tolist() == [2, 3, 1]
    assert mistakes.answer.tolist() == [1, 0, 1]
    assert mistakes.probability.tolist() == [0.8, 0.7, 0.6]
    assert mistakes.label_probability.tolist() == [0.2, 0.3, 0.4]
    assert mistakes.first(2).label.tolist() == [0, 1]


def test_the_command_shows_what_the_run_does(trained, data_dir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--workdir", trained, "--data-dir", data_dir, "--index", 523, "--mistakes", 5]
    assert main([*map(str, flags)]) == 0
    printed = capsys.readouterr().out
    evaluation, restored = read_eval(trained), restore_run(trained)
    wrong = evaluation["total"] - evaluation["correct"]
    assert f"{wrong:,} of 1,000 test images are misread" in printed

    folder = trained / "figures"
    names = ("read_digit", "gates", "mistakes")
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in printed
    assert has_ink(folder / "mistakes.png")
    test = data.read_split(data.prepare("mnist5k", data_dir), "test")
    read = read_csv(folder / "read_digit.csv")
    shown = [[float(line[f"probability_{k}"]) for k in range(10)] for line in read]
    expected = probabilities_by_row(restored.model, restored.params, test.images[523])
    np.testing.assert_allclose(shown, expected, rtol=1e-4)
    settled = settled_row(expected, 5)
    assert ("from row" if settled else "the last answer is wrong") in printed
    assert len(read_csv(folder / "gates.csv")) == 4 * 24
    mistakes = read_csv(folder / "mistakes.csv")
    assert len(mistakes) == min(5, wrong)
    for line in mistakes:
        assert test.labels[int(line["image"])] == int(line["label"]) != int(line["answer"])

    assert main([*map(str, flags), "--mistakes", "0", "--figures", str(tmp_path / "new")]) == 0
    assert {path.stem for path in (tmp_path / "new").iterdir()} == {"read_digit", "gates"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--index", "-1"], "--index must be at least 0"),
        (["--mistakes", "-1"], "--mistakes must be at least 0"),
        (["--workdir", "no/such/run"], "there is no run in no/such/run"),
    ],
)
def test_flags_that_can_not_be_used_get_one_line(flags, says, capsys):
    pytest.importorskip("matplotlib")
    assert main(flags) == 2
    assert_one_line(capsys, says)


def test_what_is_wrong_beside_the_run_gets_one_line(trained, data_dir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--workdir", str(trained), "--data-dir", str(data_dir)]
    assert main([*flags, "--index", "1000"]) == 2
    assert_one_line(capsys, "--index must be less than 1000, the number of test images of mnist5k")
    (tmp_path / "file").touch()
    assert main([*flags, "--figures", str(tmp_path / "file")]) == 2
    assert_one_line(capsys, f"--figures {tmp_path}/file can't be created")


def test_without_matplotlib_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert main([]) == 2
    assert_one_line(capsys, f"this needs matplotlib: {install_command('figures')}")


def assert_one_line(capsys, says):
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
