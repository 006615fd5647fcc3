"""Report on trained runs, side by side, on one self-contained HTML page.

    python -m experiments.report runs/mnist_lstm [WORKDIR ...] [--output report.html] [...]

The page shows the accuracies, the curves, the speed and the flags that differ. For each run it
shows the confusion matrix, the most confident mistakes, and the software and machine that trained
it. It needs no network. A run may still be training, or its data may be unavailable: the page then
shows what there is, and a line says what is missing.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.harness.command import command
from experiments.harness.output_files import replacing
from experiments.harness.usage import (
    DataPlaces,
    Folder,
    UsageError,
    check_packages,
    printable,
    read_flags,
)
from experiments.report.gather import gather, read_test_sets
from experiments.training_run.restored import read_config
from experiments.training_run.run_files import RunFilesError, report_path, writing


@dataclasses.dataclass(frozen=True)
class Options(DataPlaces):
    """The flags, with their defaults."""

    workdirs: tyro.conf.Positional[tuple[Folder, ...]]
    """Folders of the runs; these may still be training, and are not disturbed."""
    output: Path | None = None
    """Path of the page; None is report.html in the first workdir."""


@command(RunFilesError)
def main(argv: Sequence[str] | None = None) -> int:
    """Write a report from a command line and return the exit status."""
    options = read_flags(Options, argv, name="report", description=__doc__)
    check(options)
    run(options)
    return 0


def check(options: Options) -> None:
    """Check the options before the runs are read, which takes long.

    Raises:
        UsageError: no workdir is given, or a package is missing.
    """
    if not options.workdirs:
        raise UsageError("pass the workdir of a run, as in: python -m experiments.report WORKDIR")
    check_packages("report", "jinja2", "matplotlib")


def run(options: Options) -> None:
    """Gather what is known about each run, and write the page."""
    from experiments.report import page  # needs Jinja2 and matplotlib

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
            # The page may hold a name that can't be encoded.
            new.write_text(page.render(runs), encoding="utf-8", errors="replace")
    for run in runs:
        for line in run.missing:
            print(f"missing  {printable(run.workdir)}: {printable(line)}")
    print(f"report   {printable(path)}")


if __name__ == "__main__":
    sys.exit(main())
