"""Report trained runs, side by side, on one HTML page that holds all it shows.

    python -m experiments.report runs/mnist_lstm [WORKDIR ...] [--output report.html] [...]

The page has the accuracies, the curves, the speed, what differs between the runs' flags, and of
each run the confusion matrix, the most confident mistakes, and what it was trained with and on. It
needs no network. A run that is training still, or whose data can't be had, is reported as far as it
goes, and a line says what is missing.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.harness.command import command
from experiments.harness.output_files import replacing
from experiments.harness.usage import DataPlaces, UsageError, check_packages, printable, read_flags
from experiments.report.gather import gather, read_test_sets
from experiments.training_run.restored import read_config
from experiments.training_run.run_files import RunFilesError, report_path, writing


@dataclasses.dataclass(frozen=True)
class Options(DataPlaces):
    """The flags, with their defaults."""

    workdirs: tyro.conf.Positional[tuple[Path, ...]]
    """Where the runs live; they may be training still, and go on undisturbed."""
    output: Path | None = None
    """The page; None is report.html in the first workdir."""


@command(RunFilesError)
def main(argv: Sequence[str] | None = None) -> int:
    """Write a report from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="report", description=__doc__)
    check(options)
    run(options)
    return 0


def check(options: Options) -> None:
    """Refuse at once what would be wrong only after the runs are read.

    Raises:
        UsageError: no workdir is named, or a package is missing.
    """
    if not options.workdirs:
        raise UsageError("name the workdir of a run, as in: python -m experiments.report WORKDIR")
    check_packages("report", "jinja2", "matplotlib")


def run(options: Options) -> None:
    """Gather what there is of each run, and write the page."""
    from experiments.report import page  # it needs Jinja2 and matplotlib

    datasets = [read_config(workdir).dataset for workdir in options.workdirs]
    print(f"data     the test images of {', '.join(dict.fromkeys(datasets))}", flush=True)
    test_sets = read_test_sets(datasets, options.data_dir, options.manual_dir)
    runs = []
    for workdir in options.workdirs:
        print(f"reading  them with {printable(workdir)}", flush=True)
        runs.append(gather(workdir, test_sets))
    path = options.output or report_path(options.workdirs[0])
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            # A name that no encoding has may be on the page.
            new.write_text(page.render(runs), encoding="utf-8", errors="replace")
    for run in runs:
        for line in run.missing:
            print(f"missing  {printable(run.workdir)}: {printable(line)}")
    print(f"report   {printable(path)}")


if __name__ == "__main__":
    sys.exit(main())
