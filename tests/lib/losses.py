"""Losses with options, targets for them, and what torch computes of both: what tests of kernels and of steps share."""

import numpy as np
import torch
import torch.nn.functional as F

import mest_compile as mest

IGNORED = -100


def classes(rng, shape):
    return rng.integers(0, shape[1], (shape[0], *shape[2:]))


def some_ignored(rng, shape):
    labels = classes(rng, shape)
    labels[rng.random(labels.shape) < 0.4] = IGNORED
    labels.ravel()[0] = 1
    return labels


def probabilities(rng, shape):
    found = rng.random(shape) * (rng.random(shape) < 0.7) + 1e-3
    return (found / found.sum(1, keepdims=True)).astype(np.float32)


def numbers(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


def answers(rng, shape):
    """Yes and no, and what lies between."""
    return np.float32(np.where(rng.random(shape) < 0.2, rng.random(shape), rng.random(shape) < 0.4))


def taught(rng, shape):
    return classes(rng, shape), numbers(rng, shape) * 3


def weights(width):
    return tuple(np.linspace(0.25, 2, width).round(3).tolist())


def rules(width):
    """{name: (loss of `width` outputs, what makes its targets, torch's loss of (outputs, targets))}."""
    weight = weights(width)
    tensor = torch.tensor(weight, dtype=torch.float64)

    def distilled(temperature, mix):
        def loss(outputs, given):
            labels, teacher = given
            soft = (
                F.kl_div(
                    F.log_softmax(outputs / temperature, 1), F.softmax(teacher / temperature, 1), reduction="none"
                ).sum()
                / labels.numel()
            )
            return (1 - mix) * F.cross_entropy(outputs, labels) + mix * temperature**2 * soft

        return loss

    def cross_entropy(**options):
        return lambda outputs, labels: F.cross_entropy(outputs, labels, **options)

    return {
        "cross_entropy": (mest.CrossEntropy(), classes, cross_entropy()),
        "smoothed": (mest.CrossEntropy(0.1), classes, cross_entropy(label_smoothing=0.1)),
        "weighted": (mest.CrossEntropy(weight=weight), classes, cross_entropy(weight=tensor)),
        "ignoring": (mest.CrossEntropy(ignore_index=IGNORED), some_ignored, cross_entropy(ignore_index=IGNORED)),
        "all three": (
            mest.CrossEntropy(0.2, weight, IGNORED),
            some_ignored,
            cross_entropy(label_smoothing=0.2, weight=tensor, ignore_index=IGNORED),
        ),
        "soft": (mest.SoftCrossEntropy(), probabilities, cross_entropy()),
        "soft, weighted": (
            mest.SoftCrossEntropy(0.1, weight),
            probabilities,
            cross_entropy(label_smoothing=0.1, weight=tensor),
        ),
        "distill": (mest.Distill(), taught, distilled(4.0, 0.5)),
        "teacher alone": (mest.Distill(2.0, 1.0), taught, distilled(2.0, 1.0)),
        "labels alone": (mest.Distill(2.0, 0.0), taught, distilled(2.0, 0.0)),
        "bce": (mest.BCE(), answers, F.binary_cross_entropy_with_logits),
        "bce, weighted": (
            mest.BCE(pos_weight=3),
            answers,
            lambda outputs, targets: F.binary_cross_entropy_with_logits(
                outputs, targets, pos_weight=torch.tensor(3.0, dtype=torch.float64)
            ),
        ),
        "bce, weighted one by one": (
            mest.BCE(pos_weight=weight),
            answers,
            lambda outputs, targets: F.binary_cross_entropy_with_logits(
                outputs, targets, pos_weight=tensor.reshape(-1, *[1] * (targets.ndim - 2))
            ),
        ),
        "mse": (mest.MSE(), numbers, F.mse_loss),
        "smooth_l1": (mest.SmoothL1(), numbers, F.smooth_l1_loss),
        "smooth_l1, beta": (
            mest.SmoothL1(0.25),
            numbers,
            lambda outputs, targets: F.smooth_l1_loss(outputs, targets, beta=0.25),
        ),
        "l1": (mest.SmoothL1(0), numbers, lambda outputs, targets: F.smooth_l1_loss(outputs, targets, beta=0)),
        "huber": (mest.Huber(), numbers, F.huber_loss),
        "huber, delta": (
            mest.Huber(0.5),
            numbers,
            lambda outputs, targets: F.huber_loss(outputs, targets, delta=0.5),
        ),
    }


NAMES = list(rules(2))


def tensors(given, dtype=torch.float64):
    """Targets as torch takes them, numbers of that type."""
    if isinstance(given, tuple):
        return tuple(tensors(one, dtype) for one in given)
    return torch.from_numpy(given if given.dtype.kind == "i" else given.astype(str(dtype).removeprefix("torch.")))


def as_tuple(given):
    return given if isinstance(given, tuple) else (given,)
