"""The forms in which sequences come, and where the carry starts anew: each by what it means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_flax import CellStack, GRUStack, LSTMCell, LSTMStack, RNNStack, SequenceClassifier

pytestmark = pytest.mark.usefixtures("strict_dtypes")

STACKS = (LSTMStack, GRUStack, RNNStack)
each_stack = pytest.mark.parametrize("stack", STACKS)
HOLES = np.array([[1, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)


def normal(seed, *shape):
    """By NumPy, as is what is cut out of it: JAX would compile a program for each shape."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found, expected, tolerance=1e-6):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=0, atol=tolerance), found, expected
    )


def fill(shapes):
    """Random parameters of these shapes, without compiling the initialisers."""
    leaves, structure = jax.tree.flatten(shapes)
    arrays = (jnp.asarray(0.4 * normal(k, *leaf.shape)) for k, leaf in enumerate(leaves))
    return jax.tree.unflatten(structure, arrays)


def build(stack, x, **options):
    module = stack(8, **options)
    return module, fill(jax.eval_shape(module.init, jax.random.key(0), x))


def apply(module, *args, **kwargs):
    return jax.device_get(jax.jit(module.apply)(*args, **kwargs))


# Axes


@pytest.mark.parametrize(
    ("stack", "time_major"),
    [(LSTMStack, False), (LSTMStack, True), (GRUStack, False), (RNNStack, True)],
)
def test_one_sequence_and_many_batch_axes_are_rows_of_a_batch(stack, time_major):
    """As `torch.nn.LSTM` takes one sequence, and `flax.linen.RNN` any batch axes."""
    rows = normal(1, 6, 5, 4)  # [batch, time, features]
    options = {"num_layers": 2, "bidirectional": True}
    module, variables = build(stack, rows, **options)
    lengths = np.array([5, 0, 3, 1, 4, 2])
    start = jax.tree.map(lambda s: normal(2, *s.shape), module.initialize_carry(None, rows.shape))
    outputs, final = apply(module, variables, rows, start, seq_lengths=lengths)

    module = module.clone(time_major=time_major)
    for batch, of in (((), np.s_[2]), ((3, 2), np.s_[:])):
        x = rows[of].reshape(*batch, 5, 4)
        expected = outputs[of].reshape(*batch, 5, -1)
        if time_major:
            x, expected = (np.moveaxis(a, -2, 0) for a in (x, expected))

        def seen(carry, of=of, batch=batch):
            return jax.tree.map(lambda s: s[:, of].reshape(4, *batch, 8), carry)

        assert jax.tree.map(jnp.shape, module.initialize_carry(None, x.shape)) == jax.tree.map(
            jnp.shape, seen(final)
        )
        found = apply(module, variables, x, seen(start), seq_lengths=lengths[of].reshape(batch))
        close(found, (expected, seen(final)))
    _, kept = jax.eval_shape(lambda: module.apply(variables, x, mutable="gates"))
    assert {g.shape[:-1] for g in jax.tree.leaves(kept)} == {x.shape[:-1]}


def test_a_classifier_takes_them_too():
    x = normal(1, 2, 3, 5, 4)
    model = SequenceClassifier(LSTMStack(8, bidirectional=True), 3)
    variables = fill(jax.eval_shape(model.init, jax.random.key(0), x))
    logits = apply(model, variables, x)
    assert logits.shape == (2, 3, 3)
    close(apply(model, variables, x[1, 2]), logits[1, 2])
    mask, resets = np.arange(5) >= 2, np.arange(5) == 4
    close(apply(model, variables, x[0, 0], mask=mask), apply(model, variables, x[0, 0, 2:]))
    shape = jax.eval_shape(lambda: model.apply(variables, x[0, 0], resets=resets)).shape
    assert shape == (3,)


@each_stack
def test_flags_of_another_shape_or_dtype_are_refused(stack):
    module, variables = build(stack, x := normal(1, 3, 6, 4))
    for name in ("mask", "resets"):
        for wrong in (jnp.ones((3, 5), bool), jnp.ones((3, 6), jnp.int32), jnp.ones(6, bool)):
            with pytest.raises(ValueError, match=rf"{name} has shape .*, not \(3, 6\) and bool"):
                module.apply(variables, x, **{name: wrong})


# One direction, reversed


@pytest.mark.parametrize(
    ("stack", "implementation"), [*((s, "scan") for s in STACKS), (LSTMStack, "native")]
)
def test_reverse_is_the_other_half_of_both_directions(stack, implementation):
    x, lengths = normal(1, 3, 6, 4), jnp.array([6, 0, 4])
    both, variables = build(stack, x, bidirectional=True)
    params = {"l0": variables["params"]["l0_reverse"]}
    module = stack(8, reverse=True, implementation=implementation)
    outputs, final = apply(both, variables, x, seq_lengths=lengths)
    found = apply(module, {"params": params}, x, seq_lengths=lengths)
    close(found, (outputs[:, :, 8:], jax.tree.map(lambda s: s[1:], final)))
    with pytest.raises(ValueError, match="reverse is for one direction: bidirectional has both"):
        stack(8, reverse=True, bidirectional=True)


# Masks


@pytest.mark.parametrize(
    ("stack", "implementation"), [*((s, "scan") for s in STACKS), (LSTMStack, "native")]
)
def test_a_masked_step_is_as_if_it_were_not_there(stack, implementation):
    """Holes and left padding, in both directions and through two layers, with all gradients."""
    x = normal(1, 3, 6, 4)
    options = {"num_layers": 2, "bidirectional": True, "implementation": implementation}
    module, variables = build(stack, x, **options)

    @jax.jit
    def run(variables, x, mask):
        def loss(variables, x):
            outputs, final = module.apply(variables, x, mask=mask)
            total = (outputs**2).sum() + sum((s**3).sum() for s in jax.tree.leaves(final))
            return total, (outputs, final)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)

    dirty = np.where(HOLES[:, :, None], x, np.float32("nan"))  # reaches nothing
    (total, (outputs, of_mask)), (by_params, by_x) = jax.device_get(run(variables, dirty, HOLES))
    assert (outputs[~HOLES] == 0).all()
    assert (by_x[~HOLES] == 0).all()

    # The same steps, moved to the front, with lengths.
    short = np.zeros_like(x)
    for row, counts in enumerate(HOLES):
        short[row, : counts.sum()] = x[row, counts]
    packed = np.sort(~HOLES, axis=1)
    (expected, (front, _)), (same, by_short) = jax.device_get(run(variables, short, ~packed))
    close((total, by_params), (expected, same), 1e-5)
    close(outputs[HOLES], front[~packed])
    close(by_x[HOLES], by_short[~packed], 1e-5)
    of_lengths = apply(module, variables, short, seq_lengths=HOLES.sum(1))
    close((front, of_mask), of_lengths)


def test_a_mask_and_lengths_count_steps_that_both_count():
    x, lengths = normal(1, 3, 6, 4), jnp.array([4, 5, 6])
    module, variables = build(LSTMStack, x)
    both = HOLES & (np.arange(6) < lengths[:, None])
    run = jax.jit(module.apply)
    found = run(variables, x, mask=jnp.array(HOLES), seq_lengths=lengths)
    close(found, run(variables, x, mask=jnp.array(both)))


def test_gates_lie_where_their_steps_are():
    x = normal(1, 3, 6, 4)
    module, variables = build(LSTMStack, x)
    run = jax.jit(lambda v, x, mask: module.apply(v, x, mask=mask, mutable="gates"))
    (outputs, _), kept = jax.device_get(run(variables, x, HOLES))
    gates = kept["gates"]["l0"]
    close(gates["output"] * np.tanh(gates["cell"]), outputs)
    assert (gates["forget"][~HOLES] == 0).all()
    assert (gates["forget"][HOLES] > 0).all()


# The carry inside a sequence


@each_stack
def test_pieces_between_resets_know_nothing_of_each_other(stack):
    x = normal(1, 2, 6, 4)
    module, variables = build(stack, x, num_layers=2)
    zeros = jax.tree.map(np.asarray, module.initialize_carry(None, x.shape))
    start = jax.tree.map(lambda s: normal(2, *s.shape), zeros)
    resets = np.zeros((2, 6), bool)
    resets[0, [2, 4]] = resets[1, 0] = True
    outputs, final = apply(module, variables, x, start, resets=resets)

    run = jax.jit(module.apply)
    first, fresh = (jax.tree.map(lambda s: s[:, :1], carry) for carry in (start, zeros))
    pieces = [run(variables, x[:1, :2], first)]
    pieces += [run(variables, x[:1, k : k + 2], fresh) for k in (2, 4)]
    close(outputs[:1], np.concatenate([piece[0] for piece in pieces], 1))
    close(jax.tree.map(lambda s: s[:, :1], final), pieces[-1][1])
    close(outputs[1:], run(variables, x[1:], fresh)[0])  # the initial carry is dropped too


def test_no_gradient_passes_a_reset():
    x, resets = normal(1, 1, 6, 4), np.arange(6)[None] == 3
    module, variables = build(LSTMStack, x)

    @jax.jit
    @jax.grad
    def slope(x):
        return module.apply(variables, x, resets=resets)[0][0, 3:].sum()

    gradient = jax.device_get(slope(x))
    assert (gradient[0, :3] == 0).all()
    assert (gradient[0, 3:] != 0).all()


def test_resets_in_reverse_are_those_of_the_sequence_turned_around():
    x = normal(1, 2, 7, 4)
    module, variables = build(LSTMStack, x)
    resets = np.random.default_rng(5).random((2, 7)) < 0.4
    outputs, final = apply(module, variables, x[:, ::-1], resets=resets[:, ::-1])
    found = apply(module.clone(reverse=True), variables, x, resets=resets)
    close(found, (outputs[:, ::-1], final))


def test_no_kernel_resets_and_it_says_so(caplog):
    x, resets = normal(1, 2, 7, 4), jnp.zeros((2, 7), bool)
    module, variables = build(LSTMStack, x)
    with caplog.at_level("INFO", "lstm_flax"):
        module.apply(variables, x, resets=resets)
    assert "implementation='auto' scans: resets" in caplog.text
    with pytest.warns(UserWarning, match="implementation='native' scans: resets"):
        module.clone(implementation="native").apply(variables, x, resets=resets)
    for options, reason in (
        ({"peephole": True}, "peephole"),
        ({"activation": jax.nn.relu}, "another activation"),
        ({"recurrent_activation": jax.nn.hard_sigmoid}, "another recurrent_activation"),
    ):
        assert LSTMStack(8, **options).why_not_layer(x) == reason
    same = LSTMStack(8, activation=jnp.tanh, recurrent_activation=jax.nn.sigmoid)
    assert same.why_not_layer(x) == LSTMStack(8).why_not_layer(x)


def test_a_stream_is_trained_piece_by_piece():
    """Truncated backpropagation through time: the carry goes on, its gradient does not."""
    x = normal(1, 2, 12, 4)
    module, variables = build(LSTMStack, x)

    @jax.jit
    def piece(variables, carry, x):
        def loss(variables):
            outputs, last = module.apply(variables, x, jax.lax.stop_gradient(carry))
            return (outputs**2).sum(), last

        (value, carry), gradient = jax.value_and_grad(loss, has_aux=True)(variables)
        return carry, value, gradient

    zeros = module.initialize_carry(None, x.shape)
    carry, values, gradients = zeros, [], []
    for start in range(0, 12, 4):
        carry, value, gradient = piece(variables, carry, x[:, start : start + 4])
        values.append(value)
        gradients.append(gradient)
    outputs, whole = apply(module, variables, x)
    close((carry, sum(values)), (whole, (outputs**2).sum()), 1e-5)
    # What one piece gives is the gradient with the carry before it held fixed.
    _, before = apply(module, variables, x[:, :8])
    fixed = jax.jit(jax.grad(lambda v: (module.apply(v, x[:, 8:], before)[0] ** 2).sum()))
    close(gradients[-1], fixed(variables), 1e-5)


# Any cell


def with_gates(module, variables, x, lengths):
    run = jax.jit(lambda v, x: module.apply(v, x, seq_lengths=lengths, mutable="gates"))
    return jax.device_get(run(variables, x))


def test_unrolled_steps_are_the_same_steps():
    x, lengths = normal(1, 3, 6, 4), np.array([6, 0, 4])
    module, variables = build(GRUStack, x)
    expected = apply(module, variables, x, seq_lengths=lengths)
    for unroll in (4, True):  # does not divide the steps; all of them
        close(apply(module.clone(unroll=unroll), variables, x, seq_lengths=lengths), expected)
    with pytest.raises(ValueError, match="unroll is 0, not an integer of at least 1"):
        GRUStack(8, unroll=0)


def test_a_stack_of_our_cells_is_our_stack():
    x, lengths = normal(1, 3, 6, 4), jnp.array([6, 0, 4])
    for options in ({"bidirectional": True}, {"reverse": True}):
        module, variables = build(LSTMStack, x, num_layers=2, **options)
        cells = CellStack([LSTMCell(8), LSTMCell(8)], unroll=2, **options)

        (outputs, (h_n, c_n)), gates = with_gates(module, variables, x, lengths)
        (found, carries), same = with_gates(cells, variables, x, lengths)
        close((found, same), (outputs, gates))
        close(tuple(np.stack(states) for states in zip(*carries, strict=True)), (h_n, c_n))
