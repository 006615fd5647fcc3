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


class Member(nn.Module):
    """A stack whose call has no keywords, which `nn.vmap` would ignore."""

    implementation: str
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, lengths):
        stack = LSTMStack(6, 2, dropout=self.dropout, implementation=self.implementation, name="s")
        return stack(x, seq_lengths=lengths, deterministic=not self.dropout)


def ensemble_of(in_axes, **options):
    return nn.vmap(
        Member,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        axis_size=3,
    )(**options)


LENGTHS = jnp.array([7, 0, 3, 1])


@each
@pytest.mark.parametrize("shared", [True, False], ids=["one x", "an x each"])
def test_nn_vmap_over_parameters_is_an_ensemble(implementation, shared):
    """Its members compute what a loop over them does, and so do their gradients."""
    ensemble = ensemble_of((None if shared else 0, None), implementation=implementation)
    x = normal(1, 4, 7, 5) if shared else normal(1, 3, 4, 7, 5)
    variables = jax.jit(ensemble.init)(jax.random.key(0), x, LENGTHS)

    def of(module):
        def run(variables, x):
            grads = jax.grad(lambda v: squares(module, v, x, LENGTHS))(variables)
            return module.apply(variables, x, LENGTHS), grads

        return jax.jit(run)

    found = of(ensemble)(variables, x)
    one = of(Member(implementation))
    for m in range(3):
        member, expected = jax.tree.map(lambda p, m=m: p[m], (variables, found))
        close(expected, one(member, x if shared else x[m]))
    kernels = variables["params"]["s"]["l0"]["kernel_ih"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


@each
def test_each_member_has_its_own_dropout(implementation):
    x, ensemble = normal(1, 4, 7, 5), ensemble_of(None, implementation=implementation, dropout=0.5)
    rngs = {name: jax.random.key(k) for k, name in enumerate(("params", "dropout"))}
    variables = jax.jit(ensemble.init)(rngs, x, LENGTHS)
    same = jax.tree.map(lambda p: jnp.broadcast_to(p[:1], p.shape), variables)
    (outputs, _) = jax.jit(ensemble.apply)(same, x, LENGTHS, rngs={"dropout": rngs["dropout"]})
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


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
