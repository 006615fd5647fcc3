"""Layers out of whole PyTorch models: by prefix, wrapped, single cells, and from files."""

import importlib.util
import re
import sys

import jax
import numpy as np
import pytest

from lstm_flax import (
    GRUCell,
    GRUStack,
    LSTMCell,
    LSTMStack,
    RNNCell,
    from_torch,
    to_torch,
)

torch = pytest.importorskip("torch", reason="whole models need torch")

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="needs safetensors"
)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(5)
        self.rnn = torch.nn.LSTM(5, 3, 2, bidirectional=True, batch_first=True)


class Model(torch.nn.Module):
    """A tagger: an embedding, an encoder, a second layer, a cell and a dense layer."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 5)
        self.encoder = Encoder()
        self.refine = torch.nn.GRU(6, 4, batch_first=True)
        self.decoder = torch.nn.LSTMCell(4, 4)
        self.fc = torch.nn.Linear(4, 2)


FITS = ["encoder.rnn.", "refine.", "decoder."]


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_prefix_takes_one_layer_out_of_a_model():
    model, x = Model(), torch.randn(2, 6, 5)
    between, final = model.encoder.rnn(x)
    params = from_torch(model, prefix="encoder.rnn.")
    outputs, carry = LSTMStack(3, 2, bidirectional=True).apply({"params": params}, x.numpy())
    np.testing.assert_allclose(outputs, between.detach(), atol=1e-6)
    for found, expected in zip(carry, final, strict=True):
        np.testing.assert_allclose(found, expected.detach(), atol=1e-6)

    refined, _ = GRUStack(4).apply({"params": from_torch(model.state_dict(), "refine.")}, outputs)
    np.testing.assert_allclose(refined, model.refine(between)[0].detach(), atol=1e-6)

    # The last dot may be left out, and arrays serve as well as tensors.
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    equal(from_torch(arrays, prefix="encoder.rnn"), params)


@pytest.mark.parametrize("wrap", ["DataParallel", "compile", "both"])
def test_what_wrappers_put_before_all_names_may_be_left_out(wrap):
    model = Model()
    names = {"DataParallel": "module.", "compile": "_orig_mod.", "both": "module._orig_mod."}
    wrapped = {names[wrap] + key: value for key, value in model.state_dict().items()}
    if wrap == "DataParallel":
        wrapped = torch.nn.DataParallel(model).state_dict()
    for prefix in ("encoder.rnn.", f"{names[wrap]}encoder.rnn."):
        equal(from_torch(wrapped, prefix), from_torch(model.encoder.rnn))
    equal(from_torch(torch.nn.DataParallel(model.refine)), from_torch(model.refine))


def test_a_prefix_is_not_needed_where_there_is_nothing_else():
    encoder = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"rnn": torch.nn.RNN(5, 3)})})
    equal(from_torch(encoder), from_torch(encoder["a"]["rnn"]))
    equal(from_torch(encoder, "a"), from_torch(encoder["a"]["rnn"]))


def test_a_classifier_in_a_model_is_taken_whole_or_by_its_layer():
    rnn, lin = torch.nn.GRU(5, 3), torch.nn.Linear(3, 2)
    classifier = torch.nn.ModuleDict({"rnn": rnn, "lin": lin})
    model = torch.nn.ModuleDict({"head": classifier, "other": torch.nn.Linear(1, 1)})
    equal(from_torch(model, "head."), from_torch(classifier))
    equal(from_torch(model, "head.rnn."), from_torch(rnn))
    equal(from_torch(torch.nn.DataParallel(classifier)), from_torch(classifier))
    assert from_torch(classifier)["head"]["kernel"].shape == (3, 2)


@pytest.mark.parametrize("prefix", ["", "encoder", "lstm.", "encoder.rn", "fc."])
def test_a_prefix_that_is_wrong_or_ambiguous_lists_those_that_fit(prefix):
    model = Model()
    shown = ", ".join(map(repr, FITS))
    message = f"from_torch needs the prefix of one layer, not {prefix!r}; these fit: {shown}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_torch(model, prefix)


def test_an_error_below_a_prefix_names_the_whole_key():
    state = Model().state_dict()
    del state["encoder.rnn.bias_hh_l1"]
    with pytest.raises(ValueError, match=r"^encoder\.rnn\.bias_hh_l1 is missing"):
        from_torch(state, "encoder.rnn.")
    state["decoder.bias_ih"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"^decoder\.bias_ih has shape \(3,\), expected \(16,\)$"):
        from_torch(state, "decoder.")


CELLS = {"LSTMCell": (LSTMCell, 2), "GRUCell": (GRUCell, 1), "RNNCell": (RNNCell, 1)}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells_compute_what_pytorchs_do_and_go_back(name, bias):
    kind, states = CELLS[name]
    module, x = getattr(torch.nn, name)(5, 3, bias=bias), torch.randn(2, 5)
    start = [torch.randn(2, 3) for _ in range(states)]
    params = from_torch(module)
    given = tuple(s.numpy() for s in start)
    carry, _ = kind(3, use_bias=bias).apply(
        {"params": params}, given if states == 2 else given[0], x.numpy()
    )
    expected = module(x, tuple(start) if states == 2 else start[0])
    for found, wanted in zip(
        jax.tree.leaves(carry), expected if states == 2 else [expected], strict=True
    ):
        np.testing.assert_allclose(found, wanted.detach(), atol=1e-6)
    back = getattr(torch.nn, name)(5, 3, bias=bias)
    back.load_state_dict({key: torch.from_numpy(v) for key, v in to_torch(params).items()})
    equal(from_torch(back), params)
    with pytest.raises(ValueError, match=r"^PyTorch has no place for kernel_hn$"):
        to_torch(params | {"kernel_hn": np.ones((3, 3))})


@needs_safetensors
def test_safetensors_files(tmp_path):
    from safetensors.torch import save_file

    model = Model().to(torch.bfloat16)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    equal(from_torch(path, "encoder.rnn."), from_torch(model.encoder.rnn))
    equal(from_torch(str(path), "decoder."), from_torch(model.decoder))


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
def test_files_of_torch_save_and_training_checkpoints(tmp_path, suffix):
    model, path = Model(), tmp_path / f"model.{suffix}"
    torch.save(model.state_dict(), path)
    equal(from_torch(path, "encoder.rnn."), from_torch(model.encoder.rnn))
    adam = torch.optim.Adam(model.parameters())
    torch.save({"epoch": 3, "model": model.state_dict(), "adam": adam.state_dict()}, path)
    equal(from_torch(path, "model.encoder.rnn."), from_torch(model.encoder.rnn))
    with pytest.raises(ValueError, match=r"these fit: 'model\.encoder\.rnn\.', 'model\.refine\.'"):
        from_torch(path, "encoder.rnn.")


class Runs:
    """What a file could do if its code ran."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran its code')",))


@needs_safetensors
def test_damaged_files_and_files_with_code_are_refused_in_one_line(tmp_path):
    def refused(name, error=ValueError):
        with pytest.raises(error) as raised:
            from_torch(tmp_path / name)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        assert f"{name} is not a" in refused(name)
    torch.save({"weight_ih_l0": Runs()}, tmp_path / "code.pt")
    assert "code.pt is not a file of weights alone" in refused("code.pt")
    torch.save(torch.nn.LSTM(5, 3), tmp_path / "module.pt")
    assert "module.pt is not a file of weights alone" in refused("module.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert refused("tensor.pt").endswith("tensor.pt holds a Tensor, not a state dict")
    (tmp_path / "a.h5").write_bytes(b"")
    assert "ends in .safetensors, .pt" in refused("a.h5")
    assert "none.pt is not a file" in refused("none.pt", FileNotFoundError)
    assert "is not a file" in refused(".", FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("a.safetensors", "safetensors.numpy", 'safetensors: pip install "lstm_flax[safetensors]"'),
        ("a.pt", "torch", "torch: pip install torch"),
    ],
)
def test_a_file_whose_library_is_missing_says_what_to_install(
    tmp_path, monkeypatch, name, module, install
):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)  # an import of it now fails
    with pytest.raises(ImportError, match=rf"^reading .*{name} needs {re.escape(install)}$"):
        from_torch(tmp_path / name)


def test_an_old_pytorch_reads_no_files(tmp_path, monkeypatch):
    torch.save(Model().state_dict(), tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ImportError, match=r"safely needs torch 2\.6 or newer, not 2\.5\.1\+cpu$"):
        from_torch(tmp_path / "a.pt")
