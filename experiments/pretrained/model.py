"""The pretrained model, which reads where there is no run yet."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from experiments.harness.usage import UsageError, check_packages
from experiments.training_run import from_config
from experiments.training_run.config import RECIPES, Config, stored_config
from experiments.training_run.restored import RestoredRun, restore_run
from lstm_flax import from_torch
from lstm_flax.files import MIB, read_regular_file

FOLDER = Path(__file__).parent
FILE = FOLDER / "best.safetensors"
"""An export of a run with the recipe best; the card beside it says how it was made."""

SHA256 = "bba51ce5f6e5532e323a2d4a986419731b78dfb1c6d402366b79c80bd692aa92"
"""Of the file, in hexadecimal."""

CORRECT, TOTAL = 9_964, 10_000
"""How many of MNIST's test images the file reads correctly."""

CONFIG = Config(workdir=FOLDER, recipe="best", dataset="mnist", **RECIPES["best"])
"""How it was trained."""

STEP = 9_380
"""At which its training ended."""


def restore_or_pretrained(
    workdir: Path | None, restore: Callable[[Path], RestoredRun] = restore_run
) -> RestoredRun:
    """Restore a run, or the pretrained model if no workdir is named and the default one has no run.

    Prints a line on standard error if it is the pretrained one.

    Args:
        workdir: folder of the run; None is the default of `experiments.mnist_lstm`.
        restore: restores a run, as `restore_run` or `restore_row_reader` does.

    Raises:
        UsageError: the pretrained model can't be read.
        RunFilesError, CheckpointError: as in `restore_run`.
    """
    default = Config()
    if workdir is not None:
        return restore(workdir)
    if stored_config(default) is not None:
        return restore(default.workdir)
    run = pretrained()
    print(
        f"model   experiments/pretrained, as there is no run in {default.workdir} (recipe "
        f"{run.config.recipe}, {CORRECT / TOTAL:.2%} of MNIST's test images); train your own: "
        f"python -m experiments.mnist_lstm",
        file=sys.stderr,
        flush=True,
    )
    return run


def pretrained() -> RestoredRun:
    """Return the pretrained model, as if it had been restored from its run.

    Raises:
        UsageError: its file is missing or changed, or the package safetensors is missing.
    """
    check_packages("experiments", "safetensors", what="the pretrained model")
    try:
        content = read_regular_file(FILE, 64 * MIB, follow=True)
    except OSError as error:
        raise UsageError(f"{FILE} can't be read ({error.strerror}); {_INSTEAD}") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UsageError(f"{FILE} was changed: its SHA-256 is not {SHA256}; {_INSTEAD}")
    model = from_config.model(CONFIG)
    # A first answer should not wait until the CPU's kernel is compiled, which takes longer than it.
    model = model.clone(core=model.core.clone(implementation="scan"))
    return RestoredRun(CONFIG, model, from_torch(FILE), STEP)


def is_pretrained(run: RestoredRun) -> bool:
    """Whether this is the pretrained model, not a run."""
    return run.config.workdir == FOLDER


_INSTEAD = (
    "check it out again (git checkout experiments/pretrained), or train a run of your own: "
    "python -m experiments.mnist_lstm"
)
