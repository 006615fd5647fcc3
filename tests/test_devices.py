"""One code path for any number of devices and processes."""

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import finish, read_eval, read_lines, read_until, start

pytestmark = pytest.mark.slow

FLAGS = ["--epochs", "3", "--batch-size", "200", "--num-layers", "2", "--dropout", "0.1"]
# The sums over a batch are taken in another order; these are float32 and 60 steps.
ROUNDING = 2e-5


def devices(number):
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={number}"]
    return {"XLA_FLAGS": " ".join(flags)}


def train(data_dir, workdir, *flags, number_of_devices=1):
    process = start(data_dir, workdir, *FLAGS, *flags, **devices(number_of_devices))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def on_one_device(data_dir, made_once):
    return made_once("on_one_device", lambda workdir: finish(data_dir, workdir, *FLAGS))


def assert_equal_to_rounding(workdir, expected):
    for line, reference in zip(read_lines(workdir), read_lines(expected), strict=True):
        for name in ("train_loss", "test_loss"):
            assert line[name] == pytest.approx(reference[name], rel=ROUNDING), (line, reference)


def test_the_loss_curve_is_that_of_one_device(data_dir, on_one_device, tmp_path):
    """With the moments sharded; two processes, below, hold them whole."""
    output = train(data_dir, tmp_path, "--shard-optimizer", number_of_devices=8)
    assert "device  8 x cpu" in output
    assert_equal_to_rounding(tmp_path, on_one_device)


@pytest.mark.parametrize(("first", "then"), [(8, 1), (1, 8)])
def test_a_checkpoint_goes_on_with_other_devices(data_dir, on_one_device, tmp_path, first, then):
    # Sharded on the way out or in, so that shards meet whole arrays.
    first_flags = ["--shard-optimizer"] if first == 8 else []
    then_flags = ["--shard-optimizer"] if then == 8 else []
    process = start(data_dir, tmp_path, *FLAGS, *first_flags, **devices(first))
    read_until(process, "epoch 2/3")  # when the first epoch's checkpoint is written
    process.kill()
    process.communicate()
    output = train(data_dir, tmp_path, *then_flags, number_of_devices=then)
    assert "resuming from step" in output
    assert_equal_to_rounding(tmp_path, on_one_device)
    # What eight devices saved, one evaluates to the same figures.
    evaluation = read_eval(tmp_path)
    finish(data_dir, tmp_path, *FLAGS, "--eval-only")
    assert read_eval(tmp_path)["params_sha256"] == evaluation["params_sha256"]
    assert read_eval(tmp_path)["test_loss"] == pytest.approx(evaluation["test_loss"], rel=ROUNDING)


def test_sharded_moments_take_an_eighth_of_the_memory_and_give_the_same_updates():
    code = """if True:
        import jax, jax.numpy as jnp, numpy as np, optax
        from lstm_flax import training
        params = {"kernel": jnp.ones((24, 96)), "bias": jnp.ones(8), "odd": jnp.ones((3, 5))}
        grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
        plain = optax.adamw(1e-3)
        with jax.set_mesh(training.data_mesh()):
            spread, whole = training.shard_opt_state(plain), training.replicate(params)
            state = spread.init(whole)
            updates, state = jax.jit(spread.update)(grads, state, whole)
        held = {n: m.addressable_shards[0].data.shape for n, m in state[0].mu.items()}
        assert held == {"kernel": (3, 96), "bias": (1,), "odd": (3, 5)}, held
        expected, _ = plain.update(grads, plain.init(params), params)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
        jax.tree.map(close, updates, expected)
        assert all(u.sharding.is_fully_replicated for u in jax.tree.leaves(updates))
    """
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | devices(8))


def test_a_batch_that_the_devices_cannot_share_is_refused(data_dir, tmp_path):
    process = start(data_dir, tmp_path, "--batch-size", "201", **devices(8))
    output, _ = process.communicate()
    assert process.returncode == 2
    assert "error: --batch-size must be a multiple of the 8 devices, but is 201" in output


def free_port():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(data_dir, workdir, *flags):
    """Two processes that train one model."""
    together = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2]
    return [
        start(data_dir, workdir, *FLAGS, *flags, *together, "--process-id", process_id)
        for process_id in range(2)
    ]


def listening(port):
    """The addresses at which this machine listens on a port."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            (address, local), state = line.split()[1].split(":"), line.split()[3]
            if state == "0A" and int(local, 16) == port:
                words = re.findall("." * 8, address)  # each of four bytes, the last one first
                there = ipaddress.ip_address(b"".join(bytes.fromhex(w)[::-1] for w in words))
                found.append(str(getattr(there, "ipv4_mapped", None) or there))
    return found


def test_a_request_to_stop_reaches_all_processes(data_dir, on_one_device, tmp_path):
    first, second = start_two(data_dir, tmp_path)
    read_until(first, "epoch 1/3")
    coordinator = first.args[first.args.index("--coordinator") + 1]
    assert listening(int(coordinator.rpartition(":")[2])) == ["127.0.0.1"]
    second.terminate()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [143, 143], outputs
    assert "resuming from step" in finish(data_dir, tmp_path, *FLAGS)
    assert_equal_to_rounding(tmp_path, on_one_device)


def test_when_one_process_dies_the_other_says_so_and_both_resume_to_what_one_trains(
    data_dir, on_one_device, tmp_path
):
    for victim, line in enumerate(["epoch 1/3", "epoch 2/3"]):
        processes = start_two(data_dir, tmp_path)
        read_until(processes[0], line)
        processes[victim].kill()
        survivor = processes[1 - victim]
        output, _ = survivor.communicate(timeout=60)
        assert survivor.returncode not in (0, None)
        assert "another process was lost" in output or "another task died" in output
        processes[victim].communicate()

    processes = start_two(data_dir, tmp_path)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert_equal_to_rounding(tmp_path, on_one_device)
    # The first one speaks and writes for both.
    assert "device  2 x cpu" in outputs[0]
    assert "test accuracy" in outputs[0]
    assert not re.search("epoch|device|accuracy", outputs[1])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
