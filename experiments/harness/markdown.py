"""Tables in Markdown, as the experiments print them and the README shows them."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a table in GitHub's Markdown, whose columns are aligned in a terminal too.

    Args:
        header: the columns' titles.
        rows: the cells of each row, formatted.
        text_columns: how many columns, from the left, hold text; the others hold numbers and are
            aligned to the right.
    """
    columns = []
    for k, (title, *cells) in enumerate(zip(header, *rows, strict=True)):
        width = max(3, len(title), *map(len, cells))
        rule, side = ("-" * width, "<") if k < text_columns else ("-" * (width - 1) + ":", ">")
        columns.append([f"{cell:{side}{width}}" for cell in (title, rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
