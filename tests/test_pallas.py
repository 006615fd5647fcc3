"""The kernels for TPUs, interpreted on this machine, against what they are to compute."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lstm_flax import LSTMStack
from lstm_flax.models import lstm_layer, native, pallas_tpu

HIGHEST = jax.lax.Precision.HIGHEST


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(actual, expected, tolerance):
    """Entries differ by little beside the largest one of their array."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


# Neither the batch, nor the steps, nor the units fill up tiles of 16, 9 and 128.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "reverse"),
    [("float32", 1e-5, False), ("float32", 1e-5, True), ("bfloat16", 0.004, True)],
)
def test_each_kernel_is_its_definition(dtype, tolerance, reverse):
    """Interpreted as on a TPU: it raises where a kernel reads what is not there, and what is not
    yet written is NaN. In bfloat16 what is rounded, to 8 bits, may differ by one of them."""
    batch, time, features, hidden = 5, 17, 3, 130
    lengths = jnp.array([time, 0, 3, 1, 16])
    is_valid = lstm_layer.is_valid_step(lengths, time)[:, :, None]
    operands = (
        jnp.where(is_valid, normal(1, batch, time, features), 0).astype(dtype),
        0.1 * normal(2, features, 4 * hidden),
        0.1 * normal(3, hidden, 4 * hidden),
        normal(4, 4 * hidden),
        normal(5, batch, hidden).astype(dtype),
        normal(6, batch, hidden),
        lengths,
    )

    def both(part, operands, **static):
        static |= {"reverse": reverse, "precision": HIGHEST}
        with pltpu.force_tpu_interpret_mode():
            found = jax.jit(partial(getattr(pallas_tpu, part), **static))(*operands)
        expected = jax.jit(partial(getattr(lstm_layer, part), **static))(*operands)
        assert_close(found, expected, tolerance)
        return expected

    *_, gates, cells = both("forward", operands, keep=True)
    d_states = [normal(seed, batch, hidden) for seed in (7, 8)]
    d_outputs = normal(9, batch, time, hidden).astype(dtype)
    d_h_n, d_c_n = d_states[0].astype(dtype), d_states[1]
    both("gate_gradients", (d_outputs, d_h_n, d_c_n, gates, cells, operands[2], *operands[5:]))


@pytest.fixture
def interpreted():
    """On this machine's CPU, layers run by the kernels for TPUs, interpreted."""
    lstm_layer.register("cpu", lambda: pallas_tpu)
    with pltpu.force_tpu_interpret_mode(True):
        yield
    lstm_layer.register("cpu", lambda: native)


def test_a_stack_of_them_is_the_scan_with_all_gradients(interpreted):
    stack, x, lengths = LSTMStack(8, bidirectional=True), normal(1, 3, 4, 5), jnp.array([4, 0, 2])
    variables = jax.jit(stack.init)(jax.random.key(0), x)

    def loss(stack, variables, x, carry):
        outputs, (h_n, c_n) = stack.apply(variables, x, carry, seq_lengths=lengths)
        return (outputs**2).sum() + (h_n * c_n).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(partial(loss, s), (0, 1, 2)))(
            variables, x, (normal(2, 2, 3, 8), normal(3, 2, 3, 8))
        )
        for s in (stack, stack.clone(implementation="scan"))
    )
    assert_close(found, expected, 1e-5)


def kernels_in(function, *arguments, **options):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",), **options)
    return lowered.as_text().count("tpu_custom_call")


def test_programs_for_tpus_hold_them_wherever_they_are_made():
    stack, x = LSTMStack(8, 2), normal(1, 4, 6, 5)
    variables = stack.init(jax.random.key(0), x)

    def loss(variables, x):
        return (stack.apply(variables, x)[0] ** 2).sum()

    assert kernels_in(loss, variables, x) == 2
    assert kernels_in(jax.grad(loss), variables, x) == 4
    assert kernels_in(jax.vmap(jax.grad(loss), (None, 0)), variables, x[:, None]) == 4
    mesh, spec = jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec("data")

    def spread(variables, x):
        summed = jax.shard_map(
            lambda v, x: jax.lax.psum(loss(v, x), "data"), mesh=mesh,
            in_specs=(jax.sharding.PartitionSpec(), spec), out_specs=jax.sharding.PartitionSpec(),
        )  # fmt: skip
        return jax.grad(summed)(variables, x)

    assert kernels_in(spread, variables, jax.device_put(x, jax.NamedSharding(mesh, spec))) == 4
    # Exported for both, it runs here too.
    both = jax.export.export(jax.jit(loss), platforms=("cpu", "tpu"))(variables, x)
    assert both.mlir_module().count("tpu_custom_call") == 2
    np.testing.assert_allclose(both.call(variables, x), loss(variables, x), rtol=1e-5)


def test_weights_that_do_not_fit_and_other_dtypes_are_told_of(caplog):
    x = jax.ShapeDtypeStruct((128, 28, 28), jnp.float32)
    stack = LSTMStack(2048)
    variables = jax.eval_shape(stack.init, jax.random.key(0), x)
    with caplog.at_level(logging.INFO, "lstm_flax"):
        assert kernels_in(stack.apply, variables, x) == 0
    told = "no kernel computes forward for tpu: weights of 68 MiB do not fit into 48 MiB of VMEM"
    assert told in caplog.messages
    assert stack.why_no_kernel(x, "tpu") in told
    assert LSTMStack(256).why_no_kernel(x, "tpu") is None
    half = jax.ShapeDtypeStruct((2, 3, 4), jnp.float16)
    assert pallas_tpu.why_not("forward", [half]) == "products in float16"
