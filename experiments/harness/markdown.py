"""Tables in Markdown, as the experiments print them and the README shows them."""

from collections.abc import Sequence

from tabulate import tabulate


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table in GitHub's Markdown, which a terminal shows in even columns too.

    Args:
        header: the columns' titles.
        rows: of cells as they are to be shown.
        text_columns: how many columns from the left hold text; those of the others are numbers,
            which go to the right.
    """
    sides = ["left"] * text_columns + ["right"] * (len(header) - text_columns)
    return tabulate(rows, header, tablefmt="pipe", colalign=sides, disable_numparse=True)
