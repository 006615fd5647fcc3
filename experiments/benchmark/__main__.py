"""Compare LSTM implementations on the same work.

    python -m experiments.benchmark [--quick] [--json FILE] [--plot FILE.png]
    python -m experiments.benchmark --job [--manual-dir FOLDER]
    python -m experiments.benchmark --tpu v5e

Prints tables in Markdown. The number that counts is how many times as fast as each peer this
project is: the median over rounds and its quartiles. In a round all peers take turns.
"""

import contextlib
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from experiments.benchmark import job as jobs
from experiments.benchmark import report
from experiments.benchmark.cases import GROUPS, QUICK, Case, parse_cases
from experiments.benchmark.measure import MODES, Mode, PeerError, Settings, measure
from experiments.benchmark.peers import OURS, PEERS
from experiments.harness.command import command
from experiments.harness.output_files import replacing
from experiments.harness.usage import (
    DatasetName,
    UsageError,
    check_numbers,
    check_packages,
    counted,
    print_status,
    read_flags,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    peers: tuple[str, ...] = tuple(PEERS)
    """Implementations to compare with; this project always takes part."""
    implementations: tuple[str, ...] = ()
    """Implementations of this project to add as peers, such as scan; without them it chooses."""
    cases: tuple[str, ...] = ()
    """Sizes by their differences from the centre, such as batch=1 hidden=64,layers=3, or the groups
    latency, vmap, busy and grid; default: the group star."""
    modes: tuple[Mode, ...] = MODES
    """What to time of each case."""
    quick: bool = False
    """Measure only three cases of the star."""
    rounds: int = 7
    """Turns of each peer, for each case and mode."""
    seconds: float = 0.5
    """Approximate length of a turn, in seconds; at least one call."""
    memory: bool = True
    """Measure memory too, each time in a fresh process."""
    job: bool = False
    """Run whole jobs instead: start, one epoch, time to 99% and 99.5% of the test images."""
    job_rounds: int = 3
    """With --job: epochs of each side, in turns; only the first one compiles."""
    dataset: DatasetName = "auto"
    """With --job: dataset to train on, as for experiments.mnist_lstm."""
    data_dir: Path | None = None
    """With --job: folder of tfds's datasets; None is tfds's own default."""
    manual_dir: Path | None = None
    """With --job: folder with the four original IDX .gz files, used instead of a download."""
    flags: str = ""
    """With --job: flags of experiments.mnist_lstm on the way to 99%: --flags="--seed 1"."""
    tpu: Literal["v5e", "v6e"] | None = None
    """Compile the layers for this TPU instead, which need not be there; needs libtpu."""
    json: Path | None = None
    """Write every raw timing and the environment to this file."""
    plot: Path | None = None
    """Draw the ratios into this file, such as ratios.png; needs matplotlib."""


@command(jobs.JobError, PeerError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="benchmark", description=__doc__)
    cases = check(options)
    if options.tpu:
        from experiments.benchmark import tpu  # imports JAX and the layers

        print(tpu.tables(options.tpu))
    elif options.job:
        run_job(options)
    else:
        run_cases(options, cases)
    return 0


def check(options: Options) -> list[Case]:
    """Check the flags before anything is measured; returns the cases that they name.

    Raises:
        UsageError: a flag's value can't be used.
    """
    check_numbers(options)
    if unknown := [peer for peer in options.peers if peer not in PEERS]:
        raise UsageError(f"--peers: {unknown[0]!r} is none of {', '.join(PEERS)}")
    if options.quick and options.cases:
        raise UsageError("--quick and --cases both choose the cases; pass only one of them")
    if options.plot:
        check_packages("benchmark", "matplotlib", what="--plot")
    for path in (options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent} for {path.name}")
    try:
        cases = [case for text in options.cases for case in parse_cases(text)]
    except ValueError as error:
        raise UsageError(f"--cases: {error}") from error
    return QUICK if options.quick else cases or GROUPS["star"]


def run_cases(options: Options, cases: Sequence[Case]) -> None:
    """Measure all peers on all cases; print, write and draw the results."""
    implementations = [f"{OURS}:{name}" for name in options.implementations]
    peers = list(dict.fromkeys([OURS, *implementations, *options.peers]))
    settings = Settings(options.rounds, options.seconds, options.memory, options.modes)
    print_status(f"measuring {counted(len(cases), 'case')} with {counted(len(peers), 'peer')}")
    with progress_bar(len(cases) * len(options.modes), " cases") as advance:
        results = measure(peers, cases, settings, advance)
    print(report.tables(results, peers))
    write_json(options, report.as_values(results))
    if options.plot:
        report.plot(results, options.plot)


def run_job(options: Options) -> None:
    """Run whole jobs; print and write the results. Preparing the data is not timed.

    Raises:
        UsageError: the data can't be prepared.
    """
    from lstm_flax import data  # takes seconds to import

    has_torch = importlib.util.find_spec("torch") is not None
    sides = list(jobs.READY) if has_torch else [OURS]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        try:
            builder = data.prepare(options.dataset, options.data_dir, options.manual_dir)
            splits = {"train": "train", "t10k": "test"}
            jobs.write_idx(scratch, {n: data.read_split(builder, s) for n, s in splits.items()})
        except data.DataError as error:
            raise UsageError(str(error)) from error
        job = jobs.Job(
            builder.name, options.data_dir, scratch, scratch, options.job_rounds, options.flags
        )
        runs = jobs.count_runs(job, sides)
        print_status(f"running {counted(runs, 'job')}")
        with progress_bar(runs, " runs") as advance:
            results = jobs.run(job, sides, advance)
    print(f"{jobs.start_table(results, job)}\n\n{jobs.way_table(results, job)}")
    if not has_torch:
        print("- torch: not installed: pip install torch")
    values = {
        kind: {name: [timing._asdict() for timing in timings] for name, timings in of.items()}
        for kind, of in results.items()
    }
    write_json(options, {"job": values})


@contextlib.contextmanager
def progress_bar(total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Show a progress bar, and hand out the function that advances it and says what was done."""
    with tqdm(total=total, unit=unit, disable=None) as bar:

        def advance(done: str) -> None:
            bar.set_postfix_str(done, refresh=False)
            bar.update()

        yield advance


def write_json(options: Options, values: dict[str, Any]) -> None:
    """Write what was measured, on which machine and with which flags, to `--json` if given."""
    if options.json:
        flags = dataclasses.asdict(options)
        # Folders are the machine's own affair.
        settings = {name: value for name, value in flags.items() if not isinstance(value, Path)}
        everything = {"environment": report.environment(), "settings": settings, **values}
        with replacing(options.json) as file:
            file.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
