"""The peers that run on JAX: this project, Keras, `flax.linen.RNN`, and cuDNN through JAX."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import rnn

from experiments.benchmark.cases import CLASSES, Case, examples, weights
from experiments.benchmark.peers import LEARNING_RATE, Call, Framework, Unavailable
from lstm_flax import LSTMClassifier, from_torch

HIGHEST = jax.lax.Precision.HIGHEST


def framework() -> Framework:
    """Return JAX on its first device."""
    device = jax.devices()[0]

    def matmul(a: np.ndarray, b: np.ndarray) -> Call:
        multiply = jax.jit(partial(jax.numpy.matmul, precision=HIGHEST))
        return partial(multiply, jax.device_put(a), jax.device_put(b))

    return Framework(
        device.platform,
        device.device_kind,
        jax.block_until_ready,
        matmul,
        lambda: device.memory_stats()["peak_bytes_in_use"],
    )


def _call(apply: Callable[[Any, Any], Any], params: Any, case: Case, mode: str) -> Call:
    """Return inference or an Adam step for `apply(params, images) -> logits`, jitted."""
    images, labels = jax.device_put(examples(case))
    params = jax.device_put(params)

    def logits_of(params, images):
        if case.mapped:  # a model of one example, mapped over them
            return jax.vmap(lambda image: apply(params, image[None])[0])(images)
        return apply(params, images)

    if mode == "infer":
        return partial(jax.jit(logits_of), params, images)

    tx = optax.adam(LEARNING_RATE)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, labels):
        def loss_fn(params):
            logits = logits_of(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = jax.jit(tx.init)(params)

    def train():
        nonlocal params, opt_state
        params, opt_state, loss = step(params, opt_state, images, labels)
        return loss

    return train


def build_ours(case: Case, mode: str, **options: Any) -> Call:
    """Build `LSTMClassifier`; `options` may hold its `implementation`."""
    options |= {"dtype": jax.numpy.bfloat16} if case.bfloat16 else {"precision": HIGHEST}
    model = LSTMClassifier(case.hidden, case.layers, **options)
    params = from_torch(weights(case))
    return _call(lambda params, x: model.apply({"params": params}, x), params, case, mode)


def build_linen_rnn(case: Case, mode: str) -> Call:
    """Build one `flax.linen.RNN` a layer, over `OptimizedLSTMCell`."""
    dtype = jax.numpy.bfloat16 if case.bfloat16 else None
    layers = [nn.RNN(nn.OptimizedLSTMCell(case.hidden, dtype=dtype)) for _ in range(case.layers)]
    model = nn.Sequential([*layers, lambda outputs: outputs[:, -1], nn.Dense(CLASSES)])
    ours = from_torch(weights(case))
    params: dict[str, Any] = {f"layers_{case.layers + 1}": ours["head"]}
    for k in range(case.layers):
        gates = {name: np.split(a, 4, axis=-1) for name, a in ours["core"][f"l{k}"].items()}
        cell = params[f"layers_{k}"] = {"cell": {}}
        for gate, w_ih, w_hh, b in zip("ifgo", *gates.values(), strict=True):
            cell["cell"] |= {f"i{gate}": {"kernel": w_ih}, f"h{gate}": {"kernel": w_hh, "bias": b}}
    return _call(lambda params, x: model.apply({"params": params}, x), params, case, mode)


def build_keras(case: Case, mode: str) -> Call:
    """Build one `keras.layers.LSTM` a layer, on Keras's JAX backend."""
    import keras  # takes seconds, and only this peer needs it

    dtype = "mixed_bfloat16" if case.bfloat16 else "float32"
    lstms = [
        keras.layers.LSTM(case.hidden, return_sequences=k < case.layers - 1, dtype=dtype)
        for k in range(case.layers)
    ]
    images = keras.Input((case.time, case.features))
    model = keras.Sequential([images, *lstms, keras.layers.Dense(CLASSES, dtype=dtype)])
    # Its gates are in the same order, and its weights in the order of these dicts.
    params = from_torch(weights(case))
    layers = [params["core"][f"l{k}"] for k in range(case.layers)]
    model.set_weights([array for tree in (*layers, params["head"]) for array in tree.values()])
    fixed = [variable.value for variable in model.non_trainable_variables]
    trained = [variable.value for variable in model.trainable_variables]
    return _call(lambda params, x: model.stateless_call(params, fixed, x)[0], trained, case, mode)


def pack_for_cudnn(state_dict: dict[str, np.ndarray]) -> np.ndarray:
    """Return cuDNN's one array of weights: the kernels of all layers, then all their biases."""
    names = [name for name in state_dict if name.startswith("rnn.")]
    in_order = sorted(names, key=lambda name: "bias" in name)  # sorting is stable
    return np.concatenate([state_dict[name].ravel() for name in in_order])


def build_jax_cudnn(case: Case, mode: str) -> Call:
    """Build `jax.experimental.rnn`, whose only implementation is cuDNN's."""
    if case.bfloat16:
        raise Unavailable("jax.experimental.rnn multiplies in float32")
    zeros = np.zeros((case.layers, case.batch, case.hidden), np.float32)
    lengths = np.full(case.batch, case.time, np.int32)
    dense = nn.Dense(CLASSES, precision=HIGHEST)

    def apply(params, x):
        outputs, _, _ = rnn.lstm(
            x, zeros, zeros, params["rnn"], lengths, case.features, case.hidden, case.layers,
            0.0, False, HIGHEST,
        )  # fmt: skip
        return dense.apply({"params": params["head"]}, outputs[:, -1])

    state_dict = weights(case)
    params = {"rnn": pack_for_cudnn(state_dict), "head": from_torch(state_dict)["head"]}
    return _call(apply, params, case, mode)
