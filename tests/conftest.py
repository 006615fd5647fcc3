import atexit
import os
import subprocess
import tempfile
from pathlib import Path

# Every program is compiled once, however many of the tests' processes run it. Those of xdist and
# those that tests start inherit this; it must be there before JAX is imported.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="compiled_")
    atexit.register(compiled.cleanup)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": compiled.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

# Most of the tests' time goes into compiling programs that run once, so that XLA optimises them
# little: in all processes, since what is compiled otherwise rounds otherwise.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from small_runs import command

ORIGINAL_FILES = Path(__file__).parents[2] / "shared" / "data" / "mnist"


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """MNIST's four original files."""
    if not ORIGINAL_FILES.is_dir():
        reason = f"MNIST's original files are not in {ORIGINAL_FILES}"
        # A gate that skips them would prove nothing.
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return ORIGINAL_FILES


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A tfds folder for the whole session."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def strict_dtypes():
    """No silent promotion in our own layers; optax's optimisers rely on some."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def run(data_dir, capsys):
    """Run the experiment's command line in this process; returns `(status, output, error)`."""
    from experiments import mnist_lstm

    def run(*flags):
        try:
            status = mnist_lstm.main(["--data-dir", str(data_dir), *map(str, flags)])
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def reader(data_dir, tmp_path_factory) -> Path:
    """The workdir of a run that has learnt to read: about 95% of mnist5k's test digits."""
    from experiments import mnist_lstm

    workdir = tmp_path_factory.mktemp("reader") / "run"
    flags = ["--data-dir", data_dir, "--workdir", workdir, "--dataset", "mnist5k", "--epochs", 8]
    flags += ["--hidden-size", 96, "--num-layers", 1, "--batch-size", 50]
    assert mnist_lstm.main([*map(str, flags)]) == 0
    return workdir


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory) -> Path:
    """The workdir of a finished run of three epochs, 14 steps each; tests harm a copy of it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    subprocess.run(command(data_dir, workdir, "--epochs", 3), check=True, capture_output=True)
    return workdir
