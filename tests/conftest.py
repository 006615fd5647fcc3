import atexit
import fcntl
import os
import shutil
import tempfile
from importlib.metadata import version
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
# XLA's old emitters compile in half the time. Later releases have none, and refuse the flag.
if version("jaxlib").startswith("0.10.") and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest
from small_runs import finish

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
def made_once(tmp_path_factory):
    """Have `make(folder)` called by the first of the tests' processes that asks for the folder.

    The others wait for it. They share it, so that none may change what is in it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made_once(name, make) -> Path:
        folder, is_made = root / "made_once" / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                make(folder)
                is_made.touch()
        return folder

    return made_once


@pytest.fixture(scope="session")
def data_dir(made_once) -> Path:
    """A tfds folder for the whole session; one process at a time prepares data in it."""
    return made_once("tfds", lambda folder: None)


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
def reader(data_dir, made_once) -> Path:
    """The workdir of a run that has learnt to read: about 95% of mnist5k's test digits."""
    from experiments import mnist_lstm

    def learn(workdir):
        flags = ["--data-dir", data_dir, "--workdir", workdir, "--dataset", "mnist5k"]
        flags += ["--epochs", 8, "--hidden-size", 96, "--num-layers", 1, "--batch-size", 50]
        assert mnist_lstm.main([*map(str, flags)]) == 0

    return made_once("reader", learn)


@pytest.fixture(scope="session")
def finished(data_dir, made_once) -> Path:
    """The workdir of a finished run of three epochs, 14 steps each; tests harm a copy of it."""
    return made_once("finished", lambda workdir: finish(data_dir, workdir, "--epochs", 3))
