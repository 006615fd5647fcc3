"""Which file imports which: one way, without a cycle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("lstm_flax", "experiments")
    for path in (ROOT / package).rglob("*.py")
}
LAYERS = ("lstm_flax", "experiments.harness", "experiments.training_run", "experiments")
"""Packages, from the one that knows none of the others to the one that may import them all."""


def imported_by(path):
    """The files of this project that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module


IMPORTS = {name: set(imported_by(path)) for name, path in FILES.items()}


def layer(name):
    return next(i for i, package in enumerate(LAYERS) if f"{name}.".startswith(f"{package}."))


def test_imports_go_down_the_layers_and_never_round():
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if layer(other) > layer(name)
    ]
    assert upwards == []
    order = [*graphlib.TopologicalSorter(IMPORTS).static_order()]  # raises where there is a cycle
    assert order.index("lstm_flax.training") < order.index("experiments.mnist_lstm")


def test_the_leaves_of_the_library_know_neither_training_nor_each_other():
    leaves = ("models", "data", "checkpoints", "augment")
    for name, others in IMPORTS.items():
        leaf = next((leaf for leaf in leaves if f"{name}.".startswith(f"lstm_flax.{leaf}.")), None)
        if leaf:
            known = {other.split(".")[1] for other in others}
            assert known <= {leaf, "arguments", "buckets", "files"}, name


def test_what_takes_long_to_import_waits_until_it_is_used():
    code = """if True:
        import sys, lstm_flax
        slow = ("jax.experimental.pallas", "orbax", "tensorflow_datasets", "tensorstore")
        print([name for name in slow if name in sys.modules])
        lstm_flax.checkpoints.open_checkpoints
        print([name for name in slow if name in sys.modules])
    """
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert printed == b"[]\n['orbax', 'tensorstore']\n"


def test_experiments_without_their_packages_name_the_extra():
    started = subprocess.run(  # without any site-packages
        [sys.executable, "-S", "-m", "experiments"], cwd=ROOT, capture_output=True, text=True
    )
    assert started.returncode == 2
    assert started.stderr.count("\n") == 1
    assert started.stderr.startswith("error: the experiments' packages are not installed: ")
    assert "[experiments]" in started.stderr
