import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_flax import (
    CellStack,
    GRUStack,
    LSTMCell,
    LSTMClassifier,
    LSTMStack,
    RNNStack,
    chrono_init,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loop_over_cells(params, x, carry, hidden_size):
    """The stack as two plain Python loops over the cell."""
    layers = sorted(params)
    h_n, c_n = list(carry[0]), list(carry[1])
    outputs = []
    for t in range(x.shape[1]):
        step_input = x[:, t]
        for k, layer in enumerate(layers):
            (h_n[k], c_n[k]), step_input = LSTMCell(hidden_size).apply(
                {"params": params[layer]}, (h_n[k], c_n[k]), step_input
            )
        outputs.append(step_input)
    return jnp.stack(outputs, 1), (jnp.stack(h_n), jnp.stack(c_n))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("from_zeros", [True, False])
def test_scan_equals_a_loop_over_the_cell(num_layers, from_zeros):
    batch, time, features, hidden = 3, 7, 5, 4
    x = normal(0, batch, time, features)
    stack = LSTMStack(hidden, num_layers)
    params = stack.init(jax.random.key(1), x)["params"]
    if from_zeros:
        zeros = jnp.zeros((num_layers, batch, hidden))
        given, carry = None, (zeros, zeros)
    else:
        given = carry = (normal(2, num_layers, batch, hidden), normal(3, num_layers, batch, hidden))

    outputs, (h_n, c_n) = stack.apply({"params": params}, x, given)
    expected, (expected_h, expected_c) = loop_over_cells(params, x, carry, hidden)

    assert outputs.shape == (batch, time, hidden)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(h_n, expected_h, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(c_n, expected_c, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(outputs[:, -1], h_n[-1])


def test_cell_follows_the_equations():
    """Against NumPy in float64, gate by gate."""
    hidden, features = 3, 2
    cell = LSTMCell(hidden)
    x, h, c = normal(0, 4, features), normal(1, 4, hidden), normal(2, 4, hidden)
    params = cell.init(jax.random.key(3), (h, c), x)["params"]
    (new_h, new_c), shown = cell.apply({"params": params}, (h, c), x)
    np.testing.assert_array_equal(shown, new_h)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    w_ih, w_hh, b, x, h, c = (
        np.asarray(a, np.float64)
        for a in (params["kernel_ih"], params["kernel_hh"], params["bias"], x, h, c)
    )
    i, f, g, o = np.split(x @ w_ih + h @ w_hh + b, 4, axis=1)
    expected_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    np.testing.assert_allclose(new_c, expected_c, rtol=1e-5)
    np.testing.assert_allclose(new_h, sigmoid(o) * np.tanh(expected_c), rtol=1e-5)


@pytest.mark.parametrize(("hidden", "layers"), [(256, 3), (256, 2), (7, 1)])
def test_parameter_count_follows_the_formula(hidden, layers):
    model = LSTMClassifier(hidden, layers, num_classes=10)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    first = 4 * (hidden * (28 + hidden) + hidden)
    others = 4 * (hidden * 2 * hidden + hidden)
    assert count == first + (layers - 1) * others + 10 * (hidden + 1)


def test_initialisation_is_orthogonal_a_gate_with_an_open_forget_gate():
    hidden = 16
    params = LSTMStack(hidden).init(jax.random.key(0), jnp.zeros((1, 2, 3)))["params"]["l0"]
    for gate in jnp.split(params["kernel_hh"], 4, axis=1):
        np.testing.assert_allclose(gate.T @ gate, np.eye(hidden), atol=1e-5)
    np.testing.assert_array_equal(
        params["bias"], np.repeat(np.array([0, 1, 0, 0], np.float32), hidden)
    )


def test_chrono_biases_spread_the_times_for_which_units_remember():
    hidden, max_steps = 400, 784
    stack = LSTMStack(hidden, bias_init=chrono_init(max_steps))
    params = stack.init(jax.random.key(0), jnp.zeros((1, 2, 1)))["params"]["l0"]
    i, f, g, o = jnp.split(params["bias"], 4)
    np.testing.assert_array_equal(i, -f)
    np.testing.assert_array_equal(jnp.stack([g, o]), 0)
    # A state that nothing is written to fades as σ(b_f)**t, to 1/e after about 1 + exp(b_f) steps.
    spans = np.sort(np.exp(f))
    assert 1 <= spans[0] < 10
    assert 770 < spans[-1] < max_steps
    np.testing.assert_allclose(spans, np.linspace(1, max_steps - 1, hidden), atol=60)


def test_initialisers_are_the_callers_choice():
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    stack = LSTMStack(4, kernel_init=ones, recurrent_init=zeros, bias_init=zeros)
    params = stack.init(jax.random.key(0), jnp.zeros((1, 2, 3)))["params"]["l0"]
    assert (params["kernel_ih"] == 1).all()
    assert (params["kernel_hh"] == 0).all()
    assert (params["bias"] == 0).all()


def test_dropout_lies_between_layers_and_differs_from_step_to_step():
    """With kernels that pass the input on, the top layer shows which inputs were dropped."""
    x = jnp.ones((2, 6, 8))
    stack = LSTMStack(8, 2, dropout=0.5)
    variables = stack.init(jax.random.key(0), x)

    def run(seed, deterministic):
        rngs = {"dropout": jax.random.key(seed)}
        return stack.apply(variables, x, deterministic=deterministic, rngs=rngs)

    outputs, (h_n, _) = run(1, deterministic=False)
    plain, (plain_h, _) = run(1, deterministic=True)
    np.testing.assert_array_equal(h_n[0], plain_h[0])  # nothing is dropped before layer 0
    assert not np.allclose(outputs, plain)
    np.testing.assert_array_equal(outputs, run(1, deterministic=False)[0])
    assert not np.allclose(outputs, run(2, deterministic=False)[0])
    # A mask frozen over time would let each example's outputs differ only as the plain ones do;
    # two dropped runs of one step each, with the carry reset, must differ between the steps.
    still = LSTMStack(8, 2, dropout=0.5, recurrent_init=nn.initializers.zeros)
    forgetful = still.clone(bias_init=lambda k, s, d: jnp.full(s, -50.0, d).at[:8].set(9.0))
    variables = forgetful.init(jax.random.key(0), x)
    variables["params"]["l1"]["bias"] = variables["params"]["l1"]["bias"].at[24:].set(9.0)
    variables["params"]["l0"]["bias"] = variables["params"]["l0"]["bias"].at[24:].set(9.0)
    dropped, _ = forgetful.apply(
        variables, x, deterministic=False, rngs={"dropout": jax.random.key(3)}
    )
    assert len(np.unique(np.asarray(dropped[0]).round(5), axis=0)) == x.shape[1]


def test_misshapen_carry_is_refused_by_name():
    stack = LSTMStack(4, 2)
    x = jnp.zeros((3, 5, 6))
    variables = stack.init(jax.random.key(0), x)
    good, bad = jnp.zeros((2, 3, 4)), jnp.zeros((1, 3, 4))
    with pytest.raises(ValueError, match=r"c_0 has shape \(1, 3, 4\), not \(2, 3, 4\)"):
        stack.apply(variables, x, (good, bad))


def test_bfloat16_products_keep_the_cell_state_in_float32():
    x = normal(0, 8, 28, 28)
    model = LSTMStack(32, 2)
    variables = model.init(jax.random.key(1), x)
    exact, _ = model.apply(variables, x)
    outputs, (h_n, c_n) = model.clone(dtype=jnp.bfloat16).apply(variables, x)
    assert (outputs.dtype, h_n.dtype, c_n.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(outputs.astype(jnp.float32), exact, atol=0.02)


class NamedStack(LSTMStack):
    """A stack as a user writes one, who does not know of `nn.nowrap`."""

    def make_cell(self, name):
        return super().make_cell(name)

    def check_attributes(self):
        super().check_attributes()


@pytest.mark.parametrize(
    "model",
    [
        LSTMStack(8, 2, bidirectional=True), GRUStack(8), RNNStack(8), NamedStack(8),
        LSTMStack(8, peephole=True), CellStack([LSTMCell(8), nn.GRUCell(4)]), LSTMClassifier(8),
    ],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
def test_flax_tabulates_every_layer(model):
    x = jnp.ones((2, 3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    table = model.tabulate(jax.random.key(0), x, console_kwargs={"width": 240})
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"Total Parameters: {total:,} " in table
    layers = params.get("core", params)
    prefix = "core/" if "core" in params else ""
    assert all(f" {prefix}{name} " in table for name in layers)
