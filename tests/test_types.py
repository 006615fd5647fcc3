"""What a type checker says of a user's script: it knows the results, and refuses what is wrong."""

import re

import pytest
from mypy import api

SCRIPT = """
import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from pathlib import Path

import lstm_flax
from lstm_flax import (
    GRUStack, LSTMCarry, LSTMClassifier, LSTMStack, RNNStack, create_train_state, from_torch,
    pad_sequences, to_torch, train_step,
)

lstm = LSTMStack(hidden_size=8, num_layers=2, bidirectional=True)
x = jnp.ones((2, 3, 4))
variables = lstm.init(jax.random.key(0), x)
outputs, (h_n, c_n) = lstm.apply(variables, x, seq_lengths=jnp.array([3, 1]))
reveal_type(outputs)
reveal_type(h_n)
reveal_type(lstm.apply(variables, x, rngs={"dropout": jax.random.key(1)}))
reveal_type(lstm(x))
reveal_type(GRUStack(8)(x))
reveal_type(RNNStack(8).apply(variables, x))
reveal_type(LSTMClassifier()(x))


def stream(piece: jax.Array, carry: LSTMCarry | None) -> LSTMCarry:
    _, after = lstm.apply(variables, piece, carry)
    return after


weights: dict[str, np.ndarray] = to_torch(variables["params"])
params = from_torch(weights)
padded, lengths = pad_sequences([np.ones((3, 4), np.float32)])
state = create_train_state(LSTMClassifier(8, 1), optax.adam(1e-3), x, jax.random.key(0))
state, metrics = train_step(state, {"image": x, "label": lengths}, jax.random.key(1))
with lstm_flax.checkpoints.open_checkpoints(Path("run")) as manager:
    lstm_flax.checkpoints.save(manager, 1, {"state": state}, {})
"""

ARRAY = "jax._src.basearray.Array"

REVEALED = [
    ARRAY,
    ARRAY,
    f"tuple[{ARRAY}, tuple[{ARRAY}, {ARRAY}]]",
    f"tuple[{ARRAY}, tuple[{ARRAY}, {ARRAY}]]",
    f"tuple[{ARRAY}, {ARRAY}]",
    f"tuple[{ARRAY}, {ARRAY}]",
    ARRAY,
]


def mypy(tmp_path, script):
    """Lines that `mypy --strict` prints about a script."""
    path = tmp_path / "script.py"
    path.write_text(script)
    # Beside the script there is no configuration, so this is what a user sees.
    flags = ["--strict", f"--config-file={tmp_path / 'none.ini'}"]
    (tmp_path / "none.ini").write_text("[mypy]\n")
    output, error, _ = api.run([*flags, f"--cache-dir={tmp_path / 'cache'}", str(path)])
    assert not error
    return output.splitlines()


@pytest.mark.slow
def test_a_strict_checker_knows_what_a_users_script_gets(tmp_path):
    lines = mypy(tmp_path, SCRIPT)
    assert [line for line in lines if ": error: " in line] == []
    assert re.findall(r'Revealed type is "(.*)"', "\n".join(lines)) == REVEALED


@pytest.mark.slow
def test_a_strict_checker_refuses_what_is_wrong(tmp_path):
    wrong = {
        'LSTMStack(hidden_size="8")': '"hidden_size" to "LSTMStack" has incompatible type "str"',
        "LSTMStack()": 'Missing positional argument "hidden_size"',
        "LSTMStack(8, layers=2)": 'Unexpected keyword argument "layers"',
        'LSTMStack(8, implementation="fast")': "expected \"Literal['auto', 'scan'",
        "out, h_n = LSTMStack(8)(x); h_n.shape": 'has no attribute "shape"',
        "LSTMStack(8)(x, x)": 'has incompatible type "Array"',
        "lstm_flax.LTSMStack(8)": 'Module has no attribute "LTSMStack"',
    }
    start = "import jax, lstm_flax\nfrom lstm_flax import LSTMStack\n"
    start += "def f(x: jax.Array) -> None:\n"
    lines = mypy(tmp_path, start + "".join(f"    {line}\n" for line in wrong))
    errors = [line for line in lines if ": error: " in line]
    assert len(errors) == len(wrong), errors
    for error, expected in zip(errors, wrong.values(), strict=True):
        assert expected in error
