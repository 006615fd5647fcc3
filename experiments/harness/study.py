"""Data and figures of the experiments that examine digits and draw what they find."""

from pathlib import Path

from experiments.harness.usage import DataPlaces, check_packages, make_folder, printable
from lstm_flax import data
from lstm_flax.data import Split


def read_splits(places: DataPlaces, dataset: str, *splits: str) -> tuple[str, dict[str, Split]]:
    """Read splits of a dataset by name, and return the name of the dataset and the splits.

    Raises:
        DataError: the dataset can't be prepared or read.
    """
    builder = data.prepare(dataset, places.data_dir, places.manual_dir)
    return builder.name, {split: data.read_split(builder, split) for split in splits}


class Figures:
    """The figures of an experiment in one folder, each with its data beside it as CSV."""

    def __init__(self, folder: Path):
        """Create the folder.

        Raises:
            UsageError: the folder can't be created, or matplotlib is missing.
        """
        check_packages("figures", "matplotlib")
        self.folder = make_folder(folder, "figures")
        self._drawn: list[str] = []

    def path(self, name: str) -> Path:
        """Return where to save a figure, such as gates.png."""
        self._drawn.append(name)
        return self.folder / name

    def __str__(self) -> str:
        """Return which figures were drawn, and where."""
        names = ", ".join(self._drawn)
        return f"figures in {printable(self.folder)}: {names}; each with its data as .csv"
