"""The library apart from its experiments: what its wheel holds, and that nothing else is needed."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from test_readme import blocks

ROOT = Path(__file__).parents[1]
OF_EXTRAS = (
    "array_record", "experiments", "matplotlib", "mlxtend", "PIL", "sklearn", "tensorboardX",
    "tensorflow_datasets", "tyro",
)  # fmt: skip


def build(kind, tree, folder):
    """Build a tree's "sdist" or "wheel" by its backend alone, as pip does; returns the file."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from what the sdist holds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("lstm_flax", "experiments"):
        copytree(ROOT / name, folder / "tree" / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, folder / "tree")
    for kind in ("sdist", "wheel"):
        (folder / kind).mkdir()
    sdist = build("sdist", folder / "tree", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder / "wheel")


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment's Python, where the wheel is installed over this environment's packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, "-q", "--disable-pip-version-check", wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Python runs no .pth file that it finds there: what is installed as editable stays out.
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "packages.pth").write_text("\n".join(paths))
    return python


@pytest.mark.slow
def test_the_wheel_holds_the_library_with_its_kernel_and_nothing_else(wheel):
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lstm_flax").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__" and path.suffix != ".md"
    }
    assert {"lstm_flax/py.typed", "lstm_flax/models/native/kernel.cc"} < files
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files


@pytest.mark.slow
def test_what_is_installed_trains_the_readmes_lines(python, tmp_path):
    (train,) = blocks("python", ROOT / "lstm_flax" / "README.md")
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.modules |= dict.fromkeys({OF_EXTRAS})\n"  # as if they were not there
        f"{train}\n"
        "import lstm_flax; print(lstm_flax.__file__, state.step)\n"
        "try: lstm_flax.data\n"
        "except ImportError as error: print(error)\n"
    )
    trained = subprocess.run(
        [python, "-I", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *epochs, installed, refused = trained.stdout.splitlines()
    assert [line.count("%") for line in epochs] == [1, 1, 1]
    assert installed.startswith(str(python.parents[1]) + os.sep)
    assert installed.endswith(" 12")
    assert refused == 'lstm_flax.data needs tfds: pip install "lstm_flax[data]"'
    assert (tmp_path / "checkpoints" / "12").is_dir()
