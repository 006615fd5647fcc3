"""Exports of a run, read back: images in, logits out.

A file may be a stranger's. It is data to all of its readers, with one exception: a StableHLO
program may call whatever functions are registered in the process, some of them at an address that
the file names. Such a program is refused. Only safetensors are read with Flax.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.harness.batches import in_batches
from experiments.harness.streams import discarding_stderr
from experiments.harness.usage import check_packages
from lstm_flax.files import MIB, read_regular_file

MOST_BYTES = 2048 * MIB
"""Largest size of an export: a limit of protobuf and of flatbuffers."""

IMAGE_SHAPE = (28, 28)
"""Rows, and pixels per row, of the images that an export takes."""

BATCH_SIZE = 64
"""Images that are computed at once."""

SEAL = b"\nlstm_flax, SHA-256 of the bytes before this line: "
"""What stands before the SHA-256 at the end of a StableHLO file."""

Logits = Callable[[np.ndarray], np.ndarray]
"""Logits, float32 [n, classes], of images uint8 [n, 28, 28]."""


class ExportError(Exception):
    """A run can't be exported, or a file is no export; the message says why."""


class Export(NamedTuple):
    """An export that is ready to compute."""

    format: str
    logits: Logits


def read_export(path: Path) -> Export:
    """Read an export, whose content tells its format.

    Raises:
        ExportError: the file can't be read, is no export, or does not take images of digits.
        UsageError: the package that reads the format is missing.
    """
    try:
        content = read_regular_file(path, MOST_BYTES, follow=True)
    except OSError as error:
        raise ExportError(f"{path} can't be read ({error.strerror})") from error
    try:
        format = format_of(content)
        check_packages("export", PACKAGES[format], what=f"{path}, which is {format},")
        with discarding_stderr():  # MLIR prints what is wrong, which the error says too
            logits = _safetensors(path) if format == "safetensors" else READERS[format](content)
            _try(logits)
    except ExportError as error:
        raise ExportError(f"{path} is no export of a run: {error}") from error.__cause__
    return Export(format, lambda images: in_batches(logits, images, BATCH_SIZE))


def _try(logits: Logits) -> None:
    """Compute a batch, which shows whether a graph fits together.

    Raises:
        ExportError: it can't be computed, or the result is no batch of logits.
    """
    try:
        found = logits(np.zeros((BATCH_SIZE, *IMAGE_SHAPE), np.uint8))
    except Exception as error:  # XLA's and ONNX Runtime's, whose classes are not public
        raise ExportError(f"it can't be computed ({_first_line(error)})") from error
    if found.ndim != 2 or len(found) != BATCH_SIZE or found.shape[1] < 2:
        raise ExportError(f"it gives {found.shape}, not logits [batch, classes]")


def format_of(content: bytes) -> str:
    """Return the format whose marks a file has.

    Raises:
        ExportError: it has none's.
    """
    if content[8:9] == b"{":  # after the length of the header
        return "safetensors"
    if SEAL in content[-len(seal(b"")) :]:
        return "stablehlo"
    if content[:1] == b"\x08":  # the version, ONNX's first field
        return "onnx"
    raise ExportError("it is neither StableHLO nor ONNX nor safetensors, or it is damaged")


def seal(program: bytes) -> bytes:
    """Return what stands behind a StableHLO program in an export: its SHA-256.

    `jax.export` does not look beyond the program's end. XLA may end the process over a program that
    is damaged, so that damage must be found before.
    """
    return SEAL + hashlib.sha256(program).hexdigest().encode() + b"\n"


def _stablehlo(content: bytes) -> Logits:
    import jax
    from jax import export

    program = content[: -len(seal(b""))]
    if content != program + seal(program):
        raise ExportError("it is damaged: its SHA-256 is not the one at its end")
    try:
        # This reads offsets that nothing has checked, and so fails in many ways.
        exported = export.deserialize(bytearray(program))
        text = str(exported.mlir_module())
        shapes = [(one.dtype, one.shape[1:]) for one in exported.in_avals]
        results = [(one.dtype, len(one.shape)) for one in exported.out_avals]
        takes_any_batch = not isinstance(exported.in_avals[0].shape[0], int)
    except Exception as error:
        raise ExportError(f"its StableHLO can't be read ({_first_line(error)})") from error
    if calls := calls_outside(text):
        raise ExportError(f"its program calls functions outside of it ({', '.join(calls)})")
    if shapes != [(np.uint8, IMAGE_SHAPE)] or results != [(np.float32, 2)] or not takes_any_batch:
        raise ExportError(f"its program is {exported!s:.200}, not of images to logits")
    call = jax.jit(exported.call)
    return lambda images: np.asarray(call(images))


def calls_outside(program: str) -> list[str]:
    """Return what a StableHLO program, as text, calls or waits for outside of itself.

    Custom calls run what is registered in the process, such as Python's callbacks at an address in
    the program. JAX's check of a symbolic shape is the one that is harmless: JAX evaluates it when
    it compiles. The names are looked for anywhere in the text, so that no way of writing hides one.
    """
    rest = re.sub(r"stablehlo\.custom_call @shape_assertion\(", "", program)
    return sorted(set(re.findall(r"custom_call|infeed|outfeed|\bsend\b|\brecv\b", rest)))


def _onnx(content: bytes) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised too
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # its classes are not public
        raise ExportError(f"ONNX Runtime refuses it ({_first_line(error)})") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    takes = [(one.type, tuple(one.shape[1:])) for one in inputs]
    gives = [(one.type, len(one.shape)) for one in outputs]
    if takes != [("tensor(uint8)", IMAGE_SHAPE)] or gives != [("tensor(float)", 2)]:
        raise ExportError(
            f"its graph is of {takes!s:.99} to {gives!s:.99}, not of images to logits"
        )
    return lambda images: session.run(None, {inputs[0].name: images})[0]


def _safetensors(path: Path) -> Logits:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError, OSError) as error:
        raise ExportError(f"its safetensors can't be read ({_first_line(error)})") from error
    import jax

    from lstm_flax import LSTMClassifier, from_torch, sequences, training

    steps = {
        "rows": sequences.rows,
        "pixels": sequences.pixels,
        "permuted": sequences.permuted_pixels,
    }
    to_sequence = steps.get(metadata.get("sequence", ""))
    if to_sequence is None:
        raise ExportError(f"its metadata name no sequence of {', '.join(steps)}")
    try:
        params = from_torch(arrays)
        hidden_size = params["core"]["l0"]["kernel_hh"].shape[0]
        classes = len(params["head"]["bias"])
        model = LSTMClassifier(
            hidden_size,
            len(params["core"]),
            classes,
            precision=jax.lax.Precision.HIGHEST,
        )

        def logits(images: jax.Array) -> jax.Array:
            x = to_sequence(training.to_floats(images))
            return jax.numpy.asarray(model.apply({"params": params}, x))

        sample = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), np.uint8)
        jax.eval_shape(logits, sample)
    except Exception as error:
        raise ExportError(f"its weights are of another model ({_first_line(error)})") from error
    call = jax.jit(logits)
    return lambda images: np.asarray(call(images))


READERS: dict[str, Callable[[bytes], Logits]] = {"stablehlo": _stablehlo, "onnx": _onnx}

PACKAGES = {"stablehlo": "flatbuffers", "onnx": "onnxruntime", "safetensors": "safetensors"}


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "")
    return line[:200] or type(error).__name__
