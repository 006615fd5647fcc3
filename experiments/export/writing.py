"""The bytes of an export, from a run."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from experiments.export.reading import MOST_BYTES, ExportError, seal
from experiments.training_run import from_config
from experiments.training_run.from_config import IMAGE_SHAPE
from experiments.training_run.restored import RestoredRun
from lstm_flax import training
from lstm_flax.models import to_onnx, to_torch

Format = Literal["stablehlo", "onnx", "safetensors"]

Dtype = Literal["float32", "bfloat16"]
"""What safetensors hold weights in."""

PLATFORMS = ("cpu", "cuda", "tpu")
"""Where a StableHLO file runs."""


def to_bytes(run: RestoredRun, format: Format, dtype: Dtype = "float32") -> bytes:
    """Return the file of a run in a format; see `stablehlo`, `onnx` and `safetensors`.

    Only `safetensors` has a choice of dtype.

    Raises:
        ExportError: the format has no place for the run's precision, or the file would be larger
            than any of the formats' readers takes.
    """
    if format != "stablehlo" and run.config.precision != "float32":
        raise ExportError(
            f"{format} has no place for --precision {run.config.precision}, whose products alone "
            f"are rounded; pass --float32 to export the run with float32 products"
        )
    weights = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    if 4 * weights > MOST_BYTES // 2:
        raise ExportError(f"the run has {weights:,} weights, more than one file of a format holds")
    writers: dict[Format, Callable[[RestoredRun], bytes]] = {
        "stablehlo": stablehlo,
        "onnx": onnx,
        "safetensors": partial(safetensors, dtype=dtype),
    }
    return writers[format](run)


def with_float32(run: RestoredRun) -> RestoredRun:
    """Return a run whose products are float32, whatever it was trained with."""
    config = dataclasses.replace(run.config, precision="float32")
    return run._replace(config=config, model=from_config.model(config))


def stablehlo(run: RestoredRun) -> bytes:
    """Return `jax.export`'s serialised program: images uint8 [batch, 28, 28] to logits float32.

    The batch is symbolic, of one image or more, and the weights are constants in the program. Its
    SHA-256 stands behind it.
    """
    params, to_sequence = jax.device_get(run.params), from_config.to_sequence(run.config)

    @jax.jit
    def logits(images: jax.Array) -> jax.Array:
        x = to_sequence(training.to_floats(images))
        return jnp.asarray(run.model.apply({"params": params}, x))

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *IMAGE_SHAPE), jnp.uint8)
    program = bytes(export.export(logits, platforms=PLATFORMS)(images).serialize())
    return program + seal(program)


def onnx(run: RestoredRun) -> bytes:
    """Return `to_onnx`'s model behind one that takes `images`, uint8 [batch, 28, 28]."""
    from onnx import TensorProto, compose, helper, numpy_helper

    model = to_onnx(run.params)
    order = pixel_order(run)  # where a sequence has which pixel
    constants = {
        "largest": np.array(255, np.float32),
        "count": np.array([0, order.size]),
        "order": order,
    }
    to_sequence = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["floats", "largest"], ["ink"]),
            helper.make_node("Reshape", ["ink", "count"], ["pixels"]),
            helper.make_node("Gather", ["pixels", "order"], ["sequence"], axis=1),
        ],
        "images_to_sequences",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *IMAGE_SHAPE])],
        [helper.make_tensor_value_info("sequence", TensorProto.FLOAT, ["batch", *order.shape])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    first = helper.make_model(
        to_sequence, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    both = compose.merge_models(first, model, io_map=[("sequence", "x")])
    del both.opset_import[1:]  # it has one for each of the two
    return both.SerializeToString()


def safetensors(run: RestoredRun, dtype: Dtype = "float32") -> bytes:
    """Return the weights in PyTorch's names: `rnn.` is an `nn.LSTM`'s, `lin.` an `nn.Linear`'s.

    The metadata say what a time step is, which the weights don't tell. bfloat16 rounds each weight
    to the nearest; what reads the file computes in float32 all the same.
    """
    from safetensors.numpy import save

    metadata = {"format": "pt", "sequence": run.config.sequence}
    weights = {name: array.astype(jnp.dtype(dtype)) for name, array in to_torch(run.params).items()}
    return save(weights, metadata=metadata)


def pixel_order(run: RestoredRun) -> np.ndarray:
    """Return which pixel of an image, row after row, is where in a sequence [time, features]."""
    numbers = jnp.arange(math.prod(IMAGE_SHAPE)).reshape(1, *IMAGE_SHAPE)
    return np.asarray(from_config.to_sequence(run.config)(numbers)[0])
