"""PyTorch's weights to and from params: exact both ways, of their own, refused by name if wrong."""

import importlib.util
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import DEFAULTS, GOLDEN_CASES, make_torch

from lstm_flax import GRUStack, LSTMClassifier, LSTMStack, from_torch, to_torch

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="live weights need torch"
)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_round_trips_are_exact(name):
    arrays = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    state_dict = {k[6:]: v for k, v in arrays.items() if k.startswith("param.")}
    params = from_torch(state_dict)
    back = to_torch(params)
    assert back.keys() == state_dict.keys()
    for key in state_dict:
        if key.startswith("weight"):
            np.testing.assert_array_equal(back[key], state_dict[key])
    jax.tree.map(np.testing.assert_array_equal, from_torch(back), params)


def arrays_of(tree):
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def is_own(array):
    return array.flags.owndata and array.flags.writeable and array.flags.c_contiguous


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_both_ways_give_arrays_of_their_own(name):
    arrays = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    state_dict = {k[6:]: v for k, v in arrays.items() if k.startswith("param.")}
    state_dict = {f"rnn.{key}": value for key, value in state_dict.items()}
    features = sum(v.shape[1] for k, v in state_dict.items() if k.startswith("rnn.weight_hh_l0"))
    state_dict |= {"lin.weight": np.ones((1, features)), "lin.bias": np.ones(1)}
    before = {key: value.copy() for key, value in state_dict.items()}
    params = from_torch(state_dict)
    assert all(map(is_own, jax.tree.leaves(params)))
    back = to_torch(params)
    assert all(map(is_own, back.values()))
    for value in back.values():
        value += 1  # neither the params ...
    for path, leaf in arrays_of(from_torch(state_dict)).items():
        np.testing.assert_array_equal(arrays_of(params)[path], leaf)
    for leaf in jax.tree.leaves(params):
        leaf += 1  # ... nor the state dict sees it
    for key, value in state_dict.items():
        np.testing.assert_array_equal(value, before[key])


@needs_torch
@pytest.mark.parametrize("name", ["lstm_projection", "gru", "rnn_tanh"])
def test_params_are_a_snapshot_of_a_module_that_trains_on(name):
    import torch

    module = make_torch(DEFAULTS | GOLDEN_CASES[name])
    params = from_torch(module)
    before = jax.tree.map(np.copy, params)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1.0)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    # The same from its state dict; the LSTM's and the RNN's one bias stands for two.
    jax.tree.map(np.testing.assert_array_equal, from_torch(module.state_dict()), from_torch(module))
    np.testing.assert_allclose(
        from_torch(module)["l0"]["kernel_ih"] - params["l0"]["kernel_ih"], 1.0
    )


@needs_torch
def test_a_module_that_takes_our_weights_leaves_jaxs_alone():
    import torch

    params = LSTMStack(4, 2).init(jax.random.key(0), jnp.ones((1, 2, 3)))["params"]
    before = jax.tree.map(np.array, params)
    module = torch.nn.LSTM(3, 4, 2)
    weights = {key: torch.from_numpy(value) for key, value in to_torch(params).items()}
    module.load_state_dict(weights, assign=True)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1.0)
    jax.tree.map(np.testing.assert_array_equal, params, before)


@needs_torch
@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_through_float32_and_loses_nothing(name, dtype):
    """The sum of two biases in it would not be exact."""
    import torch

    half = make_torch(DEFAULTS | GOLDEN_CASES[name]).to(getattr(torch, dtype))
    state_dict = half.state_dict()
    params = from_torch(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    exact = from_torch({key: value.double() for key, value in state_dict.items()})
    jax.tree.map(np.testing.assert_array_equal, params, exact)
    for key, value in to_torch(params).items():
        if key.startswith("weight"):
            assert torch.equal(torch.from_numpy(value).to(state_dict[key].dtype), state_dict[key])

    # Of params in half precision PyTorch gets what they hold.
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    for key, value in to_torch(cast).items():
        assert torch.from_numpy(value).dtype == torch.float32
        wanted = to_torch(jax.tree.map(lambda leaf: leaf.astype(np.float32), cast))[key]
        np.testing.assert_array_equal(value, wanted)


def test_weights_that_are_not_finite_come_back_as_they_are():
    params = GRUStack(2).init(jax.random.key(0), jnp.ones((1, 2, 3)))["params"]
    params["l0"]["bias_hn"] = jnp.array([jnp.inf, jnp.nan])
    jax.tree.map(np.testing.assert_array_equal, from_torch(to_torch(params)), params)


def test_boxes_are_opened():
    params = LSTMClassifier(4, 1).init(jax.random.key(0), jnp.ones((1, 2, 3)))["params"]
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), params)
    jax.tree.map(np.testing.assert_array_equal, to_torch(boxed), to_torch(params))


def lstm_state_dict(num_layers=2, features=5, hidden=3):
    rng = np.random.default_rng(0)
    state = {}
    for k in range(num_layers):
        state[f"weight_ih_l{k}"] = rng.normal(size=(4 * hidden, features if k == 0 else hidden))
        state[f"weight_hh_l{k}"] = rng.normal(size=(4 * hidden, hidden))
        state[f"bias_ih_l{k}"] = rng.normal(size=4 * hidden)
        state[f"bias_hh_l{k}"] = rng.normal(size=4 * hidden)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias_hh_l1": None}, r"bias_hh_l1 is missing, expected with shape \(12,\)"),
        ({"weight_ih_l0": None}, r"weight_ih_l0 is missing"),
        ({"extra": np.ones((2, 3))}, r"extra is not expected, found with shape \(2, 3\)"),
        (
            {"weight_ih_l1": np.ones((12, 4))},
            r"weight_ih_l1 has shape \(12, 4\), expected \(12, 3\)",
        ),
        ({"weight_hh_l0": np.ones((7, 3))}, r"weight_hh_l0 has shape \(7, 3\), which is of no"),
    ],
)
def test_a_wrong_state_dict_is_refused_with_the_key_and_both_shapes(change, message):
    state = lstm_state_dict() | change
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_torch(state)
    with pytest.raises(ValueError, match=r"rnn\." + message if "extra" not in change else message):
        from_torch(
            {f"rnn.{k}": v for k, v in state.items()}
            | {"lin.weight": np.ones((10, 3)), "lin.bias": np.ones(10)}
        )


def test_a_misshapen_dense_layer_is_refused():
    layers = {f"rnn.{k}": v for k, v in lstm_state_dict().items()}
    head = {"lin.weight": np.ones((10, 4)), "lin.bias": np.ones(10)}
    with pytest.raises(ValueError, match=r"lin.weight has shape \(10, 4\), expected \(10, 3\)"):
        from_torch(layers | head)


def test_what_pytorch_has_no_place_for_is_named():
    stack = LSTMStack(4, layer_norm=True)
    params = stack.init(jax.random.key(0), jnp.zeros((1, 2, 3)))["params"]
    with pytest.raises(ValueError, match="PyTorch has no place for l0/norm_"):
        to_torch(params)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, "None"),
        ([1.0], "list"),
        (nn.Dense, "Dense"),
        (3, "int"),
    ],
)
def test_what_are_no_weights_is_said(given, named):
    for convert in (from_torch, to_torch):
        with pytest.raises(TypeError, match=rf"^{convert.__name__} takes a .*, not .*{named}.*$"):
            convert(given)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "is None"),
        ({}, "is dict"),
        ("abc", "is <U3"),
        (np.ones((12, 5), np.int32), "is int32"),
        (np.ones((12, 5), np.complex64), "is complex64"),
        ([[1.0], [2.0, 3.0]], "can't be read as an array"),
        (np.ones(12), r"has shape \(12,\)"),
    ],
)
def test_a_value_that_is_no_floating_matrix_is_refused_with_its_key(value, found):
    with pytest.raises(ValueError, match=rf"^weight_ih_l0 {found}.*$"):
        from_torch(lstm_state_dict() | {"weight_ih_l0": value})
    params = from_torch(lstm_state_dict())
    params["l0"]["kernel_ih"] = value
    with pytest.raises(ValueError, match=rf"^l0(/kernel_ih)? {found}|^l0/kernel_ih is missing"):
        to_torch(params)


@needs_torch
def test_a_tensor_that_has_no_numbers_is_refused_with_its_key():
    import torch

    module = torch.nn.LSTM(5, 3, device="meta")
    with pytest.raises(ValueError, match=r"^weight_ih_l0 can't be read as an array: .*meta"):
        from_torch(module)
    with pytest.raises(ValueError, match=r"^weight_ih_l0 is missing; there is weight, bias$"):
        from_torch(torch.nn.Linear(5, 3))


def test_a_layer_number_out_of_all_bounds_is_refused_at_once():
    with pytest.raises(
        ValueError, match="weight_ih_l2 is missing, though there is a layer 9999999"
    ):
        from_torch(lstm_state_dict() | {"weight_ih_l9999999": np.ones((12, 3))})


def classifier_params():
    layers = {f"rnn.{k}": v for k, v in lstm_state_dict(num_layers=3).items()}
    return from_torch(layers | {"lin.weight": np.ones((10, 3)), "lin.bias": np.ones(10)})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("core/l1", None, "core/l1/kernel_ih is missing, though there is a layer 2"),
        ("core/l0", None, "core/l0/kernel_ih is missing; there is core/l1/"),
        ("core/l1/kernel_hh", None, "core/l1/kernel_hh is missing, expected with shape (3, 12)"),
        ("core/l1/bias", None, "core/l1/bias is missing, expected with shape (12,)"),
        ("core/l1/kernel_ih", np.ones((5, 12)), "l1/kernel_ih has shape (5, 12), expected (3, 12)"),
        ("core/l0/kernel_hh", np.ones((3, 11)), "core/l0/kernel_hh has shape (3, 11), which is of"),
        ("core/l2/bias_hn", np.ones(3), "core/l2/bias_hn is not expected, found with shape (3,)"),
        ("core/l0", np.ones(3), "PyTorch has no place for core/l0"),
        ("core/norm/scale", np.ones(3), "PyTorch has no place for core/norm/scale"),
        ("head", None, "head/kernel is missing, expected with shape (3, 'classes')"),
        ("head/bias", None, "head/bias is missing, expected with shape (10,)"),
        ("head/kernel", np.ones((4, 10)), "head/kernel has shape (4, 10), expected (3, 10)"),
        ("other", np.ones(2), "other is not expected, found with shape (2,)"),
        ("params", {}, 'to_torch takes variables["params"]'),
    ],
)
def test_malformed_params_are_refused_with_the_parameter_and_both_shapes(path, value, message):
    params = node = classifier_params()
    *parents, name = path.split("/")
    for parent in parents:
        node = node.setdefault(parent, {})
    if value is None:
        del node[name]
    else:
        node[name] = value
    with pytest.raises(ValueError, match=rf"^.*{re.escape(message)}.*$"):
        to_torch(params)


@pytest.mark.parametrize("value", [None, np.ones(9)])
def test_the_grus_own_bias_is_checked(value):
    params = GRUStack(3).init(jax.random.key(0), jnp.ones((1, 2, 5)))["params"]
    params["l0"]["bias_hn"] = value
    if value is None:
        del params["l0"]["bias_hn"]
    with pytest.raises(ValueError, match=r"^l0/bias_hn .*\(3,\)$"):
        to_torch(params)
