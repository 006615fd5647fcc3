import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lstm_flax import (
    Keys,
    LSTMClassifier,
    Metrics,
    create_train_state,
    eval_step,
    evaluate,
    sequences,
    train_step,
    train_steps,
    training,
)
from lstm_flax.augment import distort


def make_data(num_images, seed=0):
    """Random images whose label is written into them, so that they can be learned."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, num_images)
    images = rng.integers(0, 256, (num_images, 28, 28))
    images[np.arange(num_images), :, labels] = 255
    return {"image": jnp.array(images, jnp.uint8), "label": jnp.array(labels, jnp.int32)}


DATA_5 = make_data(5)
ADAM = optax.adam(1e-2)


def make_state(**options):
    model = LSTMClassifier(16, 2, **options)
    return create_train_state(model, ADAM, jnp.zeros((1, 28, 28)), jax.random.key(0))


def as_batch(data):
    return data | {"mask": jnp.ones(len(data["label"]), bool)}


def assert_equal_trees(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def run_epoch(state, data, chunks, **options):
    metrics, keys = Metrics.empty(), Keys.from_seed(5)
    for chunk in chunks:
        state, metrics = train_steps(state, metrics, data, keys, chunk, **options)
    return state, metrics


def train_a_little(num_steps):
    """Leaves of all that a short training makes, of 5 images of 4 x 3 pixels."""
    tx = training.onecycle_adamw(1e-2, 10, weight_decay=1e-2, clip_norm=1.0)
    sample = jnp.zeros((1, 4, 3))  # float64 with x64
    state = create_train_state(LSTMClassifier(4, 1), tx, sample, jax.random.key(0))
    data = {name: array[..., :4, :3] if array.ndim > 1 else array for name, array in DATA_5.items()}
    fresh = jax.tree.leaves(jax.tree.map(jnp.copy, (state, Metrics.empty())))
    state, metrics = run_epoch(state, data, [num_steps], batch_size=3)
    evaluated = evaluate(state, data, batch_size=3)
    read = (evaluated.loss, evaluated.accuracy)
    return fresh, jax.tree.leaves((state, metrics)), jax.tree.leaves((evaluated, read))


@pytest.mark.slow
@pytest.mark.parametrize("context", [jax.enable_x64(True), jax.disable_jit()], ids=["x64", "eager"])
def test_neither_x64_nor_the_lack_of_jit_changes_what_comes_out(context):
    """So that a checkpoint that was made with it can be restored without, and the other way."""
    expected = train_a_little(np.int32(2))
    fresh, trained, _ = expected
    assert [leaf.dtype for leaf in trained] == [leaf.dtype for leaf in fresh]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(expected)} == {"float32", "int32"}
    with context:
        found = train_a_little(np.int64(2))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_overfits_32_images():
    batch = as_batch(make_data(32))
    state = make_state()
    for _ in range(250):
        state, _ = train_step(state, batch, jax.random.key(0))
    metrics = eval_step(state, batch)
    assert int(metrics.correct) == 32
    assert float(metrics.loss) < 0.05


def test_step_two_does_not_recompile():
    batch = as_batch(make_data(8))
    state, _ = train_step(make_state(), batch, jax.random.key(0))
    compiled = train_step._cache_size()
    state, _ = train_step(state, batch, jax.random.key(1))
    assert train_step._cache_size() == compiled
    data = make_data(10)
    state, metrics = run_epoch(state, data, [1], batch_size=4)
    compiled = train_steps._cache_size()
    train_steps(state, metrics, data, Keys.from_seed(5), 2, batch_size=4)
    assert train_steps._cache_size() == compiled


@pytest.mark.parametrize("batch_size", [1, 7, 10, 23, 64])
def test_metrics_count_every_example_of_a_ragged_last_batch(batch_size):
    data, state = make_data(23), make_state()
    logits = state.apply_fn({"params": state.params}, training.to_floats(data["image"]))
    logits, labels = np.asarray(logits, np.float64), np.asarray(data["label"])
    log_sums = np.log(np.exp(logits).sum(1))
    losses = log_sums - logits[np.arange(23), labels]

    metrics = evaluate(state, data, batch_size=batch_size)
    assert int(metrics.count) == 23
    assert int(metrics.correct) == (logits.argmax(1) == labels).sum()
    np.testing.assert_allclose(metrics.loss, losses.mean(), rtol=1e-5)


def test_an_epoch_trains_on_every_image_once_and_weighs_it_once():
    """With a learning rate of 0 the epoch's metrics are those of the whole set."""
    data = make_data(23)
    model = LSTMClassifier(16, 2)
    state = create_train_state(model, optax.sgd(0.0), jnp.zeros((1, 28, 28)), jax.random.key(0))
    whole = evaluate(state, data, batch_size=23)
    state, metrics = run_epoch(state, data, [100], batch_size=5)
    assert int(state.step) == 5
    assert (int(metrics.count), int(metrics.correct)) == (23, int(whole.correct))
    np.testing.assert_allclose(metrics.loss, whole.loss, rtol=1e-5)


def test_padding_of_the_last_batch_leaves_no_trace_in_the_gradient():
    data = make_data(3)
    filled = {
        "image": jnp.concatenate([data["image"], jnp.full((2, 28, 28), 200, jnp.uint8)]),
        "label": jnp.concatenate([data["label"], jnp.array([4, 4], jnp.int32)]),
        "mask": jnp.array([True, True, True, False, False]),
    }
    key = jax.random.key(0)
    plain, _ = train_step(make_state(), as_batch(data), key)
    padded, _ = train_step(make_state(), filled, key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain.params, padded.params
    )


@pytest.mark.parametrize("options", [{}, {"augment": distort}])
def test_chunks_of_any_size_give_the_same_bits(options):
    data = make_data(23)
    whole = run_epoch(make_state(dropout=0.3), data, [5], batch_size=5, **options)
    for chunks in ([1, 1, 1, 1, 1], [2, 3], [4, 99]):
        parts = run_epoch(make_state(dropout=0.3), data, chunks, batch_size=5, **options)
        assert_equal_trees(whole, parts)


def test_train_steps_equal_a_loop_over_train_step():
    data, keys = make_data(23), Keys.from_seed(5)
    looped, expected = make_state(), Metrics.empty()
    for epoch in range(2):
        order = jax.random.permutation(jax.random.fold_in(keys.order, epoch), 23)
        for first in range(0, 23, 5):
            rows = order[first : first + 5]
            batch = as_batch({name: array[rows] for name, array in data.items()})
            looped, metrics = train_step(looped, batch, keys.noise)
            expected = expected + metrics
    state, metrics = run_epoch(make_state(), data, [9, 9], batch_size=5)
    assert int(metrics.correct) == int(expected.correct)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, looped.params
    )


def test_noise_differs_between_steps_and_repeats_with_the_step():
    batch = as_batch(make_data(16))
    state = make_state(dropout=0.5)

    def loss_at(step):
        at = state.replace(step=jnp.int32(step))
        return float(train_step(at, batch, jax.random.key(0), distort)[1].loss)

    assert loss_at(3) == loss_at(3)
    assert loss_at(3) != loss_at(4)


@pytest.mark.parametrize(("options", "top"), [({}, 30), ({"warmup": 0.05}, 5)])
def test_learning_rate_is_one_cycle_and_gradients_are_clipped(options, top):
    tx = training.onecycle_adamw(1e-2, 100, weight_decay=0.0, clip_norm=1.0, **options)
    params = {"w": jnp.zeros(3)}
    small, state, sizes = {"w": jnp.full(3, 1e-3)}, tx.init(params), []
    for _ in range(100):
        updates, state = tx.update(small, state, params)
        sizes.append(float(jnp.abs(updates["w"]).max()))
    assert int(np.argmax(sizes)) in range(top - 2, top + 3)
    np.testing.assert_allclose(max(sizes), 1e-2, rtol=1e-2)
    assert sizes[0] < 1e-3
    assert sizes[-1] < 1e-5
    # The clipped gradient has norm 1, so Adam's first moment is a tenth of that.
    updates, state = tx.update({"w": jnp.full(3, 1e6)}, tx.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(jnp.linalg.norm(moment), 0.1, rtol=1e-5)


@pytest.mark.usefixtures("strict_dtypes")
def test_affine_of_no_size_is_the_identity_and_a_shift_moves_pixels():
    images = jax.random.uniform(jax.random.key(0), (4, 28, 28))
    still = {"max_rotation": 0.0, "max_shear": 0.0, "max_scale": 0.0}
    key = jax.random.key(1)
    np.testing.assert_array_equal(distort(key, images, max_shift=0.0, **still), images)
    moved = distort(key, images, max_shift=2.0, **still)
    assert not np.allclose(moved, images)
    # A ramp that falls by one a pixel shows by how much each image was moved along x.
    ramp = jnp.broadcast_to(jnp.arange(28.0), (64, 28, 28))
    shifts = (distort(key, ramp, max_shift=2.0, **still) - ramp)[:, 5:-5, 5:-5]
    np.testing.assert_allclose(shifts.min((1, 2)), shifts.max((1, 2)), atol=1e-4)
    assert shifts.min() >= -2
    assert shifts.max() <= 2
    assert shifts.std() > 0.8  # uniform on [-2, 2] has 1.15


@pytest.mark.usefixtures("strict_dtypes")
def test_affine_rotates_about_the_centre():
    spot = jnp.zeros((32, 29, 29)).at[:, 14, 20].set(1.0)
    turned = distort(
        jax.random.key(0), spot, max_rotation=0.2, max_shear=0.0, max_scale=0.0, max_shift=0.0
    )
    y, x = np.mgrid[:29, :29] - 14.0
    mass = np.asarray(turned, np.float64)
    mass /= mass.sum((1, 2), keepdims=True)
    centre_y, centre_x = (mass * y).sum((1, 2)), (mass * x).sum((1, 2))
    np.testing.assert_allclose(np.hypot(centre_y, centre_x), 6, atol=0.3)
    angles = np.arctan2(centre_y, centre_x)
    assert np.abs(angles).max() < 0.25
    assert angles.std() > 0.08  # uniform on [-0.2, 0.2] has 0.115


@pytest.mark.usefixtures("strict_dtypes")
def test_elastic_moves_points_by_its_pixels_and_neighbours_together():
    still = {"max_rotation": 0.0, "max_shear": 0.0, "max_scale": 0.0, "max_shift": 0.0}
    ramp = jnp.broadcast_to(jnp.arange(28.0), (512, 28, 28))
    moves = (distort(jax.random.key(0), ramp, elastic=0.5, **still) - ramp)[:, 3:-3, 3:-3]
    np.testing.assert_allclose(moves.std((0, 2)), 0.5, rtol=0.1)
    # Blurring twice by a Gaussian of radius 4 is one of radius 4 √2: at 4 pixels exp(-1/4).
    near = (moves[:, :, :-4] * moves[:, :, 4:]).mean() / moves.var()
    np.testing.assert_allclose(near, np.exp(-0.25), atol=0.05)


@pytest.mark.usefixtures("strict_dtypes")
def test_gamma_raises_all_pixels_of_an_image_to_one_power():
    still = {"max_rotation": 0.0, "max_shear": 0.0, "max_scale": 0.0, "max_shift": 0.0}
    images = jnp.broadcast_to(jnp.linspace(0, 1, 28), (512, 28, 28))
    raised = np.asarray(distort(jax.random.key(0), images, gamma=2.0, **still))
    np.testing.assert_array_equal(raised[..., 0], 0)
    powers = np.log(raised[..., 1:-1]) / np.log(np.asarray(images[..., 1:-1]))
    np.testing.assert_allclose(powers, np.broadcast_to(powers[:, :1, :1], powers.shape), rtol=1e-3)
    drawn = np.log2(powers[:, 0, 0])  # uniform on [-1, 1]
    assert np.abs(drawn).max() < 1.001
    assert 0.5 < drawn.std() < 0.65
    np.testing.assert_array_equal(distort(jax.random.key(0), images, gamma=1.0, **still), images)


def test_label_smoothing_is_cross_entropy_with_soft_targets():
    batch, state = as_batch(make_data(8)), make_state()
    targets = 0.8 * np.eye(10, dtype=np.float32)[batch["label"]] + 0.02

    def loss(params):
        logits = state.apply_fn({"params": params}, training.to_floats(batch["image"]))
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    plain = state.replace(tx=optax.sgd(1.0), opt_state=optax.sgd(1.0).init(state.params))
    moved, metrics = train_step(plain, batch, jax.random.key(0), label_smoothing=0.2)
    expected = jax.tree.map(lambda p, g: p - g, state.params, jax.grad(loss)(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved.params, expected)
    assert float(metrics.loss) == float(eval_step(state, batch).loss)  # of the plain labels


def test_readings_have_every_pixel_once_and_a_fixed_order():
    images = jnp.arange(2 * 784).reshape(2, 28, 28)
    np.testing.assert_array_equal(sequences.rows(images)[1, 3], images[1, 3])
    sequence = sequences.pixels(images)
    assert sequence.shape == (2, 784, 1)
    np.testing.assert_array_equal(sequence[1, 30, 0], images[1, 1, 2])
    permuted = sequences.permuted_pixels(images)[:, :, 0]
    np.testing.assert_array_equal(jnp.sort(permuted), images.reshape(2, 784))
    np.testing.assert_array_equal(permuted[1] - 784, permuted[0])
    assert permuted[0, :3].tolist() == [319, 576, 323]  # as in the literature's code
