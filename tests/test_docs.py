"""The reference: what its pages hold, that their links lead somewhere, and what fails the build."""

import importlib
import pkgutil
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from urllib.parse import unquote, urlsplit

import pytest

import lstm_flax

ROOT = Path(__file__).parents[1]
MODULES = [
    f"lstm_flax.{module.name}"
    for module in pkgutil.iter_modules(lstm_flax.__path__)
    if module.name != "models"  # whose names lstm_flax exports
]


class Page(HTMLParser):
    """The places in a page, and where it leads; of the latter, what a browser loads with it."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.loaded = path, set(), set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values["id"]} if "id" in values else set()
        found = {values[name] for name in ("href", "src") if name in values}
        self.links |= found
        if tag != "a":
            self.loaded |= found


def build(tree, site):
    """Build the pages of a tree; strictly, as its configuration says."""
    command = [sys.executable, "-m", "mkdocs", "build"]  # with -q it would count no warnings
    command += ["-f", tree / "docs" / "mkdocs.yml", "-d", site]
    return subprocess.run(command, cwd=site.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of this tree, by their paths in the site."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = build(ROOT, folder)
    assert (built.returncode, built.stdout) == (0, ""), built.stderr
    assert "WARNING" not in built.stderr
    return {str(path.relative_to(folder)): Page(path) for path in folder.rglob("*.html")}


@pytest.fixture
def tree(tmp_path):
    """A copy of what the pages are made of."""
    for name in ("docs", "lstm_flax", "experiments", "tests"):
        copytree(ROOT / name, tmp_path / name, ignore=ignore_patterns("__pycache__"))
    for page in ROOT.glob("*.md"):
        copy(page, tmp_path)
    return tmp_path


def public_names():
    """The public names by their full paths, each with its other path if it has two."""
    for name in lstm_flax.__all__:
        module = getattr(lstm_flax, name).__module__
        yield f"lstm_flax.{name}", f"{module}.{name}"
    for path in MODULES:
        module = importlib.import_module(path)
        own = [name for name, value in vars(module).items() if is_of(path, value)]
        for name in getattr(module, "__all__", own):
            if not name.startswith("_"):
                yield f"{path}.{name}", f"{path}.{name}"


def is_of(path, value):
    return callable(value) and getattr(value, "__module__", None) == path


@pytest.mark.slow
def test_every_public_name_has_its_place(site):
    ids = set().union(*(page.ids for page in site.values()))
    names = list(public_names())
    assert ("lstm_flax.augment.distort",) * 2 in names
    assert [name for name, other in names if ids.isdisjoint((name, other))] == []
    assert "lstm_flax.LSTMStack.__call__" in site["layers.html"].ids
    assert "lstm_flax.models.cell.RecurrentCell.step" in site["bases.html"].ids


@pytest.mark.slow
def test_other_projects_can_refer_to_every_name(site):
    inventory = (site["index.html"].path.parent / "objects.inv").read_bytes()
    header = inventory.split(b"\n", 4)
    names = {line.split()[0] for line in zlib.decompress(header[4]).decode().splitlines()}
    assert {f"lstm_flax.{name}" for name in lstm_flax.__all__} <= names


@pytest.mark.slow
def test_the_pages_say_what_the_docstrings_say(site):
    text = re.sub(r"<[^>]+>", "", site["layers.html"].path.read_text())
    assert re.search(r"LSTMStack\(\s+hidden_size: int,\s+num_layers: int = 1,", text)
    assert "recurrent_activation: Activation = logistic" in text
    assert "units of each layer and direction" in text
    assert "../figures/gradient_flow.png" in site["experiments/gradient_flow/index.html"].links


@pytest.mark.slow
def test_every_link_leads_to_a_place(site):
    root = site["index.html"].path.parent
    count = 0
    for page in site.values():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or page.path.name == "404.html":  # which has links from the host's root
                continue
            target = (page.path.parent / unquote(url.path)) if url.path else page.path
            target = (target / "index.html" if target.is_dir() else target).resolve()
            assert target.is_file(), f"{page.path}: {link}"
            name = str(target.relative_to(root))
            if url.fragment and name in site:
                assert unquote(url.fragment) in site[name].ids, f"{page.path}: {link}"
                count += 1
    assert count > 300


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site):
    loaded = set().union(*(page.loaded for page in site.values()))
    assert any(link.endswith(".js") for link in loaded)
    assert [link for link in loaded if urlsplit(link).netloc] == []


FAULTS = {
    "a page that is not there": ("README.md", "[a](nowhere.md)", "nowhere.md"),
    "a heading": ("experiments/README.md", "[a](TASKS.md#nowhere)", "TASKS.md#nowhere"),
    "a picture": ("lstm_flax/README.md", '<img src="nowhere.png">', "lstm_flax/nowhere.png"),
    "a source": ("experiments/TASKS.md", "[a](nowhere.py)", "experiments/nowhere.py"),
    "a README beside the navigation": ("experiments/harness/README.md", "# A", "harness/README.md"),
    "a name without a docstring": (
        "lstm_flax/training.py",
        "def new(): pass",
        "lstm_flax.training.new is public, but has no docstring",
    ),
    "a method without a docstring": (
        "lstm_flax/models/classifier.py",
        "    def new(self): pass",
        "lstm_flax.SequenceClassifier.new is public, but has no docstring",
    ),
    "a name that no page has": (
        "lstm_flax/__init__.py",
        'def new():\n    """Do it."""\n\n\n__all__ += ["new"]',
        "lstm_flax.new is public, but on no page",
    ),
    "a parameter that is not there": (
        "lstm_flax/augment.py",
        'def new(a: int) -> None:\n    """Do it.\n\n    Args:\n        b: not there.\n    """',
        "Parameter 'b' does not appear in the function signature",
    ),
}


@pytest.mark.slow
def test_every_fault_fails_the_build(tree):
    before = {path for path in tree.rglob("*") if "__pycache__" not in path.parts}
    added = set()
    for file, text, _ in FAULTS.values():
        path = tree / file
        old = path.read_text() if path.exists() else ""
        if text.startswith("    def"):  # into the class, before what follows it
            old, mark, after = old.partition("\n\n\ndef LSTMClassifier(")
            path.write_text(f"{old}\n\n{text}{mark}{after}")
        else:
            path.write_text(f"{old}\n\n{text}\n")
            added |= {path} - before
    built = build(tree, tree / "elsewhere")
    assert built.returncode != 0
    logged = re.split(r"^(?=[A-Z]+ +- )", built.stderr, flags=re.MULTILINE)
    warnings = [record for record in logged if record.startswith("WARNING")]
    # Each counts, so each alone fails the build.
    assert f"Aborted with {len(warnings)} warnings in strict mode!" in built.stdout + built.stderr
    for fault, (_, _, said) in FAULTS.items():
        assert any(said in warning for warning in warnings), (fault, built.stderr)
    # Nothing is written beside the sources.
    after = {path for path in tree.rglob("*") if "__pycache__" not in path.parts}
    assert {path.relative_to(tree).parts[0] for path in after - before - added} <= {"elsewhere"}
