"""The adding problem with sequences of many lengths: regression from the last valid step.

    python -m experiments.adding [--torch]

At each step a sequence has a random number and a mark. Two steps are marked, one in each half,
and the target is the sum of their numbers (Hochreiter and Schmidhuber, "Long Short-Term Memory",
1997). `--torch` trains the same model in PyTorch, from the same weights on the same batches.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.command import command
from experiments.harness.usage import MAX_SEED, check, check_numbers, check_packages, read_flags
from lstm_flax import LSTMStack, SequenceClassifier, to_torch

MAX_LENGTH = 50  # the shortest sequences have half as many steps
BATCH_SIZE = 128
LEARNING_RATE, CLIP_NORM = 1e-2, 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    steps: int = 1000
    """Training steps, each on a new batch of 128 sequences."""
    hidden_size: int = 64
    """Units of the LSTM."""
    seed: int = 0
    """Seed of the weights and the data."""
    torch: bool = False
    """Train the same model in PyTorch too."""


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the mean squared error on new sequences beside the baseline's."""
    options = read_flags(Options, argv, name="adding", description=__doc__)
    check_numbers(options, "seed")
    check(options, "seed", options.seed <= MAX_SEED, f"at most {MAX_SEED}")
    if options.torch:
        check_packages("benchmark", "torch", what="--torch")
    of_init, of_test, *of_steps = jax.random.split(jax.random.key(options.seed), options.steps + 2)
    x, lengths, targets = draw_batch(of_test)

    # One logit is a regression: a dense layer on the hidden state of the last valid step.
    model = SequenceClassifier(LSTMStack(options.hidden_size), num_classes=1)
    params = initial = model.init(of_init, x, seq_lengths=lengths)["params"]
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(LEARNING_RATE))
    opt_state = optimizer.init(params)

    @jax.jit
    def mean_squared_error(params, x, lengths, targets):
        answers: Any = model.apply({"params": params}, x, seq_lengths=lengths)
        return jnp.mean((answers[:, 0] - targets) ** 2)

    @jax.jit
    def train_step(params, opt_state, key):
        grads = jax.grad(mean_squared_error)(params, *draw_batch(key))
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    for key in of_steps:
        params, opt_state = train_step(params, opt_state, key)
    print("mean squared error on 128 new sequences")
    print(f"always 1  {jnp.mean((1 - targets) ** 2):.5f}")
    print(f"lstm_flax {mean_squared_error(params, x, lengths, targets):.5f}")
    if options.torch:
        print(f"PyTorch   {train_in_torch(initial, of_steps, of_test):.5f}")
    return 0


@jax.jit
def draw_batch(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return x [128, 50, 2], lengths [128] and targets [128]."""
    of_lengths, of_values, of_first, of_second = jax.random.split(key, 4)
    lengths = jax.random.randint(of_lengths, (BATCH_SIZE,), MAX_LENGTH // 2, MAX_LENGTH + 1)
    values = jax.random.uniform(of_values, (BATCH_SIZE, MAX_LENGTH))
    first = jax.random.randint(of_first, (BATCH_SIZE,), 0, lengths // 2)
    second = jax.random.randint(of_second, (BATCH_SIZE,), lengths // 2, lengths)
    marks = jax.nn.one_hot(first, MAX_LENGTH) + jax.nn.one_hot(second, MAX_LENGTH)
    return jnp.stack([values, marks], axis=-1), lengths, jnp.sum(values * marks, axis=1)


def train_in_torch(params, of_steps: list[jax.Array], of_test: jax.Array) -> float:
    """Do the same in PyTorch; returns the mean squared error."""
    import torch
    from torch import nn

    weights = {name: torch.from_numpy(value) for name, value in to_torch(params).items()}
    rnn = nn.LSTM(2, weights["lin.weight"].shape[1], batch_first=True)
    model = nn.ModuleDict({"rnn": rnn, "lin": nn.Linear(rnn.hidden_size, 1)})
    model.load_state_dict(weights)
    rnn.bias_hh_l0.requires_grad_(False)  # zero; b_ih is the whole bias, as here
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    def mean_squared_error(key):
        x, lengths, targets = (torch.from_numpy(np.array(part)) for part in draw_batch(key))
        outputs, _ = rnn(x)  # to the end of the padding, which is faster than packing
        answers = model["lin"](outputs[torch.arange(len(x)), lengths - 1])
        return nn.functional.mse_loss(answers[:, 0], targets)

    for key in of_steps:
        optimizer.zero_grad()
        mean_squared_error(key).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
    return mean_squared_error(of_test).item()


if __name__ == "__main__":
    sys.exit(main())
