"""One recipe of the MNIST experiment with several seeds: mean and spread of the test accuracy.

    python -m experiments.accuracy [--recipe best] [--seeds 0 1 2 3 4] [--flags="--epochs 5"]

Each seed is a run of experiments.mnist_lstm in its own workdir. The same command resumes where it
was interrupted, and only evaluates runs that are finished. Each result is that of the last step:
the test set chooses nothing.
"""

import csv
import dataclasses
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import mnist_lstm
from experiments.harness.command import command
from experiments.harness.markdown import table
from experiments.harness.output_files import replacing
from experiments.harness.usage import Folder, UsageError, check_seeds, read_flags
from experiments.training_run import run_files
from experiments.training_run.config import RecipeName


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    workdir: Folder = Path("runs/accuracy")
    """Folder of the runs, RECIPE-seed0 and so on, and of the table of their results."""
    recipe: RecipeName = "best"
    """Recipe, as in experiments.mnist_lstm."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the runs."""
    flags: str = ""
    """Further flags of experiments.mnist_lstm, in one string: --flags="--epochs 5"."""


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Train with each seed and print the results; returns the exit status."""
    options = read_flags(Options, argv, name="accuracy", description=__doc__)
    check_seeds(options.seeds)
    evaluations = []
    try:
        flags_of_all = shlex.split(options.flags)
    except ValueError as error:  # a quote that is not closed
        raise UsageError(f"--flags can't be read ({error}): {options.flags}") from error
    for seed in options.seeds:
        workdir = options.workdir / f"{options.recipe}-seed{seed}"
        print(f"== seed {seed}", flush=True)
        flags = ["--workdir", str(workdir), "--recipe", options.recipe, "--seed", str(seed)]
        if status := mnist_lstm.main([*flags, *flags_of_all]):
            return status
        evaluation = run_files.read_json(run_files.eval_path(workdir))
        evaluations.append({"seed": seed} | evaluation)
    path = options.workdir / f"{options.recipe}.csv"
    with replacing(path) as table_file, table_file.open("w", newline="") as file:
        writer = csv.DictWriter(file, evaluations[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(evaluations)
    print(f"\n{summary(evaluations)}\n\nwritten to {path}")
    return 0


def summary(evaluations: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown: a row per seed, then mean and sample standard deviation."""
    rows = [
        [str(e["seed"]), f"{e['correct']:,} of {e['total']:,}", f"{e['test_accuracy']:.2%}"]
        for e in evaluations
    ]
    accuracies = 100 * np.array([e["test_accuracy"] for e in evaluations])
    # As many digits as the test set resolves: 0.1 % if it has 1,000 images.
    digits = max(0, math.ceil(math.log10(evaluations[0]["total"])) - 2)
    spread = f" ± {accuracies.std(ddof=1):.{digits}f}" if len(accuracies) > 1 else ""
    rows.append(["mean ± standard deviation", "", f"{accuracies.mean():.{digits}f}{spread} %"])
    return table(["seed", "correct", "test accuracy"], rows)


if __name__ == "__main__":
    sys.exit(main())
