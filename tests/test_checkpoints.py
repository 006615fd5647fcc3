import pickle
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

from lstm_flax import checkpoints

TX = optax.adam(1e-3)


def make_state(step, value=0.0):
    params = {"w": jnp.full((300, 300), value, jnp.float32)}
    state = TrainState.create(apply_fn=None, params=params, tx=TX)
    return state.replace(step=jnp.int32(step))


def save_all(directory, metrics):
    """Save a checkpoint for each metrics; returns `(steps kept, best, latest)`."""
    with checkpoints.open_checkpoints(directory) as manager:
        for step, of_step in enumerate(metrics):
            checkpoints.save(manager, step, make_state(step, step), {"n": step}, of_step)
        checkpoints.wait(manager)
        return sorted(manager.all_steps()), checkpoints.best_step(manager), manager.latest_step()


def restored_result(directory):
    with checkpoints.open_checkpoints(directory, read_only=True) as manager:
        steps = checkpoints.result_steps(manager)
        restored, damages = checkpoints.restore_first(manager, make_state(0), steps)
    # Whatever it is, it is as it was saved.
    assert restored.metadata == {"n": restored.step}
    expected = make_state(restored.step, restored.step)
    jax.tree.map(np.testing.assert_array_equal, restored.tree, expected)
    return restored.step, [str(damage) for damage in damages]


def test_without_validation_the_last_step_is_the_result(tmp_path):
    metrics = [{"test_accuracy": 1 / (step + 1)} for step in range(6)]
    assert save_all(tmp_path, metrics) == ([3, 4, 5], 5, 5)


def test_with_validation_the_most_accurate_is_the_result_and_the_later_of_two(tmp_path):
    accuracies = [0.1, 0.9, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6]
    metrics = [{"validation_accuracy": accuracy} for accuracy in accuracies]
    assert save_all(tmp_path, metrics) == ([3, 5, 6, 7], 3, 7)


def test_a_checkpoint_within_an_epoch_is_never_the_best_of_a_run_with_validation(tmp_path):
    assert save_all(tmp_path, [{"validation_accuracy": 0.1}, {}, {}, {}, {}])[1] == 0


def test_arrays_and_json_values_come_back_exactly(tmp_path):
    tree = {
        "half": jnp.arange(7, dtype=jnp.bfloat16) / 3,
        "flags": jnp.arange(9) % 2 == 0,
        "count": jnp.int32(-3),
        "wide": jax.random.normal(jax.random.key(0), (100, 200)),
    }
    metadata = {"seed": 1, "records": [{"test_loss": 0.1 + 0.2}], "seconds": 1e-300}
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, 7, tree, metadata)
    with checkpoints.open_checkpoints(tmp_path, read_only=True) as manager:
        restored = checkpoints.restore(manager, jax.tree.map(jnp.zeros_like, tree), 7)
    jax.tree.map(np.testing.assert_array_equal, restored.tree, tree)
    assert restored.metadata == metadata


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
    advance = jax.jit(
        lambda s: s.apply_gradients(grads=jax.tree.map(jnp.ones_like, s.params)), donate_argnums=0
    )
    state = make_state(0)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        for _ in range(3):
            checkpoints.save(manager, int(state.step), state, {})
            for _ in range(10):
                state = advance(state)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        for step in (0, 10, 20):
            w = checkpoints.restore(manager, make_state(0), step).tree.params["w"]
            assert len(np.unique(w)) == 1
            np.testing.assert_allclose(w[0, 0], -1e-3 * step, rtol=1e-3)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    save_all(tmp_path, [{}, {}])
    with (
        checkpoints.open_checkpoints(tmp_path) as manager,
        pytest.raises(checkpoints.CheckpointError, match=r"step 4 .*there are: 0, 1$"),
    ):
        checkpoints.restore(manager, make_state(0), 4)


def test_a_checkpoint_of_another_model_is_refused_with_both_shapes(tmp_path):
    save_all(tmp_path, [{}])
    other = make_state(0).replace(params={"w": jnp.zeros((300, 200))})
    message = r"another model: params/w is float32\[300, 300\] there, float32\[300, 200\] here"
    with (
        checkpoints.open_checkpoints(tmp_path) as manager,
        pytest.raises(checkpoints.CheckpointError, match=message),
    ):
        checkpoints.restore(manager, other, 0)


def test_a_checkpoint_of_an_unknown_layout_is_refused(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(make_state(0)))
    with pytest.raises(checkpoints.CheckpointError, match="step 0: its description can't be read"):
        restored_result(tmp_path)


DAMAGES = {
    "a flipped bit": lambda file, at: file[:at] + bytes([file[at] ^ 1 << at % 8]) + file[at + 1 :],
    "cut off": lambda file, at: file[:at],
    "empty": lambda file, at: b"",
    "zeros": lambda file, at: bytes(len(file)),
    "removed": lambda file, at: None,
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    save_all(directory, [{}, {}])
    return directory


@pytest.fixture(scope="module")
def validated_checkpoints(tmp_path_factory):
    """Of three, of which the first is the result."""
    directory = tmp_path_factory.mktemp("validated")
    save_all(directory, [{"validation_accuracy": accuracy} for accuracy in (0.9, 0.1, 0.2)])
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("checkpoints_of", "result", "next_best"),
    [("two_checkpoints", 1, 0), ("validated_checkpoints", 0, 2)],
)
def test_no_damage_to_any_file_goes_unseen_or_reaches_another_checkpoint(
    request, tmp_path, capfd, checkpoints_of, result, next_best, damage
):
    """Either the damage did not matter, or the next best is restored and it is said."""
    rng = random.Random(damage)
    directory, hurt = request.getfixturevalue(checkpoints_of), 0
    paths = [path for path in sorted((directory / str(result)).rglob("*")) if path.is_file()]
    if damage == "removed":
        paths += [path for path in (directory / str(result)).rglob("*") if path.is_dir()]
    for number, path in enumerate(paths):
        copy = tmp_path / str(number)
        shutil.copytree(directory, copy)
        harmed = copy / path.relative_to(directory)
        if path.is_dir():
            shutil.rmtree(harmed)
        elif damage == "removed":
            harmed.unlink()
        elif content := path.read_bytes():
            harmed.write_bytes(DAMAGES[damage](content, rng.randrange(len(content))))
        step, damages = restored_result(copy)
        if step == result:
            assert not damages, path
            continue
        assert step == next_best, path
        assert [damage.startswith(f"step {result}: ") for damage in damages] == [True], path
        hurt += 1
    assert hurt >= 2  # the arrays and their description at the least
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_description_of_a_checkpoint_that_is_no_result_is_nothing_to_tell(tmp_path):
    save_all(tmp_path, [{"test_accuracy": 0.5}] * 3)
    (tmp_path / "0" / "about" / "metadata").unlink()
    assert restored_result(tmp_path) == (2, [])


def test_a_checkpoint_that_may_be_the_best_is_kept_though_its_description_is_damaged(tmp_path):
    save_all(tmp_path, [{"validation_accuracy": accuracy} for accuracy in (0.9, 0.1, 0.2)])
    (tmp_path / "0" / "about" / "metadata").unlink()
    with checkpoints.open_checkpoints(tmp_path) as manager:
        for step in range(3, 7):
            checkpoints.save(manager, step, make_state(step, step), {"n": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "4", "5", "6"]


def test_a_flipped_bit_of_an_array_is_seen_though_it_can_be_read(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    # Random numbers don't compress, so Orbax alone would restore this one without a word.
    with checkpoints.open_checkpoints(tmp_path / "copy") as manager:
        tree = {"w": jax.random.normal(jax.random.key(0), (300, 300))}
        checkpoints.save(manager, 2, tree, {})
        checkpoints.wait(manager)
        largest = max((tmp_path / "copy" / "2").rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        with pytest.raises(checkpoints.DamagedError, match="do not match their fingerprints"):
            checkpoints.restore(manager, tree, 2)


def test_where_no_checkpoint_is_intact_each_is_named(two_checkpoints, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    for step in "01":
        (copy / step / "about" / "metadata").unlink()
    with pytest.raises(checkpoints.CheckpointError, match=r"can be restored: step 1: .*step 0: "):
        restored_result(copy)


def test_half_written_folders_of_a_killed_run_are_removed(two_checkpoints, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    (copy / "1").rename(copy / "1.orbax-checkpoint-tmp")
    assert restored_result(copy) == (0, [])  # read-only: all stays
    assert (copy / "1.orbax-checkpoint-tmp").exists()
    with checkpoints.open_checkpoints(copy) as manager:
        assert sorted(manager.all_steps()) == [0]
        checkpoints.save(manager, 1, make_state(1, 1), {"n": 1})
    assert sorted(path.name for path in copy.iterdir()) == ["0", "1"]
    assert restored_result(copy) == (1, [])


def test_restoring_executes_nothing_from_the_checkpoint(two_checkpoints, monkeypatch):
    """No unpickling, the one way by which arrays and JSON could become code."""
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    assert restored_result(two_checkpoints) == (1, [])
