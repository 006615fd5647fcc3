"""What the tests of other projects check of their recurrent layers, of these here.

Each test says whose checks it stands for; `lstm_flax/PEERS.md` counts them. The peers compute the
expected values live, or bring their own: ONNX its cases, PyTorch its database of modules.
"""

import functools
import importlib
import importlib.util
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import FlaxError

from lstm_flax import (
    CellStack,
    GRUCell,
    GRUStack,
    LSTMCell,
    LSTMStack,
    ResetBeforeGRUCell,
    RNNCell,
    RNNStack,
    from_flax,
    from_keras,
    from_torch,
    to_torch,
)

STACKS = {"LSTM": LSTMStack, "GRU": GRUStack, "RNN": RNNStack}
each_stack = pytest.mark.parametrize("name", STACKS)


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=0, atol=tolerance), found, expected
    )


def fill(shapes):
    """Random parameters of these shapes, without compiling the initialisers."""
    leaves, structure = jax.tree.flatten(shapes)
    arrays = [0.4 * normal(k, *leaf.shape) for k, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def in_order(array, order, axis=-1):
    """Gates, which lie along an axis, in another order."""
    parts = np.split(np.asarray(array), len(order), axis)
    return np.concatenate([parts[k] for k in order], axis)


HOLES = np.array([[1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], bool)


# ONNX: its backend's node cases for the operators LSTM, GRU and RNN


def onnx_cases():
    if importlib.util.find_spec("onnx") is None:
        return []
    from onnx.backend.test.case import node

    # To import a file registers its cases; the loader would import those of all operators.
    for name in ("lstm", "gru", "rnn"):
        importlib.import_module(f"onnx.backend.test.case.node.{name}")
    cases = node._NodeTestCases
    return [case for case in cases if case.model.graph.node[0].op_type in ("LSTM", "GRU", "RNN")]


ORDERS = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # of ONNX's gates, as ours lie


def stack_for(node):
    """The stack that computes what an ONNX node does, and its attributes."""
    import onnx

    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    direction = given.get("direction", b"forward")
    options = {
        "bidirectional": direction == b"bidirectional",
        "reverse": direction == b"reverse",
        "time_major": not given.get("layout", 0),
    }
    if node.op_type == "GRU":
        options["reset_after"] = bool(given.get("linear_before_reset", 0))
    if node.op_type == "LSTM":
        options["peephole"] = "P" in node.input
    return STACKS[node.op_type](given["hidden_size"], **options), given.get("layout", 0)


def params_from_onnx(kind, stack, inputs):
    order, params = ORDERS[kind], {}
    for d in range(len(inputs["W"])):
        size = inputs["R"].shape[-1]
        layer = {
            "kernel_ih": in_order(inputs["W"][d], order, 0).T,
            "kernel_hh": in_order(inputs["R"][d], order, 0).T,
        }
        both = inputs.get("B", np.zeros((d + 1, 2 * len(order) * size), np.float32))[d]
        layer["bias"] = sum(in_order(b, order) for b in np.split(both, 2))
        if kind == "GRU" and not stack.reset_after:
            layer["kernel_hh"], layer["kernel_hn"] = np.split(layer["kernel_hh"], [2 * size], 1)
        if "P" in inputs:
            peepholes = np.split(inputs["P"][d], 3)
            layer |= dict(zip(("peephole_i", "peephole_o", "peephole_f"), peepholes, strict=True))
        params["l0" if d == 0 else "l0_reverse"] = layer
    return params


@needs("onnx")
@pytest.mark.parametrize("case", onnx_cases(), ids=lambda case: case.name)
def test_onnx_node_cases(case):
    node = case.model.graph.node[0]
    stack, layout = stack_for(node)
    for arrays, expected in case.data_sets:
        inputs = dict(zip(filter(None, node.input), arrays, strict=True))
        params = params_from_onnx(node.op_type, stack, inputs)
        states = [inputs[name] for name in ("initial_h", "initial_c") if name in inputs]
        if layout:
            states = [np.swapaxes(state, 0, 1) for state in states]
        start = (tuple(states) if node.op_type == "LSTM" else states[0]) if states else None
        outputs, final = stack.apply(
            {"params": params}, inputs["X"], start, seq_lengths=inputs.get("sequence_lens")
        )
        # ONNX has an axis of directions.
        outputs = outputs.reshape(*outputs.shape[:2], len(params), -1)
        outputs = outputs if layout else np.swapaxes(outputs, 1, 2)
        final = [np.swapaxes(s, 0, 1) if layout else s for s in jax.tree.leaves(final)]
        found = dict(zip(("Y", "Y_h", "Y_c"), (outputs, *final), strict=False))
        named = zip(("Y", "Y_h", "Y_c"), node.output, strict=False)
        for (name, _), wanted in zip([n for n in named if n[1]], expected, strict=True):
            np.testing.assert_allclose(found[name], wanted, rtol=case.rtol, atol=1e-6)


# PyTorch: its database of modules


def torch_samples(name, what="module_inputs_func"):
    import torch
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls is getattr(torch.nn, name))
    get = getattr(info, what)
    return get(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)


def our_cell(module):
    """The cell of ours that computes what a cell of PyTorch's does, and its parameters."""
    kinds = {"LSTMCell": LSTMCell, "GRUCell": GRUCell, "RNNCell": RNNCell}
    options = {"use_bias": bool(module.bias)}  # of some it is a string, in the place of another
    if hasattr(module, "nonlinearity"):
        options["nonlinearity"] = module.nonlinearity
    cell = kinds[type(module).__name__](module.hidden_size, **options)
    return cell, {"params": from_torch(module)}


def numpy(tree):
    if isinstance(tree, tuple):
        return tuple(map(numpy, tree))
    return tree.detach().numpy()


@needs("torch")
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_torchs_module_database_of_cells(name):
    """`test_modules.py`, test_forward and test_errors: each sample, without a batch."""
    import torch

    for sample in torch_samples(name):
        made, given = sample.constructor_input, sample.forward_input
        module = getattr(torch.nn, name)(*made.args, **made.kwargs)
        cell, variables = our_cell(module)
        x, carry = map(numpy, given.args)
        found, _ = jax.jit(cell.apply)(variables, carry, x)
        close(found, numpy(module(*given.args)))
    for error in torch_samples(name, "module_error_inputs_func"):
        made, given = (
            getattr(error.module_error_input, f"{k}_input") for k in ("constructor", "forward")
        )
        module = getattr(torch.nn, name)(*made.args, **made.kwargs)
        cell, variables = our_cell(module)
        x, carry = map(numpy, given.args)
        with pytest.raises((ValueError, FlaxError)):
            jax.eval_shape(cell.apply, variables, carry, x)


@pytest.mark.slow
@needs("torch")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@each_stack
def test_torchs_module_database_of_layers(name):
    """`test_modules.py`'s test_forward: each sample, all of them without a batch."""
    import torch

    compiled = functools.cache(lambda stack: jax.jit(stack.apply))  # samples come in several orders
    for sample in torch_samples(name):
        options = dict(sample.constructor_input.kwargs)
        given = sample.forward_input.args
        module = getattr(torch.nn, name)(**options)
        renamed = {"bias": "use_bias", "batch_first": None, "input_size": None}
        ours = {renamed.get(k, k): v for k, v in options.items() if renamed.get(k, k) is not None}
        # As given: without a batch axis there is no order of axes.
        stack = STACKS[name](**ours)
        found = compiled(stack)({"params": from_torch(module)}, *map(numpy, given))
        close(found, numpy(module(*given)))


@needs("torch")
@each_stack
def test_torchs_module_database_of_layers_errors(name):
    """`test_modules.py`'s test_errors, but for input_size, which x tells, and casts of x."""
    options = ("input_size", "hidden_size", "num_layers")
    refused = 0
    for error in torch_samples(name, "module_error_inputs_func"):
        made = error.module_error_input.constructor_input
        given = dict(zip(options, made.args, strict=False)) | made.kwargs
        size = given.pop("input_size")
        if "dtype" in given or not isinstance(size, int) or size < 0:
            continue
        x = jnp.ones((1, 2, size))
        renamed = {"bias": "use_bias", "batch_first": "time_major"}
        ours = {renamed.get(key, key): value for key, value in given.items()}
        with pytest.raises(ValueError, match=" is "):
            jax.eval_shape(STACKS[name](**ours).init, jax.random.key(0), x)
        refused += 1
    assert refused == 10


@each_stack
@pytest.mark.parametrize("proj_size", [0, 2])
def test_torchs_layers_check_their_arguments(name, proj_size):
    """`test_nn.py`: test_rnn_args_check, test_projections_lstm_args_check,
    test_projections_errors_on_gru_and_rnn, test_cudnn_forward_exception."""
    if proj_size and name != "LSTM":
        with pytest.raises(TypeError, match="proj_size"):
            STACKS[name](5, 2, proj_size=proj_size)
        return
    stack = STACKS[name](5, 2, **({"proj_size": proj_size} if proj_size else {}))
    shape = (4, 6, 3)
    variables = jax.eval_shape(stack.init, jax.random.key(0), jnp.ones(shape))
    carry = jax.tree.map(np.asarray, stack.initialize_carry(None, shape))
    for axis in (0, 2):
        x = jnp.ones(tuple(7 if k == axis else size for k, size in enumerate(shape)))
        with pytest.raises((ValueError, FlaxError)):
            jax.eval_shape(stack.apply, variables, x, carry)
    leaves, structure = jax.tree.flatten(carry)
    for axis, number in itertools.product(range(3), range(len(leaves))):
        wrong = [np.repeat(s, 7, axis) if k == number else s for k, s in enumerate(leaves)]
        with pytest.raises(ValueError, match=r"initial_carry: ._0 has shape"):
            jax.eval_shape(
                stack.apply, variables, jnp.ones(shape), jax.tree.unflatten(structure, wrong)
            )


@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("LSTM", {"proj_size": 2, "bidirectional": True})],
)
def test_torchs_layers_without_a_carry_and_without_sequences(name, options):
    """`test_nn.py`: test_rnn_initial_hidden_state, test_projections_lstm_initial_hidden_state,
    test_RNN_input_size_zero, with gradients."""
    stack, x = STACKS[name](4, **options), normal(1, 2, 5, 3)
    variables = fill(jax.eval_shape(stack.init, jax.random.key(0), x))
    run = jax.jit(stack.apply)
    close(run(variables, x), run(variables, x, stack.initialize_carry(None, x.shape)))
    gradient = jax.grad(lambda v: stack.apply(v, x[:0])[0].sum())(variables)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


# Keras: its layers


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # read when it is first imported
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {keras.backend.backend()} in this process")
    with jax.numpy_dtype_promotion("standard"):
        yield keras


KERAS = {"LSTM": (LSTMStack, 2), "GRU": (GRUStack, 1), "SimpleRNN": (RNNStack, 1)}
KERAS_CASES = [
    ("LSTM", {}), ("LSTM", {"go_backwards": True}), ("LSTM", {"zero_output_for_mask": True}),
    ("LSTM", {"activation": "relu", "recurrent_activation": "hard_sigmoid"}),
    ("GRU", {}), ("GRU", {"go_backwards": True, "reset_after": False}),
    ("GRU", {"use_bias": False, "reset_after": False, "recurrent_activation": "hard_sigmoid"}),
    ("SimpleRNN", {"go_backwards": True}), ("SimpleRNN", {"activation": "relu"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), KERAS_CASES, ids=str)
def test_keras_layers(keras, kind, options):
    """`lstm_test.py`, `gru_test.py`, `simple_rnn_test.py`: correctness, state, masking."""
    x, (stack, states) = normal(1, 3, 6, 4), KERAS[kind]
    start = [normal(k, 3, 5) for k in range(states)]
    layer = getattr(keras.layers, kind)(
        5, return_sequences=True, return_state=True, bias_initializer="glorot_uniform", **options
    )
    functions = {"relu": jax.nn.relu, "hard_sigmoid": jax.nn.hard_sigmoid}
    ours = {
        "reverse": options.get("go_backwards", False),
        "hold_outputs": not options.get("zero_output_for_mask", False),
        **{name: functions[f] for name, f in options.items() if "activation" in name},
        **{name: options[name] for name in ("use_bias", "reset_after") if name in options},
    }
    module = stack(5, **ours)
    for mask in (None, HOLES):
        outputs, *final = layer(
            x, initial_state=start, mask=None if mask is None else jnp.array(mask)
        )
        params = from_keras(layer)
        given = jax.tree.map(lambda s: s[None], tuple(start) if states == 2 else start[0])
        found, carry = module.apply({"params": params}, x, given, mask=mask)
        close(found[:, ::-1] if ours["reverse"] else found, outputs)
        close([s[0] for s in jax.tree.leaves(carry)], final)


def test_keras_bidirectional(keras):
    """`bidirectional_test.py`: correctness, initial state, masking, return_state."""
    x, start = normal(1, 3, 6, 4), [normal(k, 3, 5) for k in range(4)]
    inner = keras.layers.LSTM(5, return_sequences=True, return_state=True)
    layer = keras.layers.Bidirectional(inner)
    outputs, *final = layer(x, initial_state=start, mask=jnp.array(HOLES))
    given = jnp.stack(start[::2]), jnp.stack(start[1::2])
    module = LSTMStack(5, bidirectional=True)  # the wrapper sets zero_output_for_mask
    found, carry = module.apply({"params": from_keras(layer)}, x, given, mask=HOLES)
    close(found, outputs)
    close([carry[0][0], carry[1][0], carry[0][1], carry[1][1]], final)


def test_keras_stacked_cells_of_unlike_sizes(keras):
    """`stacked_rnn_cells_test.py` and `rnn_test.py`: correctness, states, mask."""
    x = normal(1, 3, 6, 4)
    cells = [keras.layers.LSTMCell(3), keras.layers.GRUCell(5), keras.layers.SimpleRNNCell(2)]
    layer = keras.layers.RNN(
        cells, return_sequences=True, return_state=True, zero_output_for_mask=True
    )
    outputs, *final = layer(x, mask=jnp.array(HOLES))
    stack = CellStack([LSTMCell(3), GRUCell(5), RNNCell(2)])
    found, carry = stack.apply({"params": from_keras(*cells)}, x, mask=HOLES)
    close(found, outputs)
    close(jax.tree.leaves(carry), [s.reshape(3, -1) for s in jax.tree.leaves(final)])


class TwoStatesCell(nn.RNNCellBase):
    """A cell of one's own: Keras's `TwoStatesRNNCell`, whose weights are all ones."""

    units: int
    num_feature_axes = 1

    def initialize_carry(self, rng, input_shape):
        zeros = jnp.zeros((*input_shape[:-1], self.units))
        return zeros, zeros

    def __call__(self, carry, x):
        state = jnp.broadcast_to((x.sum(-1) + carry[0].sum(-1))[..., None], carry[0].shape)
        return (state, state), 2 * state


def test_keras_stack_of_cells_of_ones_own():
    """`stacked_rnn_cells_test.py`: test_correctness_two_states_stack, by its numbers."""
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    outputs, carry = CellStack([TwoStatesCell(3), TwoStatesCell(2)]).apply({}, x)
    close(outputs[..., 0], np.array([[72.0, 624, 3144], [648, 4080, 17544]]))
    close(outputs[..., 0], outputs[..., 1])
    close([state[:, 0] for state in jax.tree.leaves(carry)[1:3]], [[158.0, 782], [1572, 8772]])


# Flax: linen's and nnx's modules


@pytest.mark.parametrize("cell", [LSTMCell(5), GRUCell(5), ResetBeforeGRUCell(5), RNNCell(5)])
def test_linens_rnn_runs_our_cells(cell):
    """`linen_recurrent_test.py`: forward, batch axes, time major, lengths, reverse, keep_order."""
    x, lengths = normal(1, 3, 6, 4), jnp.array([6, 1, 4])
    for reverse in (False, True):
        rnn = nn.RNN(cell, return_carry=True, reverse=reverse, keep_order=True)
        variables = fill(jax.eval_shape(rnn.init, jax.random.key(0), x))
        params = {"params": {"l0": variables["params"]["cell"]}}
        stack = CellStack([cell], reverse=reverse)
        found, (carry,) = stack.apply(params, x, seq_lengths=lengths)
        last, outputs = jax.jit(rnn.apply)(variables, x, seq_lengths=lengths)
        outputs = jnp.where(jnp.arange(6)[None, :, None] < lengths[:, None, None], outputs, 0)
        close((found, carry), (outputs, last))
    assert cell.num_feature_axes == 1
    both = nn.Bidirectional(nn.RNN(cell), nn.RNN(cell))
    found, _ = jax.eval_shape(both.init_with_output, jax.random.key(0), x)
    assert found.shape == (3, 6, 10)


LINEN = {
    "LSTMCell": nn.LSTMCell(5),
    "OptimizedLSTMCell": nn.OptimizedLSTMCell(5),
    "GRUCell": nn.GRUCell(5, carry_init=nn.initializers.ones),
    "SimpleCell": nn.SimpleCell(5, residual=True),
    "MGUCell": nn.MGUCell(5),
    "activations": nn.LSTMCell(5, gate_fn=nn.relu, activation_fn=nn.elu),
}


@pytest.mark.parametrize("name", LINEN)
def test_our_stack_runs_linens_cells(name):
    """Against linen's own RNN: lengths, any batch axes, time major, a carry that is not zero."""
    cell, x = LINEN[name], normal(1, 2, 3, 6, 4)
    lengths = np.array([[6, 1, 4], [2, 3, 6]])
    stack = CellStack([cell], reverse=name != "GRUCell")
    variables = fill(jax.eval_shape(stack.init, jax.random.key(0), x))
    found, (carry,) = stack.apply(variables, x, seq_lengths=lengths)
    expected = nn.RNN(cell, return_carry=True, keep_order=True, reverse=stack.reverse)
    # With lengths it takes only one batch axis.
    last, outputs = jax.jit(expected.apply)(
        {"params": {"cell": variables["params"]["l0"]}},
        x.reshape(6, 6, 4),
        seq_lengths=lengths.reshape(6),
    )
    counts = np.arange(6) < lengths[..., None]
    close(np.asarray(found)[counts], np.asarray(outputs).reshape(2, 3, 6, 5)[counts])
    close(jax.tree.map(lambda s: s.reshape(6, -1), carry), last)


def test_our_stack_runs_a_cell_over_pictures():
    """`linen_recurrent_test.py`: test_rnn_with_spatial_dimensions."""
    x, mask = normal(1, 2, 4, 6, 6, 3), jnp.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool)
    cell = nn.ConvLSTMCell(5, (3, 3))
    stack = CellStack([cell, cell])
    variables = fill(jax.eval_shape(stack.init, jax.random.key(0), x))
    outputs, carry = stack.apply(variables, x, mask=mask)
    assert outputs.shape == (2, 4, 6, 6, 5)
    assert jax.tree.leaves(carry[1])[0].shape == (2, 6, 6, 5)
    y = x[0, [0, 1, 3]][None]
    for name in ("l0", "l1"):
        y = jax.jit(nn.RNN(cell).apply)({"params": {"cell": variables["params"][name]}}, y)
    close(outputs[0, np.array([0, 1, 3])], y[0])


def test_linens_activations_are_ours():
    """`test_lstm_with_custom_activations`, of linen and nnx, by its numbers."""
    x = normal(1, 3, 6, 4)
    cell = nn.LSTMCell(5, gate_fn=nn.relu, activation_fn=nn.elu)
    rnn = nn.RNN(cell, return_carry=True)
    variables = fill(jax.eval_shape(rnn.init, jax.random.key(0), x))
    stack = LSTMStack(5, recurrent_activation=nn.relu, activation=nn.elu)
    found, (h_n, c_n) = stack.apply({"params": from_flax(variables["params"])}, x)
    close(((c_n[0], h_n[0]), found), jax.jit(rnn.apply)(variables, x))


@pytest.mark.parametrize("reverse", [False, True])
def test_nnxs_layer_is_ours(reverse):
    """`recurrent_test.py` of nnx: a sequence, lengths, reverse, time major, equivalence."""
    x, lengths = normal(1, 3, 6, 4), jnp.array([6, 1, 4])
    cell = nnx.LSTMCell(4, 5, rngs=nnx.Rngs(0))
    rnn = nnx.RNN(cell, return_carry=True, reverse=reverse, keep_order=True)
    (c, h), outputs = rnn(x, seq_lengths=lengths)
    found, (h_n, c_n) = LSTMStack(5, reverse=reverse, hold_outputs=False).apply(
        {"params": from_flax(cell)}, x, seq_lengths=lengths
    )
    close((h_n[0], c_n[0]), (h, c))
    counts = np.arange(6) < np.asarray(lengths)[:, None]
    close(found[counts], outputs[counts])


# Haiku: its cores, unrolled


def unrolled(make, x, resets=None, start=None, **options):
    """A Haiku core's random parameters, its outputs and its last state."""
    import haiku as hk

    def run(x, resets):
        core = make(hk)
        state = core.initial_state(x.shape[1]) if start is None else start
        if resets is None:
            return hk.dynamic_unroll(core, x, state, **options)
        return hk.dynamic_unroll(hk.ResetCore(core), (x, resets), state, **options)

    net = hk.without_apply_rng(hk.transform(run))
    params = fill(jax.eval_shape(net.init, jax.random.key(0), x, resets))
    return params, jax.jit(net.apply)(params, x, resets)


def params_from_haiku(kind, params):
    """The parameters of a core that has its default name."""
    if kind == "VanillaRNN":
        of_x, of_h = params["vanilla_rnn/linear"], params["vanilla_rnn/linear_1"]
        return {"kernel_ih": of_x["w"], "kernel_hh": of_h["w"], "bias": of_x["b"] + of_h["b"]}
    if kind == "LSTM":
        w, b = (in_order(params["lstm/linear"][name], (0, 2, 1, 3)) for name in "wb")
        size = len(b) // 4
        b[size : 2 * size] += 1  # which its forget gate adds
        return {"kernel_ih": w[:-size], "kernel_hh": w[-size:], "bias": b}
    # Its update gate says how much is new; ours, how much stays.
    w_i, w_h, b = (np.array(params["gru"][name]) for name in ("w_i", "w_h", "b"))
    size = len(w_h)
    for array in (w_i, w_h, b):
        array[..., :size] *= -1
    w_i, w_h, b = (in_order(array, (1, 0, 2)) for array in (w_i, w_h, b))
    return {
        "kernel_ih": w_i, "kernel_hh": w_h[:, : 2 * size], "kernel_hn": w_h[:, 2 * size :],
        "bias": b,
    }  # fmt: skip


HAIKU = {
    "VanillaRNN": (RNNStack, {"nonlinearity": "relu"}),
    "LSTM": (LSTMStack, {}),
    "GRU": (GRUStack, {"reset_after": False}),
}


@needs("haiku")
@pytest.mark.parametrize("kind", HAIKU)
@pytest.mark.parametrize("reverse", [False, True])
def test_haikus_cores_and_resets(kind, reverse):
    """`recurrent_test.py`: unrolled batched, unbatched, with resets, and in reverse."""
    x, (stack, options) = normal(1, 6, 3, 4), HAIKU[kind]
    resets = np.random.default_rng(2).random((6, 3)) < 0.3

    def make(hk):
        return getattr(hk, kind)(5)

    def ours(x, resets, params):
        module = stack(5, time_major=True, reverse=reverse, **options)
        layer = params_from_haiku(kind, params)
        outputs, carry = module.apply({"params": {"l0": layer}}, x, resets=resets)
        return outputs, [state[0] for state in jax.tree.leaves(carry)]

    for flags in (None, resets):
        params, (outputs, state) = unrolled(make, x, flags, reverse=reverse)
        # Unbatched too, as test_core_unroll_unbatched has it.
        found, carry = ours(x, flags, params)
        close((found, carry), (outputs, jax.tree.leaves(state)))
        one, _ = ours(x[:, 1], None if flags is None else flags[:, 1], params)
        close(one, outputs[:, 1])


@needs("haiku")
def test_haikus_deep_rnn_of_unlike_sizes():
    """`recurrent_test.py`: DeepRNN's connection, shapes and states."""
    x = normal(1, 6, 3, 4)
    params, (outputs, states) = unrolled(
        lambda hk: hk.DeepRNN([hk.LSTM(5), hk.GRU(2), hk.VanillaRNN(3)]), x
    )
    layers = {
        f"l{k}": params_from_haiku(kind, params)
        for k, kind in enumerate(("LSTM", "GRU", "VanillaRNN"))
    }
    stack = CellStack(
        [LSTMCell(5), ResetBeforeGRUCell(2), RNNCell(3, nonlinearity="relu")], time_major=True
    )
    found, carry = stack.apply({"params": layers}, x)
    close(found, outputs)
    close(jax.tree.leaves(carry), jax.tree.leaves(states))


# Equinox: its cells, which take one sequence


@needs("equinox")
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("kind", "stack"), [("LSTMCell", LSTMStack), ("GRUCell", GRUStack)])
def test_equinoxs_cells(kind, stack, use_bias):
    """`test_nn.py`: test_lstm_cell and test_gru_cell, a scan over one sequence."""
    import equinox as eqx

    x, states = normal(1, 6, 4), 2 if kind == "LSTMCell" else 1
    cell = getattr(eqx.nn, kind)(4, 5, use_bias=use_bias, key=jax.random.key(0))
    start = tuple(normal(k, 5) for k in range(states)) if states == 2 else normal(0, 5)

    def step(carry, x_t):
        carry = cell(x_t, carry)
        return carry, jax.tree.leaves(carry)[0]

    last, expected = jax.lax.scan(step, jax.tree.map(jnp.asarray, start), x)
    layer = {"kernel_ih": cell.weight_ih.T, "kernel_hh": cell.weight_hh.T}
    if use_bias:
        layer["bias"] = cell.bias
    if use_bias and kind == "GRUCell":
        layer["bias_hn"] = cell.bias_n
    found, final = stack(5, use_bias=use_bias).apply(
        {"params": {"l0": layer}}, x, jax.tree.map(lambda s: s[None], start)
    )
    close(found, expected)
    close([s[0] for s in jax.tree.leaves(final)], jax.tree.leaves(last))


# JAX: the experimental cuDNN layer's reference


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_jaxs_reference_lstm(num_layers, bidirectional):
    """`experimental_rnn_test.py`: test_lstm_ref, whose lengths begin at 0, by its numbers."""
    from jax.experimental import rnn

    x, lengths = normal(1, 3, 6, 4), jnp.array([6, 0, 4])
    sizes = {
        "input_size": 4, "hidden_size": 5, "num_layers": num_layers,
        "bidirectional": bidirectional,
    }  # fmt: skip
    weights = rnn.init_lstm_weight(jax.random.key(0), **sizes)
    parts = rnn.unpack_lstm_weights(weights, **sizes)
    count = num_layers * (1 + bidirectional)
    start = normal(2, count, 3, 5), normal(3, count, 3, 5)
    expected = jax.jit(
        lambda *args: rnn.lstm_ref(*args, seq_lengths=lengths, dropout=0.0, **sizes)
    )(x, *start, *parts)
    state = {}
    sides = ("", "_reverse")[: 1 + bidirectional]
    for n, (k, side) in enumerate(itertools.product(range(num_layers), sides)):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        state |= {f"{name}_l{k}{side}": parts[p][n] for p, name in enumerate(names)}
    stack = LSTMStack(5, num_layers, bidirectional=bidirectional)
    outputs, (h_n, c_n) = stack.apply({"params": from_torch(state)}, x, start, seq_lengths=lengths)
    filled = np.asarray(lengths) > 0  # of an empty sequence theirs has another state
    close(outputs, expected[0])
    close((h_n[:, filled], c_n[:, filled]), (expected[1][:, filled], expected[2][:, filled]))
    np.testing.assert_array_equal(h_n[:, 1], start[0][:, 1])


# What PyTorch has no place for


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (LSTMStack(4, peephole=True), "PyTorch has no place for l0/peephole_f"),
        (GRUStack(4, reset_after=False, use_bias=False), "PyTorch has no place for l0/kernel_hn"),
        (CellStack([nn.GRUCell(4)]), "PyTorch has no place for l0/hn/bias"),
        (CellStack([LSTMCell(4), LSTMCell(3)]), "l1/kernel_ih has shape"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_to_torch_refuses_what_pytorch_lacks(stack, message):
    params = fill(jax.eval_shape(stack.init, jax.random.key(0), jnp.ones((1, 2, 3)))["params"])
    with pytest.raises(ValueError, match=message) as raised:
        to_torch(params)
    assert "\n" not in str(raised.value)
