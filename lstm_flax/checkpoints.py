"""Checkpoints of a run: a tree of arrays and JSON values about it, as one Orbax composite a step.

Orbax writes a checkpoint into a temporary folder and renames it when it is whole. What may happen
to its files afterwards, on a failing disk or in a copy, it does not notice: float32 weights with a
flipped byte are float32 weights. So each checkpoint carries a fingerprint of each of its arrays
and a digest of its JSON values, and what does not match them is not restored.

A checkpoint may also be a stranger's. Nothing here executes code from it: arrays are restored into
the shapes and dtypes of a tree that the caller gives, and all else is JSON. No link in it is
followed, and no array is read before all that the checkpoint declares of it is as the caller's tree
needs it. Fingerprints find damage; whoever makes a checkpoint can make them too.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lstm_flax import buckets
from lstm_flax.arguments import check, check_integer
from lstm_flax.files import MIB, parse_json, read_regular_file, walk

MOST_DESCRIPTION = 16 * MIB
"""Bytes of each file that describes a checkpoint; ten thousand epochs take 5 MiB."""

MOST_CHUNKS = 65_536
"""Into which an array can be cut; Orbax makes one for each device that holds a part of it."""

COMMIT_FILE = "commit_success.txt"
"""Orbax's last object of a checkpoint in a bucket; without it, the checkpoint is incomplete."""


class CheckpointError(Exception):
    """A checkpoint is not there, or can't be used or written; the message says which and why."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was saved, or was saved by something else."""


class Restored(NamedTuple):
    """What a checkpoint holds."""

    step: int
    tree: Any
    metadata: dict[str, Any]


def best_fn(metrics: dict[str, Any], step: int) -> tuple[float, int]:
    """Score a checkpoint; the run's result is the one with the highest score.

    It is the most accurate one on the validation images, or else the last. Of equally accurate ones
    the later is better. Test figures play no part.
    """
    return metrics.get("validation_accuracy", 0.0), step


@contextlib.contextmanager
def open_checkpoints(
    directory: Path, *, keep: int = 3, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Open a run's checkpoints; closing them waits for what is still being written.

    Args:
        directory: a folder on a disk or, by `buckets.as_path`, in a bucket. It is made where it
            does not exist, unless `read_only`; what a killed run left half-written in it is
            removed, unless `read_only`.
        keep: how many of the latest to keep, beside the best by `best_fn`.
        read_only: change nothing on disk.

    Raises:
        ValueError: `keep` is no positive integer.
        CheckpointError: the directory can't be made or listed, or something in it is a link or far
            too large; or on closing, where the last save failed.
    """
    check_integer("keep", keep, 1)
    directory = directory if buckets.is_bucket(directory) else directory.absolute()
    policies = [preservation_policy.LatestN(keep), _Best(directory)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
    )
    _check_files(directory)
    try:
        manager = ocp.CheckpointManager(directory, options=options)
    except OSError as error:
        reason = error.strerror or _brief(error)
        raise CheckpointError(f"{directory} can't be opened ({reason})") from error
    except jax.errors.JaxRuntimeError:
        raise  # another process failed
    except Exception as error:  # whatever Orbax makes of what it keeps there for itself
        raise CheckpointError(f"{directory} can't be opened ({_brief(error)})") from error
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            manager.close()
        raise
    with _saving(manager):
        manager.close()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    tree: Any,
    metadata: dict[str, Any],
    metrics: dict[str, Any] | None = None,
) -> None:
    """Start saving a checkpoint; it is written while training goes on.

    Args:
        manager: from `open_checkpoints`.
        step: its name; larger than that of every other checkpoint.
        tree: of arrays, which may be donated as soon as this returns.
        metadata: what else belongs to it, as JSON values.
        metrics: what `best_fn` scores, as JSON values.

    Raises:
        ValueError: the step is no integer of at least 0, or the tree is not one of arrays.
        CheckpointError: the step is not the largest, this save can't be started, or the one before
            it failed.
    """
    check_integer("step", step, 0)
    if (last := manager.latest_step()) is not None and step <= last:
        raise CheckpointError(f"step {step} can't be saved after step {last}")
    leaves = _describe(tree)
    for leaf, fingerprint in zip(leaves.values(), _fingerprints(tree), strict=True):
        leaf["fingerprint"] = int(fingerprint)
    values = {"about": metadata, "metrics": metrics or {}, "leaves": leaves}
    with _saving(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(tree),
                about=ocp.args.JsonSave(values | {"sha256": _digest(values)}),
            ),
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Wait until all checkpoints are on disk.

    Raises:
        CheckpointError: a save failed.
    """
    with _saving(manager):
        manager.wait_until_finished()


def saved_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a directory, the latest first.

    Nothing is opened, so a damaged checkpoint counts too. Without a directory there are none.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):
        if buckets.is_bucket(directory):
            paths = [path for path, _ in buckets.walk(directory)]
            names = [path.parent.name for path in paths if path.name == COMMIT_FILE]
        else:  # a complete checkpoint is renamed to its step
            names = [path.name for path in directory.iterdir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def best_step(manager: ocp.CheckpointManager) -> int | None:
    """The best step by `best_fn`, of those whose description is intact; None without any."""
    return _best(_read_metrics(manager.directory, manager.all_steps()))


def result_steps(manager: ocp.CheckpointManager) -> list[int]:
    """The checkpoints' steps: the result's, then the others that may stand in, latest first.

    Before them come those whose damaged description may hide that they are the result: restoring
    them tells of it.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    metrics = _read_metrics(manager.directory, steps)
    best = _best(metrics)
    # Where some epoch was not validated none was, and only a later one may be the result.
    is_last_the_result = any(m and "validation_accuracy" not in m for m in metrics.values())
    hidden = [
        step
        for step in steps
        if step not in metrics and (best is None or step > best or not is_last_the_result)
    ]
    others = [step for step in steps if step != best and step not in hidden]
    return hidden + ([] if best is None else [best]) + others


def restore(manager: ocp.CheckpointManager, like: Any, step: int) -> Restored:
    """Restore the checkpoint of a step.

    Args:
        manager: from `open_checkpoints`.
        like: a tree of the same structure; gives shapes, dtypes and where the arrays shall lie,
            which may be other devices than those that saved them. Its leaves are arrays, or
            `jax.ShapeDtypeStruct`s with a sharding.
        step: `manager.latest_step()`, `best_step(manager)` or any other.

    Raises:
        ValueError: the step is no integer, or `like` is not a tree of arrays.
        DamagedError: the checkpoint is not as it was saved.
        CheckpointError: there is no checkpoint of that step, or its tree is not as `like`.
    """
    check("step", step, "an integer", lambda s: operator.index(s) is not None)
    if step not in manager.all_steps():
        steps = ", ".join(map(str, sorted(manager.all_steps()))) or "none"
        raise CheckpointError(
            f"no checkpoint of step {step} in {manager.directory}; there are: {steps}"
        )
    values = read_description(manager.directory, step)
    fingerprints = [leaf.pop("fingerprint") for leaf in values["leaves"].values()]
    wanted = _describe(like)
    _check_leaves(step, values["leaves"], wanted)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        _check_size(manager.directory / str(step), like)
        _read_through(manager.directory / str(step) / "tree", wanted)
        arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
        tree = manager.restore(step, args=arguments)["tree"]
    except Exception as error:  # whatever Orbax and TensorStore make of the remains
        raise DamagedError(f"step {step}: {_brief(error)}") from error
    if not np.array_equal(_fingerprints(tree), np.array(fingerprints, np.uint32)):
        raise DamagedError(f"step {step}: its arrays do not match their fingerprints")
    return Restored(step, tree, values["about"])


def restore_first(
    manager: ocp.CheckpointManager, like: Any, steps: Sequence[int]
) -> tuple[Restored, list[DamagedError]]:
    """Restore the first of several checkpoints that is as it was saved.

    Args:
        manager: from `open_checkpoints`.
        like: as for `restore`.
        steps: which to try, in this order.

    Returns:
        What was restored, and why each one before it was not.

    Raises:
        CheckpointError: none of them can be restored.
    """
    damages: list[DamagedError] = []
    for step in steps:
        try:
            return restore(manager, like, step), damages
        except DamagedError as damage:
            damages.append(damage)
    reasons = "; ".join(map(str, damages)) or "there are none"
    raise CheckpointError(f"no checkpoint in {manager.directory} can be restored: {reasons}")


@dataclasses.dataclass(frozen=True)
class _Best(preservation_policy.PreservationPolicy):
    """Keep the best checkpoint, and damaged ones, which may be it.

    It is found in the checkpoints themselves: Orbax's own metrics, once damaged, keep even the
    intact checkpoints from being opened.
    """

    directory: Path
    known: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Metrics read before, by step; a bucket may take a second for each."""

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Say of each checkpoint, by Orbax's protocol, whether it is the best of all."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        unknown = [step for step in steps if step not in self.known]
        self.known.update(_read_metrics(self.directory, unknown))
        metrics = {step: self.known[step] for step in steps if step in self.known}
        best = _best(metrics)
        return [step == best or step not in metrics for step in steps]


def _best(metrics: dict[int, dict[str, Any]]) -> int | None:
    return max(metrics, key=lambda step: best_fn(metrics[step], step), default=None)


def _read_metrics(directory: Path, steps: Iterable[int]) -> dict[int, dict[str, Any]]:
    """What `best_fn` scores, of each checkpoint whose description is intact, by its step."""
    metrics = {}
    for step in steps:
        with contextlib.suppress(DamagedError):
            metrics[step] = read_description(directory, step)["metrics"]
    return metrics


def read_description(directory: Path, step: int) -> dict[str, Any]:
    """What `save` wrote about a checkpoint, checked against its digest; its arrays are not read.

    Returns:
        "about", which is the metadata, and "metrics", both as they were given, and "leaves", which
        describes the arrays.

    Raises:
        DamagedError: it can't be read, or is not as it was saved.
    """
    try:
        path = directory / str(step) / "about" / "metadata"
        values = parse_json(read_regular_file(path, MOST_DESCRIPTION))
        is_intact = values.pop("sha256") == _digest(values)
        is_ours = _is_description(values)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"step {step}: its description can't be read ({error})") from error
    if not is_intact:
        raise DamagedError(f"step {step}: its description does not match its digest")
    if not is_ours:
        raise DamagedError(f"step {step}: its description is none that `save` writes")
    return values


def _is_description(values: dict[str, Any]) -> bool:
    """Whether it has the parts that `save` writes, of the types that are relied on."""
    accuracy = values["metrics"].get("validation_accuracy", 0.0)
    return (
        isinstance(values["about"], dict)
        and isinstance(accuracy, int | float)
        and not math.isnan(accuracy)
        and all(type(leaf["fingerprint"]) is int for leaf in values["leaves"].values())
        and all(0 <= leaf["fingerprint"] < 2**32 for leaf in values["leaves"].values())
    )


def _check_files(directory: Path) -> None:
    """Check a directory of checkpoints before Orbax reads or removes anything in it."""
    try:
        for path, size in walk(directory.resolve()):  # itself, it may be a link
            is_description = path.parent.name != "d"  # where OCDBT keeps the arrays
            if is_description and size > MOST_DESCRIPTION:
                raise CheckpointError(f"{path} has more than {MOST_DESCRIPTION // MIB} MiB")
            if path.name in (".zarray", "zarr.json"):
                raise CheckpointError(f"{path} is none of a checkpoint's files")
    except OSError as error:
        raise CheckpointError(f"{error.filename} can't be used ({error.strerror})") from error


def _check_size(folder: Path, like: Any) -> None:
    """Check that a checkpoint's files are not far larger than its arrays."""
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    files = sum(size for _, size in walk(folder))
    if files > 2 * arrays + 64 * MIB:
        raise ValueError(f"its files have {files / MIB:,.0f} MiB, its arrays {arrays / MIB:,.0f}")


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each leaf, by its path, in the order of `jax.tree.leaves`."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if not leaves:
        raise ValueError("the tree holds no arrays")
    for name, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "shape") or not _is_numeric(dtype):
            raise ValueError(f"{name or 'the tree'} is {dtype}, not an array of numbers")
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()
    }


def _is_numeric(dtype: Any) -> bool:
    return any(jax.dtypes.issubdtype(dtype, kind) for kind in (np.number, np.bool_))


def _check_leaves(step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    if saved == wanted:
        return
    name = next(n for n in [*saved, *wanted] if saved.get(n) != wanted.get(n))
    there, here = (
        f"{leaf['dtype']}{leaf['shape']}" if (leaf := leaves.get(name)) else "absent"
        for leaves in (saved, wanted)
    )
    raise CheckpointError(f"step {step} is of another model: {name} is {there} there, {here} here")


@jax.jit
def _fingerprints(tree: Any) -> jax.Array:
    """One uint32 a leaf: the sum of its bytes, each times an odd number of its own.

    Sums of integers are the same on every kind and number of devices, and no odd multiple of a
    byte's change is zero modulo 2**32, so that not one changed byte goes unseen.
    """

    def fingerprint(leaf: jax.Array) -> jax.Array:
        octets = leaf.reshape(-1).view(jnp.uint8).astype(jnp.uint32)
        weights = 2 * jnp.arange(octets.size, dtype=jnp.uint32) + 1
        return jnp.sum(octets * weights, dtype=jnp.uint32)

    return jnp.stack([fingerprint(leaf) for leaf in jax.tree.leaves(tree)])


def _read_through(database: Path, wanted: dict[str, dict[str, Any]]) -> None:
    """Read all of a saved tree, so that what can't be read is found here.

    TensorStore says so in an exception; Orbax, which reads all arrays at once, also lets the
    others that were under way write pages of tracebacks. And a chunk is laid out in memory as
    large as it is declared to be, so that what is declared is looked at first.
    """
    descriptions = [path for path, _ in walk(database / "array_metadatas")]
    if not descriptions:
        raise ValueError("the descriptions of its arrays are missing")
    for description in descriptions:
        entries = parse_json(read_regular_file(description, MOST_DESCRIPTION))
        for entry in entries["array_metadatas"]:
            if not {"param_name", "write_shape", "ext_metadata"} <= entry["array_metadata"].keys():
                raise ValueError(f"{description.name} is damaged")
    formats = parse_json(read_regular_file(database / "_METADATA", MOST_DESCRIPTION))
    if formats.get("use_zarr3") or not formats.get("use_ocdbt", True):
        raise ValueError("it holds arrays of another format")
    base = f"{database}/" if buckets.is_bucket(database) else f"file://{database}/"
    store = {"driver": "ocdbt", "base": base}
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    if any(key.endswith("zarr.json") for key in keys):
        raise ValueError("it holds arrays of another format")
    paths = [key.removesuffix(".zarray") for key in keys if key.endswith(".zarray")]
    if len(paths) != len(wanted):
        raise ValueError(f"holds {len(paths)} of {len(wanted)} arrays")
    arrays = {
        path: ts.open({"driver": "zarr", "kvstore": store | {"path": path}}).result()
        for path in paths
    }
    declared = [(_as_key(path), list(a.shape), a.dtype.name) for path, a in arrays.items()]
    expected = [(_as_key(name), leaf["shape"], leaf["dtype"]) for name, leaf in wanted.items()]
    for there, here in zip(sorted(declared), sorted(expected), strict=True):
        if there != here:
            raise ValueError(f"its array {there} should be {here}")
    for array in arrays.values():
        _check_chunks(array)
    for array in arrays.values():
        array.read().result()


def _as_key(path: str) -> str:
    """The name of a leaf, or the place of an array, spelt alike."""
    return path.rstrip("/").replace("/", ".")


def _check_chunks(array: ts.TensorStore) -> None:
    sizes = [size or 0 for size in array.chunk_layout.read_chunk.shape or ()]  # none of a scalar
    extents = list(zip(array.shape, sizes, strict=True))
    if not all(1 <= size <= max(length, 1) for length, size in extents):
        raise ValueError(f"an array of {list(array.shape)} has chunks of {sizes}")
    counts = [-(-length // size) for length, size in extents]
    if math.prod(counts) > MOST_CHUNKS:
        raise ValueError(f"an array of {list(array.shape)} has {math.prod(counts):,} chunks")


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _brief(error: Exception) -> str:
    """An error in few words; of TensorStore's chains of causes, the operating system's own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if number := re.search(r"(?:os_error_code='|OS error )(\d+)", text):  # by its version
        return os.strerror(int(number[1]))
    return next(iter(text.strip().splitlines()), type(error).__name__)[:200]


@contextlib.contextmanager
def _saving(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turn whatever a save fails with into one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # the devices failed, or another process did, and not the save
    except Exception as error:
        raise CheckpointError(
            f"a checkpoint can't be written to {manager.directory} ({_brief(error)}); "
            f"those written before are untouched"
        ) from error
