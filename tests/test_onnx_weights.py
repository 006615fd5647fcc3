"""ONNX's own operators, in ONNX Runtime, compute what the layers and what PyTorch compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_flax import (
    GRUStack,
    LSTMClassifier,
    LSTMStack,
    RNNStack,
    SequenceClassifier,
    from_torch,
    to_onnx,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(model, *inputs):
    """The outputs of an ONNX model by name, once onnx's checker has passed it."""
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_inputs()]
    results = session.run(None, dict(zip(names, inputs, strict=True)))
    return dict(zip([one.name for one in session.get_outputs()], results, strict=True))


def inputs_of(rng):
    return rng.normal(size=(4, 7, 5)).astype(np.float32), np.array([7, 1, 4, 6], np.int32)


def with_drawn_biases(params, rng):
    """Biases that differ from each other, so that a gate out of its order shows."""
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)) * 0.4, params)


@pytest.mark.parametrize(
    ("stack", "options", "named"),
    [
        (LSTMStack, {}, {}),
        (LSTMStack, {"use_bias": False, "bidirectional": True}, {}),
        (GRUStack, {"bidirectional": True}, {}),
        (RNNStack, {}, {}),
        (RNNStack, {"nonlinearity": "relu", "bidirectional": True}, {"nonlinearity": "relu"}),
    ],
)
def test_a_stack_gives_the_same_outputs_and_states(stack, options, named):
    rng = np.random.default_rng(0)
    x, lengths = inputs_of(rng)
    module = stack(6, 2, **options)
    params = with_drawn_biases(module.init(jax.random.key(0), x)["params"], rng)
    for given in ((), (lengths,)):
        model = to_onnx(params, seq_lengths=bool(given), **named)
        found = run(model, x, *given)
        seq_lengths = jnp.asarray(lengths) if given else None
        outputs, carry = module.apply({"params": params}, x, seq_lengths=seq_lengths)
        expected = dict(
            zip(["outputs", "h_n", "c_n"], [outputs, *jax.tree.leaves(carry)], strict=False)
        )
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)


def test_a_padded_model_of_pytorch_goes_to_onnx_with_its_logits():
    torch = pytest.importorskip("torch")
    from torch.nn.utils.rnn import pack_padded_sequence

    x, lengths = inputs_of(np.random.default_rng(1))
    rnn = torch.nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True)
    lin = torch.nn.Linear(12, 3)
    params = from_torch(torch.nn.ModuleDict({"rnn": rnn, "lin": lin}))
    with torch.no_grad():
        packed = pack_padded_sequence(
            torch.from_numpy(x), torch.from_numpy(lengths), batch_first=True, enforce_sorted=False
        )
        h_n = rnn(packed)[1][0]
        expected = lin(torch.cat([h_n[-2], h_n[-1]], -1)).numpy()
    found = run(to_onnx(params, seq_lengths=True), x, lengths)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5)
    ours = SequenceClassifier(LSTMStack(6, 2, bidirectional=True), 3)
    logits = ours.apply({"params": params}, x, seq_lengths=jnp.asarray(lengths))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_it_takes_any_batch_and_any_time():
    model = LSTMClassifier(6, 1, 3)
    x = np.ones((2, 5, 4), np.float32)
    params = model.init(jax.random.key(0), x)["params"]
    exported = to_onnx(params)
    assert [(one.domain, one.version) for one in exported.opset_import] == [("", 17)]
    for shape in ((1, 3, 4), (9, 8, 4)):
        x = np.ones(shape, np.float32)
        expected = model.apply({"params": params}, x)
        np.testing.assert_allclose(run(exported, x)["logits"], expected, atol=1e-5)


def test_what_onnx_has_no_place_for_is_refused():
    x = np.ones((2, 5, 4), np.float32)
    params = LSTMStack(6, 1, proj_size=3).init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="no projection"):
        to_onnx(params)
    params = LSTMStack(6, 1, peephole=True).init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="PyTorch has no place for l0/"):
        to_onnx(params)
    with pytest.raises(ValueError, match="nonlinearity"):
        to_onnx(params, nonlinearity="sine")
