"""The peers that run on JAX: this project, Keras, `flax.linen.RNN`, and cuDNN through JAX."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from experiments.benchmark.cases import Case, examples, weights
from experiments.benchmark.framework import LEARNING_RATE, Call, Framework, Unavailable


def jax_framework() -> Framework:
    """JAX on its first device."""
    import jax

    device = jax.devices()[0]

    def product(a: np.ndarray, b: np.ndarray) -> Call:
        multiply = jax.jit(partial(jax.numpy.matmul, precision=jax.lax.Precision.HIGHEST))
        return partial(multiply, jax.device_put(a), jax.device_put(b))

    return Framework(
        device.platform,
        device.device_kind,
        jax.block_until_ready,
        product,
        lambda: device.memory_stats()["peak_bytes_in_use"],
    )


def _jax_call(apply: Callable[[Any, Any], Any], params: Any, case: Case, mode: str) -> Call:
    """Inference or an Adam step around a model's logits, the same for all that run on JAX.

    Args:
        apply: `(params, images) -> logits`.
        params: a tree of arrays, all of which are trained.
        case: the sizes.
        mode: "infer" or "train".
    """
    import jax
    import optax

    images, labels = jax.device_put(examples(case))
    params = jax.device_put(params)
    if case.mapped:
        apply = _one_by_one(apply)
    if mode == "infer":
        return partial(jax.jit(apply), params, images)

    optimizer = optax.adam(LEARNING_RATE)

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, labels):
        def loss_fn(params):
            logits = apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        params, moments = state
        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), loss

    state = (params, jax.jit(optimizer.init)(params))

    def train():
        nonlocal state
        state, loss = step(state, images, labels)
        return loss

    return train


def _one_by_one(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The same model, written for one example and mapped over them."""
    import jax

    return lambda params, images: jax.vmap(lambda image: apply(params, image[None])[0])(images)


def build_ours(case: Case, mode: str, implementation: str | None = None) -> Call:
    """`LSTMClassifier`, by one of its implementations, or the one that it takes by itself."""
    import jax

    from lstm_flax import LSTMClassifier, LSTMStack

    options: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST}
    if implementation is not None:
        if "implementation" not in LSTMStack.__dataclass_fields__:
            raise Unavailable("LSTMStack has no argument `implementation`")
        options["implementation"] = implementation
    model = LSTMClassifier(case.hidden, case.layers, **options)
    layers, head = weights(case)
    params = {"core": {f"l{k}": layer for k, layer in enumerate(layers)}, "head": head}
    return _jax_call(lambda params, x: model.apply({"params": params}, x), params, case, mode)


def build_linen_rnn(case: Case, mode: str) -> Call:
    """One `flax.linen.RNN` a layer, over `OptimizedLSTMCell`."""
    import flax.linen as nn

    layers, head = weights(case)
    stack = [nn.RNN(nn.OptimizedLSTMCell(case.hidden)) for _ in layers]
    model = nn.Sequential([*stack, lambda outputs: outputs[:, -1], nn.Dense(len(head["bias"]))])
    params: dict[str, Any] = {f"layers_{len(layers) + 1}": head}
    for k, layer in enumerate(layers):
        gates = {name: np.split(array, 4, axis=-1) for name, array in layer.items()}
        cell = {}
        for gate, index in zip("ifgo", range(4), strict=True):
            cell[f"i{gate}"] = {"kernel": gates["kernel_ih"][index]}
            cell[f"h{gate}"] = {
                "kernel": gates["kernel_hh"][index],
                "bias": gates["bias"][index],
            }
        params[f"layers_{k}"] = {"cell": cell}
    return _jax_call(lambda params, x: model.apply({"params": params}, x), params, case, mode)


def build_keras(case: Case, mode: str) -> Call:
    """One `keras.layers.LSTM` a layer, on Keras's JAX backend."""
    import keras

    layers, head = weights(case)
    last = len(layers) - 1
    model = keras.Sequential(
        [
            keras.Input((case.time, case.features)),
            *[
                keras.layers.LSTM(case.hidden, return_sequences=k < last)
                for k in range(len(layers))
            ],
            keras.layers.Dense(len(head["bias"])),
        ]
    )
    # Its gates lie in the same order, and its weights in that of the dicts.
    model.set_weights([array for tree in (*layers, head) for array in tree.values()])
    others = [variable.value for variable in model.non_trainable_variables]
    params = [variable.value for variable in model.trainable_variables]
    return _jax_call(
        lambda params, x: model.stateless_call(params, others, x)[0], params, case, mode
    )


def pack_for_cudnn(layers: list[dict[str, np.ndarray]]) -> np.ndarray:
    """cuDNN's one array of weights: all layers' kernels, transposed, then all their biases."""
    kernels = [layer[name].T for layer in layers for name in ("kernel_ih", "kernel_hh")]
    biases = [array for layer in layers for array in (layer["bias"], np.zeros_like(layer["bias"]))]
    return np.concatenate([array.ravel() for array in (*kernels, *biases)])


def build_jax_cudnn(case: Case, mode: str) -> Call:
    """`jax.experimental.rnn`, whose only implementation is cuDNN's."""
    import jax
    from jax.experimental import rnn

    layers, head = weights(case)
    zeros = np.zeros((case.layers, case.batch, case.hidden), np.float32)
    lengths = np.full(case.batch, case.time, np.int32)

    def apply(params, x):
        outputs, _, _ = rnn.lstm(
            x, zeros, zeros, params["rnn"], lengths, case.features, case.hidden, case.layers,
            0.0, False, jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        head = params["head"]
        product = jax.numpy.matmul(
            outputs[:, -1], head["kernel"], precision=jax.lax.Precision.HIGHEST
        )
        return product + head["bias"]

    return _jax_call(apply, {"rnn": pack_for_cudnn(layers), "head": head}, case, mode)
