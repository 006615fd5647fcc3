"""Tables in Markdown, as the experiments print them and the README shows them."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table in GitHub's Markdown, which a terminal shows in even columns too.

    Args:
        header: the columns' titles.
        rows: of cells as they are to be shown.
        text_columns: how many columns from the left hold text; those of the others are numbers,
            which go to the right.
    """
    columns = []
    for k, (title, *cells) in enumerate(zip(header, *rows, strict=True)):
        width = max(3, len(title), *map(len, cells))
        rule, side = ("-" * width, "<") if k < text_columns else ("-" * (width - 1) + ":", ">")
        columns.append([f"{cell:{side}{width}}" for cell in (title, rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
