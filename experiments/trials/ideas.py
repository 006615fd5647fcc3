"""Ideas for better recipes, each a small change to what the recipe `best` does.

Images are float32 [batch, 28, 28] in [0, 1], targets float32 [batch, 10], a distribution an image.
`progress` is the fraction of the training that is done, float32 [].
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax, random

from experiments.training_run import from_config
from experiments.training_run.config import Config
from lstm_flax import training
from lstm_flax.models import SequenceClassifier

Params = Any


class Reading(NamedTuple):
    """A model that reads a batch."""

    model: SequenceClassifier
    params: Params
    x: jax.Array  # [batch, time, features]
    key: jax.Array | None = None  # of dropout, in training

    @property
    def mode(self) -> dict[str, Any]:
        """Arguments of `apply`, for training or not."""
        return {
            "deterministic": self.key is None,
            "rngs": {} if self.key is None else {"dropout": self.key},
        }


def distorted(config: Config, key: jax.Array, images: jax.Array, progress: jax.Array) -> jax.Array:
    """Distort all images, as the recipe does."""
    augment = from_config.augment(config)
    assert augment is not None, "the recipe distorts"
    return augment(key, images)


def unmixed(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Leave images and targets as they are."""
    return images, targets


def model_logits(reading: Reading) -> jax.Array:
    """Return the model's own logits."""
    logits: Any = reading.model.apply({"params": reading.params}, reading.x, **reading.mode)
    return logits


def head_logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Return the logits of hidden states [batch, hidden]."""
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def mean_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def last_loss(idea: "Idea", reading: Reading, targets: jax.Array) -> jax.Array:
    """Return the loss after the last row."""
    return mean_loss(idea.logits(reading), targets)


class Idea(NamedTuple):
    """What is done otherwise than in the recipe; the defaults are the recipe."""

    says: str
    flags: Mapping[str, Any] = MappingProxyType({})  # of experiments.mnist_lstm
    longer: int = 1  # how many times as many epochs
    augment: Callable[..., jax.Array] = distorted
    mix: Callable[..., tuple[jax.Array, jax.Array]] = unmixed
    logits: Callable[[Reading], jax.Array] = model_logits
    loss: Callable[..., jax.Array] = last_loss
    gradient: Callable[..., Params] = lambda loss, params: jax.grad(loss)(params)
    optimizer: Callable[[Config, int], optax.GradientTransformation] = from_config.optimizer
    extend: Callable[[Params], Params] = lambda params: params
    has_teachers: bool = False


# ---- Images.


def fading(config: Config, key: jax.Array, images: jax.Array, progress: jax.Array) -> jax.Array:
    """Distort all images at first, and fewer and fewer in the last three tenths of the training."""
    chosen = random.uniform(random.fold_in(key, 2), (len(images), 1, 1)) < (1 - progress) / 0.3
    return jnp.where(chosen, distorted(config, key, images, progress), images)


def erasing(config: Config, key: jax.Array, images: jax.Array, progress: jax.Array) -> jax.Array:
    """Blacken a rectangle of 4 to 10 pixels a side in half of the images (Zhong et al., 2020)."""
    drawn = random.uniform(random.fold_in(key, 2), (5, len(images), 1))
    sides, begins = 4 + 6 * drawn[:2], 28 * drawn[2:4]
    inside = jnp.abs(jnp.arange(28) - begins) < sides / 2  # [2, batch, 28]
    hidden = inside[0][:, :, None] & inside[1][:, None, :] & (drawn[4] < 0.5)[..., None]
    return jnp.where(hidden, 0, distorted(config, key, images, progress))


def row_dropout(
    config: Config, key: jax.Array, images: jax.Array, progress: jax.Array
) -> jax.Array:
    """Blacken each row with probability 0.05."""
    kept = random.bernoulli(random.fold_in(key, 2), 0.95, (len(images), 28, 1))
    return distorted(config, key, images, progress) * kept


def thickness(config: Config, key: jax.Array, images: jax.Array, progress: jax.Array) -> jax.Array:
    """Make strokes thicker or thinner: up to half way to the maximum or minimum of 3 x 3 pixels."""
    images = distorted(config, key, images, progress)
    thick = lax.reduce_window(images, -jnp.inf, lax.max, (1, 3, 3), (1, 1, 1), "SAME")
    thin = lax.reduce_window(images, jnp.inf, lax.min, (1, 3, 3), (1, 1, 1), "SAME")
    amount = random.uniform(random.fold_in(key, 2), (len(images), 1, 1), minval=-0.5, maxval=0.5)
    return jnp.where(
        amount > 0, images + amount * (thick - images), images - amount * (thin - images)
    )


# ---- Images with their targets.


def mixup(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add a little of another image, and as much of its target (Zhang et al., 2018)."""
    share = random.beta(key, 0.2, 0.2, (len(images), 1))
    share = jnp.maximum(share, 1 - share)
    image_share = share[..., None]
    return (
        image_share * images + (1 - image_share) * jnp.roll(images, 1, 0),
        share * targets + (1 - share) * jnp.roll(targets, 1, 0),
    )


def cut_in_time(
    key: jax.Array, images: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Begin a fifth of the images with rows of another one (as Yun et al., "CutMix", 2019)."""
    of_images, of_rows = random.split(key)
    chosen = random.bernoulli(of_images, 0.2, (len(images), 1))
    rows = jnp.where(chosen, random.randint(of_rows, (len(images), 1), 0, 15), 0)
    foreign = jnp.arange(28) < rows
    share = rows / 28
    return (
        jnp.where(foreign[..., None], jnp.roll(images, 1, 0), images),
        (1 - share) * targets + share * jnp.roll(targets, 1, 0),
    )


# ---- Model, loss and optimiser.


def early_loss(idea: Idea, reading: Reading, targets: jax.Array) -> jax.Array:
    """Add a tenth of the loss after 20 and 24 rows to that after the last one."""
    params = reading.params
    outputs, _ = reading.model.core.apply({"params": params["core"]}, reading.x, **reading.mode)
    weights = {20: 0.1, 24: 0.1, 28: 1.0}
    losses = [
        weight * mean_loss(head_logits(params, outputs[:, rows - 1]), targets)
        for rows, weight in weights.items()
    ]
    return jnp.sum(jnp.stack(losses))


def learned_carry_logits(reading: Reading) -> jax.Array:
    """Begin each sequence with carries that are parameters."""
    params, core = reading.params, reading.model.core
    carry = {
        name: jnp.broadcast_to(leaf[:, None], (len(leaf), len(reading.x), leaf.shape[-1]))
        for name, leaf in params["carry"].items()
    }
    initial = carry["h"].astype(core.dtype), carry["c"]
    _, (h_n, _) = core.apply({"params": params["core"]}, reading.x, initial, **reading.mode)
    return head_logits(params, h_n[-1])


def with_carry(params: Params) -> Params:
    """Add initial carries of zeros, float32 [layers, hidden], to the parameters."""
    layers, hidden = len(params["core"]), params["head"]["kernel"].shape[0]
    return params | {"carry": {name: jnp.zeros((layers, hidden)) for name in ("h", "c")}}


def sharpness_aware(loss: Callable[[Params], jax.Array], params: Params) -> Params:
    """Return the gradient a step of 0.05 uphill (Foret et al., "Sharpness-Aware", 2021)."""
    gradient = jax.grad(loss)(params)
    scale = 0.05 / (optax.tree.norm(gradient) + 1e-12)
    return jax.grad(loss)(jax.tree.map(lambda p, g: p + scale * g, params, gradient))


def muon(config: Config, num_images: int) -> optax.GradientTransformation:
    """Return Muon for the matrices and AdamW for the rest, both with the recipe's cycle."""
    steps = config.epochs * training.steps_per_epoch(num_images, config.batch_size)

    def cycle(peak: float) -> optax.Schedule:
        return optax.cosine_onecycle_schedule(steps, peak, config.warmup)

    tx = optax.contrib.muon(
        cycle(0.01),
        weight_decay=config.weight_decay,
        adam_learning_rate=cycle(config.learning_rate),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)


IDEAS = {
    "recipe": Idea("the recipe `best` as it is"),
    "fading": Idea("ever fewer distorted images in the last 3 tenths", augment=fading),
    "erasing": Idea("a rectangle of half of the images is black", augment=erasing),
    "row-dropout": Idea("a twentieth of the rows are black", augment=row_dropout),
    "thickness": Idea("thicker and thinner strokes", augment=thickness),
    "gamma": Idea("lighter and darker strokes", {"gamma": 2.0}),
    "mixup": Idea("mixup of images, Beta(0.2, 0.2)", mix=mixup),
    "cut-in-time": Idea("first rows of another image, in a fifth", mix=cut_in_time),
    "smoothing": Idea("label smoothing 0.1 instead of 0.05", {"label_smoothing": 0.1}),
    "dropout": Idea("dropout 0.2 and 3 times as many epochs", {"dropout": 0.2}, longer=3),
    "gamma-dropout": Idea("`gamma` and `dropout`", {"gamma": 2.0, "dropout": 0.2}, longer=3),
    "longer": Idea("3 times as many epochs, without dropout", longer=3),
    "early": Idea("a loss after 20 and 24 rows too", loss=early_loss),
    "carry": Idea("learned initial carries", logits=learned_carry_logits, extend=with_carry),
    "sam": Idea("sharpness-aware steps, radius 0.05", gradient=sharpness_aware),
    "muon": Idea("Muon instead of AdamW", optimizer=muon),
    "distilled": Idea("learns what five models of the recipe answer", has_teachers=True),
}
"""By name. Each is compared with the first, which must be the recipe."""
