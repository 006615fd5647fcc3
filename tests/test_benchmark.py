import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from printed import table_rows

from experiments.benchmark import jax_peers, onnx_peer, peers, torch_peers
from experiments.benchmark.__main__ import main
from experiments.benchmark.cases import GROUPS, Case, examples, flops, parse_cases, weights
from experiments.benchmark.job import (
    Job,
    Timing,
    Way,
    count_runs,
    run,
    start_table,
    way_table,
    write_idx,
)
from experiments.benchmark.measure import PeerError, check_same, peak_bytes
from experiments.benchmark.peers import Unavailable
from experiments.benchmark.report import ratio
from lstm_flax import LSTMClassifier, from_torch
from lstm_flax.augment import distort

TINY = Case(batch=4, time=5, features=3, hidden=8, layers=2)


def is_installed(package):
    return importlib.util.find_spec(package) is not None


@pytest.mark.slow
def test_the_command_reports_what_it_measured(tmp_path, capsys):
    plot = ["--plot", str(tmp_path / "plot.png")] if is_installed("matplotlib") else []
    asked = ["lstm_flax", "torch", "flax.linen.RNN", "jax cuDNN"]
    flags = [
        "--cases",
        "batch=3,hidden=8,busy=1",
        "--rounds",
        "3",
        "--seconds",
        "0.001",
        "--no-memory",
    ]
    assert main(["--peers", *asked, *flags, "--json", str(tmp_path / "raw.json"), *plot]) == 0
    printed = capsys.readouterr().out
    raw = json.loads((tmp_path / "raw.json").read_text())

    expected = {name for name in asked if is_installed(peers.PEERS[name].package)}
    if jax.default_backend() != "gpu":
        expected.remove("jax cuDNN")
    # That they are all there says too that they computed the same logits and losses.
    assert set(raw["peers"]) == expected
    assert set(raw["notes"]) == set(asked) - expected
    assert len(raw["measurements"]) == 2 * len(expected)
    for name, why in raw["notes"].items():
        assert f"- {name}: {why}" in printed
        assert "\n" not in why

    speeds = {
        (m["mode"], m["peer"]): np.array([3 * t["calls"] / t["seconds"] for t in m["rounds"]])
        for m in raw["measurements"]
    }
    assert len(raw["ratios"]) == 2 * (len(expected) - 1)
    for found in raw["ratios"]:
        mode, peer = found["mode"], found["peer"]
        rounds = speeds[mode, "lstm_flax"] / speeds[mode, peer]
        assert rounds.shape == (3,)
        np.testing.assert_allclose(found["median"], np.median(rounds))
        assert min(rounds) <= found["low"] <= found["median"] <= found["high"] <= max(rounds)
        assert f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})" in printed
        assert f"{np.median(speeds[mode, peer]):,.0f}" in printed
    # Beside the busy process, each call is timed.
    assert all(
        0 < turn["slow"] <= turn["seconds"] for m in raw["measurements"] for turn in m["rounds"]
    )
    assert "95th percentile, ms" in printed
    # Each table's rows have as many cells as its header.
    for block in printed.strip().split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert raw["environment"]["versions"]["jax"] == jax.__version__
    if plot:
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_pairs_the_rounds():
    # Twice as fast in every round, however slow the machine was in the second one.
    assert ratio([1, 10, 1], [2, 20, 2]) == (2, 2, 2)
    assert ratio([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]) == (3, 2, 4)
    assert str(ratio([2], [1])) == "0.50 (0.50 to 0.50)"


@pytest.mark.parametrize("case", [TINY, Case(2, 3, 5, 4, 1), Case(1, 2, 1, 3, 3)])
def test_flops_are_those_of_the_products(case):
    params = from_torch(weights(case))
    layers, head = [params["core"][f"l{k}"] for k in range(case.layers)], params["head"]
    images, labels = examples(case)
    # Where training starts from, too, so that no product of the backward pass is left out.
    starts = [np.zeros((2, case.batch, case.hidden), np.float32) for _ in layers]

    def loss(parameters):
        layers, head, starts = parameters
        states = list(starts)
        for t in range(case.time):
            x = images[:, t]
            for k, layer in enumerate(layers):
                h, c = states[k]
                gates = x @ layer["kernel_ih"] + h @ layer["kernel_hh"] + layer["bias"]
                i, f, g, o = jnp.split(gates, 4, axis=-1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                x = jax.nn.sigmoid(o) * jnp.tanh(c)
                states[k] = jnp.stack([x, c])
        logits = x @ head["kernel"] + head["bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    parameters = (layers, head, starts)
    assert product_flops(jax.make_jaxpr(loss)(parameters).jaxpr) == flops(case, "infer")
    assert product_flops(jax.make_jaxpr(jax.grad(loss))(parameters).jaxpr) == flops(case, "train")


def product_flops(jaxpr):
    """FLOPs of all matrix products of a program without loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = np.prod([left[axis] for axis in contracted])
            total += 2 * int(inner) * equation.outvars[0].aval.size
        if "jaxpr" in equation.params:  # a function that was jitted by itself
            total += product_flops(equation.params["jaxpr"].jaxpr)
    return total


def test_peers_on_jax_train_alike():
    ours = jax_peers.build_ours(TINY, "train")
    theirs = jax_peers.build_linen_rnn(TINY, "train")
    losses = np.array([[ours(), theirs()] for _ in range(20)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    assert losses[-1, 0] < losses[0, 0]


def test_torch_computes_the_same_from_the_same_weights():
    torch = pytest.importorskip("torch")
    logits = torch_peers.build_torch(TINY, "infer")()
    np.testing.assert_allclose(logits, jax_peers.build_ours(TINY, "infer")(), atol=1e-6)
    loss = torch_peers.build_torch(TINY, "train")()
    np.testing.assert_allclose(loss, jax_peers.build_ours(TINY, "train")(), atol=1e-6)

    # The reference of the whole job is that model too.
    from experiments.benchmark.torch_reference import Classifier

    model, images = Classifier(8, 2), torch.rand(4, 28, 28)
    params = from_torch(model.state_dict())
    np.testing.assert_allclose(
        model(images).detach(),
        LSTMClassifier(8, 2).apply({"params": params}, jnp.asarray(images.numpy())),
        atol=1e-6,
    )


def test_keras_computes_the_same_from_the_same_weights(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip("keras")
    logits = jax_peers.build_keras(TINY, "infer")()
    np.testing.assert_allclose(logits, jax_peers.build_ours(TINY, "infer")(), atol=1e-6)


def assert_rounded(build):
    exact = jax_peers.build_ours(TINY, "infer")()
    rounded = np.float32(build(TINY._replace(bfloat16=1), "infer")())
    assert 0 < np.abs(rounded - exact).max() < 0.01


def test_in_bfloat16_all_compute_the_same_to_its_eight_bits(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip("keras")
    for build in (jax_peers.build_ours, jax_peers.build_linen_rnn, jax_peers.build_keras):
        assert_rounded(build)
    with pytest.raises(Unavailable, match="no bfloat16"):
        onnx_peer.build_onnx(TINY._replace(bfloat16=1), "infer")


def test_pytorch_computes_the_same_in_bfloat16_or_says_that_it_can_not():
    pytest.importorskip("torch")
    try:
        assert_rounded(torch_peers.build_torch)
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_kerass_peer_leaves_the_dtype_of_other_layers_alone(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    before = keras.config.dtype_policy().name
    jax_peers.build_keras(TINY._replace(bfloat16=1), "infer")
    assert keras.config.dtype_policy().name == before


def test_onnx_runtime_computes_the_same_and_says_what_it_can_not():
    pytest.importorskip("onnxruntime")
    logits = onnx_peer.build_onnx(TINY, "infer")()
    np.testing.assert_allclose(logits, jax_peers.build_ours(TINY, "infer")(), atol=1e-6)
    with pytest.raises(Unavailable, match="no training"):
        onnx_peer.build_onnx(TINY, "train")


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_examples_one_by_one_give_the_same(mode):
    mapped = TINY._replace(mapped=1)
    expected = jax_peers.build_ours(TINY, mode)()
    np.testing.assert_allclose(jax_peers.build_ours(mapped, mode)(), expected, atol=1e-6)


def test_the_weights_reach_cudnn_in_its_order():
    from jax.experimental import rnn

    head = from_torch(weights(TINY))["head"]
    packed = jnp.asarray(jax_peers.pack_for_cudnn(weights(TINY)))
    unpacked = rnn.unpack_lstm_weights(packed, TINY.features, TINY.hidden, TINY.layers, False)
    zeros = jnp.zeros((TINY.layers, TINY.batch, TINY.hidden))
    lengths = jnp.full(TINY.batch, TINY.time, jnp.int32)
    outputs, _, _ = rnn.lstm_ref(
        examples(TINY)[0], zeros, zeros, *unpacked, lengths,
        TINY.features, TINY.hidden, TINY.layers, 0.0, False,
    )  # fmt: skip
    logits = outputs[:, -1] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, jax_peers.build_ours(TINY, "infer")(), atol=1e-6)


def test_memory_grows_by_what_training_keeps():
    case = Case(batch=512, time=40, features=4, hidden=64, layers=1)
    kept = 4 * case.batch * case.time * case.hidden * 4  # bytes of four gates in float32
    grown = peak_bytes("flax.linen.RNN", case, "train")
    assert kept < grown < 100 * kept


def test_a_missing_peer_is_left_out_with_one_line(monkeypatch):
    absent = peers.PEERS["keras"]._replace(package="no_such_package")
    monkeypatch.setitem(peers.PEERS, "absent", absent)
    with pytest.raises(Unavailable, match=r"^not installed: pip install no_such_package$"):
        peers.open_peer("absent")


def test_other_results_are_no_comparison():
    check_same([[1.0, 2.0]], [[1.0, 2.00001]])
    with pytest.raises(PeerError, match=r"differ by 0\.1"):
        check_same([[1.0, 2.1]], [[1.0, 2.0]])
    with pytest.raises(PeerError, match="nan"):
        check_same(float("nan"), 1.0)


def test_cases_are_read_as_they_differ_from_the_centre():
    assert parse_cases("vmap")[1].mapped == 1
    assert parse_cases("batch=1") == [Case(batch=1)]
    (pixels,) = parse_cases("time=784,features=1")
    star = parse_cases("star")
    assert pixels in star
    assert len(set(star)) == len(star) == len(GROUPS["star"]) == 9
    with pytest.raises(ValueError, match="'width' is none of batch, time"):
        parse_cases("width=3")
    with pytest.raises(ValueError, match="hidden must be a positive integer"):
        parse_cases("hidden=0")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--seconds", "nan"], "--seconds must be a positive number"),
        (["--peers", "tensor"], "--peers: 'tensor' is none of lstm_flax, torch"),
        (["--cases", "hidden"], "--cases: 'hidden': hidden must be a positive integer"),
        (["--cases", "batch=2", "--quick"], "--quick and --cases"),
        (["--json", "no/such/folder.json"], "there is no folder no/such"),
    ],
)
def test_flags_that_can_not_be_used_get_one_line(flags, says, capsys):
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_whole_job_runs_on_both_sides(data_dir, tmp_path):
    from lstm_flax import data

    builder = data.prepare("mnist5k", data_dir)
    train, test = (data.read_split(builder, name) for name in ("train", "test"))
    idx = tmp_path / "idx"
    idx.mkdir()
    write_idx(idx, {"train": train, "t10k": test})
    sizes = ("--hidden-size", "8", "--num-layers", "1", "--batch-size", "500")
    ways = (
        Way("ours", "lstm_flax", ("--epochs", "9")),
        Way("plain", "torch", ("--epochs", "2")),
        Way("one cycle", "torch", ("--epochs", "2", "--one-cycle")),
    )
    job = Job("mnist5k", data_dir, idx, tmp_path, 1, "--epochs 2", ways, (0.01, 0.02), sizes)
    sides = ["lstm_flax", "torch"] if is_installed("torch") else ["lstm_flax"]
    done = []
    results = run(job, sides, done.append)

    assert list(results["starts"]) == sides
    assert list(results["ways"]) == ["ours", "plain", "one cycle"][: 2 * len(sides) - 1]
    assert len(done) == count_runs(job, sides)
    for (start,) in results["starts"].values():
        assert 0 < start.ready < start.whole
        assert 0 < start.seconds < start.whole
    for timings in results["ways"].values():  # each stops after the epoch that gets there
        assert [t.accuracy >= 0.02 for t in timings] == [False] * (len(timings) - 1) + [True]
    rows = table_rows(start_table(results, job))
    assert rows[1][1] == f"{results['starts']['lstm_flax'][0].ready:.1f}"
    assert rows[2].count("not measured") == 2  # only a second start finds anything compiled
    assert (tmp_path / "compiled").is_dir()


def test_when_a_way_reached_an_accuracy():
    job = Job("mnist", None, Path(), Path(), 1, ways=(), accuracies=(0.9, 0.95))
    timings = [Timing(1.0, 1, 9.0, 10.0, 0.8), Timing(1.0, 2, 18.0, 20.0, 0.91)]
    rows = table_rows(way_table({"ways": {"slow": timings}}, job))
    assert rows[1] == ["slow", "20 (epoch 2)", "not reached", "91.00% after epoch 2, 20"]


def test_idx_files_are_read_back(tmp_path):
    pytest.importorskip("torch")
    from experiments.benchmark.torch_reference import read_split

    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    write_idx(tmp_path, {"train": (images, np.array([3, 9], np.int32))})
    pixels, labels = read_split(tmp_path, "train")
    np.testing.assert_array_equal(pixels * 255, images)
    assert labels.tolist() == [3, 9]


def test_the_reference_distorts_as_the_experiment_does(monkeypatch):
    torch = pytest.importorskip("torch")
    from experiments.benchmark import torch_reference

    key, images = jax.random.key(3), np.random.default_rng(0).random((5, 28, 28), np.float32)
    drawn = (np.array(jax.random.uniform(key, (5, 6), minval=-1)) + 1) / 2
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.from_numpy(drawn))
    np.testing.assert_allclose(
        torch_reference.distort(torch.from_numpy(images)),
        distort(key, jnp.asarray(images)),
        atol=1e-5,
    )
