"""Measure what textbooks say about vanishing gradients, on real digits.

    python -m experiments.gradient_flow [--figures runs/gradient_flow] [--part flow] [...]

One layer, vanilla RNN and LSTM, in three parts:

- flow: how much of the gradient of the last step's loss reaches each earlier state, at
  initialisation and after a short training, over 28 rows and over 784 single pixels.
- clipping: what clipping the gradient changes in the training of an RNN, and what it does not.
- memory: test accuracy when blank rows come after the digit, the same training for all.

Writes figures, each with its data as CSV beside it, and prints tables in Markdown. All parts
together take 13 minutes of CPU time, or 11 minutes on 2 cores that do other work too. The
trainings are short, on 4,000 images: five epochs of rows reach 73% to 89% of the test images, and
one epoch of pixels is no better than guessing.

float32 ends at 1e38. Over 784 pixels, the RNN of gain 1.5 becomes NaN in its first train step. The
LSTM of forget bias 3 does not move: the squares of its gradient, 1e22, overflow, and clipping
divides the gradient by an infinite norm. Clipping comes too late for both.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from experiments.gradient_flow.clipping import CLIP_NORM, Trace, trace, watched_descent
from experiments.gradient_flow.flow import Flow, before_and_after
from experiments.gradient_flow.memory import BLANK_ROWS, accuracies
from experiments.gradient_flow.models import all_variants, as_pixels, as_rows, rnns
from experiments.harness import markdown
from experiments.harness.command import command
from experiments.harness.short_training import Recipe
from experiments.harness.study import Figures, read_splits
from experiments.harness.usage import (
    DataFlags,
    check_fills_batch,
    check_numbers,
    check_seeds,
    counted,
    print_status,
    read_flags,
)
from lstm_flax import Keys
from lstm_flax.data import DataError, Split


@dataclasses.dataclass(frozen=True)
class Options(DataFlags):
    """The flags, with their defaults."""

    figures: Path = Path("runs/gradient_flow")
    """Folder for the figures and their data."""
    part: Literal["all", "flow", "clipping", "memory"] = "all"
    """What to measure."""
    images: int = 4000
    """Number of training images: the first ones, or all if there are fewer."""
    test_images: int = 1000
    """Number of test images: the first ones, or all if there are fewer."""
    hidden_size: int = 128
    """Units of the layer."""
    epochs: int = 5
    """Passes over the training images when digits are read row by row."""
    pixel_epochs: int = 1
    """Passes over the training images when digits are read pixel by pixel."""
    batch_size: int = 100
    """Images per train step."""
    learning_rate: float = 2e-3
    """Peak of AdamW's one-cycle learning rate."""
    clipping_steps: int = 100
    """Train steps in the part clipping."""
    clipping_rate: float = 0.3
    """Learning rate of plain gradient descent in the part clipping."""
    probes: int = 64
    """Number of test images whose gradients are followed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings in the part memory."""
    seed: int = 0
    """Seed of the parameters and of the order of images in the other parts."""


@command(DataError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="gradient_flow", description=__doc__)
    check_numbers(options, "seed")
    check_seeds(options.seeds)
    run(options, Figures(options.figures))
    return 0


def run(options: Options, drawn: Figures) -> None:
    """Measure, draw and print each part."""
    from experiments.gradient_flow import figures  # needs matplotlib

    splits = load_splits(options)
    if options.part in ("all", "flow"):
        print_status("part flow: gradients before and after training")
        flows = measure_flow(options, splits)
        figures.draw_flow(
            [flow for flow in flows if not flow.is_trained],
            "At initialisation: how much of the last step's gradient reaches step t",
            drawn.path("gradient_flow.png"),
        )
        figures.draw_flow(
            [flow for flow in flows if flow.is_trained],
            "After training: how much of the last step's gradient reaches step t",
            drawn.path("gradient_flow_trained.png"),
        )
        print(flow_table(flows), flush=True)
    if options.part in ("all", "clipping"):
        print_status("part clipping: training with and without it")
        traces = measure_clipping(options, splits)
        figures.draw_clipping(traces, drawn.path("clipping.png"))
        print(clipping_table(traces), flush=True)
    if options.part in ("all", "memory"):
        print_status(f"part memory: training with {counted(len(options.seeds), 'seed')}")
        found = measure_memory(options, splits)
        figures.draw_memory(found, drawn.path("memory.png"))
        print(memory_table(found), flush=True)
    print(drawn)


def load_splits(options: Options) -> dict[str, Split]:
    """Read the images of both splits.

    Raises:
        DataError: they are not available.
        UsageError: they do not fill a batch.
    """
    _, whole = read_splits(options, options.dataset, "train", "test")
    splits = {
        "train": first(whole["train"], options.images),
        "test": first(whole["test"], options.test_images),
    }
    check_fills_batch(options.batch_size, len(splits["train"].labels))
    return splits


def first(split: Split, count: int) -> Split:
    """Return the first `count` examples."""
    return Split(split.images[:count], split.labels[:count])


def measure_flow(options: Options, splits: dict[str, Split]) -> list[Flow]:
    """Follow the gradient through all variants and both sequences, before and after training."""
    variants = all_variants(options.hidden_size)
    keys = Keys.from_seed(options.seed)
    flows: list[Flow] = []
    with tqdm(total=4 * len(variants), desc="flow", disable=None) as bar:
        for sequence, read, epochs in (
            ("rows", as_rows, options.epochs),
            ("pixels", as_pixels, options.pixel_epochs),
        ):
            datasets = {name: read(split) for name, split in splits.items()}
            probe = read(first(splits["test"], options.probes))
            recipe = Recipe(epochs, options.batch_size, options.learning_rate)
            for flow in before_and_after(variants, sequence, datasets, probe, keys, recipe):
                flows.append(flow)
                bar.update()
    return flows


def measure_clipping(options: Options, splits: dict[str, Split]) -> dict[tuple[str, bool], Trace]:
    """Train an RNN with exploding and one with vanishing gradients, with and without clipping."""
    variants = rnns(options.hidden_size, 1.5, 0.5)
    train_data, probe = as_rows(splits["train"]), as_rows(first(splits["test"], options.probes))
    keys = Keys.from_seed(options.seed)
    traces = {}
    with tqdm(total=2 * len(variants), desc="clipping", disable=None) as bar:
        for clips in (False, True):
            tx = watched_descent(options.clipping_rate, CLIP_NORM if clips else None)
            for variant in variants:
                traces[variant.label, clips] = trace(
                    variant,
                    tx,
                    train_data,
                    probe,
                    keys,
                    steps=options.clipping_steps,
                    batch_size=options.batch_size,
                )
                bar.update()
    return traces


def measure_memory(options: Options, splits: dict[str, Split]) -> dict[int, dict[str, list[float]]]:
    """Return the accuracies of all seeds, by the number of blank rows and the variant's label."""
    variants = all_variants(options.hidden_size)
    recipe = Recipe(options.epochs, options.batch_size, options.learning_rate)
    return {
        blank: accuracies(variants, splits, blank, options.seeds, recipe)
        for blank in tqdm(BLANK_ROWS, desc="memory", disable=None)
    }


def flow_table(flows: Sequence[Flow]) -> str:
    """Return the first step's gradient relative to the last step's, and the accuracies."""
    by_key = {(flow.label, flow.sequence, flow.is_trained): flow for flow in flows}
    moments = [(s, t) for s in ("rows", "pixels") for t in (False, True)]
    header = ["first step's gradient / last step's"]
    header += ["28 rows, at first", "trained", "test accuracy"]
    header += ["784 pixels, at first", "trained", "test accuracy"]
    rows = []
    for label in dict.fromkeys(flow.label for flow in flows):
        for state in by_key[label, "rows", False].norms:
            cells = [f"{label}: {state}"]
            for sequence, is_trained in moments:
                flow = by_key[label, sequence, is_trained]
                cells.append(f"{flow.relative(state)[0]:.1e}")
                if is_trained:
                    cells.append(f"{flow.accuracy:.1%}")
            rows.append(cells)
    return markdown.table(header, rows) + "\n"


def clipping_table(traces: dict[tuple[str, bool], Trace]) -> str:
    """Return the median and largest norm, the last loss and the reach."""
    header = ["", "clipped", "median norm", "largest norm", "mean loss of the last ten steps"]
    header += ["median first step's gradient / last step's"]
    rows = [
        [
            label,
            "yes" if clips else "no",
            f"{np.median(found.norm):.1f}",
            f"{found.norm.max():.1f}",
            f"{found.loss[-10:].mean():.2f}",
            f"{np.median(found.reach):.1e}",
        ]
        for (label, clips), found in traces.items()
    ]
    return markdown.table(header, rows, text_columns=2) + "\n"


def memory_table(found: dict[int, dict[str, list[float]]]) -> str:
    """Return the mean test accuracy, and in brackets the lowest and highest of the seeds."""
    header = ["test accuracy, %", *(f"{blank} blank rows" for blank in found)]
    rows = []
    for label in next(iter(found.values())):
        cells = [
            f"{100 * np.mean(seeds):.1f} ({100 * min(seeds):.1f} to {100 * max(seeds):.1f})"
            for seeds in (by_label[label] for by_label in found.values())
        ]
        rows.append([label, *cells])
    return markdown.table(header, rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
