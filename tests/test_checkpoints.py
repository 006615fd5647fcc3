import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from lstm_flax import checkpoints

TX = optax.adam(1e-3)


def make_state(step, value=0.0):
    params = {"w": jnp.full((300, 300), value)}
    state = TrainState.create(apply_fn=None, params=params, tx=TX)
    return state.replace(step=jnp.int32(step))


def save_all(directory, records):
    with checkpoints.open_checkpoints(directory) as manager:
        for record in records:
            checkpoints.save(manager, make_state(record["step"]), {"seed": 1}, record)
        manager.wait_until_finished()
        return sorted(manager.all_steps()), manager.best_step(), manager.latest_step()


def test_without_validation_the_last_step_is_the_result(tmp_path):
    records = [{"step": s, "test_accuracy": 1 / (s + 1)} for s in range(6)]
    assert save_all(tmp_path, records) == ([3, 4, 5], 5, 5)


def test_with_validation_the_most_accurate_is_the_result_and_the_later_of_two(tmp_path):
    accuracies = [0.1, 0.9, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6]
    records = [{"step": s, "validation_accuracy": a} for s, a in enumerate(accuracies)]
    assert save_all(tmp_path, records) == ([3, 5, 6, 7], 3, 7)


def test_state_config_and_metrics_come_back_exactly(tmp_path):
    state = make_state(7, np.pi)
    record = {"step": 7, "test_loss": 0.1 + 0.2}
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, state, {"hidden_size": 3}, record)
    with checkpoints.open_checkpoints(tmp_path, read_only=True) as manager:
        restored = checkpoints.restore(manager, make_state(0), 7)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    assert restored.config == {"hidden_size": 3}
    assert restored.metrics == record


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
    advance = jax.jit(
        lambda s: s.apply_gradients(grads=jax.tree.map(jnp.ones_like, s.params)), donate_argnums=0
    )
    state = make_state(0)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        for _ in range(3):
            checkpoints.save(manager, state, {}, {"step": int(state.step)})
            for _ in range(10):
                state = advance(state)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        for step in (0, 10, 20):
            w = checkpoints.restore(manager, make_state(0), step).state.params["w"]
            assert len(np.unique(w)) == 1
            np.testing.assert_allclose(w[0, 0], -1e-3 * step, rtol=1e-3)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    save_all(tmp_path, [{"step": 3}, {"step": 5}])
    with (
        checkpoints.open_checkpoints(tmp_path) as manager,
        pytest.raises(checkpoints.CheckpointError, match=r"step 4 .*there are: 3, 5$"),
    ):
        checkpoints.restore(manager, make_state(0), 4)
