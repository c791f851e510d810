"""How good predicted probabilities are: NLL, Brier score, calibration error, top-5; and a temperature for them.

All of it is for one set of images: logits or log probabilities (N, C) of N images and C classes, labels (N,).
"""

from math import exp, log

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

NUM_BINS = 15  # equal widths of confidence, as in Guo et al. 2017
TOP = 5
_MIN_CLASSES_FOR_TOP = 20  # with fewer, five guesses are nearly always right
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.05, 20.0

Reliability = list[dict[str, float]]


def measure_images(log_probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What each image adds to each measure: arrays (N,), whose means are the measures.

    nll: negative log-likelihood, −log p of the true class, in nats.
    brier: Σ over the classes of (p − y)², y one-hot; from 0 to 2. Source: Brier 1950.
    ece: expected calibration error, Σ over the bins of |Σ of (correct − confidence)| / N. The confidence is the highest
        p, and a bin includes its right end. An image adds its own (correct − confidence), with the sign of its bin's
        sum. Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599, equation 3.
    top5: whether the true class is among the five with the highest p; from 20 classes on.
    """
    probabilities = np.exp(log_probabilities)
    of_true = log_probabilities[np.arange(len(labels)), labels]  # (N,)
    one_hot = labels[:, None] == np.arange(probabilities.shape[1])
    gaps = (probabilities.argmax(1) == labels) - probabilities.max(1)
    bins = _bins(probabilities.max(1))
    signs = np.sign(np.bincount(bins, gaps, NUM_BINS))
    measures = {"nll": -of_true, "brier": ((probabilities - one_hot) ** 2).sum(1), "ece": signs[bins] * gaps}
    if probabilities.shape[1] >= _MIN_CLASSES_FOR_TOP:
        # Of equal ones the first counts as higher, as for argmax: in half precision, many are equal.
        before = np.arange(probabilities.shape[1]) < labels[:, None]
        ahead = (log_probabilities > of_true[:, None]) | (before & (log_probabilities == of_true[:, None]))
        measures["top5"] = (ahead.sum(1) < TOP).astype(float)
    return measures


def reliability(log_probabilities: np.ndarray, labels: np.ndarray) -> Reliability:
    """By bin of confidence, from 0 to 1: the number of images, their mean confidence, and their accuracy."""
    confidence, correct = np.exp(log_probabilities.max(1)), log_probabilities.argmax(1) == labels
    bins = _bins(confidence)
    counts = np.bincount(bins, minlength=NUM_BINS)
    confidences, accuracies = (
        np.bincount(bins, values, NUM_BINS) / np.maximum(counts, 1) for values in (confidence, correct)
    )
    rows = zip(counts.tolist(), confidences.tolist(), accuracies.tolist(), strict=True)
    return [{"images": images, "confidence": mean, "accuracy": accuracy} for images, mean, accuracy in rows]


def _bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence: 0 for (0, 1/15], 14 for (14/15, 1]."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    return np.searchsorted(edges[1:-1], confidence, side="left")


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T with the least NLL of softmax(logits / T), between 0.05 and 20.

    The NLL is convex in 1 / T, so that there is one minimum. It has none where all images are classified correctly:
    then T is as low as changes the NLL. Source: Guo et al. 2017, section 4.2.
    """

    def nll(log_temperature: float) -> float:
        scaled = log_softmax(logits / exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    bounds = log(_LOWEST_TEMPERATURE), log(_HIGHEST_TEMPERATURE)
    return exp(minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)
