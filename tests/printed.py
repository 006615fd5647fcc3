"""What a command printed or wrote, taken apart."""

import csv


def table_rows(text):
    """Cells of each row of the tables in Markdown in a text, the headers among them."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    return [row for row in rows if not set("".join(row)) <= set("-:")]


def read_csv(path):
    """The rows of a CSV file, each a dict by the header's names."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
