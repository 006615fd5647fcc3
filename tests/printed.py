"""What a command printed, taken apart."""


def table_rows(text):
    """Cells of each row of the tables in Markdown in a text, the headers among them."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    return [row for row in rows if not set("".join(row)) <= set("-:")]
