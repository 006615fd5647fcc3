"""cuDNN's layers: from the same parameters, with the same results and gradients as the scan.

No GPU is needed: `jax.experimental.rnn.lstm_ref` is cuDNN's reference, on the same packed weights.
It stands in for cuDNN's two calls, and constants for the sizes that cuDNN knows.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn
from jax.interpreters import mlir

from lstm_flax import LSTMStack
from lstm_flax.models import cudnn


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def sizes(monkeypatch):
    """Programs can be made that call cuDNN."""
    asked = []

    def compute(*arguments):
        asked.append(arguments)
        return 16, 32

    known = SimpleNamespace(compute_rnn_workspace_reserve_space_sizes=compute)
    monkeypatch.setattr(rnn, "gpu_rnn", known)
    return asked


@pytest.fixture
def reference(sizes, monkeypatch):
    """On this machine's CPU, calls of cuDNN are calls of its reference."""

    def run(x, h_0, c_0, weights, lengths, precision, **settings):
        names = ("input_size", "hidden_size", "num_layers", "bidirectional")
        unpacked = rnn.unpack_lstm_weights(weights, *(settings[name] for name in names))
        return rnn.lstm_ref(x, h_0, c_0, *unpacked, lengths, *settings.values())

    def forward(x, h_0, c_0, weights, lengths, **settings):
        results = run(x, h_0, c_0, weights, lengths, **settings)
        kept = jnp.full(32, 7.0)  # which the backward pass must be given
        return results, (x, h_0, c_0, weights, lengths, results[0], kept)

    def backward(residuals, gradients, **settings):
        x, h_0, c_0, weights, lengths, _, kept = residuals
        function = partial(run, lengths=lengths, **settings)
        found = jax.vjp(lambda *a: function(*a), x, h_0, c_0, weights)[1](gradients)
        return (found[0], found[1], found[2], found[3] * kept[0] / 7, None)

    monkeypatch.setattr(rnn, "lstm_fwd", forward)
    monkeypatch.setattr(rnn, "lstm_bwd", backward)
    cudnn.register("cpu")
    yield
    for made, definition in (
        (cudnn.forward_p, cudnn.forward),
        (cudnn.gradients_p, cudnn.gradients),
    ):
        mlir.register_lowering(made, mlir.lower_fun(definition, multiple_results=True), "cpu")


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"num_layers": 2, "bidirectional": True, "time_major": True}, [4, 0, 2]),
        ({"num_layers": 2, "dropout": 0.5, "use_bias": False}, None),
    ],
)
def test_values_and_all_gradients(reference, options, lengths):
    stack = LSTMStack(6, implementation="cudnn", **options)
    x = normal(1, *((4, 3) if stack.time_major else (3, 4)), 5)
    variables = jax.jit(stack.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda p: p + 0.1 * normal(p.size, *p.shape), variables)
    zeros = stack.initialize_carry(None, x.shape)
    carry = jax.tree.map(lambda s: normal(2, *s.shape), zeros)
    lengths = None if lengths is None else jnp.array(lengths)

    def loss(stack, variables, x, carry):
        outputs, (h_n, c_n) = stack.apply(
            variables, x, carry, seq_lengths=lengths, deterministic=False,
            rngs={"dropout": jax.random.key(3)},
        )  # fmt: skip
        return (outputs**2).sum() + (h_n * c_n).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(partial(loss, s), (0, 1, 2)))(variables, x, carry)
        for s in (stack, stack.clone(implementation="scan"))
    )
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


def test_other_derivatives_and_vmap_are_the_scans(reference):
    stack, x = LSTMStack(4, implementation="cudnn"), normal(1, 2, 3, 2)
    variables = jax.jit(stack.init)(jax.random.key(0), x)

    def loss(stack, x):
        return (stack.apply(variables, x)[0] ** 3).sum()

    def derivatives(stack):
        f = partial(loss, stack)
        return {
            "hessian times x": jax.jvp(jax.grad(f), (x,), (x,))[1],
            "each example": jax.vmap(jax.grad(f))(x[:, None]),
        }

    found, expected = (
        jax.jit(partial(derivatives, s))() for s in (stack, stack.clone(implementation="scan"))
    )
    for name, e in expected.items():
        np.testing.assert_allclose(found[name], e, atol=1e-5 * np.abs(e).max(), err_msg=name)


@pytest.mark.parametrize(("precision", "allows_tf32"), [(None, True), ("highest", False)])
def test_programs_for_cuda_call_it_both_ways(sizes, precision, allows_tf32):
    """JAX's own lowering needs CUDA's library; here a line in its place says what is called."""

    def call(name):
        def lower(ctx, *arguments, cudnn_allow_tf32, **_):
            assert cudnn_allow_tf32 is allows_tf32
            return jax.ffi.ffi_lowering(name)(ctx, *arguments)

        return lower

    mlir.register_lowering(rnn.rnn_fwd_p, call("cudnn_rnn"), "cuda")
    mlir.register_lowering(rnn.rnn_bwd_p, call("cudnn_rnn_bwd"), "cuda")
    options = {"bidirectional": True, "precision": precision, "implementation": "cudnn"}
    stack, x = LSTMStack(6, 3, **options), normal(1, 3, 4, 5)
    variables = jax.jit(stack.init)(jax.random.key(0), x)
    traced = jax.jit(jax.grad(lambda v: stack.apply(v, x)[0].sum())).trace(variables)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@cudnn_rnn(") == program.count("@cudnn_rnn_bwd(") == 1
    assert "stablehlo.while" not in program
    # Elsewhere the same program runs by layers.
    assert "cudnn" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_why_not_is_told_of():
    x = jnp.ones((2, 3, 4))
    stack = LSTMStack(6, implementation="cudnn")
    variables = stack.init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match="'cudnn' scans: JAX's CUDA plugin is not installed"):
        stack.apply(variables, x)
    assert stack.clone(dtype=jnp.bfloat16).why_no_kernel(x, "cuda") == "products in bfloat16"
