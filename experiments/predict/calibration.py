"""Probabilities that can be trusted: of the answers of 90%, nine in ten are right."""

import numpy as np
from scipy import optimize

TEMPERATURE = 1.1
"""What a model's logits are divided by.

Fitted, as in Guo et al., "On Calibration of Modern Neural Networks", 2017, to pictures of digits
that were held out of the training; the README has the figures.
"""

SMOOTHED_TEMPERATURE = 0.52
"""Likewise, for models that label smoothing has taught to be 95% sure at most.

Fitted to 20,000 training images as the pretrained model reads them; the README says how sure it
then is of the test images.
"""

UNSURE = 0.9
"""Below this probability an answer is unsure: a third of such answers are wrong."""


def temperature_for(label_smoothing: float) -> float:
    """Return what to divide the logits of a model by that was trained so."""
    return SMOOTHED_TEMPERATURE if label_smoothing else TEMPERATURE


def calibrated(probabilities: np.ndarray, temperature: float = TEMPERATURE) -> np.ndarray:
    """Divide the logits of probabilities [..., classes] by a temperature.

    Logits are the logarithms of probabilities but for a constant, which softmax takes out again.
    """
    logits = np.log(np.maximum(probabilities, 1e-30, dtype=np.float64)) / temperature
    scaled = np.exp(logits - logits.max(-1, keepdims=True))
    return scaled / scaled.sum(-1, keepdims=True)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Find the temperature under which labels are likeliest, from 0.2 to 5.

    Args:
        probabilities: a model's, [n, classes].
        labels: what the pictures show, [n].
    """

    def loss(temperature: float) -> float:
        likely = calibrated(probabilities, temperature)[np.arange(len(labels)), labels]
        return float(-np.log(np.maximum(likely, 1e-12)).mean())

    return float(optimize.minimize_scalar(loss, bounds=(0.2, 5), method="bounded").x)


def reliability(
    confidences: np.ndarray, right: np.ndarray, edges: tuple[float, ...]
) -> list[tuple[int, float, float]]:
    """Compare how sure answers are with how often they are right.

    Args:
        confidences: the probability of each answer, [n].
        right: whether each is right, [n].
        edges: the ascending bounds of the bins.

    Returns:
        Of each bin: how many answers it has, their mean probability, and the part that is right.
    """
    bins = np.digitize(confidences, edges[1:-1])
    return [
        (int(own.sum()), float(confidences[own].mean()), float(right[own].mean()))
        if (own := bins == k).any()
        else (0, float("nan"), float("nan"))
        for k in range(len(edges) - 1)
    ]
