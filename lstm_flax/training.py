"""Training and evaluation: pure functions over a `TrainState` and batches.

A dataset is a dict of arrays that lie whole on the device, `{"image": uint8 [n, height, width],
"label": int32 [n]}`. A batch is one too, with a "mask", bool [batch], that is False where the
last batch of a pass was filled up. Every example counts, each exactly once a pass.

Everything random is a function of `(seed, epoch)` or `(seed, step)`, so a `TrainState`, which
knows its step, is all that a resumed run needs.

An argument that does not fit is a ValueError of one line, raised while the function is traced. A
label outside the classes is one only where labels are known, outside `jax.jit`; in a compiled step
it makes the loss NaN, since telling of it would have every step wait for the device.
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
from lstm_flax.readings import rows

Batch = dict[str, jax.Array]
Augment = Callable[[jax.Array, jax.Array], jax.Array]
Reading = Callable[[jax.Array], jax.Array]


class Keys(NamedTuple):
    """The PRNG keys of a run, one for each thing that is random."""

    init: jax.Array
    order: jax.Array  # with the epoch: the order of the training images
    noise: jax.Array  # with the step: dropout and augmentation

    @classmethod
    def from_seed(cls, seed: int) -> "Keys":
        """Derive the keys of the run with this seed, an integer of 32 bits.

        Of a larger or a negative one JAX would take more bits with `jax_enable_x64` than without.
        """
        check(
            "seed", seed, "an integer from 0 to 2**32 - 1", lambda s: operator.index(s) >> 32 == 0
        )
        return cls(*jax.random.split(jax.random.key(seed), 3))


@flax.struct.dataclass
class Metrics:
    """Sums over examples, which add up over batches; they are divided once, when read."""

    loss_sum: jax.Array  # float32, cross-entropy in nats
    correct: jax.Array  # int32
    count: jax.Array  # int32

    @classmethod
    def zero(cls) -> "Metrics":
        """The metrics of no examples."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    @classmethod
    def of(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> "Metrics":
        """Metrics of one batch: logits [batch, classes], labels [batch], mask bool [batch].

        The loss is NaN where a label that counts is outside the classes.

        Raises:
            ValueError: a shape or dtype is another, or labels that are known are outside the
                classes.
        """
        check_array("the model's result", logits, ("batch", "classes"), np.floating)
        check_array("label", labels, logits.shape[:1], np.integer)
        check_array("mask", mask, logits.shape[:1], np.bool_)
        labels, classes = labels.astype(jnp.int32), logits.shape[1]
        is_outside = (labels < 0) | (labels >= classes)
        if not isinstance(wrong := mask & is_outside, jax.core.Tracer) and wrong.any():
            found = sorted(set(labels[wrong].tolist()))
            raise ValueError(f"label is within 0..{classes - 1}, but some are {found}")
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
        """Mean cross-entropy, nats an example."""
        return self.loss_sum / self.count

    @property
    def accuracy(self) -> jax.Array:
        """Fraction of the examples that were classified correctly."""
        return self.correct.astype(jnp.float32) / self.count


def data_mesh() -> Mesh:
    """A mesh of all devices along the axis "data"; one device is a mesh of one."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any) -> Any:
    """Lay every array of `tree` whole on each device of the mesh in force (`jax.set_mesh`)."""
    return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), P()))


def shard_opt_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shard the optimiser's state over the devices of the mesh in force.

    Without it each keeps all of it. The updates are the same; each step gathers them (Rajbhandari
    et al., "ZeRO", 2020, stage 1). What no axis of can be shared equally stays whole.
    """

    def init(params):
        return _constrain(tx.init(params), _share)

    def update(updates, state, params=None, **more):
        updates, state = tx.update(updates, state, params, **more)
        return _whole(updates), _constrain(state, _share)

    return optax.GradientTransformation(init, update)


def _share(leaf: jax.Array) -> P:
    """Split the first axis that the devices can share equally."""
    devices = jax.sharding.get_abstract_mesh().size
    axis = next((k for k, size in enumerate(leaf.shape) if size % devices == 0), None)
    return P() if axis is None else P(*[None] * axis, "data")


def _whole(tree: Any) -> Any:
    """Under `jax.set_mesh`, keep all of each array on every device."""
    return _constrain(tree, lambda leaf: P())


def _split_over_devices(batch: Batch) -> Batch:
    """Under `jax.set_mesh`, give each device its share of the batch."""
    return _constrain(batch, lambda array: P("data"))


def _constrain(tree: Any, spec: Callable[[jax.Array], P]) -> Any:
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spec(leaf)), tree)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches in one pass over the data, the last of them perhaps filled up.

    Raises:
        ValueError: one of them is no positive integer.
    """
    check_integer("num_examples", num_examples, 1)
    check_integer("batch_size", batch_size, 1)
    return -(-num_examples // batch_size)


def onecycle_adamw(
    peak_learning_rate: float, total_steps: int, *, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW under a one-cycle learning rate.

    The rate climbs to its peak over the first three tenths of `total_steps` and falls to almost
    nothing by their end, along cosines (Smith and Topin, "Super-Convergence", 2018).

    Args:
        peak_learning_rate: the largest learning rate.
        total_steps: steps of the whole training.
        weight_decay: decoupled (Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
            2019): each step takes `learning_rate * weight_decay` of every parameter off it.
        clip_norm: the largest global norm of the gradients; larger ones are scaled down to it.

    Raises:
        ValueError: one of them is out of its bounds.
    """
    for name, value in (("peak_learning_rate", peak_learning_rate), ("weight_decay", weight_decay)):
        check(name, value, "a finite number from 0 on", lambda v: 0 <= v < math.inf)
    check_integer("total_steps", total_steps, 1)
    check("clip_norm", clip_norm, "a number greater than 0", lambda v: v > 0)
    schedule = optax.cosine_onecycle_schedule(total_steps, peak_learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay)
    )


def create_train_state(
    model: nn.Module, tx: optax.GradientTransformation, sample: jax.Array, key: jax.Array
) -> TrainState:
    """Fresh parameters and optimiser state at step 0, under `jax.set_mesh` whole on each device.

    Args:
        model: called as `model(x, deterministic=...)`, x being [batch, time, features].
        tx: the optimiser.
        sample: any input of the right shape and dtype; only those matter.
        key: PRNG key of the initialisers.

    Raises:
        ValueError: the model is no module, `tx` no optimiser, or the sample not floating [batch,
            time, features].
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
    """Compiled once for all keys; flax alone would take as long again for each."""
    return model.init(key, sample)["params"]


def to_floats(images: jax.Array) -> jax.Array:
    """uint8 images as float32 in [0, 1].

    Raises:
        ValueError: they are of another dtype.
    """
    check("the images' dtype", getattr(images, "dtype", None), "uint8", lambda d: d == np.uint8)
    return images.astype(jnp.float32) / 255


@partial(jax.jit, static_argnames=("augment", "read", "label_smoothing"))
def train_step(
    state: TrainState,
    batch: Batch,
    noise_key: jax.Array,
    augment: Augment | None = None,
    read: Reading = rows,
    label_smoothing: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One gradient step on the mean cross-entropy of a batch.

    Args:
        state: the state before the step.
        batch: images, labels and mask, as the module describes them.
        noise_key: of dropout and augmentation; `state.step` is folded into it.
        augment: `(key, images float32 [batch, height, width]) -> images`.
        read: `images -> sequences [batch, time, features]`, as in `lstm_flax.readings`.
        label_smoothing: part of each label's weight that goes to all classes alike (Szegedy et
            al., "Rethinking the Inception Architecture", 2016, section 7); the metrics' loss is
            that of the plain labels.

    Returns:
        The state after the step, and the metrics of the batch before it.

    Raises:
        ValueError: an array is missing, misshapen or of another dtype, or the label smoothing not
            in [0, 1).
    """
    _check_data("batch", batch, ("image", "label", "mask"))
    smoothing = "at least 0 and less than 1"
    check("label_smoothing", label_smoothing, smoothing, lambda s: 0 <= s < 1)
    dropout_key, augment_key = jax.random.split(jax.random.fold_in(noise_key, state.step))
    images = to_floats(batch["image"])
    if augment is not None:
        images = augment(augment_key, images)
    x = read(images)

    def loss_fn(params):
        rngs = {"dropout": dropout_key}
        logits = state.apply_fn({"params": params}, x, deterministic=False, rngs=rngs)
        metrics = Metrics.of(logits, batch["label"], batch["mask"])
        if not label_smoothing:
            return metrics.loss, metrics
        labels = jax.nn.one_hot(batch["label"], logits.shape[-1])
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, label_smoothing))
        return jnp.sum(losses, where=batch["mask"]) / metrics.count, metrics

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    return state.replace(params=_whole(state.params)), metrics


@partial(jax.jit, static_argnames="read")
def eval_step(state: TrainState, batch: Batch, read: Reading = rows) -> Metrics:
    """Metrics of one batch, without dropout or augmentation.

    Args:
        state: whose parameters are evaluated.
        batch: images, labels and mask, as the module describes them.
        read: as in `train_step`.

    Raises:
        ValueError: an array is missing, misshapen or of another dtype.
    """
    _check_data("batch", batch, ("image", "label", "mask"))
    logits = state.apply_fn({"params": state.params}, read(to_floats(batch["image"])))
    return Metrics.of(logits, batch["label"], batch["mask"])


@jax.jit
def is_finite(tree: Any) -> jax.Array:
    """Whether no number in a tree is NaN or infinite, as a bool array []."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _check_data(name: str, data: Batch, arrays: tuple[str, ...]) -> None:
    """Check that these arrays are there, and are as the module describes them."""
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
    """Batch `index` of a pass over `data` in the given order, filled up with masked examples."""
    positions = index * batch_size + jnp.arange(batch_size)
    mask = positions < order.size
    rows = order[jnp.where(mask, positions, 0)]
    batch = {name: array[rows] for name, array in data.items()}
    return _split_over_devices(batch | {"mask": mask})


@partial(
    jax.jit,
    static_argnames=("batch_size", "augment", "read", "label_smoothing"),
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
    read: Reading = rows,
    label_smoothing: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """Up to `max_steps` train steps in one call, stopping where the epoch ends.

    `max_steps` is traced, so one compiled program serves chunks of any size, and the result does
    not depend on how a pass is cut into chunks. `state` and `metrics` are given up to the call.

    Args:
        state: its step says which epoch this is and which batches are still to come.
        metrics: of the epoch so far.
        data: the whole training set.
        keys: the run's.
        max_steps: steps to take at most.
        batch_size: images a step.
        augment, read, label_smoothing: as in `train_step`.

    Returns:
        The state after these steps, and the metrics of the epoch so far.

    Raises:
        ValueError: as by `train_step`, or the batch size is no positive integer.
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
        state, batch_metrics = train_step(state, batch, keys.noise, augment, read, label_smoothing)
        return state, metrics + batch_metrics

    steps = jnp.minimum(max_steps, per_epoch - first).astype(jnp.int32)
    return jax.lax.fori_loop(first, first + steps, body, (state, metrics))


@partial(jax.jit, static_argnames=("batch_size", "read"))
def evaluate(state: TrainState, data: Batch, *, batch_size: int, read: Reading = rows) -> Metrics:
    """Metrics over a whole dataset, every example of it, in one call.

    Args:
        state: whose parameters are evaluated.
        data: the images and labels, in any number.
        batch_size: images at a time.
        read: as in `train_step`.

    Raises:
        ValueError: as by `eval_step`, or the batch size is no positive integer.
    """
    _check_data("data", data, ("image", "label"))
    num_examples = data["label"].shape[0]
    order = jnp.arange(num_examples)

    def body(index, metrics):
        return metrics + eval_step(state, _take_batch(data, order, index, batch_size), read)

    return jax.lax.fori_loop(0, steps_per_epoch(num_examples, batch_size), body, Metrics.zero())
