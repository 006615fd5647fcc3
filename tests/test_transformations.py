"""JAX's and Flax's transformations, which the layers allow."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

from lstm_flax import GRUStack, LSTMClassifier, LSTMStack, RNNStack

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_stack = pytest.mark.parametrize("stack", [LSTMStack, RNNStack, GRUStack])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss_of(module, variables, x):
    return jnp.sum(module.apply(variables, x)[0] ** 2)


@each_stack
def test_vmap_over_weights_equals_a_loop(stack):
    x = normal(1, 3, 7, 5)
    module = stack(8, 2)
    ensemble = jax.vmap(lambda key: module.init(key, x))(jax.random.split(jax.random.key(0), 4))
    outputs, _ = jax.vmap(lambda v: module.apply(v, x))(ensemble)
    for member in range(4):
        alone, _ = module.apply(jax.tree.map(lambda a, m=member: a[m], ensemble), x)
        np.testing.assert_allclose(outputs[member], alone, atol=1e-6)


@each_stack
def test_checkpoint_and_remat_leave_the_gradient_as_it_is(stack):
    x = normal(1, 3, 7, 5)
    module = stack(8, 2)
    variables = module.init(jax.random.key(0), x)
    plain = jax.grad(lambda v: loss_of(module, v, x))(variables)
    checkpointed = jax.grad(jax.checkpoint(lambda v: loss_of(module, v, x)))(variables)
    remat = nn.remat(stack)(8, 2)
    rematted = jax.jit(jax.grad(lambda v: loss_of(remat, v, x)))(variables)
    for other in (checkpointed, rematted):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, other)


@pytest.mark.slow
@each_stack
def test_gradients_equal_finite_differences(stack):
    # Linen's LayerNorm promotes float64 with float32 inside.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = normal(1, 2, 5, 3).astype(jnp.float64)
        module = stack(4, 2, bidirectional=True, layer_norm=True, param_dtype=jnp.float64)
        variables = module.init(jax.random.key(0), x)
        check_grads(
            lambda v, x: loss_of(module, v, x), (variables, x), order=1, modes=["rev"], eps=1e-6
        )


def test_an_exported_classifier_runs_without_flax_for_any_batch(tmp_path):
    model = LSTMClassifier(16, 2)
    x = normal(1, 5, 28, 28)
    variables = model.init(jax.random.key(0), x)
    (batch,) = export.symbolic_shape("batch")
    exported = export.export(
        jax.jit(lambda x: model.apply(variables, x)), platforms=["cpu", "cuda", "tpu"]
    )(jax.ShapeDtypeStruct((batch, 28, 28), jnp.float32))
    (tmp_path / "classifier").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", x)
    code = """if True:
        import sys, jax, numpy as np
        sys.modules["flax"] = None  # any import of it now fails
        from jax import export
        from pathlib import Path
        folder = Path(sys.argv[1])
        classify = export.deserialize((folder / "classifier").read_bytes())
        assert classify.platforms == ("cpu", "cuda", "tpu")
        x = np.load(folder / "x.npy")
        np.save(folder / "logits.npy", classify.call(x))
        assert classify.call(x[:2]).shape == (2, 10)
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), jax.jit(model.apply)(variables, x), atol=1e-6
    )
