"""The real steps, compiled for accelerators that this machine does not have."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import tpu
from experiments.training_run import from_config
from experiments.training_run.config import Config
from lstm_flax import training
from lstm_flax.augment import distort

pytestmark = pytest.mark.slow

BATCH_SIZE = 1024
V5E_BYTES = 16 * 2**30  # of HBM on a chip
FOUND = importlib.util.find_spec("libtpu")
# A libtpu that is installed greets every import of JAX; the gate keeps its own aside.
LIBTPU = os.environ.get("LIBTPU_FOR_TESTS") or (
    FOUND and str(Path(FOUND.submodule_search_locations[0]) / "libtpu.so")
)


def step_flops(config):
    """Of the matrix products in one time step, `(train, eval)`: 2 a multiply-add."""
    products = [28 * 4 * 256, 256 * 4 * 256, 256 * 4 * 256, 256 * 4 * 256]  # ih, hh of 2 layers
    forward = 2 * config.batch_size * sum(products)
    # Backward takes as many again for the weights and for the inputs, of which x needs none.
    return 3 * forward - 2 * config.batch_size * products[0], forward


@pytest.mark.skipif(not LIBTPU, reason="compiling for TPUs needs libtpu")
@pytest.mark.parametrize(
    ("topology", "chips", "precision"),
    [("v5e:1x1", "1x1", "bfloat16"), ("v5e:2x2", "2x2", "float32")],
)
def test_train_and_eval_step_compile_for_tpu_v5e(topology, chips, precision):
    script = Path(__file__).parent / "compile_for_tpu.py"
    compiled = subprocess.run(
        [sys.executable, str(script), topology, chips, precision, str(BATCH_SIZE)],
        env=os.environ
        | {
            "PYTHONPATH": str(script.parents[1]),
            "TPU_LIBRARY_PATH": LIBTPU,
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other tests compile at the same time
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
            "XLA_FLAGS": "",  # libtpu refuses those for the CPU
        },
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    report = json.loads(compiled.stdout.splitlines()[-1])
    print(report)  # for the README: pytest -rP
    assert report["kind"] == "TPU v5 lite"
    assert report["devices"] == eval(chips.replace("x", "*"))
    for name, products in zip(
        ("train", "eval"), step_flops(Config(batch_size=BATCH_SIZE)), strict=True
    ):
        # The products, and a few per cent for gates, augmentation and AdamW.
        assert 1 < report[name]["flops"] * report["devices"] / products < 1.06
        assert report[name]["bytes"] < V5E_BYTES / 4


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_train_and_eval_step_lower_for(platform):
    config = Config(batch_size=8, hidden_size=16)
    model, tx = from_config.model(config), from_config.optimizer(config, num_images=80)
    # The scan, whose products XLA may round.
    model = model.clone(core=model.core.clone(implementation="scan"))
    sample = jnp.zeros((8, 28, 28), jnp.uint8)
    key = jax.random.key(0)
    state = training.create_train_state(model, tx, training.to_floats(sample), key)
    batch = {"image": sample, "label": jnp.zeros(8, jnp.int32), "mask": jnp.ones(8, bool)}

    def train(params, opt_state, batch):
        before = state.replace(params=params, opt_state=opt_state)
        after, metrics = training.train_step(before, batch, key, distort)
        return after.params, after.opt_state, metrics.loss_sum

    def evaluate(params, batch):
        return training.eval_step(state.replace(params=params), batch).correct

    def lower(function, *arguments):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()

    program = lower(train, state.params, state.opt_state, batch)
    assert "stablehlo.while" in program  # the scan over time
    # Products of float32 operands are float32, not the faster ones an accelerator would choose.
    dots = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert dots
    assert all("HIGHEST" in line for line in dots if "x16xf32" in line or "x64xf32" in line)
    assert "stablehlo.while" in lower(evaluate, state.params, batch)


@pytest.mark.skipif(not LIBTPU, reason="compiling for TPUs needs libtpu")
def test_the_kernels_take_fewer_cycles_and_operations_than_the_scan(monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", LIBTPU)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # libtpu refuses those for the CPU
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    scan, kernels = (
        tpu.compile_apart("v5e", tpu.Program(name, "train", 128, "bfloat16"))
        for name in ("scan", "auto")
    )
    print(scan, kernels)
    products = 132_000  # cycles that the products take at the chip's peak, of 4 units of 128 x 128
    assert products < kernels["bundles"] < 0.7 * scan["bundles"]
    assert kernels["operations"] <= 30 < 28 * 30 < scan["operations"]
    assert kernels["cycles"] < scan["cycles"] / 5
