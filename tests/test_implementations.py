"""Every implementation against the scan of cells: values and all gradients, under JAX's transforms.

On this machine, that is; `test_pallas.py` and `test_cudnn.py` hold those for others to it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lstm_flax import GRUStack, LSTMStack, RNNStack
from lstm_flax.models.lstm_layer import Operands, lstm_layer

each_faster = pytest.mark.parametrize("implementation", ["native"])
each_stack = pytest.mark.parametrize("stack", [LSTMStack, GRUStack, RNNStack])

pytestmark = [
    pytest.mark.usefixtures("strict_dtypes"),
    pytest.mark.filterwarnings("ignore:implementation='native' scans"),
]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(actual, expected, tolerance=1e-5):
    """Entries differ by little beside the largest one of their array."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            a, e, rtol=0, atol=tolerance * max(np.abs(np.asarray(e)).max(initial=0), 1e-30)
        ),
        actual,
        expected,
    )


def moved(variables):
    """Parameters away from their initial values, so that no bias is zero."""
    return jax.tree.map(lambda p: p + 0.1 * normal(p.size, *p.shape), variables)


def build(implementation, x, stack=LSTMStack, **options):
    """A stack by an implementation, the same one by the scan, and parameters for both."""
    scan = stack(8, implementation="scan", **options)
    return scan.clone(implementation=implementation), scan, moved(scan.init(jax.random.key(0), x))


def all_of(module, variables, x, carry, lengths):
    """Outputs and final carry, and the gradients of everything that has one."""

    def apply(variables, x, carry):
        return module.apply(variables, x, carry, seq_lengths=lengths)

    values, pull_back = jax.vjp(apply, variables, x, carry)
    cotangents = jax.tree.map(lambda v: normal(v.size, *v.shape).astype(v.dtype), values)
    return values, pull_back(cotangents)


LENGTHS = [None, [6, 0, 3, 1]]


@each_faster
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("stack", "options"),
    [
        (LSTMStack, {"num_layers": 2}),
        (LSTMStack, {"bidirectional": True, "time_major": True}),
        (LSTMStack, {"use_bias": False}),
        (GRUStack, {"bidirectional": True}),
        (RNNStack, {"bidirectional": True}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_values_and_gradients_with_lengths_from_zero_on(implementation, stack, lengths, options):
    x = normal(1, 4, 6, 5)
    x = x.swapaxes(0, 1) if options.get("time_major") else x
    module, scan, variables = build(implementation, x, stack, **options)
    carry = jax.tree.map(lambda s: normal(2, *s.shape), module.initialize_carry(None, x.shape))
    lengths = None if lengths is None else jnp.array(lengths)
    found = jax.jit(partial(all_of, module))(variables, x, carry, lengths)
    expected = jax.jit(partial(all_of, scan))(variables, x, carry, lengths)
    assert_close(found, expected)
    if lengths is not None:
        for state, initial, gradient in zip(
            *map(jax.tree.leaves, (found[0][1], carry, found[1][2])), strict=True
        ):
            empty = np.asarray(lengths) == 0
            np.testing.assert_array_equal(state[:, empty], initial[:, empty])
            cotangent = normal(state.size, *state.shape)
            np.testing.assert_allclose(gradient[:, empty], cotangent[:, empty], rtol=1e-6)


@each_faster
@pytest.mark.parametrize("held", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_parameters_of_another_dtype_are_cast_as_the_scan_casts_them(implementation, held):
    x = normal(1, 4, 6, 5)
    module, scan, variables = build(implementation, x)
    variables = jax.tree.map(lambda p: p.astype(held), variables)
    run = [
        jax.jit(jax.value_and_grad(lambda v, m=m: m.apply(v, x)[0].sum())) for m in (module, scan)
    ]
    (value, gradients), (expected, wanted) = (r(variables) for r in run)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype == held
        atol = 0.02 * np.abs(theirs.astype(np.float32)).max()  # a bfloat16 has 8 bits
        np.testing.assert_allclose(
            ours.astype(np.float32), theirs.astype(np.float32), rtol=0, atol=atol
        )


@each_faster
def test_forward_mode_and_second_derivatives(implementation):
    x, carry = normal(1, 2, 3, 2), (normal(2, 1, 2, 8), normal(3, 1, 2, 8))
    module, scan, variables = build(implementation, x)
    lengths = jnp.array([3, 2])

    def loss(module, variables, x, carry):
        outputs, (h_n, c_n) = module.apply(variables, x, carry, seq_lengths=lengths)
        return (outputs**3).sum() + (h_n * c_n).sum()

    def derivatives(module):
        f = partial(loss, module)
        at = (variables, x, carry)
        along = jax.tree.map(lambda a: normal(a.size + 1, *a.shape), at)
        return {
            "jvp": jax.jvp(f, at, along),
            "linearize": jax.linearize(f, *at)[1](*along),
            "forward over reverse": jax.jvp(jax.grad(f, (0, 1, 2)), at, along)[1],
            "reverse over reverse": jax.grad(
                lambda *a: sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(f, (0, 1, 2))(*a))),
                (0, 1, 2),
            )(*at),
            "hessian": jax.hessian(f, 1)(*at),
            "jacrev": jax.jacrev(lambda x: module.apply(variables, x)[0])(x),
            "jacfwd": jax.jacfwd(lambda x: module.apply(variables, x)[0])(x),
        }

    found = jax.jit(partial(derivatives, module))()
    expected = jax.jit(partial(derivatives, scan))()
    for name in expected:
        assert_close(found[name], expected[name], 1e-4)


@each_faster
def test_vmap_over_whatever_is_mapped(implementation):
    x = normal(1, 4, 6, 5)
    module, scan, variables = build(implementation, x)
    carry = (normal(2, 1, 4, 8), normal(3, 1, 4, 8))
    many = jax.tree.map(lambda a: normal(a.size, 3, *a.shape), (variables, x, carry))
    lengths = jnp.array([[6, 0, 3, 1], [1, 2, 3, 4], [6, 6, 6, 6]])

    def run(module, axes):
        given = [
            m if axis == 0 else one
            for axis, m, one in zip(
                axes, (*many, lengths), (variables, x, carry, lengths[0]), strict=True
            )
        ]
        return jax.vmap(partial(all_of, module), axes)(*given)

    for axes in ((None, 0, None, None), (None, 0, 0, 0), (0, None, None, None), (0, 0, 0, None)):
        found, expected = (jax.jit(partial(run, m, axes))() for m in (module, scan))
        assert_close(found, expected)


@each_faster
def test_examples_one_by_one_are_the_batch(implementation):
    """The gradient of a sum over `vmap`, and each example's own."""
    x = normal(1, 7, 6, 5)
    module, _, variables = build(implementation, x)

    def loss(variables, x):
        return (module.apply(variables, x)[0] ** 2).sum()

    def one_by_one(variables):
        return jax.vmap(lambda x: loss(variables, x[None]))(x).sum()

    expected = jax.grad(loss)(variables, x)
    assert_close(jax.grad(one_by_one)(variables), expected)
    each = jax.vmap(jax.grad(loss), (None, 0))(variables, x[:, None])
    assert_close(jax.tree.map(lambda g: g.sum(0), each), expected)


@each_faster
@each_stack
@pytest.mark.parametrize("has_carry", [True, False])
def test_shard_map(implementation, stack, has_carry):
    """With its checks of what varies over which axis."""
    x = normal(1, 4, 6, 5)
    module, scan, variables = build(implementation, x, stack, bidirectional=True)
    carry = module.initialize_carry(None, x.shape) if has_carry else None
    mesh = jax.make_mesh((1,), ("data",))

    def loss(module, variables, x, carry):
        return (module.apply(variables, x, carry)[0] ** 2).sum()

    @jax.jit
    def spread(variables, x, carry):
        return jax.shard_map(
            lambda *args: jax.lax.psum(loss(module, *args), "data"),
            mesh=mesh,
            in_specs=(P(), P("data"), P(None, "data")),
            out_specs=P(),
        )(variables, x, carry)

    expected = jax.jit(jax.value_and_grad(partial(loss, scan)))(variables, x, carry)
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    carry = jax.device_put(carry, NamedSharding(mesh, P(None, "data")))
    assert_close(jax.value_and_grad(spread)(variables, x, carry), expected)


@each_faster
@each_stack
@pytest.mark.parametrize("has_carry", [True, False])
def test_an_explicit_mesh(implementation, stack, has_carry):
    x, lengths = normal(1, 4, 6, 5), jnp.array([6, 0, 3, 1])
    module, scan, variables = build(implementation, x, stack)

    def loss(module, variables, x, carry):
        return (module.apply(variables, x, carry, seq_lengths=lengths)[0] ** 2).sum()

    given = module.initialize_carry(None, x.shape) if has_carry else None
    expected = jax.jit(jax.value_and_grad(partial(loss, scan), (0, 1)))(variables, x, given)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        x = jax.device_put(x, P("data"))
        carry = jax.tree.map(lambda s: jax.device_put(s, P(None, "data")), given)
        found = jax.jit(jax.value_and_grad(partial(loss, module), (0, 1)))(variables, x, carry)
    assert_close(found, expected)


@each_faster
def test_checkpoint_scan_and_cond_go_through_it(implementation):
    x = normal(1, 3, 2, 6, 5)
    module, scan, variables = build(implementation, x[0])

    def losses(module):
        @jax.checkpoint
        def loss(variables, x):
            return jax.lax.cond(
                x.sum() > 0,
                lambda: module.apply(variables, x)[0].sum(),
                lambda: (module.apply(variables, x)[0] ** 2).sum(),
            )

        return jax.lax.map(lambda x: jax.grad(loss)(variables, x), x)

    assert_close(jax.jit(partial(losses, module))(), jax.jit(partial(losses, scan))())


@each_faster
def test_with_jit_disabled(implementation):
    x = normal(1, 2, 3, 5)
    module, scan, variables = build(implementation, x)

    def loss(module, variables):
        return (module.apply(variables, x)[0] ** 2).sum()

    with jax.disable_jit():
        found = jax.value_and_grad(partial(loss, module))(variables)
    assert_close(found, jax.value_and_grad(partial(loss, scan))(variables))


@each_faster
def test_no_rank_is_promoted(implementation):
    x, lengths = normal(1, 4, 6, 5), jnp.array([6, 0, 3, 1])
    module, _, variables = build(implementation, x, num_layers=2)
    with jax.numpy_rank_promotion("raise"):
        jax.grad(lambda v: module.apply(v, x, seq_lengths=lengths)[0].sum())(variables)


@each_faster
def test_a_program_for_another_platform_and_an_export_hold_no_kernel(implementation):
    x = normal(1, 4, 6, 5)
    module, scan, variables = build(implementation, x)
    traced = jax.jit(jax.grad(lambda v, x: module.apply(v, x)[0].sum())).trace(variables, x)
    for platform in ("tpu", "cuda"):
        assert "lstm_flax_" not in traced.lower(lowering_platforms=(platform,)).as_text()
    exported = jax.export.export(jax.jit(module.apply))(variables, x)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(variables, x), scan.apply(variables, x))


def test_an_operand_of_another_shape_or_dtype_is_named():
    good = {
        "x": (3, 4, 5), "kernel_ih": (5, 32), "kernel_hh": (8, 32), "bias": (32,),
        "h_0": (3, 8), "c_0": (3, 8), "lengths": (3,),
    }  # fmt: skip
    operands = Operands(
        **{
            name: jnp.ones(shape, jnp.int32 if name == "lengths" else None)
            for name, shape in good.items()
        }
    )
    assert lstm_layer(operands)[0].shape == (3, 4, 8)
    for name in ("kernel_ih", "kernel_hh", "bias", "c_0", "lengths"):
        wrong = operands._replace(**{name: getattr(operands, name)[1:]})
        with pytest.raises(ValueError, match=rf"^{name} is .*, not "):
            lstm_layer(wrong)
    for name in ("kernel_hh", "bias", "h_0", "lengths"):
        wrong = operands._replace(**{name: getattr(operands, name).astype(jnp.float16)})
        with pytest.raises(ValueError, match=rf"^{name} is float16.*, not "):
            lstm_layer(wrong)
