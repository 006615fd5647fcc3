"""What training composes around a stack: ensembles, remat, truncated backpropagation."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_flax import GRUStack, LSTMStack, from_torch

each = pytest.mark.parametrize("implementation", ["scan", "native"])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found, expected):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5), found, expected
    )


def squares(module, variables, x, *carry, **options):
    return jnp.sum(module.apply(variables, x, *carry, **options)[0] ** 2)


@each
@pytest.mark.parametrize("shared", [True, False], ids=["one x", "an x each"])
def test_nn_vmap_over_parameters_is_an_ensemble(implementation, shared):
    """Members, their gradients too, equal a loop; parameters and dropout differ from each other."""
    members = 3
    options = {"num_layers": 2, "dropout": 0.5, "implementation": implementation}
    ensemble = nn.vmap(
        LSTMStack,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=None if shared else 0,
        axis_size=members,
    )(6, **options)
    x = normal(1, 4, 7, 5) if shared else normal(1, members, 4, 7, 5)
    variables = jax.jit(ensemble.init)(jax.random.key(0), x)
    outputs, grads = jax.jit(
        lambda v: (ensemble.apply(v, x)[0], jax.grad(partial(squares, ensemble, x=x))(v))
    )(variables)
    assert outputs.shape == (members, 4, 7, 6)
    alone = LSTMStack(6, **options)
    one = jax.jit(lambda v, x: (alone.apply(v, x)[0], jax.grad(partial(squares, alone, x=x))(v)))
    for m in range(members):
        member = jax.tree.map(lambda p, m=m: p[m], (variables, outputs, grads))
        close(member[1:], one(member[0], x if shared else x[m]))
    kernels = variables["params"]["l0"]["kernel_ih"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


@pytest.mark.parametrize(
    ("stack", "implementation"), [(LSTMStack, "scan"), (LSTMStack, "native"), (GRUStack, "scan")]
)
def test_remat_of_every_kind_leaves_the_gradient_as_it_is(implementation, stack):
    x, options = normal(1, 3, 7, 5), {"num_layers": 2, "implementation": implementation}
    module, rematted = stack(6, **options), nn.remat(stack)(6, **options)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    lengths = jnp.array([7, 0, 3])
    loss = partial(squares, module, x=x, seq_lengths=lengths)
    expected = jax.jit(jax.grad(loss))(variables)
    for other in (jax.checkpoint(loss), partial(squares, rematted, x=x, seq_lengths=lengths)):
        close(jax.jit(jax.grad(other))(variables), expected)


def in_pieces(module, variables, x, steps):
    """The same loss, whose backward pass computes again what lies within a piece of so many."""

    @jax.checkpoint
    def piece(carry, part):
        outputs, carry = module.apply(variables, part, carry)
        return carry, jnp.sum(outputs**2)

    batch, time, features = x.shape
    parts = x.reshape(batch, time // steps, steps, features).swapaxes(0, 1)
    _, losses = jax.lax.scan(piece, module.initialize_carry(None, x.shape), parts)
    return jnp.sum(losses)


@each
def test_checkpointed_pieces_of_784_steps_take_a_fraction_of_the_memory(implementation):
    x = normal(1, 4, 784, 1)
    module = LSTMStack(16, 2, implementation=implementation)
    variables = module.init(jax.random.key(0), jnp.ones((1, 1, 1)))
    whole, pieces = (
        jax.jit(jax.grad(loss)).lower(variables).compile()
        for loss in (partial(squares, module, x=x), lambda v: in_pieces(module, v, x, steps=28))
    )
    memory = [program.memory_analysis().temp_size_in_bytes for program in (whole, pieces)]
    assert memory[1] < memory[0] / 5
    expected = whole(variables)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=0, atol=1e-4 * scale),
        pieces(variables),
        expected,
    )


@each
def test_truncated_backpropagation_is_pytorchs(implementation):
    """A stream in windows: PyTorch detaches the carry, JAX stops its gradient."""
    torch = pytest.importorskip("torch")
    layer, x = torch.nn.LSTM(5, 6, 2, batch_first=True), normal(1, 3, 12, 5)
    windows = np.split(x, 3, axis=1)
    state = None
    for window in windows:
        outputs, state = layer(torch.from_numpy(window), state)
        (outputs**2).sum().backward()  # gradients add up
        state = tuple(s.detach() for s in state)

    module = LSTMStack(6, 2, implementation=implementation)
    variables = {"params": from_torch(layer)}

    def loss(variables, carry, window):
        outputs, carry = module.apply(variables, window, jax.lax.stop_gradient(carry))
        return jnp.sum(outputs**2), carry

    def stream(variables):  # one program, as a reader may write it ...
        carry, total = module.initialize_carry(None, x.shape), 0.0
        for window in windows:
            value, carry = loss(variables, carry, window)
            total += value
        return total, carry

    grads, carry = jax.jit(jax.grad(stream, has_aux=True))(variables)
    expected = {key: p.grad.numpy() for key, p in layer.named_parameters()}
    for k in range(2):
        of = grads["params"][f"l{k}"]
        close(of["kernel_ih"], expected[f"weight_ih_l{k}"].T)
        close(of["kernel_hh"], expected[f"weight_hh_l{k}"].T)
        close(of["bias"], expected[f"bias_ih_l{k}"])
    close(carry, tuple(s.numpy() for s in state))

    # ... or a program for each window, between which there is no gradient anyway.
    carry, step = module.initialize_carry(None, x.shape), jax.jit(jax.grad(loss, has_aux=True))
    parts = []
    for window in windows:
        part, carry = step(variables, carry, window)
        parts.append(part)
    close(jax.tree.map(lambda *g: sum(g), *parts), grads)

    # Without the truncation the gradient is another one.
    full = jax.jit(jax.grad(partial(squares, module, x=x)))(variables)
    assert np.abs(full["params"]["l0"]["bias"] - grads["params"]["l0"]["bias"]).max() > 1e-3
