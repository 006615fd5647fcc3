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


WRONG = {
    'LSTMStack(hidden_size="8")': '"hidden_size" to "LSTMStack" has incompatible type "str"',
    "LSTMStack()": 'Missing positional argument "hidden_size"',
    "LSTMStack(8, layers=2)": 'Unexpected keyword argument "layers"',
    'LSTMStack(8, implementation="fast")': "expected \"Literal['auto', 'scan'",
    "out, h_n = LSTMStack(8)(x); h_n.shape": 'has no attribute "shape"',
    "LSTMStack(8)(x, x)": 'has incompatible type "Array"',
    "lstm_flax.LTSMStack(8)": 'Module has no attribute "LTSMStack"',
}

WRONG_SCRIPT = """
import jax, lstm_flax
from lstm_flax import LSTMStack

def f(x: jax.Array) -> None:
    """ + "\n    ".join(WRONG)


@pytest.mark.slow
def test_a_strict_checker_knows_what_a_users_script_gets_and_refuses_what_is_wrong(tmp_path):
    """In one call, since most of its time goes into reading JAX and Flax."""
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(SCRIPT)
    wrong.write_text(WRONG_SCRIPT)
    # Beside the scripts there is no configuration, so this is what a user sees.
    (tmp_path / "none.ini").write_text("[mypy]\n")
    flags = ["--strict", f"--config-file={tmp_path / 'none.ini'}"]
    flags.append(f"--cache-dir={tmp_path / 'cache'}")
    output, complaint, _ = api.run([*flags, str(right), str(wrong)])
    assert not complaint
    assert re.findall(r'right.py:.* Revealed type is "(.*)"', output) == REVEALED
    errors = [line for line in output.splitlines() if ": error: " in line]
    assert len(errors) == len(WRONG), errors
    for error, expected in zip(errors, WRONG.values(), strict=True):
        assert "wrong.py:" in error
        assert expected in error
