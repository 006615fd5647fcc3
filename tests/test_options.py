"""The layers' options, each against its definition."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_flax import (
    GRUCell,
    GRUStack,
    LSTMCell,
    LSTMStack,
    RNNCell,
    RNNStack,
    SequenceClassifier,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

CELLS = {LSTMStack: LSTMCell, RNNStack: RNNCell, GRUStack: GRUCell}
each_stack = pytest.mark.parametrize("stack", CELLS)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def build(stack, x, **options):
    module = stack(8, **options)
    return module, module.init(jax.random.key(0), x)


def train(module, variables, x, seed=0, **inputs):
    rngs = {"dropout": jax.random.key(seed)}
    return module.apply(variables, x, deterministic=False, rngs=rngs, **inputs)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# Swapping, shapes and bad input


@each_stack
def test_the_three_are_swapped_by_one_argument(stack):
    x = normal(1, 4, 7, 5)
    model = SequenceClassifier(stack(8, 2, bidirectional=True), num_classes=3)
    logits, variables = model.init_with_output(jax.random.key(0), x)
    assert logits.shape == (4, 3)
    lengths = jnp.array([7, 3, 1, 5])
    ragged = model.apply(variables, x, seq_lengths=lengths)
    for row, length in enumerate(lengths):
        alone = model.apply(variables, x[row : row + 1, :length])
        np.testing.assert_allclose(ragged[row], alone[0], atol=1e-6)


@each_stack
@pytest.mark.parametrize("lengths", [[3, 8], [-1, 2], [0, 1000]])
def test_lengths_out_of_range_are_refused(stack, lengths):
    x = normal(1, 2, 7, 5)
    module, variables = build(stack, x)
    with pytest.raises(ValueError, match=r"seq_lengths must lie in 0\.\.7, but has"):
        module.apply(variables, x, seq_lengths=jnp.array(lengths))


@pytest.mark.parametrize("lengths", [jnp.array([1, 2, 3]), jnp.array([1.0, 2.0])])
def test_misshapen_lengths_are_refused(lengths):
    x = normal(1, 2, 7, 5)
    module, variables = build(LSTMStack, x)
    with pytest.raises(ValueError, match=r"seq_lengths has shape .* not \(2,\) and integers"):
        module.apply(variables, x, seq_lengths=lengths)


@each_stack
def test_traced_lengths_out_of_range_do_as_documented(stack):
    x = normal(1, 3, 7, 5)
    module, variables = build(stack, x)
    run = jax.jit(lambda lengths: module.apply(variables, x, seq_lengths=lengths))
    outputs, carry = run(jnp.array([0, 7, 99]))
    whole, whole_carry = module.apply(variables, x)
    assert (outputs[0] == 0).all()
    np.testing.assert_allclose(outputs[1:], whole[1:], atol=1e-6)
    for state, expected in zip(jax.tree.leaves(carry), jax.tree.leaves(whole_carry), strict=True):
        assert (state[:, 0] == 0).all()
        np.testing.assert_allclose(state[:, 1:], expected[:, 1:], atol=1e-6)


@each_stack
def test_not_even_nan_in_the_padding_reaches_outputs_carry_or_gradients(stack):
    x, lengths = normal(1, 3, 7, 5), jnp.array([7, 2, 4])
    padding = jnp.arange(7)[None, :, None] >= lengths[:, None, None]
    module, variables = build(stack, x, num_layers=2, bidirectional=True, dropout=0.5)

    def loss(variables, x):
        outputs, carry = train(module, variables, x, seq_lengths=lengths)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((outputs, carry)))

    clean = jax.value_and_grad(loss, argnums=(0, 1))(variables, x)
    dirty = jax.value_and_grad(loss, argnums=(0, 1))(variables, jnp.where(padding, jnp.nan, x))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert (clean[1][1][jnp.broadcast_to(padding, x.shape)] == 0).all()


@each_stack
def test_initial_carry_is_checked_by_name_and_may_be_learned(stack):
    x = normal(1, 3, 7, 5)
    module, variables = build(stack, x, num_layers=2)
    _, carry = module.apply(variables, x)
    short = jax.tree.map(lambda a: a[:1], carry)
    with pytest.raises(ValueError, match=r"h_0 has shape \(1, 3, 8\), not \(2, 3, 8\)"):
        module.apply(variables, x, short)
    with pytest.raises(ValueError, match="initial_carry has the structure"):
        module.apply(variables, x, {"h": jnp.zeros((2, 3, 8))})

    def loss(carry):
        return jnp.sum(module.apply(variables, x, carry)[0] ** 2)

    for gradient in jax.tree.leaves(jax.grad(loss)(carry)):
        assert (gradient != 0).all()


# Regularisation


def test_dropout_keeps_the_mean_and_lies_on_every_layers_output_but_the_last():
    x = normal(1, 64, 20, 5)
    module, variables = build(LSTMStack, x, num_layers=2, dropout=0.5)
    single, _ = LSTMStack(8).apply({"params": {"l0": variables["params"]["l0"]}}, x)
    outputs, (h_n, _) = train(module, variables, x)
    np.testing.assert_allclose(h_n[0], single[:, -1], atol=1e-6)
    assert (outputs[:, 1:] != 0).all()  # at first an input may be dropped whole
    with pytest.warns(UserWarning, match=r"dropout=0\.5 drops nothing in a stack of one layer"):
        one_layer, one = build(LSTMStack, x, dropout=0.5)
    np.testing.assert_array_equal(train(one_layer, one, x)[0], one_layer.apply(one, x)[0])


@each_stack
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_masks_differ_between_steps_and_examples(stack, bidirectional):
    """Layer 1 sees the same everywhere but for its masks, and forgets nothing it could mix up."""
    x = jnp.ones((4, 6, 5))
    module, variables = build(
        stack, x, num_layers=2, dropout=0.5, bidirectional=bidirectional,
        recurrent_init=nn.initializers.zeros, bias_init=nn.initializers.zeros, use_bias=False,
    )  # fmt: skip
    # Without recurrence a vanilla RNN's step depends on that step's input alone.
    if stack is RNNStack:
        outputs, _ = train(module, variables, x)
        rows = np.asarray(outputs).reshape(24, -1).round(5)
        assert len(np.unique(rows, axis=0)) > 20
    plain = module.apply(variables, x)[0]
    first, again, other = (train(module, variables, x, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)


@each_stack
def test_recurrent_dropout_is_one_mask_a_sequence(stack):
    """A diagonal recurrence, driven by a constant, shows a dropped unit in every step."""
    x = normal(1, 32, 9, 5)
    module, variables = build(stack, x, recurrent_dropout=0.5)
    cell = CELLS[stack](8)
    outputs, _ = train(module, variables, x, seed=3)
    # Find each sequence's mask among all there are, by running the cell in a plain loop.
    masks = (np.arange(256)[:, None] >> np.arange(8)) & 1
    masks = jnp.asarray(masks / 0.5, jnp.float32)
    params = {"params": variables["params"]["l0"]}
    seen = set()
    for row in range(4):
        carry = cell.initialize_carry(None, (256, 5))
        steps = []
        for t in range(9):
            x_t = jnp.broadcast_to(x[row, t], (256, 5))
            carry, shown = cell.apply(params, carry, x_t, masks)
            steps.append(shown)
        error = jnp.abs(jnp.stack(steps, 1) - outputs[row]).max((1, 2))
        assert error.min() < 1e-5
        seen.add(int(error.argmin()))
    assert len(seen) > 1
    np.testing.assert_allclose(
        module.apply(variables, x)[0], stack(8).apply(variables, x)[0], atol=1e-6
    )


def test_zoneout_keeps_units_at_random_in_training_and_in_the_mean_otherwise():
    x = normal(1, 64, 12, 5)
    module, variables = build(LSTMStack, x, zoneout=0.25, zoneout_cell=0.5)
    outputs, _ = train(module, variables, x)
    kept = np.asarray(outputs[:, 1:] == outputs[:, :-1])
    assert abs(kept.mean() - 0.25) < 0.02
    assert kept.std(axis=1).min() >= 0
    assert 0 < kept.mean(axis=(0, 2)).min() < kept.mean(axis=(0, 2)).max() < 0.5

    # In evaluation: the loop with means.
    cell, params = LSTMCell(8), {"params": variables["params"]["l0"]}
    h = c = jnp.zeros((64, 8))
    for t in range(12):
        (new_h, new_c), _ = cell.apply(params, (h, c), x[:, t])
        h, c = 0.25 * h + 0.75 * new_h, 0.5 * c + 0.5 * new_c
    evaluated, (h_n, c_n) = module.apply(variables, x)
    np.testing.assert_allclose(evaluated[:, -1], h, atol=1e-6)
    np.testing.assert_allclose(h_n[0], h, atol=1e-6)
    np.testing.assert_allclose(c_n[0], c, atol=1e-6)


def test_layer_norm_follows_its_definition():
    """Ba, Kiros and Hinton's equations for the LSTM, in NumPy and float64."""
    x = normal(1, 4, 3, 5)
    module, variables = build(LSTMStack, x, layer_norm=True)
    noise = iter(jax.random.split(jax.random.key(7), 99))
    variables = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(noise), a.shape), variables)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"]["l0"])

    def norm(z, scale, bias=0.0):
        z = z - z.mean(-1, keepdims=True)
        return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * scale + bias

    h = c = np.zeros((4, 8))
    for t in range(3):
        gates = (
            norm(np.asarray(x[:, t], np.float64) @ p["kernel_ih"], p["norm_ih"]["scale"])
            + norm(h @ p["kernel_hh"], p["norm_hh"]["scale"])
            + p["bias"]
        )
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(norm(c, p["norm_c"]["scale"], p["norm_c"]["bias"]))
    outputs, (_, c_n) = module.apply(variables, x)
    np.testing.assert_allclose(outputs[:, -1], h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(c_n[0], c, rtol=1e-4, atol=1e-5)


# Precision, streaming, gates


@each_stack
def test_bfloat16_is_within_its_stated_error(stack):
    """The README states it: 28 steps, 2 layers, largest error of an output."""
    x = normal(1, 32, 28, 28)
    module = stack(64, 2)
    variables = module.init(jax.random.key(0), x)
    exact, _ = module.apply(variables, x)
    outputs, carry = module.clone(dtype=jnp.bfloat16).apply(variables, x)
    assert outputs.dtype == jnp.bfloat16
    if stack is LSTMStack:
        assert carry[1].dtype == jnp.float32
    error = jnp.abs(outputs.astype(jnp.float32) - exact).max()
    assert 0 < error < 0.03


@each_stack
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [11, 1]])
@pytest.mark.parametrize("implementation", ["auto", "by name"])
def test_a_stream_of_pieces_equals_the_whole(stack, pieces, implementation):
    x = normal(1, 3, 12, 5)
    named = "native" if stack is LSTMStack else "scan"
    options = {"implementation": named} if implementation == "by name" else {}
    module, variables = build(stack, x, num_layers=2, **options)
    run = jax.jit(module.apply)
    whole, final = run(variables, x)
    carry, outputs, start = None, [], 0
    for length in pieces:
        piece, carry = run(variables, x[:, start : start + length], carry)
        outputs.append(piece)
        start += length
    # Bit for bit, unless the default has pieces of different sizes computed in different ways.
    tolerance = 2e-7 if options == {} else 0
    streamed = jnp.concatenate(outputs, 1), carry
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=tolerance), streamed, (whole, final)
    )


def test_gates_follow_the_equations_and_cost_nothing_when_not_asked_for():
    x = normal(1, 3, 6, 5)
    module, variables = build(LSTMStack, x, num_layers=2)
    assert set(variables) == {"params"}
    (outputs, (_, c_n)), kept = module.apply(variables, x, mutable="gates")
    below = x
    for layer in ("l0", "l1"):
        gates, p = kept["gates"][layer], variables["params"][layer]
        assert {name: gate.shape for name, gate in gates.items()} == dict.fromkeys(
            ("input", "forget", "candidate", "output", "cell"), (3, 6, 8)
        )
        h = np.concatenate([np.zeros((3, 1, 8)), gates["output"] * np.tanh(gates["cell"])], 1)
        z = np.asarray(below) @ p["kernel_ih"] + h[:, :-1] @ p["kernel_hh"] + p["bias"]
        i, f, g, o = np.split(z, 4, axis=-1)
        np.testing.assert_allclose(gates["input"], sigmoid(i), atol=1e-5)
        np.testing.assert_allclose(gates["forget"], sigmoid(f), atol=1e-5)
        np.testing.assert_allclose(gates["candidate"], np.tanh(g), atol=1e-5)
        np.testing.assert_allclose(gates["output"], sigmoid(o), atol=1e-5)
        before = np.concatenate([np.zeros((3, 1, 8)), gates["cell"][:, :-1]], 1)
        np.testing.assert_allclose(
            gates["cell"], sigmoid(f) * before + sigmoid(i) * np.tanh(g), atol=1e-5
        )
        below = h[:, 1:]
    np.testing.assert_allclose(outputs, below, atol=1e-5)
    np.testing.assert_array_equal(c_n[1], kept["gates"]["l1"]["cell"][:, -1])

    def program(**options):
        return jax.jit(lambda v, x: module.apply(v, x, **options)).lower(variables, x).as_text()

    # Asked for, the gates are results of the program; otherwise they are not even computed apart.
    assert len(program(mutable="gates")) > len(program())
    assert program(mutable=False) == program()


@each_stack
def test_gates_are_kept_in_both_directions_and_time_major(stack):
    x = normal(1, 6, 3, 5)
    module, variables = build(stack, x, bidirectional=True, time_major=True)
    _, kept = module.apply(variables, x, mutable="gates")
    assert set(kept["gates"]) == {"l0", "l0_reverse"}
    assert {a.shape for a in jax.tree.leaves(kept)} == {(6, 3, 8)}
