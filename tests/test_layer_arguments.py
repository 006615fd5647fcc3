"""What the layers refuse, in one line, and what they take."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import FlaxError
from jax.sharding import PartitionSpec as P

from lstm_flax import (
    GRUCell,
    GRUStack,
    LSTMCell,
    LSTMClassifier,
    LSTMStack,
    RNNCell,
    RNNStack,
    SequenceClassifier,
    chrono_init,
)

STACKS = [LSTMStack, GRUStack, RNNStack]
each_stack = pytest.mark.parametrize("stack", STACKS)
each_implementation = pytest.mark.parametrize("implementation", ["auto", "scan"])
KEY = jax.random.key(0)


def build(stack, x, **options):
    module = stack(8, **options)
    return module, module.init(KEY, x)


def first_line(raised):
    return str(raised.value).splitlines()[0]


# Attributes


@each_stack
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, not an integer of at least 1"),
        ({"hidden_size": 2.5}, "hidden_size is 2.5, not an integer"),
        ({"hidden_size": True}, "hidden_size is True, not an integer"),
        ({"num_layers": 0}, "num_layers is 0, not an integer of at least 1"),
        ({"num_layers": 2, "dropout": 1.5}, "dropout is 1.5, not a number from 0 to 1"),
        ({"dropout": float("nan")}, "dropout is nan, not a number from 0 to 1"),
        ({"recurrent_dropout": 1}, "recurrent_dropout is 1, not a number of at least 0 and less"),
        ({"zoneout": -0.1}, "zoneout is -0.1, not a number from 0 to 1"),
        ({"implementation": "fast"}, "implementation is 'fast', not one of 'auto', 'scan'"),
        ({"dtype": jnp.int32}, "dtype is .*int32.*, not a floating-point dtype"),
        ({"param_dtype": "float23"}, "param_dtype is 'float23', not a floating-point dtype"),
    ],
    ids=str,
)
def test_a_stack_refuses_such_an_attribute_at_once(stack, options, message):
    with pytest.raises(ValueError, match=message):
        stack(**{"hidden_size": 8} | options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTMStack(8, zoneout_cell=1.5), "zoneout_cell is 1.5, not a number from 0 to 1"),
        (lambda: LSTMStack(8, proj_size=-1), "proj_size is -1, not an integer from 0 to 7"),
        (lambda: LSTMStack(8, proj_size=8), "proj_size is 8, not an integer from 0 to 7"),
        (lambda: LSTMCell(8, proj_size=8), "proj_size is 8, not an integer from 0 to 7"),
        (lambda: GRUCell(0), "hidden_size is 0, not an integer of at least 1"),
        (lambda: RNNStack(8, nonlinearity="gelu"), "nonlinearity is 'gelu', not one of 'tanh'"),
        (lambda: RNNCell(8, nonlinearity="gelu"), "nonlinearity is 'gelu', not one of 'tanh'"),
        (lambda: chrono_init(1), "max_steps is 1, not an integer of at least 2"),
        (lambda: SequenceClassifier(LSTMStack(8), 0), "num_classes is 0, not an integer"),
        (lambda: LSTMClassifier(8, 1, -1), "num_classes is -1, not an integer"),
    ],
)
def test_others_refuse_theirs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each_stack
def test_dropout_in_one_layer_is_told_of_once(stack):
    with pytest.warns(UserWarning, match=r"dropout=0\.5 drops nothing in a stack of one layer"):
        module = stack(8, dropout=0.5)
    module.init(KEY, jnp.ones((2, 3, 5)))  # no second time: a warning is an error here


@each_stack
def test_a_dtype_may_be_a_string(stack):
    x = jnp.ones((2, 3, 5))
    module, variables = build(stack, x, param_dtype="float32", dtype="float32")
    np.testing.assert_array_equal(module.apply(variables, x)[0], stack(8).apply(variables, x)[0])
    assert module.why_not_native(x) == stack(8).why_not_native(x)


@each_stack
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_are_drawn_in_any_dtype(stack, dtype):
    x = jnp.ones((2, 3, 5))
    drawn = stack(8, param_dtype=dtype).init(KEY, x)
    expected = stack(8).init(KEY, x)
    jax.tree.map(
        lambda a, e: np.testing.assert_array_equal(a, np.asarray(e.astype(dtype))), drawn, expected
    )


@each_stack
def test_modules_can_be_pickled(stack):
    for module in (stack(8), SequenceClassifier(stack(8), 3)):
        assert pickle.loads(pickle.dumps(module)) == module
    chrono = LSTMStack(8, bias_init=chrono_init(9))
    assert pickle.loads(pickle.dumps(chrono)) == chrono


# Parameters


@each_stack
@each_implementation
def test_parameters_of_another_shape_get_flaxs_error(stack, implementation):
    x = jnp.ones((3, 7, 5))
    module, variables = build(stack, x, num_layers=2, implementation=implementation)
    for features in (4, 6, 10, 0):
        with pytest.raises((FlaxError, ValueError), match=r"kernel_ih|number of features"):
            module.apply(variables, jnp.ones((3, 7, features)))
    for size in (4, 16, 32):
        with pytest.raises(FlaxError, match=r'"kernel_ih" in ".*l0\)?", .* shape'):
            stack(size, 2, implementation=implementation).apply(variables, x)


@each_stack
@each_implementation
def test_missing_and_extra_parameters_are_named(stack, implementation):
    x = jnp.ones((3, 7, 5))
    module, variables = build(stack, x, num_layers=2, implementation=implementation)
    with pytest.raises(FlaxError, match=r'"kernel_ih" .*l2'):
        module.clone(num_layers=3).apply(variables, x)
    with pytest.raises(ValueError, match=r"params has l1, which this \w+ does not have; it has l0"):
        module.clone(num_layers=1).apply(variables, x)
    with pytest.raises(ValueError, match="params has l0/bias"):
        module.clone(use_bias=False).apply(variables, x)
    params = variables["params"]
    for name in params["l1"]:
        lacking = params | {"l1": {k: v for k, v in params["l1"].items() if k != name}}
        with pytest.raises(FlaxError, match=f'"{name}" .*l1'):
            module.apply({"params": lacking}, x)
    whole = jax.tree.map(lambda p: p.astype(jnp.int32), variables)
    with pytest.raises(ValueError, match=r"l0/kernel_ih has dtype int32, not a floating-point one"):
        module.apply(whole, x)


def test_boxed_parameters_keep_their_boxes():
    x = jnp.ones((2, 3, 5))
    for init, boxed in (
        (nn.with_partitioning(nn.initializers.glorot_uniform(), (None, "model")), nn.Partitioned),
        (
            nn.with_logical_partitioning(nn.initializers.glorot_uniform(), (None, "model")),
            nn.LogicallyPartitioned,
        ),
    ):
        for stack in STACKS:
            for how in ("scan", "auto"):
                module, variables = build(
                    stack, x, kernel_init=init, recurrent_init=init, implementation=how
                )
                specs = nn.get_partition_spec(variables)["params"]["l0"]
                assert specs["kernel_ih"] == specs["kernel_hh"] == P(None, "model")
                assert isinstance(variables["params"]["l0"]["kernel_ih"], boxed)
                found = module.apply(variables, x)[0]
                np.testing.assert_allclose(
                    found, stack(8).apply(nn.meta.unbox(variables), x)[0], atol=1e-6
                )


# Inputs


@each_stack
@each_implementation
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones(5), r"x has shape \(5,\), not \[\.\.\., time, features\]"),
        (jnp.ones((2, 3, 5), jnp.int32), "x has dtype int32, not a floating-point one"),
        (jnp.ones((2, 3, 5), jnp.uint8), "x has dtype uint8, not a floating-point one"),
        (jnp.ones((2, 3, 5), bool), "x has dtype bool, not a floating-point one"),
        (jnp.ones((2, 3, 5), jnp.complex64), "x has dtype complex64, not a floating-point one"),
        ("text", "x is a str, which can't become an array"),
        (None, "x is a NoneType, which can't become an array"),
        ([[1.0], [1.0, 2.0]], "x is a list, which can't become an array"),
    ],
    ids=lambda value: getattr(value, "dtype", str(value)),
)
def test_another_x_is_refused(stack, implementation, x, message):
    module, variables = build(stack, jnp.ones((2, 3, 5)), implementation=implementation)
    with pytest.raises(ValueError, match=message) as raised:
        module.apply(variables, x)
    assert len(first_line(raised)) < 250


@each_stack
@each_implementation
def test_arrays_alike_are_taken(stack, implementation):
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    module, variables = build(stack, x, implementation=implementation)
    expected = module.apply(variables, x)[0]
    alike = [x.tolist(), x.astype(np.float16).astype(np.float64), jnp.asarray(x)]
    torch = pytest.importorskip("torch")
    for given in (*alike, torch.tensor(x)):
        np.testing.assert_allclose(module.apply(variables, given)[0], expected, atol=2e-3)
    with pytest.raises(ValueError, match=r"x is a torch\.Tensor, which can't become an array"):
        module.apply(variables, torch.tensor(x, requires_grad=True))


@each_stack
@each_implementation
@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_sequences_or_steps_the_results_are_empty(stack, implementation, bidirectional):
    x = jnp.ones((2, 3, 5))
    options = {"implementation": implementation, "bidirectional": bidirectional}
    module, variables = build(stack, x, **options)
    carry = jax.tree.map(jnp.ones_like, module.initialize_carry(None, x.shape))
    outputs, final = module.apply(variables, x[:, :0], carry)
    assert outputs.shape == (2, 0, 8 * (1 + bidirectional))
    jax.tree.map(np.testing.assert_array_equal, final, carry)
    outputs, final = module.apply(variables, x[:0])
    assert outputs.shape == (0, 3, 8 * (1 + bidirectional))
    assert {s.shape for s in jax.tree.leaves(final)} == {(1 + bidirectional, 0, 8)}


@each_stack
def test_a_carry_of_another_form_is_refused(stack):
    x = jnp.ones((2, 3, 5))
    module, variables = build(stack, x)
    with pytest.raises(ValueError, match="initial_carry") as raised:
        module.apply(variables, x, (0.0, 0.0))
    assert "\n" not in first_line(raised)
    whole = jax.tree.map(lambda s: s.astype(jnp.int32), module.initialize_carry(None, x.shape))
    with pytest.raises(ValueError, match="h_0 has dtype int32, not a floating-point one"):
        module.apply(variables, x, whole)


@each_stack
def test_the_public_zero_carry_is_what_a_scan_over_calls_needs(stack):
    x = jax.random.normal(KEY, (3, 7, 5))
    for options in ({"dtype": jnp.bfloat16}, {"num_layers": 2, "bidirectional": True}):
        module, variables = build(stack, x, **options)
        zeros = module.initialize_carry(KEY, x.shape)
        outputs, final = module.apply(variables, x, zeros)
        assert jax.eval_shape(lambda zeros=zeros: zeros) == jax.eval_shape(lambda f=final: f)
        np.testing.assert_array_equal(outputs, module.apply(variables, x)[0])

        def call(carry, piece, module=module, variables=variables):
            return module.apply(variables, piece, carry)[::-1]

        jax.lax.scan(call, zeros, x[None])  # refuses a carry of other dtypes
    time_major = stack(8, time_major=True).initialize_carry(None, (7, 3, 5))
    assert {s.shape for s in jax.tree.leaves(time_major)} == {(1, 3, 8)}


# Cells


@pytest.mark.parametrize(
    ("cell", "carry", "x", "message"),
    [
        (LSTMCell(20), ((1, 20), (3, 20)), (3, 10), r"h has shape \(1, 20\), not \(3, 20\)"),
        (LSTMCell(20), ((3, 20), (3, 1)), (3, 10), r"c has shape \(3, 1\), not \(3, 20\)"),
        (LSTMCell(20), ((3, 20), (20,)), (3, 10), r"c has shape \(20,\), not \(3, 20\)"),
        (GRUCell(20), (1, 1, 3, 20), (3, 10), r"h has shape .*, not \(3, 20\)"),
        (RNNCell(20), (3, 21), (3, 10), r"h has shape \(3, 21\), not \(3, 20\)"),
        (RNNCell(20), (20,), (), r"x has shape \(\)"),
    ],
)
def test_a_cell_broadcasts_no_carry(cell, carry, x, message):
    carry = jax.tree.map(jnp.ones, carry, is_leaf=lambda s: isinstance(s[0], int))
    with pytest.raises(ValueError, match=message):
        cell.init(KEY, carry, jnp.ones(x))


@pytest.mark.parametrize("cell", [LSTMCell(4), GRUCell(4), RNNCell(4)])
def test_a_cell_takes_one_example_without_a_batch(cell):
    x = jax.random.normal(KEY, (3, 10))
    (carry, _), variables = cell.init_with_output(KEY, cell.initialize_carry(None, x.shape), x)
    again = cell.apply(variables, carry, x)
    one = cell.apply(variables, jax.tree.map(lambda s: s[1], carry), x[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6), again, one)


# Stacks in larger modules


def test_in_a_sequence_of_modules_no_carry_is_passed_on():
    x = jax.random.normal(KEY, (2, 5, 8))
    layers = [LSTMStack(8, return_carry=False), LSTMStack(8)]
    (outputs, _), variables = nn.Sequential(layers).init_with_output(KEY, x)
    first, second = (variables["params"][f"layers_{k}"] for k in (0, 1))
    below, _ = LSTMStack(8).apply({"params": first}, x)
    expected, _ = LSTMStack(8).apply({"params": second}, below)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


@each_stack
def test_a_classifier_reads_what_both_directions_end_with(stack):
    x, lengths = jax.random.normal(KEY, (3, 6, 5)), jnp.array([6, 2, 0])
    model = SequenceClassifier(stack(8, 2, bidirectional=True, return_carry=False), 4)
    variables = model.init(KEY, x)
    core = stack(8, 2, bidirectional=True)
    _, carry = core.apply({"params": variables["params"]["core"]}, x, seq_lengths=lengths)
    h_n = jax.tree.leaves(carry)[0]
    head = variables["params"]["head"]
    expected = jnp.concatenate([h_n[2], h_n[3]], -1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(model.apply(variables, x, seq_lengths=lengths), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"x has shape \(3, 0, 5\): there are no time steps"):
        model.apply(variables, x[:, :0])


class Twice(nn.Module):
    """One stack, called twice: the second time on fewer steps."""

    @nn.compact
    def __call__(self, x):
        stack = LSTMStack(x.shape[-1], 2, name="stack")
        return stack(stack(x)[0][:, :2])[0]


def test_the_gates_of_each_call_are_kept_and_those_handed_back_replaced():
    x = jax.random.normal(KEY, (2, 6, 3))
    variables = Twice().init(KEY, x)
    _, kept = Twice().apply(variables, x, mutable="gates")
    for layer in ("l0", "l1"):
        shapes = [g.shape for g in kept["gates"]["stack"][layer]["forget"]]
        assert shapes == [(2, 6, 3), (2, 2, 3)]
    module, variables = build(LSTMStack, x, num_layers=2)
    _, kept = module.apply(variables, x, mutable="gates")
    shorter = x[:, :4]
    expected = module.apply(variables, shorter, mutable="gates")[1]
    _, again = module.apply(variables | kept, shorter, mutable="gates")
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    np.testing.assert_allclose(  # not asked for, they are left alone
        module.apply(variables | kept, shorter)[0], module.apply(variables, shorter)[0]
    )


@each_stack
@each_implementation
def test_outside_of_jit_nothing_is_compiled_twice(stack, implementation, caplog):
    x = jax.random.normal(KEY, (2, 3, 5))
    module, variables = build(stack, x, implementation=implementation)
    module.apply(variables, 2 * x)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        module.apply(variables, x)
    assert [r.message for r in caplog.records if "Compiling" in r.message] == []
