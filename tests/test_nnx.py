"""The stacks as modules of NNX, by its own bridge: called, trained, saved and restored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from lstm_flax import LSTMStack

each = pytest.mark.parametrize("implementation", ["scan", "native"])

X = np.random.default_rng(0).normal(size=(4, 7, 5)).astype(np.float32)
LENGTHS = np.array([7, 1, 0, 4], np.int32)
TARGETS = np.array([0, 1, 1, 0])


class Tagger(nnx.Module):
    """Half of NNX, half of the bridge."""

    def __init__(self, stack, rngs):
        self.rnn = nnx.bridge.ToNNX(stack, rngs=rngs).lazy_init(X[:1])
        self.head = nnx.Linear(2 * stack.hidden_size, 2, rngs=rngs)

    def __call__(self, x, lengths, deterministic=True):
        _, (h_n, _) = self.rnn(x, seq_lengths=lengths, deterministic=deterministic)
        return self.head(jnp.concatenate([h_n[-2], h_n[-1]], axis=-1))


def tagger(implementation, seed=0, **options):
    stack = LSTMStack(8, 2, bidirectional=True, implementation=implementation, **options)
    return Tagger(stack, nnx.Rngs(params=seed, dropout=seed + 1))


def pure(model, kind=nnx.Param):
    return nnx.to_pure_dict(nnx.state(model, kind))


def loss_of(model, deterministic=True):
    logits = model(X, LENGTHS, deterministic)
    return optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS).mean()


def close(found, expected):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5), found, expected
    )


@each
def test_calls_and_gradients_are_linens(implementation):
    rnn = tagger(implementation).rnn
    stack = rnn.to_nnx__module

    def squares(rnn):
        found = rnn(X, rnn.initialize_carry(None, X.shape), seq_lengths=LENGTHS)
        return jnp.sum(found[0] ** 2), found

    def expected_squares(params):
        found = stack.apply({"params": params}, X, seq_lengths=LENGTHS)
        return jnp.sum(found[0] ** 2), found

    (_, found), grads = nnx.jit(nnx.value_and_grad(squares, has_aux=True))(rnn)
    expected = jax.jit(jax.value_and_grad(expected_squares, has_aux=True))(pure(rnn))
    close((found, nnx.to_pure_dict(grads)), (expected[0][1], expected[1]))


@each
def test_dropout_draws_from_the_rngs_of_nnx(implementation):
    model, same = (tagger(implementation, dropout=0.5) for _ in range(2))
    run = nnx.jit(lambda m, deterministic: m(X, LENGTHS, deterministic), static_argnums=1)
    first, second = run(model, False), run(model, False)
    assert np.abs(first - second).max() > 1e-4  # the stream goes on from call to call ...
    np.testing.assert_array_equal(run(same, False), first)  # ... from its seed
    np.testing.assert_array_equal(run(model, True), run(model, True))


@each
def test_it_trains_and_goes_on_after_a_restore(implementation, tmp_path):
    """Orbax saves all state: the weights, the optimiser's, and how far the rngs are."""

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of)(model, deterministic=False)
        optimizer.update(model, grads)
        return loss

    def started(seed):
        model = tagger(implementation, seed, dropout=0.2)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    run = started(seed=0)
    first = step(*run)
    step(*run)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nnx.to_pure_dict(nnx.state(run)))
        checkpointer.wait_until_finished()
        other = started(seed=5)
        like = nnx.to_pure_dict(nnx.state(other))
        nnx.update(other, checkpointer.restore(tmp_path / "run", like))
    jax.tree.map(np.testing.assert_array_equal, pure(other[0]), pure(run[0]))
    losses = [[float(step(*r)) for _ in range(30)] for r in (run, other)]
    assert losses[0] == losses[1]  # dropout included
    assert losses[0][-1] < 0.5 * first
