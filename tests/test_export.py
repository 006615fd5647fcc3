"""Runs as StableHLO, ONNX and safetensors: what other programs compute with the files."""

import dataclasses
import hashlib
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_runs import read_eval

from experiments.export.__main__ import Options, main
from experiments.export.card import training_flags
from experiments.export.reading import ExportError, calls_outside, read_export, seal
from experiments.export.writing import Format, onnx, pixel_order, safetensors, to_bytes
from experiments.harness.usage import read_flags
from experiments.predict.__main__ import main as predict
from experiments.training_run import from_config
from experiments.training_run.config import RECIPES, Config, hyperparameters, parse
from experiments.training_run.restored import RestoredRun, restore_run
from lstm_flax import data

FORMATS = Format.__args__
for package in ("flatbuffers", "onnx", "onnxruntime", "safetensors"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def exports(reader, data_dir, tmp_path_factory):
    """A folder with the reader's run in all formats, `digits.FORMAT`, and their cards."""
    folder = tmp_path_factory.mktemp("exports") / "new"
    for format in FORMATS:
        flags = ["--workdir", reader, "--format", format, folder / f"digits.{format}"]
        assert main([*map(str, flags), "--data-dir", str(data_dir)]) == 0
    return folder


@pytest.fixture(scope="module")
def images(data_dir):
    """The first test digits."""
    return data.read_split(data.prepare("mnist5k", data_dir, None), "test").images[:100]


@pytest.fixture(scope="module")
def expected(reader, images):
    """The logits that the run's model gives them."""
    run = restore_run(reader)
    return np.asarray(run.model.apply({"params": run.params}, np.float32(images) / 255))


def untrained(sequence, hidden_size=6):
    """A run's result before it has learnt anything, with biases that are not zero."""
    config = Config(sequence=sequence, hidden_size=hidden_size, num_layers=2)
    model = from_config.model(config)
    x = from_config.to_sequence(config)(jnp.zeros((1, 28, 28)))
    params = model.init(jax.random.key(3), x)["params"]
    return RestoredRun(config, model, jax.device_get(params), 0)


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_says_what_is_in_the_file(exports, reader, format, monkeypatch, capsys):
    assert sorted(path.name for path in exports.iterdir()) == sorted(
        name for one in FORMATS for name in (f"digits.{one}", f"digits.{one}.md")
    )
    card = (exports / f"digits.{format}.md").read_text()
    evaluated = read_eval(reader)
    counts = f"{evaluated['correct']:,} of {evaluated['total']:,} test images, 95% interval "
    assert counts in card
    assert hashlib.sha256((exports / f"digits.{format}").read_bytes()).hexdigest() in card
    assert evaluated["params_sha256"] in card
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    if format == "safetensors":
        pytest.importorskip("torch")
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(exports)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (3, 10)
    assert len(capsys.readouterr().out.split()) >= 3


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_says_how_to_make_the_file_again(exports, reader, format):
    card = (exports / f"digits.{format}.md").read_text()
    again = card[card.index("## Make it again") :]
    train, export = re.findall(r"^python -m experiments\.\w+ (.*)", again, re.MULTILINE)
    config = parse(shlex.split(train))
    assert hyperparameters(config) == hyperparameters(restore_run(reader).config)
    options = read_flags(Options, shlex.split(export), name="export")
    assert options.workdir == config.workdir
    assert (options.format, options.float32, options.dtype) == (format, False, "float32")
    assert options.output == Path(f"digits.{format}")


def test_the_flags_of_a_card_are_what_differs_from_the_recipe():
    best = Config(recipe="best", dataset="mnist", **RECIPES["best"])
    assert training_flags(best) == ["--recipe", "best", "--dataset", "mnist"]
    other = dataclasses.replace(best, augment=False, seed=3, workdir=Path("/home/me/run"))
    assert training_flags(other)[4:] == ["--no-augment", "--seed", "3"]


def test_weights_may_be_rounded_to_bfloat16(exports, reader, data_dir, images, tmp_path, capsys):
    out = tmp_path / "digits.safetensors"
    flags = ["--workdir", str(reader), "--data-dir", str(data_dir), "--dtype", "bfloat16", str(out)]
    assert main([*flags, "--format", "safetensors"]) == 0
    assert out.stat().st_size < 0.52 * (exports / out.name).stat().st_size
    run = restore_run(reader)
    rounded = jax.tree.map(lambda leaf: jnp.float32(jnp.bfloat16(leaf)), run.params)
    logits = np.asarray(run.model.apply({"params": rounded}, np.float32(images) / 255))
    np.testing.assert_allclose(read_export(out).logits(images), logits, atol=1e-5)
    card = out.with_name(f"{out.name}.md").read_text()
    correct = read_eval(reader)["correct"]
    assert f"rounded to bfloat16; in float32 they read {correct:,} of 1,000 test images" in card
    assert " --format safetensors --dtype bfloat16 digits.safetensors\n" in card
    capsys.readouterr()
    assert main([*flags, "--format", "onnx"]) == 2
    assert capsys.readouterr().err == "error: --dtype bfloat16 is for --format safetensors alone\n"


def test_onnx_runtime_computes_the_runs_logits(exports, images, expected):
    import onnx
    import onnxruntime

    graph = onnx.load(exports / "digits.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", 17)]
    assert [node.op_type for node in graph.graph.node].count("LSTM") == 1
    session = onnxruntime.InferenceSession(exports / "digits.onnx")
    for batch in (images, images[:1]):
        (logits,) = session.run(["logits"], {"images": batch})
        np.testing.assert_allclose(logits, expected[: len(batch)], atol=1e-5)


def test_pytorch_computes_the_runs_logits(exports, images, expected):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    rnn, lin = torch.nn.LSTM(28, 96, 1, batch_first=True), torch.nn.Linear(96, 10)
    model = torch.nn.ModuleDict({"rnn": rnn, "lin": lin})
    model.load_state_dict(load_file(exports / "digits.safetensors"))
    with torch.inference_mode():
        logits = lin(rnn(torch.from_numpy(np.float32(images) / 255))[0][:, -1])
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)


def test_jax_alone_computes_the_runs_logits_for_any_batch(exports, images, expected):
    program = jax.export.deserialize(bytearray((exports / "digits.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert str(program.in_avals[0].shape[0]) == "batch"
    for batch in (images, images[:1]):
        np.testing.assert_allclose(program.call(batch), expected[: len(batch)], atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_predict_reads_with_an_export_as_with_the_run(
    exports, reader, images, format, tmp_path, capsys
):
    for k in range(5):
        Image.fromarray(images[k]).save(tmp_path / f"{k}.png")
    assert predict(["--workdir", str(reader), "--json", str(tmp_path)]) == 0
    by_run = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    code = """if True:
        import sys
        if not sys.argv[2].endswith("safetensors"):
            sys.modules["flax"] = None  # any import of it now fails
        from experiments.predict.__main__ import main
        sys.exit(main(sys.argv[1:]))
    """
    model = exports / f"digits.{format}"
    outcome = subprocess.run(
        [sys.executable, "-c", code, "--model", model, "--json", tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
    by_export = [json.loads(line) for line in outcome.stdout.splitlines()]
    for one, other in zip(by_run, by_export, strict=True):
        assert (one["file"], one["label"]) == (other["file"], other["label"])
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-5)


@pytest.mark.parametrize("sequence", ["pixels", "permuted"])
def test_the_order_of_the_pixels_is_in_the_file(sequence, images, tmp_path):
    run = untrained(sequence)
    x = np.float32(images[:3]).reshape(3, 784)[:, pixel_order(run)] / 255
    logits = np.asarray(run.model.apply({"params": run.params}, x))
    assert np.ptp(logits, axis=0).max() > 1e-3
    for write in (onnx, safetensors):
        (tmp_path / "file").write_bytes(write(run))
        found = read_export(tmp_path / "file").logits(images[:3])
        np.testing.assert_allclose(found, logits, atol=1e-5)


def test_a_precision_that_a_format_lacks_is_refused(reader, data_dir, tmp_path, capsys):
    workdir = shutil.copytree(reader, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"precision": "bfloat16"}))
    out = tmp_path / "digits.onnx"
    flags = ["--workdir", str(workdir), "--data-dir", str(data_dir), str(out)]
    capsys.readouterr()
    for format in ("onnx", "safetensors"):
        assert main(["--format", format, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {format} has no place for --precision bfloat16")
        assert error.count("\n") == 1
    assert not out.exists()
    assert main(["--format", "onnx", "--float32", *flags]) == 0
    card = out.with_name("digits.onnx.md").read_text()
    assert f"{read_eval(reader)['correct']:,} of " in card
    assert "seed 0, bfloat16 products" in card
    assert "--precision bfloat16" in card
    assert "--format onnx --float32 digits.onnx" in card
    program = jax.export.deserialize(bytearray(to_bytes(restore_run(workdir), "stablehlo")))
    assert "bf16" in program.mlir_module()
    assert program.out_avals[0].dtype == jnp.float32


def test_a_file_that_is_there_is_replaced_and_a_folder_is_not(reader, data_dir, tmp_path, capsys):
    flags = ["--workdir", str(reader), "--data-dir", str(data_dir), "--format", "safetensors"]
    (tmp_path / "old").write_text("old")
    (tmp_path / "folder").mkdir()
    capsys.readouterr()
    assert main([*flags, str(tmp_path / "folder")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {tmp_path}/folder can't be written (it is not a regular file)"
    assert main([*flags, str(tmp_path / "old")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"old", "old.md", "folder"}
    assert read_export(tmp_path / "old").format == "safetensors"


class Touch:
    """What a pickle does when it is loaded: create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_is_no_export_is_refused_in_one_line(exports, tmp_path, capfd):
    from onnx import TensorProto, helper
    from safetensors.numpy import save

    shape = ["batch", 28, 28]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "same",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, shape)],
    )
    opset = helper.make_opsetid("", 17)
    other = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
    whole = {format: (exports / f"digits.{format}").read_bytes() for format in FORMATS}
    program = whole["stablehlo"].replace(b"images", b"imagee")
    files = {
        "empty": (b"", "neither StableHLO nor ONNX nor safetensors"),
        "picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "neither"),
        "pickle": (pickle.dumps(Touch(tmp_path / "touched")), "neither"),
        "half.stablehlo": (whole["stablehlo"][: 10**5], "neither"),
        "half.onnx": (whole["onnx"][: 10**5], "ONNX Runtime refuses it"),
        "half.safetensors": (whole["safetensors"][: 10**5], "safetensors can't be read"),
        "damaged.stablehlo": (program, "its SHA-256 is not the one at its end"),
        "sealed": (b"no program" + seal(b"no program"), "StableHLO can't be read"),
        "other.onnx": (other, "not of images to logits"),
        "other.safetensors": (save({"w": np.ones(3)}), "no sequence"),
        "another.safetensors": (
            save({"w": np.ones(3)}, metadata={"sequence": "rows"}),
            "another model",
        ),
    }
    Image.new("L", (28, 28)).save(tmp_path / "digit.png")
    capfd.readouterr()
    for name, (content, because) in files.items():
        (tmp_path / name).write_bytes(content)
        assert predict(["--model", str(tmp_path / name), str(tmp_path / "digit.png")]) == 2, name
        output, error = capfd.readouterr()
        assert error.startswith(f"error: {tmp_path / name} is no export of a run: "), error
        assert because in error, error
        assert error.count("\n") == 1, error
        assert output == ""
    assert not (tmp_path / "touched").exists()
    assert predict(["--model", str(tmp_path / "none"), str(tmp_path / "digit.png")]) == 2
    assert "none can't be read (No such file or directory)" in capfd.readouterr().err


def test_a_program_that_calls_what_is_registered_is_refused(exports, tmp_path):
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 28, 28), jnp.uint8)

    @jax.jit
    def logits(images):
        called = jax.ffi.ffi_call("strangers", jax.ShapeDtypeStruct(images.shape[:1], jnp.float32))
        return called(images)[:, None] * jnp.ones(10)

    disabled = [jax.export.DisabledSafetyCheck.custom_call("strangers")]
    program = bytes(jax.export.export(logits, disabled_checks=disabled)(images).serialize())
    (tmp_path / "file").write_bytes(program + seal(program))
    with pytest.raises(ExportError, match="calls functions outside of it"):
        read_export(tmp_path / "file")
    ours = jax.export.deserialize(bytearray((exports / "digits.stablehlo").read_bytes()))
    assert "custom_call" in str(ours.mlir_module())  # the check of the batch
    assert calls_outside(str(ours.mlir_module())) == []
