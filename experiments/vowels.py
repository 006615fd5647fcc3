"""Nine speakers told apart by their vowels: sequences of many lengths, read in both directions.

    python -m experiments.vowels

sktime ships 270 utterances to train on and 370 to test on, each with 7 to 29 frames of 12 numbers
(Kudo, Toyama and Shimbo, 1999). The classifier reads the final states of both directions, so each
utterance ends where its own length says. Expect 98.1 ± 0.3% of the test set in half a minute, and
98.9% of a logistic regression: 270 utterances are few.
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
from experiments.harness.usage import check, check_numbers, check_packages, read_flags
from lstm_flax import LSTMStack, SequenceClassifier, pad_sequences

SPEAKERS, BATCH_SIZE, LEARNING_RATE, CLIP_NORM = 9, 64, 5e-3, 1.0
NOISE = 0.5  # standard deviations, on the training frames


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    steps: int = 300
    """Training steps, each on 64 of the utterances."""
    hidden_size: int = 64
    """Units of each direction."""
    seeds: int = 5
    """Trainings, each with weights, batches and noise of its own."""


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Train with each seed, and print the accuracy on the test set beside the baseline's."""
    options = read_flags(Options, argv, name="vowels", description=__doc__)
    check_numbers(options)
    check(options, "seeds", options.seeds >= 2, "at least 2, for a standard deviation")
    check_packages("tasks", "sktime", what="vowels")
    (heard, speakers), (new, answers) = read("train"), read("test")
    mean, scale = np.mean(np.concatenate(heard), axis=0), np.std(np.concatenate(heard), axis=0)
    (x, lengths), test = (pad_sequences([(u - mean) / scale for u in us]) for us in (heard, new))

    model = SequenceClassifier(LSTMStack(options.hidden_size, bidirectional=True), SPEAKERS)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(schedule))

    @jax.jit
    def train_step(params, opt_state, key):
        of_batch, of_noise = jax.random.split(key)
        batch = jax.random.permutation(of_batch, len(x))[:BATCH_SIZE]
        frames, steps, labels = (jnp.asarray(part)[batch] for part in (x, lengths, speakers))
        frames += NOISE * jax.random.normal(of_noise, frames.shape)

        def loss(params):
            logits: Any = model.apply({"params": params}, frames, seq_lengths=steps)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    accuracies = []
    for seed in range(options.seeds):
        of_init, *of_steps = jax.random.split(jax.random.key(seed), options.steps + 1)
        params = model.init(of_init, x, seq_lengths=lengths)["params"]
        opt_state = optimizer.init(params)
        for key in of_steps:
            params, opt_state = train_step(params, opt_state, key)
        logits: Any = model.apply({"params": params}, test[0], seq_lengths=test[1])
        accuracies.append(100 * np.mean(logits.argmax(-1) == answers))
    print(f"% of {len(answers)} new utterances; mean ± standard deviation of the seeds")
    print(f"logistic  {100 * regression(heard, speakers, new, answers):.1f}")
    print(f"lstm_flax {np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}")
    return 0


def read(split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Return utterances [time, 12] and their speakers, 0 to 8."""
    from sktime.datasets import load_japanese_vowels

    utterances, speakers = load_japanese_vowels(split, return_type="df-list")
    return [u.to_numpy(np.float32) for u in utterances], speakers.astype(np.int32) - 1


def regression(heard, speakers, new, answers) -> float:
    """Return the accuracy of a logistic regression on the means of each utterance's thirds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def thirds(utterances):
        return [np.ravel([p.mean(0) for p in np.array_split(u, 3)]) for u in utterances]

    model = make_pipeline(StandardScaler(), LogisticRegression(C=10, max_iter=2000))
    return model.fit(thirds(heard), speakers).score(thirds(new), answers)


if __name__ == "__main__":
    sys.exit(main())
