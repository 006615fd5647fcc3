"""The model card: what a file holds, how well it reads, how to load it."""

import json
import shlex
from collections.abc import Callable
from typing import NamedTuple

from scipy.stats import binomtest

from experiments.export.writing import PLATFORMS, Dtype, Format
from experiments.harness.markdown import table
from experiments.harness.usage import counted, printable
from experiments.training_run.config import RECIPES, Config, hyperparameters
from experiments.training_run.from_config import count_parameters
from experiments.training_run.restored import RestoredRun
from experiments.training_run.run_files import params_sha256
from lstm_flax.models.onnx_weights import IR_VERSION, OPSET
from lstm_flax.sequences import PERMUTATION_SEED


class Score(NamedTuple):
    """How many of the test images the file reads correctly."""

    correct: int
    total: int

    def __str__(self) -> str:
        low, high = binomtest(self.correct, self.total).proportion_ci(method="wilson")
        return (
            f"{self.correct / self.total:.2%}: {self.correct:,} of {self.total:,} test images, "
            f"95% interval {low:.2%} to {high:.2%} (Wilson)"
        )


class Exported(NamedTuple):
    """A file of a run, and what was found out about it."""

    name: str
    format: Format
    dtype: Dtype  # of its weights
    precision: str  # of the products that it was tested with
    sha256: str  # in hexadecimal
    score: Score
    run_correct: int  # test images that the run itself reads correctly, with those products


def card(file: Exported, run: RestoredRun) -> str:
    """Return a page of Markdown about an export of a run, as the run was trained."""
    config = run.config
    images = "`images`, uint8 [batch, 28, 28]: one digit each, 0 is paper and 255 is ink"
    facts = {
        "stablehlo": [
            ("format", f"StableHLO of `jax.export`, for {', '.join(PLATFORMS)}, for any batch"),
            ("takes", images),
            ("gives", "logits, float32 [batch, 10]"),
        ],
        "onnx": [
            ("format", f"ONNX, opset {OPSET}, IR version {IR_VERSION}, ONNX's own operators"),
            ("takes", images),
            ("gives", "`logits`, float32 [batch, 10]"),
        ],
        "safetensors": [
            (
                "format",
                "safetensors, in PyTorch's names: `rnn.` of `nn.LSTM`, `lin.` of `nn.Linear`",
            ),
            ("takes", f"sequences, float32 [batch, {steps_of(run)}], of ink from 0 to 1"),
            ("gives", "logits, float32 [batch, 10]"),
        ],
    }[file.format]
    facts += [
        (
            "model",
            f"{counted(config.num_layers, 'LSTM layer')} of {config.hidden_size} units, "
            f"{count_parameters(config):,} parameters",
        ),
        ("precision of the products", file.precision),
        ("weights", weights(file)),
        ("trained and tested on", config.dataset),
        ("accuracy of this file", str(file.score)),
        ("SHA-256 of this file", f"`{file.sha256}`"),
        ("SHA-256 of the run's parameters", f"`{params_sha256(run.params)}`"),
        (
            "training",
            f"recipe {config.recipe}, {counted(config.epochs, 'epoch')}, seed {config.seed}, "
            f"{config.precision} products, checkpoint of step {run.step:,}",
        ),
    ]
    return f"""# {printable(file.name)}

An LSTM that reads a digit {UNITS[config.sequence]}, trained with lstm_flax.

{table(("property", "value"), facts, text_columns=2)}

It has learnt from digits that are scaled and centred as in {config.dataset}. `experiments.predict`
scales and centres pictures so before it reads them:

```bash
python -m experiments.predict --model {printable(file.name)} picture.png
```

## Load it

```bash
pip install {PACKAGES[file.format]}
```

```python
{LOADERS[file.format](file.name, run)}
```

## Make it again

```bash
python -m experiments.mnist_lstm {shlex.join(training_flags(config))} --workdir runs/again
python -m experiments.export --workdir runs/again {shlex.join(export_flags(file, config))}
```

The same machine and versions give the same file; others round differently.
"""


def weights(file: Exported) -> str:
    """Return how a file holds the weights, and what their rounding costs."""
    if file.dtype == "float32":
        return "float32"
    return (
        f"rounded to {file.dtype}; in float32 they read {file.run_correct:,} of "
        f"{file.score.total:,} test images correctly"
    )


def training_flags(config: Config) -> list[str]:
    """Return the flags that train a run like this one: the recipe, and what differs from it."""
    of_recipe = hyperparameters(Config(recipe=config.recipe, **RECIPES[config.recipe]))
    flags = ["--recipe", config.recipe]
    for name, value in hyperparameters(config).items():
        if value != of_recipe[name]:
            flag = name.replace("_", "-")
            match value:
                case bool():
                    flags += [f"--{flag}" if value else f"--no-{flag}"]
                case _:
                    flags += [f"--{flag}", str(value)]
    return flags


def export_flags(file: Exported, config: Config) -> list[str]:
    """Return the flags that write a file like this one."""
    flags = ["--format", file.format]
    if file.precision != config.precision:
        flags += ["--float32"]
    if file.dtype != "float32":
        flags += ["--dtype", file.dtype]
    return [*flags, printable(file.name)]


UNITS = {
    "rows": "row by row",
    "pixels": "pixel by pixel",
    "permuted": "pixel by pixel in one random order",
}

PACKAGES = {
    "stablehlo": '"jax>=0.10" flatbuffers',
    "onnx": "onnxruntime",
    "safetensors": "torch safetensors",
}


def steps_of(run: RestoredRun) -> str:
    """Return the time and the features of a run's sequences."""
    return "28, 28" if run.config.sequence == "rows" else "784, 1"


def quoted(name: str) -> str:
    """Return a name as Python writes it, in double quotes."""
    return json.dumps(name)


def _stablehlo(name: str, run: RestoredRun) -> str:
    return f"""from pathlib import Path

import numpy as np
from jax import export

model = export.deserialize(bytearray(Path({quoted(name)}).read_bytes()))
images = np.zeros((3, 28, 28), np.uint8)  # your digits
logits = model.call(images)
print(logits.argmax(-1))"""


def _onnx(name: str, run: RestoredRun) -> str:
    return f"""import numpy as np
import onnxruntime

model = onnxruntime.InferenceSession({quoted(name)})
images = np.zeros((3, 28, 28), np.uint8)  # your digits
(logits,) = model.run(["logits"], {{"images": images}})
print(logits.argmax(-1))"""


def _safetensors(name: str, run: RestoredRun) -> str:
    config = run.config
    features = run.params["core"]["l0"]["kernel_ih"].shape[0]
    x = {
        "rows": "images / 255",
        "pixels": "images.reshape(-1, 784, 1) / 255",
        "permuted": "images.reshape(-1, 784, 1)[:, order] / 255",
    }[config.sequence]
    numpy, order = "", ""
    if config.sequence == "permuted":
        numpy = "import numpy as np\n"
        order = f"order = np.random.RandomState({PERMUTATION_SEED}).permutation(784)\n"
    return f"""{numpy}import torch
from safetensors.torch import load_file

rnn = torch.nn.LSTM({features}, {config.hidden_size}, {config.num_layers}, batch_first=True)
lin = torch.nn.Linear({config.hidden_size}, 10)
model = torch.nn.ModuleDict({{"rnn": rnn, "lin": lin}})
model.load_state_dict(load_file({quoted(name)}))
images = torch.zeros((3, 28, 28), dtype=torch.uint8)  # your digits
{order}logits = lin(rnn({x})[0][:, -1])
print(logits.argmax(-1))"""


LOADERS: dict[Format, Callable[[str, RestoredRun], str]] = {
    "stablehlo": _stablehlo,
    "onnx": _onnx,
    "safetensors": _safetensors,
}
