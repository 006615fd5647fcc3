"""Render the report as one self-contained HTML page; needs Jinja2 and matplotlib."""

import itertools
import statistics
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import numpy as np

from experiments.harness.usage import counted
from experiments.report import figures
from experiments.report.gather import Result, RunData, Score, differing_flags
from experiments.training_run.console import accuracy_interval

MISTAKES = 12
"""Number of mistakes shown for a run."""

STRONGEST_TINT = 80
"""Strongest tint of a cell of a confusion matrix, in %."""


class Mistake(NamedTuple):
    """A test image that is classified wrongly."""

    uri: str
    image: int  # its index
    label: int
    answer: int
    probability: float


class Cell(NamedTuple):
    """A cell of a confusion matrix."""

    images: int
    kind: str  # "right", "wrong" or "zero"
    tint: int  # strength of its colour, in %


class Environment(NamedTuple):
    """The software and machine that trained a run: one column for each change."""

    steps: list[Any]  # the first step of each column
    times: list[str]
    rows: dict[str, list[str]]  # by name, one value for each column


class RunView(NamedTuple):
    """A run, as the page shows it."""

    number: int  # from 1
    name: str
    run: RunData
    colours: dict[str, str]  # on a light and on a dark page
    accuracy: str
    speed: float | None  # images a second, median epoch
    confusion: list[list[Cell]]
    mistakes: list[Mistake]
    environment: Environment | None


def render(runs: Sequence[RunData]) -> str:
    """Return the page about some runs."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "grouped": "{:,.0f}".format, "counted": counted}
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = environment.from_string(page)
    records = [run.records for run in runs]
    differing, common = differing_flags(runs)
    return template.render(
        shown=[show(k, *each) for k, each in enumerate(zip(names(runs), runs, strict=True), 1)],
        inks=figures.INKS,
        comparison=figures.draw_comparison(records),
        throughput=figures.draw_throughput(records),
        differing=differing,
        common=common,
        datasets=list(dict.fromkeys(run.config.dataset for run in runs)),
    )


def show(number: int, name: str, run: RunData) -> RunView:
    """Prepare what the page shows about a run."""
    speeds = [record["images_per_second"] for record in run.records]
    return RunView(
        number=number,
        name=name,
        run=run,
        colours={page: figures.colour(number - 1, ink) for page, ink in figures.INKS.items()},
        accuracy=accuracy(run.score),
        speed=statistics.median(speeds) if speeds else None,
        confusion=cells(run.result.confusion) if run.result else [],
        mistakes=shown_mistakes(run.result) if run.result else [],
        environment=environment_table(run.starts) if run.starts else None,
    )


def names(runs: Sequence[RunData]) -> list[str]:
    """Return a name for each run: that of its folder, or its whole path if two share that."""
    short = [run.workdir.resolve().name for run in runs]
    return [
        name if short.count(name) == 1 else str(run.workdir)
        for name, run in zip(short, runs, strict=True)
    ]


def accuracy(score: Score | None) -> str:
    """Format a test accuracy, with its interval if the number of images is known."""
    if score is None:
        return "–"
    unchecked = "" if score.is_measured else ", as recorded, not checked"
    if score.correct is None or score.total is None:
        return f"{score.accuracy:.2%}{unchecked}"
    low, high = accuracy_interval(score.correct, score.total)
    return f"{score.accuracy:.2%} ({low:.2%} to {high:.2%}){unchecked}"


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def cells(confusion: np.ndarray) -> list[list[Cell]]:
    """Return the cells of a confusion matrix [classes, classes], tinted by their share."""
    is_right = np.eye(len(confusion), dtype=bool)
    most = np.where(is_right, confusion[is_right].max(), confusion[~is_right].max(initial=0))
    # The square root keeps a single image among many visible.
    tints = np.round(STRONGEST_TINT * np.sqrt(confusion / np.maximum(most, 1))).astype(int)
    kinds = np.where(is_right, "right", np.where(confusion, "wrong", "zero"))
    rows = zip(confusion.tolist(), kinds.tolist(), tints.tolist(), strict=True)
    return [[Cell(*cell) for cell in zip(*row, strict=True)] for row in rows]


def shown_mistakes(result: Result) -> list[Mistake]:
    """Return the most confident mistakes."""
    mistakes = zip(*result.mistakes.first(MISTAKES), strict=True)
    return [
        Mistake(figures.image_uri(result.images[index]), index, label, answer, probability)
        for index, label, answer, probability, _ in mistakes
    ]


def environment_table(starts: Sequence[dict[str, Any]]) -> Environment:
    """Return a table with one column for consecutive starts in the same environment."""
    columns = [(kind, list(group)) for kind, group in itertools.groupby(starts, key=facts)]
    kinds = [kind for kind, _ in columns]
    facts_found = dict.fromkeys(name for kind in kinds for name in kind)
    times = []
    for _, group in columns:
        again = f", and {len(group) - 1} more" if len(group) > 1 else ""
        times.append(f"{group[0].get('time', '–')}{again}")
    return Environment(
        steps=[group[0].get("step", "–") for _, group in columns],
        times=times,
        rows={name: [kind.get(name, "–") for kind in kinds] for name in facts_found},
    )


def facts(start: dict[str, Any]) -> dict[str, str]:
    """Return a line of environment.jsonl as one flat dict, without its step and time."""
    found: dict[str, str] = {}
    for name, value in start.items():
        if isinstance(value, dict):
            found |= {inner: str(of or "not installed") for inner, of in value.items()}
        elif name not in ("step", "time"):
            found[name] = str(value)
    return found
