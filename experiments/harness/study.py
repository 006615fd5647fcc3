"""What experiments share that look into digits and draw what they find: the data, the figures."""

from pathlib import Path

from experiments.harness.usage import DataPlaces, check_packages, make_folder, printable
from lstm_flax import data
from lstm_flax.data import Split


def read_splits(places: DataPlaces, dataset: str, *splits: str) -> tuple[str, dict[str, Split]]:
    """Read splits of a dataset, by their names; returns the dataset's own name too.

    Raises:
        DataError: they can't be had.
    """
    builder = data.prepare(dataset, places.data_dir, places.manual_dir)
    return builder.name, {split: data.read_split(builder, split) for split in splits}


class Figures:
    """The figures of an experiment, in one folder, each with its data beside it as CSV."""

    def __init__(self, folder: Path):
        """Make the folder.

        Raises:
            UsageError: it can't be made, or matplotlib is missing.
        """
        check_packages("figures", "matplotlib")
        self.folder = make_folder(folder, "figures")
        self._drawn: list[str] = []

    def path(self, name: str) -> Path:
        """Where to draw a figure, such as gates.png."""
        self._drawn.append(name)
        return self.folder / name

    def __str__(self) -> str:
        """Say which were drawn, and where."""
        names = ", ".join(self._drawn)
        return f"figures in {printable(self.folder)}: {names}; each with its data as .csv"
