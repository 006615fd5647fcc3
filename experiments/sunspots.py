"""Sunspots forecast eleven years ahead, with prediction intervals.

    python -m experiments.sunspots

statsmodels ships the numbers of 1700 to 2008. The LSTM learns the mean and spread of each next year
until 1949, reads the years up to each origin and goes on from its draws, with the carry kept.
Quantiles of 500 such futures are the forecast and its interval.
"""

import dataclasses
import sys
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.command import command
from experiments.harness.usage import check_numbers, check_packages, read_flags
from lstm_flax import LSTMStack

KNOWN, HORIZON, FUTURES = 250, 11, 500  # years to train on, years to forecast, draws
SCALE = 10.0  # of the square roots, which spread alike in high and in low years


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    steps: int = 300
    """Training steps, each on all years until 1949."""
    hidden_size: int = 32
    """Units of the LSTM."""


class Forecaster(nn.Module):
    """Mean and logarithm of the spread of the next value."""

    rnn: LSTMStack

    @nn.compact
    def __call__(self, values, carry=None, seq_lengths=None):
        """Read values [batch, time]; returns two of [batch, time] and the carry."""
        outputs, carry = self.rnn(values[..., None], carry, seq_lengths=seq_lengths)
        return jnp.moveaxis(nn.Dense(2)(outputs), -1, 0), carry


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print errors of the forecasts beside the baselines'."""
    options = read_flags(Options, argv, name="sunspots", description=__doc__)
    check_numbers(options)
    check_packages("tasks", "statsmodels", what="sunspots")
    from statsmodels.datasets import sunspots

    spots = sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(np.float32)
    values = jnp.sqrt(spots) / SCALE
    model = Forecaster(LSTMStack(options.hidden_size))
    params = model.init(jax.random.key(0), values[None])["params"]
    learning_rate = optax.cosine_decay_schedule(5e-3, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, opt_state):
        def loss(params):
            (mean, log_spread), _ = model.apply({"params": params}, values[None, : KNOWN - 1])
            errors = (values[1:KNOWN] - mean) / jnp.exp(log_spread)
            return jnp.mean(errors**2 / 2 + log_spread)  # of a normal distribution

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(options.steps):
        params, opt_state = train_step(params, opt_state)

    @jax.jit
    def forecast(params, lengths, key):
        """Draw futures [HORIZON, origins * FUTURES] after the first `lengths` years."""
        histories = jnp.broadcast_to(values, (len(lengths), len(values)))
        _, carry = model.apply({"params": params}, histories, seq_lengths=lengths - 1)
        carry = jax.tree.map(lambda state: jnp.repeat(state, FUTURES, axis=1), carry)

        def draw_year(state, key):
            value, carry = state
            (mean, log_spread), carry = model.apply({"params": params}, value[:, None], carry)
            drawn = mean + jnp.exp(log_spread) * jax.random.normal(key, mean.shape)
            value = jnp.maximum(drawn[:, 0], 0)
            return (value, carry), value

        last = jnp.repeat(values[lengths - 1], FUTURES)
        return jax.lax.scan(draw_year, (last, carry), jax.random.split(key, HORIZON))[1]

    origins = np.arange(KNOWN, len(spots) - HORIZON + 1)  # years known at each forecast
    futures = forecast(params, origins, jax.random.key(1)).reshape(HORIZON, -1, FUTURES)
    low, median, high = (SCALE * jnp.quantile(futures, jnp.array([0.1, 0.5, 0.9]), axis=-1)) ** 2
    actual, before = (np.stack([spots[o - s :][:HORIZON] for o in origins], 1) for s in (0, 11))
    guesses = {"last": spots[origins - 1], "cycle": before, "lstm_flax": median}
    for name, guess in (guesses | {"AR(9)": autoregression(spots, KNOWN, origins)}).items():
        print(f"{name:9} {np.sqrt(np.mean((guess - actual) ** 2)):.1f}")
    print(f"covered   {np.mean((low <= actual) & (actual <= high)):.2f}")
    return 0


def autoregression(spots: np.ndarray, years: int, origins: np.ndarray, order: int = 9):
    """Forecast [HORIZON, origins] by least squares on the years before."""
    windows = np.lib.stride_tricks.sliding_window_view(spots[:years], order + 1)
    inputs = np.column_stack([windows[:, :-1], np.ones(len(windows))])
    weights = np.linalg.lstsq(inputs, windows[:, -1])[0]
    history = np.stack([spots[o - order : o] for o in origins])
    for _ in range(HORIZON):
        following = history[:, -order:] @ weights[:-1] + weights[-1]
        history = np.column_stack([history, following])
    return history[:, order:].T


if __name__ == "__main__":
    sys.exit(main())
