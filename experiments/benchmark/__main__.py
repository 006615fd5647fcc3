"""Compare LSTM implementations on the same work.

    python -m experiments.benchmark [--quick] [--json FILE] [--plot FILE.png]
    python -m experiments.benchmark --job [--manual-dir FOLDER]
    python -m experiments.benchmark --tpu v5e

Prints tables in Markdown. The figure that counts is how many times as fast as each peer this
project is: the median over rounds, in each of which all peers have a turn, and its quartiles.
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from experiments.benchmark import job as jobs
from experiments.benchmark import report, tpu
from experiments.benchmark.cases import QUICK, STAR, Case, parse_cases
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
    """Whom to compare with; this project is always there."""
    implementations: tuple[str, ...] = ()
    """Of this project, by name, each as a peer too; without them it chooses one by itself."""
    cases: tuple[str, ...] = ()
    """Sizes as they differ from the centre, such as batch=1 hidden=64,layers=3, or the groups
    latency, vmap, busy and grid; none: the group star."""
    modes: tuple[Mode, ...] = MODES
    """What to time of each case."""
    quick: bool = False
    """Three cases of the star."""
    rounds: int = 7
    """Turns of each peer, for each case and mode."""
    seconds: float = 0.5
    """How long a turn takes, about, in seconds; at least one call."""
    memory: bool = True
    """Measure memory too, in a fresh process for each figure."""
    job: bool = False
    """Run whole jobs instead: start, one epoch, time to 99% of the test images."""
    job_rounds: int = 3
    """With --job: epochs of each side, in turn; from the second on it is compiled already."""
    dataset: DatasetName = "auto"
    """With --job: what to learn, as for experiments.mnist_lstm."""
    data_dir: Path | None = None
    """With --job: tfds's folder; None is tfds's own default."""
    manual_dir: Path | None = None
    """With --job: folder with the four original IDX .gz files, in place of a download."""
    recipe: str = ""
    """With --job: flags of experiments.mnist_lstm on its way to 99%: --recipe="--epochs 5"."""
    max_epochs: int = 20
    """With --job: epochs of the reference on its way to 99%, at most."""
    tpu: Literal["v5e", "v6e"] | None = None
    """Compile the layers for such a TPU instead, which need not be there; needs libtpu."""
    json: Path | None = None
    """Write every raw timing and the environment to this file."""
    plot: Path | None = None
    """Draw the ratios into this file, such as ratios.png; needs matplotlib."""


@command(jobs.JobError, PeerError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="benchmark", description=__doc__)
    check(options)
    if options.tpu:
        print(tpu.tables(options.tpu))
    else:
        run_job(options) if options.job else run_cases(options)
    return 0


def check(options: Options) -> None:
    """Refuse at once what would be wrong only after all is measured.

    Raises:
        UsageError: a flag's value can't be used.
    """
    check_numbers(options)
    if unknown := [peer for peer in options.peers if peer not in PEERS]:
        raise UsageError(f"--peers: {unknown[0]!r} is none of {', '.join(PEERS)}")
    if options.quick and options.cases:
        raise UsageError("--quick and --cases both say which cases; give one of them")
    if options.plot:
        check_packages("benchmark", "matplotlib", what="--plot")
    for path in (options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent} for {path.name}")


def chosen_cases(options: Options) -> list[Case]:
    """The cases that the flags ask for.

    Raises:
        UsageError: one can't be read.
    """
    if options.quick:
        return QUICK
    try:
        return [case for text in options.cases for case in parse_cases(text)] or STAR
    except ValueError as error:
        raise UsageError(f"--cases: {error}") from error


def chosen_peers(options: Options) -> list[str]:
    """The peers that the flags ask for, this project first."""
    implementations = [f"{OURS}:{name}" for name in options.implementations]
    return list(dict.fromkeys([OURS, *implementations, *options.peers]))


def run_cases(options: Options) -> None:
    """Measure, print, write and draw."""
    cases, peers = chosen_cases(options), chosen_peers(options)
    settings = Settings(options.rounds, options.seconds, options.memory, options.modes)
    print_status(f"measuring {counted(len(cases), 'case')} with {counted(len(peers), 'peer')}")
    with tqdm(total=len(cases) * len(options.modes), unit=" cases", disable=None) as bar:

        def advance(done: str) -> None:
            bar.set_postfix_str(done, refresh=False)
            bar.update()

        results = measure(peers, cases, settings, advance)
    print(report.tables(results, peers))
    write_json(options, report.as_values(results))
    if options.plot:
        report.plot(results, options.plot)


def run_job(options: Options) -> None:
    """Run whole jobs, print and write."""
    with_torch = importlib.util.find_spec("torch") is not None
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare_job(options, Path(scratch))
        turns = jobs.turns(job, with_torch)
        print_status(f"running {counted(turns, 'job')}")
        with tqdm(total=turns, unit=" runs", disable=None) as bar:

            def advance(done: str) -> None:
                bar.set_postfix_str(done, refresh=False)
                bar.update()

            results = jobs.run(job, with_torch, advance)
    print(jobs.job_table(results, job))
    if not with_torch:
        print("- torch: not installed: pip install torch")
    values = {
        side: {
            "starts": [start._asdict() for start in result["starts"]],
            "reached": result["reached"]._asdict(),
        }
        for side, result in results.items()
    }
    write_json(options, {"job": values})


def prepare_job(options: Options, scratch: Path) -> jobs.Job:
    """Prepare the data for both sides, which is no part of what is timed.

    Raises:
        UsageError: the data can't be had.
    """
    from lstm_flax import data  # takes seconds to import

    try:
        builder = data.prepare(options.dataset, options.data_dir, options.manual_dir)
        splits = {name: data.read_split(builder, name) for name in ("train", "test")}
    except data.DataError as error:
        raise UsageError(str(error)) from error
    folder = scratch / "idx"
    folder.mkdir()
    jobs.write_idx(folder, {"train": splits["train"], "t10k": splits["test"]})
    return jobs.Job(
        builder.name,
        options.data_dir,
        folder,
        scratch,
        options.job_rounds,
        options.max_epochs,
        options.recipe,
    )


def write_json(options: Options, values: dict[str, Any]) -> None:
    """Write what was measured, where and how, if that was asked for."""
    if options.json:
        flags = dataclasses.asdict(options)
        # Folders are the machine's own affair.
        settings = {name: value for name, value in flags.items() if not isinstance(value, Path)}
        everything = {"environment": report.environment(), "settings": settings, **values}
        with replacing(options.json) as file:
            file.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
