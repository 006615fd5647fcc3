"""Training and evaluation: pure functions over a `TrainState` and batches.

A dataset is a dict of arrays that are whole on the device, `{"image": uint8 [n, height, width],
"label": int32 [n]}`. A batch also has a "mask", bool [batch], which is False for the examples that
fill up the last batch of an epoch. Every example counts exactly once in an epoch.

All randomness is a function of `(seed, epoch)` or `(seed, step)`. A `TrainState` knows its step, so
a run needs nothing else to resume.

An invalid argument raises a ValueError of one line while the function is traced. A label outside
the classes raises one only if the labels are known, outside `jax.jit`. In a compiled step it makes
the loss NaN instead: to report it, every step would have to wait for the device.
"""

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lstm_flax.arguments import check, check_array, check_integer
from lstm_flax.sequences import rows

Batch = dict[str, jax.Array]
"""Arrays by name, as described at the top of this module."""

Augment = Callable[[jax.Array, jax.Array], jax.Array]
"""`(key, images float32 [batch, height, width]) -> images`, such as `lstm_flax.augment.distort`."""

ToSequence = Callable[[jax.Array], jax.Array]
"""`images -> sequences [batch, time, features]`, such as `lstm_flax.sequences.rows`."""


class Keys(NamedTuple):
    """The PRNG keys of a run, one for each source of randomness.

    Attributes:
        init: for the initial parameters.
        order: with the epoch, for the order of the training images.
        noise: with the step, for dropout and augmentation.
    """

    init: jax.Array
    order: jax.Array
    noise: jax.Array

    @classmethod
    def from_seed(cls, seed: int) -> "Keys":
        """Derive the keys of a run from its seed, an unsigned integer of 32 bits.

        Of a larger or negative seed, JAX would use more bits with `jax_enable_x64` than without.
        """
        check(
            "seed", seed, "an integer from 0 to 2**32 - 1", lambda s: operator.index(s) >> 32 == 0
        )
        return cls(*jax.random.split(jax.random.key(seed), 3))


@flax.struct.dataclass
class Metrics:
    """Sums over examples. They add up over batches, and are divided only when they are read.

    Attributes:
        loss_sum: float32 [], cross-entropy in nats.
        correct: int32 [], examples that are classified correctly.
        count: int32 [], all examples.
    """

    loss_sum: jax.Array
    correct: jax.Array
    count: jax.Array

    @classmethod
    def empty(cls) -> "Metrics":
        """Return the metrics of no examples."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    @classmethod
    def from_logits(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> "Metrics":
        """Compute the metrics of one batch.

        Args:
            logits: floating [batch, classes].
            labels: integer [batch]. If one that counts is outside the classes, the loss is NaN.
            mask: bool [batch]; examples where it is False don't count.

        Raises:
            ValueError: a shape or dtype is wrong, or labels that are known are outside the classes.
        """
        check_array("the model's output", logits, ("batch", "classes"), np.floating)
        check_array("label", labels, logits.shape[:1], np.integer)
        check_array("mask", mask, logits.shape[:1], np.bool_)
        labels, classes = labels.astype(jnp.int32), logits.shape[1]
        is_outside = (labels < 0) | (labels >= classes)
        if not isinstance(wrong := mask & is_outside, jax.core.Tracer) and wrong.any():
            found = sorted(set(labels[wrong].tolist()))
            raise ValueError(f"label must be within 0..{classes - 1}, but some are {found}")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        losses = jnp.where(is_outside, jnp.nan, losses)
        hits = (jnp.argmax(logits, -1) == labels) & mask
        return cls(
            jnp.sum(losses, where=mask, dtype=jnp.float32),
            jnp.sum(hits, dtype=jnp.int32),
            jnp.sum(mask, dtype=jnp.int32),
        )

    def __add__(self, other: "Metrics") -> "Metrics":
        return jax.tree.map(jnp.add, self, other)

    @property
    def loss(self) -> jax.Array:
        """Mean cross-entropy in nats per example."""
        return self.loss_sum / self.count

    @property
    def accuracy(self) -> jax.Array:
        """Fraction of the examples that are classified correctly."""
        return self.correct.astype(jnp.float32) / self.count


def data_mesh() -> Mesh:
    """Return a mesh of all devices along the axis "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any) -> Any:
    """Replicate every array of `tree` on all devices of the current mesh (`jax.set_mesh`)."""
    return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), P()))


def shard_opt_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shard the optimiser's state over the devices of the current mesh (`jax.set_mesh`).

    Without this, each device holds all of the state. The updates are the same, and each step
    gathers them (Rajbhandari et al., "ZeRO", 2020, stage 1). Arrays with no axis divisible by the
    device count stay replicated.
    """

    def init(params):
        return _constrain(tx.init(params), _opt_state_spec)

    def update(updates, state, params=None, **more):
        updates, state = tx.update(updates, state, params, **more)
        return _keep_replicated(updates), _constrain(state, _opt_state_spec)

    return optax.GradientTransformation(init, update)


def _opt_state_spec(leaf: jax.Array) -> P:
    """Return the spec that splits the first axis divisible by the device count."""
    devices = jax.sharding.get_abstract_mesh().size
    axis = next((k for k, size in enumerate(leaf.shape) if size % devices == 0), None)
    return P() if axis is None else P(*[None] * axis, "data")


def _keep_replicated(tree: Any) -> Any:
    """Under `jax.set_mesh`, keep every array replicated on all devices."""
    return _constrain(tree, lambda leaf: P())


def _split_over_devices(batch: Batch) -> Batch:
    """Under `jax.set_mesh`, split the batch over the devices."""
    return _constrain(batch, lambda array: P("data"))


def _constrain(tree: Any, spec: Callable[[jax.Array], P]) -> Any:
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spec(leaf)), tree)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return the number of batches in one epoch; the last batch may be filled up.

    Raises:
        ValueError: an argument is not a positive integer.
    """
    check_integer("num_examples", num_examples, 1)
    check_integer("batch_size", batch_size, 1)
    return -(-num_examples // batch_size)


def onecycle_adamw(
    peak_learning_rate: float,
    total_steps: int,
    *,
    weight_decay: float,
    clip_norm: float,
    warmup: float = 0.3,
) -> optax.GradientTransformation:
    """Return AdamW with a one-cycle learning rate, which clips gradients by their global norm.

    The rate rises to its peak over the first `warmup` of `total_steps`, and falls to almost zero by
    their end, along cosines (Smith and Topin, "Super-Convergence", 2018).

    Args:
        peak_learning_rate: the largest learning rate.
        total_steps: number of steps in the whole training.
        weight_decay: decoupled (Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
            2019): each step shrinks every parameter by the fraction `learning_rate * weight_decay`.
        clip_norm: the largest global norm of the gradients; larger ones are scaled down to it.

    Raises:
        ValueError: an argument is out of bounds.
    """
    for name, value in (("peak_learning_rate", peak_learning_rate), ("weight_decay", weight_decay)):
        check(name, value, "a finite number of at least 0", lambda v: 0 <= v < math.inf)
    check_integer("total_steps", total_steps, 1)
    check("clip_norm", clip_norm, "a number greater than 0", lambda v: v > 0)
    check("warmup", warmup, "more than 0 and less than 1", lambda v: 0 < v < 1)
    schedule = optax.cosine_onecycle_schedule(total_steps, peak_learning_rate, warmup)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay)
    )


def create_train_state(
    model: nn.Module, tx: optax.GradientTransformation, sample: jax.Array, key: jax.Array
) -> TrainState:
    """Return new parameters and optimiser state at step 0, replicated under `jax.set_mesh`.

    Args:
        model: a module that is called as `model(x, deterministic=...)`, x: [batch, time, features].
        tx: the optimiser.
        sample: any input of the right shape and dtype; its values are not used.
        key: PRNG key of the initialisers.

    Raises:
        ValueError: `model` is not a module, `tx` is not an optimiser, or `sample` is not floating
            [batch, time, features].
    """
    check("model", model, "a flax.linen module", lambda m: isinstance(m, nn.Module))
    check("tx", tx, "an optax optimiser", lambda t: callable(t.init) and callable(t.update))
    check_array("sample", sample, ("batch", "time", "features"), np.floating)
    place = (lambda tree: tree) if jax.sharding.get_abstract_mesh().empty else replicate
    params = place(_initial_params(model, key, jnp.zeros(sample.shape, sample.dtype)))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    # An array from the start: a Python 0 would compile every step function twice.
    return state.replace(step=place(jnp.zeros((), jnp.int32)))


@partial(jax.jit, static_argnums=0)
def _initial_params(model: nn.Module, key: jax.Array, sample: jax.Array) -> Any:
    """Initialise the model, compiled once for all keys; without jit, each key takes as long."""
    return model.init(key, sample)["params"]


def to_floats(images: jax.Array) -> jax.Array:
    """Convert uint8 images to float32 in [0, 1].

    Raises:
        ValueError: the images have another dtype.
    """
    check("the images' dtype", getattr(images, "dtype", None), "uint8", lambda d: d == np.uint8)
    return images.astype(jnp.float32) / 255


@partial(jax.jit, static_argnames=("augment", "to_sequence", "label_smoothing"))
def train_step(
    state: TrainState,
    batch: Batch,
    noise_key: jax.Array,
    augment: Augment | None = None,
    to_sequence: ToSequence = rows,
    label_smoothing: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """Take one gradient step on the mean cross-entropy of a batch.

    Args:
        state: the state before the step.
        batch: images, labels and mask, as described at the top of this module.
        noise_key: key of dropout and augmentation; `state.step` is folded into it.
        augment: `(key, images float32 [batch, height, width]) -> images`.
        to_sequence: `images -> sequences [batch, time, features]`, as in `lstm_flax.sequences`.
        label_smoothing: share of each label's weight that is spread evenly over all classes
            (Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7). The loss in
            the metrics does not use it.

    Returns:
        The state after the step, and the metrics of the batch before it.

    Raises:
        ValueError: an array is missing or has a wrong shape or dtype, or `label_smoothing` is not
            in [0, 1).
    """
    _check_data("batch", batch, ("image", "label", "mask"))
    smoothing = "at least 0 and less than 1"
    check("label_smoothing", label_smoothing, smoothing, lambda s: 0 <= s < 1)
    dropout_key, augment_key = jax.random.split(jax.random.fold_in(noise_key, state.step))
    images = to_floats(batch["image"])
    if augment is not None:
        images = augment(augment_key, images)
    x = to_sequence(images)

    def loss_fn(params):
        rngs = {"dropout": dropout_key}
        logits = state.apply_fn({"params": params}, x, deterministic=False, rngs=rngs)
        metrics = Metrics.from_logits(logits, batch["label"], batch["mask"])
        if not label_smoothing:
            return metrics.loss, metrics
        labels = jax.nn.one_hot(batch["label"], logits.shape[-1])
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, label_smoothing))
        return jnp.sum(losses, where=batch["mask"]) / metrics.count, metrics

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    return state.replace(params=_keep_replicated(state.params)), metrics


@partial(jax.jit, static_argnames="to_sequence")
def eval_step(state: TrainState, batch: Batch, to_sequence: ToSequence = rows) -> Metrics:
    """Compute the metrics of one batch, without dropout or augmentation.

    Args:
        state: the state to evaluate.
        batch: images, labels and mask, as described at the top of this module.
        to_sequence: as in `train_step`.

    Raises:
        ValueError: an array is missing or has a wrong shape or dtype.
    """
    _check_data("batch", batch, ("image", "label", "mask"))
    logits = state.apply_fn({"params": state.params}, to_sequence(to_floats(batch["image"])))
    return Metrics.from_logits(logits, batch["label"], batch["mask"])


@jax.jit
def is_finite(tree: Any) -> jax.Array:
    """Return whether all numbers in a tree are finite, as a bool array []."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _check_data(name: str, data: Batch, arrays: tuple[str, ...]) -> None:
    """Check that `data` has these arrays, with the shapes and dtypes of this module."""
    check(name, data, f"a dict of {', '.join(arrays)}", lambda d: isinstance(d, Mapping))
    if missing := [array for array in arrays if array not in data]:
        raise ValueError(f"{name} lacks {', '.join(missing)}; it has {', '.join(map(str, data))}")
    image = data["image"]
    check_array(f"{name}: image", image, ("examples", "height", "width"), np.uint8)
    if not len(image):
        raise ValueError(f"{name} has no examples")
    for array, dtype in (("label", np.integer), ("mask", np.bool_)):
        if array in arrays:
            check_array(f"{name}: {array}", data[array], (len(image),), dtype)


def _take_batch(data: Batch, order: jax.Array, index: jax.Array, batch_size: int) -> Batch:
    """Return batch `index` of an epoch in the given order, filled up with masked examples."""
    positions = index * batch_size + jnp.arange(batch_size)
    mask = positions < order.size
    rows = order[jnp.where(mask, positions, 0)]
    batch = {name: array[rows] for name, array in data.items()}
    return _split_over_devices(batch | {"mask": mask})


@partial(
    jax.jit,
    static_argnames=("batch_size", "augment", "to_sequence", "label_smoothing"),
    donate_argnames=("state", "metrics"),
)
def train_steps(
    state: TrainState,
    metrics: Metrics,
    data: Batch,
    keys: Keys,
    max_steps: jax.Array | int,
    *,
    batch_size: int,
    augment: Augment | None = None,
    to_sequence: ToSequence = rows,
    label_smoothing: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """Take up to `max_steps` train steps in one call, but none beyond the end of the epoch.

    `max_steps` is traced, so one compiled program serves chunks of any size. The result does not
    depend on how an epoch is divided into chunks. The call donates `state` and `metrics`.

    Args:
        state: the state before the steps; its step number determines the epoch and the batches.
        metrics: metrics of the epoch so far.
        data: the whole training set.
        keys: the keys of the run.
        max_steps: largest number of steps to take.
        batch_size: number of images in a step.
        augment: as in `train_step`.
        to_sequence: as in `train_step`.
        label_smoothing: as in `train_step`.

    Returns:
        The state after these steps, and the metrics of the epoch so far.

    Raises:
        ValueError: as in `train_step`, or `batch_size` is not a positive integer.
    """
    _check_data("data", data, ("image", "label"))
    for name, value, kind in (("metrics", metrics, Metrics), ("keys", keys, Keys)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    check_array("max_steps", jnp.asarray(max_steps), (), np.integer)
    num_examples = data["label"].shape[0]
    per_epoch = steps_per_epoch(num_examples, batch_size)
    epoch, first = jnp.divmod(jnp.asarray(state.step, jnp.int32), per_epoch)
    order = jax.random.permutation(jax.random.fold_in(keys.order, epoch), num_examples)

    def body(index, carry):
        state, metrics = carry
        batch = _take_batch(data, order, index, batch_size)
        state, batch_metrics = train_step(
            state, batch, keys.noise, augment, to_sequence, label_smoothing
        )
        return state, metrics + batch_metrics

    steps = jnp.minimum(max_steps, per_epoch - first).astype(jnp.int32)
    return jax.lax.fori_loop(first, first + steps, body, (state, metrics))


@partial(jax.jit, static_argnames=("batch_size", "to_sequence"))
def evaluate(
    state: TrainState, data: Batch, *, batch_size: int, to_sequence: ToSequence = rows
) -> Metrics:
    """Compute the metrics over every example of a dataset in one call.

    Args:
        state: the state to evaluate.
        data: images and labels; `batch_size` need not divide their number.
        batch_size: number of images in a batch.
        to_sequence: as in `train_step`.

    Raises:
        ValueError: as in `eval_step`, or `batch_size` is not a positive integer.
    """
    _check_data("data", data, ("image", "label"))
    num_examples = data["label"].shape[0]
    order = jnp.arange(num_examples)

    def body(index, metrics):
        return metrics + eval_step(state, _take_batch(data, order, index, batch_size), to_sequence)

    return jax.lax.fori_loop(0, steps_per_epoch(num_examples, batch_size), body, Metrics.empty())
