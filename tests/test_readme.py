"""The code in all READMEs: each block is pasted alone, by a reader who has run no other.

`test_docs.py` tests the pages in `docs`, whose links are those of the built reference.
"""

import importlib
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(
        part.startswith(".") or part in ("runs", "build", "docs")
        for part in path.parts[len(ROOT.parts) :]
    )
]


def blocks(language, *pages):
    """The blocks of a language in some pages, by default in the README at the top."""
    text = "\n".join(path.read_text() for path in pages or [ROOT / "README.md"])
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def paste(block):
    """Run a block of Python in a namespace of its own; returns that."""
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(block, names)
    return names


def commands():
    """The flags of the READMEs' commands, by the module that they start."""
    lines = "\n".join(blocks("bash", *PAGES)).replace("\\\n", " ").splitlines()
    found = {}
    for line in lines:
        for name, rest in re.findall(r"python -m (experiments\.\w+)([^&#]*)", line):
            # A flag in quotes is another command's.
            flags = re.findall(r"(--[a-z-]+)", re.sub(r"=\".*?\"", "", rest))
            found.setdefault(name, set()).update(flags)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks("python", page))
    ],
)
def test_each_block_of_python_stands_alone(page, block, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # read when it is first imported
    for module in re.findall(r"\b(torch|keras|onnxruntime)\b", block):
        pytest.importorskip(module)
    is_card = page.with_suffix("").is_file()  # of a model, which lies beside it
    monkeypatch.chdir(page.parent if is_card else tmp_path)
    names = paste(block)
    if "theirs" in names:  # the way of a PyTorch model, which promises to be short
        assert len([line for line in block.splitlines() if line]) < 30
        back = names["theirs"]([*map(names["torch"].from_numpy, names["data"])]).detach()
        for logits in (names["logits"], back):
            np.testing.assert_allclose(logits, names["apply"](names["params"]), atol=1e-5)
        assert (back - names["expected"]).abs().max() > 0.01  # it has learnt
    if "forget" in names:
        assert names["forget"].shape == (32, 28, 64)
    if "state" in names:
        assert names["state"].step == 12
    if "torch_lstm" in names:
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_within_the_project_leads_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for link in filter(None, sum(links, ())):
        if re.match(r"https?:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


def test_the_readme_can_be_finished():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
