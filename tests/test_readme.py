"""The README's code: each block is pasted alone, by somebody who has run none of the others."""

import importlib
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def paste(block):
    """Run a block of Python in a namespace of its own; returns that."""
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(block, names)
    return names


def commands():
    """The flags of the README's commands, by the module that they start."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = {}
    for line in lines:
        for name, rest in re.findall(r"python -m (experiments\.\w+)([^&#]*)", line):
            # A flag in quotes is another command's.
            flags = re.findall(r"(--[a-z-]+)", re.sub(r"=\".*?\"", "", rest))
            found.setdefault(name, set()).update(flags)
    return found


@pytest.mark.slow
def test_each_block_of_python_stands_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use, train, pytorch = blocks("python")
    assert paste(use)["forget"].shape == (32, 28, 64)
    assert paste(train)["state"].step == 12
    if importlib.util.find_spec("torch") is not None:
        names = paste(pytorch)
        expected, _ = names["torch_lstm"](names["torch"].ones(names["x"].shape))
        np.testing.assert_allclose(names["outputs"], expected.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(("name", "flags"), commands().items())
def test_each_command_has_the_flags_that_it_is_given(name, flags, capsys):
    is_package = importlib.util.find_spec(name).submodule_search_locations
    module = importlib.import_module(f"{name}.__main__" if is_package else name)
    with pytest.raises(SystemExit) as exit_:
        module.main(["--help"])
    assert exit_.value.code == 0
    assert flags <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
