"""Export a trained run as one file that other programs run.

    python -m experiments.export --workdir runs/mnist_lstm --format onnx digits.onnx

The formats are `stablehlo`, a program for CPUs, CUDA and TPUs that needs JAX alone; `onnx`, for
ONNX Runtime and others; and `safetensors`, the weights in PyTorch's names. The command computes the
whole test set with the new file, and writes nothing unless the file reads as many images correctly
as the run does. Beside the file it writes a model card, `digits.onnx.md`.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from experiments.export.reading import ExportError, read_export
from experiments.harness.command import command
from experiments.harness.output_files import replacing
from experiments.harness.usage import (
    DataPlaces,
    Folder,
    UsageError,
    check_packages,
    print_status,
    printable,
    read_flags,
)
from experiments.training_run.run_files import RunFilesError, writing
from lstm_flax import data
from lstm_flax.checkpoints import CheckpointError
from lstm_flax.data import DataError

PACKAGES = {
    "stablehlo": ("flatbuffers",),
    "onnx": ("onnx", "onnxruntime"),
    "safetensors": ("safetensors",),
}


@dataclasses.dataclass(frozen=True)
class Options(DataPlaces):
    """The flags, with their defaults."""

    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Path of the file; the model card gets `.md` behind it."""
    format: Literal["stablehlo", "onnx", "safetensors"]
    """Format of the file."""
    workdir: Folder = Path("runs/mnist_lstm")
    """Where the trained run lives."""
    float32: bool = False
    """Export float32 products, whatever --precision the run has."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in safetensors; bfloat16 rounds them, and the file is half as large."""


@command(CheckpointError, DataError, ExportError, RunFilesError)
def main(argv: Sequence[str] | None = None) -> int:
    """Export from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="export", description=__doc__)
    if options.dtype != "float32" and options.format != "safetensors":
        raise UsageError(f"--dtype {options.dtype} is for --format safetensors alone")
    check_packages("export", *PACKAGES[options.format], what=f"--format {options.format}")
    run(options)
    return 0


def run(options: Options) -> None:
    """Write the export and its card; nothing, unless the export reads as well as the run."""
    from experiments.export.card import Exported, Score, card
    from experiments.export.writing import to_bytes, with_float32
    from experiments.training_run.restored import classify, restore_run

    original = restore_run(options.workdir)
    trained = with_float32(original) if options.float32 else original
    content = to_bytes(trained, options.format, options.dtype)
    with writing(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
    name, dataset = options.output.name, trained.config.dataset
    builder = data.prepare(dataset, options.data_dir, options.manual_dir)
    test = data.read_split(builder, "test")
    print_status(f"reading {len(test.images):,} test images with the run and with the export")
    expected = count_correct(classify(trained, test.images), test.labels)
    page = options.output.with_name(f"{name}.md")
    with writing(options.output), replacing(options.output) as new:
        new.write_bytes(content)
        correct = count_correct(read_export(new).logits(test.images), test.labels)
        # The export scans, the run may have used a kernel: in bfloat16 their roundings differ.
        is_exact = trained.config.precision == options.dtype == "float32"
        may_differ = 0 if is_exact else len(test.labels) // 1000
        if abs(correct - expected) > may_differ:
            raise ExportError(
                f"the export reads {correct:,} test images correctly, the run {expected:,}; "
                f"nothing was written"
            )
        file = Exported(
            name,
            options.format,
            options.dtype,
            trained.config.precision,
            hashlib.sha256(content).hexdigest(),
            Score(correct, len(test.labels)),
            expected,
        )
        with replacing(page) as new_page:
            new_page.write_text(card(file, original), "utf-8", errors="replace")
    print(f"run      {expected:,} of {len(test.labels):,} test images of {dataset} are read")
    print(f"export   {file.score}")
    print(f"SHA-256  {file.sha256}")
    print(f"file     {printable(options.output)}, {len(content):,} bytes")
    print(f"card     {printable(page)}")


def count_correct(scores: np.ndarray, labels: np.ndarray) -> int:
    """Return for how many images the best score [n, classes] is that of the label [n]."""
    return int((scores.argmax(-1) == labels).sum())


if __name__ == "__main__":
    sys.exit(main())
