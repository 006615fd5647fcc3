"""pad_sequences, against torch.nn.utils.rnn and as the stacks read its batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_flax import GRUStack, LSTMStack, from_torch, pad_sequences

LENGTHS = (3, 7, 0, 1, 7)


def ragged(*features, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(length, *features)).astype(dtype) for length in LENGTHS]


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("features", [(), (5,), (2, 3)])
@pytest.mark.parametrize("value", [0, -1.5])
def test_it_pads_as_pytorch_does(features, time_major, value):
    torch = pytest.importorskip("torch")
    sequences = ragged(*features)
    found, lengths = pad_sequences(sequences, time_major=time_major, padding_value=value)
    expected = torch.nn.utils.rnn.pad_sequence(
        [*map(torch.from_numpy, sequences)], batch_first=not time_major, padding_value=value
    )
    np.testing.assert_array_equal(found, expected.numpy(), strict=True)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(lengths, np.array(LENGTHS, np.int32), strict=True)


def test_a_padded_batch_computes_what_pytorch_does_with_a_packed_one():
    torch = pytest.importorskip("torch")
    sequences = [sequence for sequence in ragged(5) if len(sequence)]  # PyTorch has no empty ones
    module = torch.nn.LSTM(5, 3, 2, bidirectional=True)
    rnn = torch.nn.utils.rnn
    packed = rnn.pack_sequence([*map(torch.from_numpy, sequences)], enforce_sorted=False)
    outputs, final = module(packed)
    outputs, counts = rnn.pad_packed_sequence(outputs, batch_first=True)

    x, lengths = pad_sequences(sequences, multiple_of=4)
    assert x.shape == (4, 8, 5)
    np.testing.assert_array_equal(lengths, counts)
    found, carry = LSTMStack(3, 2, bidirectional=True).apply(
        {"params": from_torch(module)}, x, seq_lengths=lengths
    )
    np.testing.assert_allclose(found[:, :7], outputs.detach(), atol=1e-6)
    assert not found[:, 7:].any()
    for state, expected in zip(carry, final, strict=True):
        np.testing.assert_allclose(state, expected.detach(), atol=1e-6)


def test_multiples_let_one_program_serve_many_lengths():
    run = jax.jit(lambda params, x, lengths: stack.apply(params, x, seq_lengths=lengths))
    stack = GRUStack(2)
    variables = stack.init(jax.random.key(0), jnp.ones((1, 1, 1)))
    for longest in range(1, 17):
        x, lengths = pad_sequences(
            [np.ones((1, 1), np.float32), np.ones((longest, 1), np.float32)], multiple_of=8
        )
        run(variables, x, lengths)
    assert run._cache_size() == 2


def test_dtypes_and_what_numpy_reads():
    assert pad_sequences([np.ones((2, 1), np.float16)])[0].dtype == np.float16
    mixed, _ = pad_sequences([np.ones(2, np.float32), np.ones(3, np.float64)])
    assert mixed.dtype == np.float64
    tokens, lengths = pad_sequences(iter([[4, 5], jnp.array([6])]), padding_value=9)
    np.testing.assert_array_equal(tokens, [[4, 5], [6, 9]])
    assert lengths.tolist() == [2, 1]
    assert pad_sequences([np.ones((0, 3))])[0].shape == (1, 0, 3)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "needs at least one sequence"),
        ([np.ones((2, 3)), np.ones((2, 4))], r"^sequence 1 has shape \[2, 4\], not \['time', 3\]"),
        ([1.0], "^sequence 0 is float, not an array"),
        ([np.ones(2), None], "^sequence 1 is NoneType, not an array"),
        ([[[1.0], [2.0, 3.0]]], "^sequence 0 can't become an array"),
    ],
)
def test_what_is_no_ragged_batch_is_refused(sequences, message):
    with pytest.raises(ValueError, match=message) as raised:
        pad_sequences(sequences)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="multiple_of is 0"):
        pad_sequences([np.ones(1)], multiple_of=0)
