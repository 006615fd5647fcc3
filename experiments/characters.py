"""Characters of a text: an embedding, truncated backpropagation, and sampling one step a call.

    python -m experiments.characters

The text is Python's own manual of its language, which `help("for")` reads (pydoc_data.topics).
Nine tenths are cut into 32 streams, read in windows of 64 characters: each window starts from the
carry in which the last one ended. Bits a character are measured on the last tenth.
"""

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.command import command
from experiments.harness.usage import check_numbers, read_flags
from lstm_flax import LSTMStack

EMBEDDING, STREAMS, WINDOW, LEARNING_RATE, SAMPLE = 64, 32, 64, 5e-3, 300


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, with their defaults."""

    steps: int = 600
    """Training steps, each on a window of all streams."""
    hidden_size: int = 256
    """Units of the LSTM."""


class CharacterModel(nn.Module):
    """Logits of each next character."""

    characters: int
    rnn: LSTMStack

    @nn.compact
    def __call__(self, text, carry):
        """Read text [batch, time]; returns logits [batch, time, characters] and the carry."""
        embed = nn.Embed(self.characters, EMBEDDING, embedding_init=nn.initializers.normal(1.0))
        outputs, carry = self.rnn(embed(text), carry)
        return nn.Dense(self.characters)(outputs), carry


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print bits a character beside the baseline's, and a sample."""
    options = read_flags(Options, argv, name="characters", description=__doc__)
    check_numbers(options)
    written = "\n".join(topics[name] for name in sorted(topics))
    alphabet, text = np.unique(list(written), return_inverse=True)
    train, test = np.split(text, [len(text) * 9 // 10])
    streams = train[: len(train) // STREAMS * STREAMS].reshape(STREAMS, -1)
    model = CharacterModel(len(alphabet), LSTMStack(options.hidden_size))
    carry = model.rnn.initialize_carry(None, (STREAMS, 1, EMBEDDING))
    start = model.rnn.initialize_carry(None, (1, 1, EMBEDDING))  # of one text
    of_init, *of_sample = jax.random.split(jax.random.key(0), SAMPLE + 1)
    params = model.init(of_init, streams[:, :1], carry)["params"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))
    opt_state = optimizer.init(params)

    def loss(params, carry, window):
        logits, carry = model.apply({"params": params}, window[:, :-1], carry)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:])
        return losses.mean(), carry

    @jax.jit
    def train_step(params, opt_state, carry, window):
        # No gradient flows through the carry from one call of jax.grad to the next.
        grads, carry = jax.grad(loss, has_aux=True)(params, carry, window)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, carry

    begins = range(0, streams.shape[1] - WINDOW, WINDOW)
    for begin in itertools.islice(itertools.cycle(begins), options.steps):
        window = streams[:, begin : begin + WINDOW + 1]
        params, opt_state, carry = train_step(params, opt_state, carry, window)
    bits = jax.jit(loss)(params, start, test[None])[0] / np.log(2)
    n_gram = n_gram_bits(written[: len(train)], written[len(train) :])
    print(f"bits a character\n5-gram    {n_gram:.3f}\nlstm_flax {bits:.3f}")

    @jax.jit
    def sample_step(character, carry, key):
        logits, carry = model.apply({"params": params}, character[None, None], carry)
        return jax.random.categorical(key, logits[0, 0]), carry

    character, carry = jnp.asarray(test[0]), start
    for key in of_sample:
        character, carry = sample_step(character, carry, key)
        print(alphabet[character], end="")
    return 0


def n_gram_bits(train: str, test: str, order: int = 5) -> float:
    """Return bits a character of n-grams, smoothed by shorter ones (Witten and Bell, 1991)."""
    guess = np.full(len(test), 1 / len(set(train + test)))
    for n in range(1, order + 1):
        seen = Counter(train[k : k + n] for k in range(len(train) - n + 1))
        times, kinds = Counter[str](), Counter[str]()  # of each context
        for gram, count in seen.items():
            times[gram[:-1]] += count
            kinds[gram[:-1]] += 1
        for k in range(n - 1, len(test)):
            gram = test[k - n + 1 : k + 1]
            if total := times[gram[:-1]] + kinds[gram[:-1]]:
                guess[k] = (seen[gram] + kinds[gram[:-1]] * guess[k]) / total
    return float(-np.log2(guess).mean())


if __name__ == "__main__":
    sys.exit(main())
