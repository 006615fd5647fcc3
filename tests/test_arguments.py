"""A wrong argument is one line that says which, what it is and what it should be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lstm_flax import (
    Keys,
    LSTMClassifier,
    LSTMStack,
    Metrics,
    checkpoints,
    create_train_state,
    eval_step,
    evaluate,
    sequences,
    train_step,
    train_steps,
    training,
)
from lstm_flax.augment import distort

IMAGES = np.zeros((6, 4, 3), np.uint8)
DATA = {"image": IMAGES, "label": np.zeros(6, np.int32)}
BATCH = DATA | {"mask": np.ones(6, bool)}
KEYS = Keys.from_seed(0)


def refuses(message):
    note = r"\n-+\nFor simplicity, JAX has removed [^\n]*"  # once a process, by JAX
    return pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*({note})?\Z")


@pytest.fixture(scope="module")
def state():
    sample = jnp.zeros((1, 4, 3))
    return create_train_state(LSTMClassifier(4, 1), optax.adam(1e-2), sample, KEYS.init)


WRONG_DATA = [
    ({"image": None}, "image is NoneType, not uint8"),
    ({"image": np.zeros((6, 12), np.uint8)}, r"image is uint8 \[6, 12\], not .*height, width\]"),
    ({"image": np.zeros((6, 4, 3, 1), np.uint8)}, r"image is uint8 \[6, 4, 3, 1\], not uint8"),
    ({"image": IMAGES / 255}, r"image is float32 \[6, 4, 3\], not uint8"),
    ({"label": np.zeros(5, np.int32)}, r"label is int32 \[5\], not integer \[6\]"),
    ({"label": np.zeros((6, 10), np.int32)}, r"label is int32 \[6, 10\], not integer \[6\]"),
    ({"label": np.zeros(6, np.float32)}, r"label is float32 \[6\], not integer \[6\]"),
    ({name: array[:0] for name, array in BATCH.items()}, "has no examples"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_DATA)
def test_arrays_that_are_no_images_and_labels(state, change, message):
    with refuses(f"batch.* {message}"):
        train_step(state, BATCH | change, KEYS.noise)
    with refuses(f"batch.* {message}"):
        eval_step(state, BATCH | change)
    with refuses(f"data.* {message}"):
        evaluate(state, DATA | change, batch_size=4)
    with refuses(f"data.* {message}"):
        train_steps(state, Metrics.empty(), DATA | change, KEYS, 1, batch_size=4)
    assert not state.step.is_deleted()  # what was refused was not given up


def test_arrays_that_are_missing_or_masks_that_are_none(state):
    for name in BATCH:
        rest = {other: array for other, array in BATCH.items() if other != name}
        for step in (eval_step, lambda *args: train_step(*args, KEYS.noise)):
            with refuses(f"batch lacks {name}; it has {', '.join(rest)}"):
                step(state, rest)
    with refuses("data lacks label; it has image"):
        evaluate(state, {"image": IMAGES}, batch_size=2)
    with refuses("data is .*, not a dict of image, label"):
        evaluate(state, tuple(DATA.values()), batch_size=2)
    with refuses(r"mask is float32 \[6\], not bool \[6\]"):
        eval_step(state, BATCH | {"mask": np.ones(6, np.float32)})


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "4"])
def test_batch_sizes(state, batch_size):
    for call in (
        lambda: evaluate(state, DATA, batch_size=batch_size),
        lambda: train_steps(state, Metrics.empty(), DATA, KEYS, 1, batch_size=batch_size),
        lambda: training.steps_per_epoch(6, batch_size),
    ):
        with refuses(f"batch_size is {batch_size!r}, not an integer of at least 1"):
            call()


def test_other_arguments_of_training(state):
    for smoothing in (-0.1, 1.0, float("nan"), "0.1"):
        with refuses(f"label_smoothing is {smoothing!r}, not at least 0 and less than 1"):
            train_step(state, BATCH, KEYS.noise, label_smoothing=smoothing)
    steps = {"data": DATA, "keys": KEYS, "max_steps": 1, "metrics": Metrics.empty()}
    for change, message in (
        ({"max_steps": 1.5}, r"max_steps is float32 \[\], not integer \[\]"),
        ({"metrics": None}, "metrics is NoneType, not Metrics"),
        ({"keys": jax.random.key(0)}, "keys is .*Tracer, not Keys"),
    ):
        with refuses(message):
            train_steps(state, batch_size=4, **steps | change)
    with refuses("num_examples is 0, not an integer of at least 1"):
        training.steps_per_epoch(0, 5)
    with refuses("the images' dtype is .*float32.*, not uint8"):
        training.to_floats(jnp.zeros((1, 4, 3)))


def test_as_many_steps_as_an_integer_can_hold_are_those_to_the_end_of_the_epoch(state):
    state = state.replace(step=jnp.int32(1))
    state, metrics = train_steps(
        jax.tree.map(jnp.copy, state), Metrics.empty(), DATA, KEYS, 2**31 - 1, batch_size=4
    )
    assert (int(state.step), int(metrics.count)) == (2, 2)


@pytest.mark.parametrize("label", [-1, 10, -11])
def test_labels_outside_the_classes_are_refused_where_they_are_known_and_else_nan(state, label):
    batch = BATCH | {"label": np.array([3, label, 0, 0, 0, 0])}
    masked = batch | {"mask": np.arange(6) != 1}
    assert np.isnan(eval_step(state, batch).loss)
    assert np.isnan(train_step(state, batch, KEYS.noise)[1].loss)
    assert np.isnan(train_step(state, batch, KEYS.noise, label_smoothing=0.1)[1].loss)
    moved, metrics = train_step(state, masked, KEYS.noise)
    assert np.isfinite(metrics.loss)
    assert training.is_finite(moved.params)
    with jax.disable_jit():
        with refuses(rf"label must be within 0\.\.9, but some are \[{label}\]"):
            eval_step(state, batch)
        assert int(eval_step(state, masked).count) == 5


def test_a_model_that_gives_no_logits():
    stack = LSTMStack(4)
    state = create_train_state(stack, optax.sgd(0.1), jnp.zeros((1, 4, 3)), KEYS.init)
    with refuses("the model's output is tuple, not floating .*batch, classes"):
        eval_step(state, BATCH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": LSTMClassifier}, "model is .*LSTMClassifier.*, not a flax.linen module"),
        ({"tx": 1e-3}, r"tx is 0\.001, not an optax optimiser"),
        ({"sample": [[[0.0]]]}, "sample is list, not floating"),
        (
            {"sample": IMAGES},
            r"sample is uint8 \[6, 4, 3\], not floating \[batch, time, features\]",
        ),
        ({"sample": jnp.zeros((4, 3))}, r"sample is float32 \[4, 3\], not floating"),
    ],
)
def test_what_no_state_can_be_made_of(change, message):
    arguments = {
        "model": LSTMClassifier(4, 1), "tx": optax.sgd(0.1), "sample": jnp.zeros((1, 4, 3)),
        "key": KEYS.init,
    }  # fmt: skip
    with refuses(message):
        create_train_state(**arguments | change)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("peak_learning_rate", [-1e-3, float("nan"), float("inf"), "1e-3", None]),
        ("total_steps", [0, -5, 10.0, None]),
        ("weight_decay", [-1e-3, float("nan"), float("inf")]),
        ("clip_norm", [0, -1.0, float("nan"), None]),
        ("warmup", [0, 1, -0.1, float("nan"), "0.3"]),
    ],
)
def test_optimisers(name, values):
    right = {"peak_learning_rate": 1e-3, "total_steps": 10, "weight_decay": 0, "clip_norm": 1.0}
    training.onecycle_adamw(**right)
    for value in values:
        with refuses(f"{name} is {value!r}, not "):
            training.onecycle_adamw(**right | {name: value})


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "0", None])
def test_seeds_are_those_that_mean_the_same_with_x64(seed):
    with refuses(f"seed is {seed!r}, not an integer from 0 to "):
        Keys.from_seed(seed)


def test_the_largest_seed_means_the_same_with_x64():
    keys = jax.random.key_data(Keys.from_seed(2**32 - 1).order)
    with jax.enable_x64(True):
        same = jax.random.key_data(Keys.from_seed(2**32 - 1).order)
    np.testing.assert_array_equal(keys, same)


@pytest.mark.parametrize(
    "name", ["max_rotation", "max_shear", "max_scale", "max_shift", "strength", "elastic"]
)
def test_amounts_of_distortion(name):
    images = jnp.zeros((2, 4, 4))
    beyond = {"max_shear": 1.6, "max_scale": 1.0}.get(name, float("inf"))
    for value in (-0.1, float("nan"), beyond, "0.1"):
        with refuses(f"{name} is {value!r}, not at least 0 and less than "):
            distort(jax.random.key(0), images, **{name: value})
    for value in (0, -4.0, float("nan")):
        with refuses(f"elastic_radius is {value!r}, not a finite number greater than 0"):
            distort(jax.random.key(0), images, elastic_radius=value)
    for value in (0.5, float("nan"), float("inf"), "2"):
        with refuses(f"gamma is {value!r}, not a finite number of at least 1"):
            distort(jax.random.key(0), images, gamma=value)
    with refuses(r"strength \* max_scale is 1.2, not at least 0 and less than 1"):
        distort(jax.random.key(0), images, strength=4, max_scale=0.3)


def test_images_to_distort_and_to_read():
    for images, found in (
        (IMAGES, r"uint8 \[6, 4, 3\]"),
        (jnp.zeros((4, 3)), r"float32 \[4, 3\]"),
        ([[[0.0]]], "list"),
    ):
        with refuses(rf"images is {found}, not floating \[batch, height, width\]"):
            distort(jax.random.key(0), images)
    for read in (sequences.rows, sequences.pixels, sequences.permuted_pixels):
        with refuses(r"images is uint8 \[4, 3\], not an array \[batch, height, width\]"):
            read(IMAGES[0])
        assert len(read(IMAGES)) == 6
        assert len(read(IMAGES[:0])) == 0


def test_checkpoints(tmp_path):
    tree, last = {"w": jnp.ones(3)}, 3
    for keep in (0, -1, 1.5, None):
        with (
            refuses(f"keep is {keep!r}, not an integer of at least 1"),
            checkpoints.open_checkpoints(tmp_path, keep=keep),
        ):
            pass
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, jnp.int32(last), tree, {})
        checkpoints.wait(manager)
        for step in (-1, 1.5, "4", None):
            with refuses(f"step is {step!r}, not an integer"):
                checkpoints.save(manager, step, tree, {})
        for step in (last, 1):
            with pytest.raises(checkpoints.CheckpointError, match=f"^step {step} can't .* step 3$"):
                checkpoints.save(manager, step, tree, {})
        for other, message in (
            ({}, "the tree holds no arrays"),
            ({"w": {"a": 1.0}}, "w/a is float, not an array of numbers"),
            ({"key": jax.random.key(0)}, "key is key<fry>, not an array of numbers"),
            ({"name": np.array(["x"])}, "name is <U1, not an array of numbers"),
            (3, "the tree is int, not an array"),
        ):
            with refuses(message):
                checkpoints.save(manager, last + 1, other, {})
            with refuses(message):
                checkpoints.restore(manager, other, last)
        for step in ("3", 3.0, None):
            with refuses(f"step is {step!r}, not an integer"):
                checkpoints.restore(manager, tree, step)
        assert manager.all_steps() == [last]
        np.testing.assert_array_equal(checkpoints.restore(manager, tree, last).tree["w"], tree["w"])


def test_a_rate_that_is_traced_is_taken():
    def update(rate):
        tx = training.onecycle_adamw(rate, 10, weight_decay=0.0, clip_norm=1.0)
        return tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})[0]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        jax.jit(update)(1e-2),
        update(1e-2),
    )


def test_a_module_of_flaxs_own_can_be_trained():
    class Mean(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            return nn.Dense(10)(x.mean(1))

    state = create_train_state(Mean(), optax.sgd(0.1), jnp.zeros((1, 4, 3)), KEYS.init)
    assert int(train_step(state, BATCH, KEYS.noise)[0].step) == 1
