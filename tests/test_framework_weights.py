"""Weights of flax's and Keras's layers, carried both ways; they compute what is right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstm_flax import (
    GRUStack,
    LSTMClassifier,
    LSTMStack,
    RNNStack,
    from_flax,
    from_keras,
    to_flax,
    to_keras,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found, expected):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=0, atol=1e-5), found, expected)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def drawn(tree):
    """Every parameter drawn: biases start at zero, where a lost one would not be missed."""
    return jax.tree.map(lambda p: 0.5 * normal(p.size, *p.shape), tree)


def params_of(module, x=None):
    """Parameters for a module, which nothing has to be compiled for."""
    x = X if x is None else x
    return drawn(jax.eval_shape(module.init, jax.random.key(0), x)["params"])


X = normal(1, 3, 6, 4)  # [batch, time, features]
CELLS = {
    "LSTMCell": LSTMStack,
    "OptimizedLSTMCell": LSTMStack,
    "GRUCell": GRUStack,
    "SimpleCell": RNNStack,
}

each_cell = pytest.mark.parametrize("name", CELLS)


def linen_layers(name):
    """Two layers of linen, the first bidirectional; their params, outputs and last carry."""
    kind = getattr(nn, name)
    layers = [
        nn.Bidirectional(nn.RNN(kind(5)), nn.RNN(kind(5))),
        nn.RNN(kind(3), return_carry=True),
    ]
    params, y = [], X
    for layer in layers:
        params.append(params_of(layer, y))
        y = layer.apply({"params": params[-1]}, y)
    return params, y[1], y[0]


@each_cell
def test_linens_cells_both_ways(name):
    params, expected, carry = linen_layers(name)
    both, one = from_flax(params[0]), from_flax(params[1])
    between, _ = CELLS[name](5, bidirectional=True).apply({"params": both}, X)
    outputs, final = CELLS[name](3).apply({"params": one}, between)
    close(outputs, expected)
    # Flax's carry of an LSTM is (c, h).
    close([state[0] for state in jax.tree.leaves(final)], jax.tree.leaves(carry)[::-1])

    ((forward, backward),), (cell,) = to_flax(both), to_flax(one)
    equal({"forward_rnn": {"cell": forward}, "backward_rnn": {"cell": backward}}, params[0])
    equal({"cell": cell}, params[1])
    equal(from_flax((forward, backward)), both)


def test_several_layers_at_once():
    params, y = [], X
    for _ in range(2):
        rnn = nn.RNN(nn.GRUCell(3))
        params.append(params_of(rnn, y))
        y = rnn.apply({"params": params[-1]}, y)
    stacked = from_flax(*params)
    close(GRUStack(3, 2).apply({"params": stacked}, X)[0], y)
    equal([{"cell": cell} for cell in to_flax(stacked)], params)


def nnx_cell(name):
    cell = getattr(nnx, name)(4, 5, rngs=nnx.Rngs(0))
    nnx.update(cell, drawn(nnx.to_pure_dict(nnx.state(cell, nnx.Param))))
    return cell


@each_cell
def test_nnxs_cells_both_ways(name):
    cell = nnx_cell(name)
    rnn = nnx.RNN(cell, return_carry=True)
    carry, expected = rnn(X)
    params = from_flax(cell)
    for source in (rnn, nnx.state(cell, nnx.Param)):
        equal(from_flax(source), params)
    outputs, final = CELLS[name](5).apply({"params": params}, X)
    close(outputs, expected)
    close([state[0] for state in jax.tree.leaves(final)], jax.tree.leaves(carry)[::-1])

    other = getattr(nnx, name)(4, 5, rngs=nnx.Rngs(1))
    (back,) = to_flax(params, "nnx_optimized" if name == "OptimizedLSTMCell" else "nnx")
    nnx.update(other, back)
    equal(
        nnx.to_pure_dict(nnx.state(other, nnx.Param)), nnx.to_pure_dict(nnx.state(cell, nnx.Param))
    )
    close(nnx.RNN(other)(X), expected)


def test_nnxs_bidirectional():
    both = nnx.Bidirectional(nnx.RNN(nnx_cell("LSTMCell")), nnx.RNN(nnx_cell("OptimizedLSTMCell")))
    params = from_flax(both)
    close(LSTMStack(5, bidirectional=True).apply({"params": params}, X)[0], both(X))
    assert sorted(params) == ["l0", "l0_reverse"]


@each_cell
def test_without_biases_flaxs_are_zero(name):
    module = CELLS[name](5, use_bias=False)
    params = params_of(module)
    expected, _ = module.apply({"params": params}, X)
    (cell,) = to_flax(params)
    close(nn.RNN(getattr(nn, name)(5)).apply({"params": {"cell": cell}}, X), expected)


def test_where_flaxs_arithmetic_differs_an_error_says_so():
    mgu = nn.MGUCell(5)
    variables = mgu.init(jax.random.key(0), jnp.ones((3, 5)), X[:, 0])
    with pytest.raises(ValueError, match=r"^layer 0 has hf/kernel, .* CellStack runs other cells"):
        from_flax(variables["params"])
    residual = nnx.SimpleCell(4, 5, residual=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^SimpleCell\(residual=True\) adds h before its activ"):
        from_flax(residual)
    gru = params_of(GRUStack(5))
    with pytest.raises(ValueError, match=r"^nnx's GRUCell has no bias inside .* l0/bias_hn is not"):
        to_flax(gru, "nnx")
    before = params_of(GRUStack(5, reset_after=False))
    with pytest.raises(ValueError, match=r"^flax's GRUCell scales the product with h, not h itsel"):
        to_flax(before)


def test_the_residuals_identity_belongs_to_the_recurrent_kernel():
    """As the error advises."""
    cell = nnx.SimpleCell(4, 5, residual=True, rngs=nnx.Rngs(0))
    expected = nnx.RNN(cell)(X)
    cell.dense_h.kernel[...] += jnp.eye(5)
    cell.residual = False
    close(RNNStack(5).apply({"params": from_flax(cell)}, X)[0], expected)


@pytest.mark.parametrize("convert", [to_flax, to_keras])
def test_what_other_libraries_lack_is_named(convert):
    for module, path in [
        (LSTMStack(5, peephole=True), "l0/peephole_f"),
        (LSTMStack(5, proj_size=2), "l0/kernel_hr"),
        (LSTMStack(5, layer_norm=True), "l0/norm_"),
    ]:
        with pytest.raises(ValueError, match=rf"have no place for {path}"):
            convert(params_of(module))
    classifier = params_of(LSTMClassifier(5, 1))
    with pytest.raises(ValueError, match=r"takes the params of one stack, .*, not core, head$"):
        convert(classifier)
    with pytest.raises(TypeError, match="takes a mapping of params, not None"):
        convert(None)
    deep = params_of(LSTMStack(5, 3))
    del deep["l1"]
    with pytest.raises(ValueError, match=r"misses layers: there is l0, l2"):
        convert(deep)
    for part, shape in (("bias", (19,)), ("kernel_ih", (4, 19)), ("kernel_hh", (5, 19))):
        wrong = params_of(LSTMStack(5))
        wrong["l0"][part] = np.ones(shape, np.float32)
        with pytest.raises(ValueError, match=rf"^{part} of l0 has shape \({shape[0]},"):
            convert(wrong)


@pytest.mark.parametrize("given", [None, 3, [1.0], nn.LSTMCell(5)])
def test_what_is_no_layer_is_said(given):
    for convert in (from_flax, from_keras):
        with pytest.raises(TypeError, match=rf"^{convert.__name__} takes .*, not"):
            convert(given)


def test_misshapen_cells_are_refused():
    (cell,) = to_flax(params_of(LSTMStack(5)))
    cell["hf"]["kernel"] = np.ones((4, 5), np.float32)
    with pytest.raises(ValueError, match=r"^the shapes of layer 0 don't fit .*hf/kernel \(4, 5\)"):
        from_flax(cell)
    cell["hf"]["kernel"] = np.ones((5, 4), np.float32)
    with pytest.raises(ValueError, match=r"^kernel_hh of layer 0 has shape \(5, 19\)"):
        from_flax(cell)
    with pytest.raises(ValueError, match=r"^layer 0 has nothing, which is of no"):
        from_flax({})


# Keras


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # read when it is first imported
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {keras.backend.backend()} in this process")
    with jax.numpy_dtype_promotion("standard"):
        yield keras


KERAS = {"LSTM": LSTMStack, "GRU": GRUStack, "SimpleRNN": RNNStack}
KERAS_CASES = [
    ("LSTM", {}),
    ("LSTM", {"use_bias": False}),
    ("GRU", {"reset_after": True}),
    ("GRU", {"reset_after": False}),
    ("GRU", {"reset_after": True, "use_bias": False}),
    ("GRU", {"reset_after": False, "use_bias": False}),
    ("SimpleRNN", {}),
]


def weights_of(layer):
    """As get_weights(), which NumPy 2 deprecates."""
    return [np.asarray(variable.value) for variable in layer.weights]


def keras_layer(keras, kind, options, x=X):
    """A layer whose weights are moved from where they start, and its outputs."""
    layer = getattr(keras.layers, kind)(5, return_sequences=True, **options)
    layer.build(x.shape)
    layer.set_weights(drawn(weights_of(layer)))
    return layer


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "options"), KERAS_CASES, ids=str)
def test_kerass_layers_both_ways(keras, kind, options, bidirectional):
    layer = keras_layer(keras, kind, options)
    if bidirectional:
        layer = keras.layers.Bidirectional(layer)
        layer.build(X.shape)
        layer.set_weights(drawn(weights_of(layer)))
    params = from_keras(layer)
    outputs, _ = KERAS[kind](5, bidirectional=bidirectional, **options).apply({"params": params}, X)
    close(outputs, layer(X))

    (weights,) = to_keras(params)
    if not (kind == "GRU" and options == {"reset_after": True}):  # of its biases, the sum remains
        equal(weights, weights_of(layer))
    layer.set_weights(weights)
    close(layer(X), outputs)
    equal(from_keras(layer), params)


def test_kerass_layers_in_a_stack_and_cells(keras):
    first = keras_layer(keras, "GRU", {})
    second = keras_layer(keras, "GRU", {}, x=np.ones((3, 6, 5)))
    params = from_keras(first, second)
    close(GRUStack(5, 2).apply({"params": params}, X)[0], second(first(X)))
    equal(from_keras(second.cell)["l0"], params["l1"])


def test_what_is_no_layer_of_ours_in_keras_is_said(keras):
    with pytest.raises(ValueError, match=r"^layer 0, LSTM, has no weights yet: build it"):
        from_keras(keras.layers.LSTM(5))
    dense = keras.layers.Dense(5)
    dense.build(X.shape)
    conv = keras.layers.ConvLSTM1D(5, 3)
    conv.build((3, 6, 4, 2))
    for layer in (dense, conv):
        with pytest.raises(ValueError, match=rf"^layer 0, {type(layer).__name__}, is no LSTM, GRU"):
            from_keras(layer)
