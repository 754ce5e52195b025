"""Optimizers of every rule, and torch's of the same: what tests of kernels and of steps share."""

import torch

import mest_compile as mest

# Of every rule one, and SGD with Nesterov's momentum.
EVERY = {
    "sgd": mest.SGD(0.1, 0.9, 1e-2),
    "nesterov": mest.SGD(0.1, 0.9, 1e-2, True),
    "plain": mest.SGD(0.05, 0, 1e-2),
    "adam": mest.Adam(weight_decay=1e-2),
    "adamw": mest.AdamW(),
    "rmsprop": mest.RMSprop(weight_decay=1e-2),
    "rmsprop momentum": mest.RMSprop(1e-3, momentum=0.9),
    "rmsprop centered": mest.RMSprop(1e-3, centered=True),
    "rmsprop both": mest.RMSprop(1e-3, 0.9, momentum=0.5, centered=True),
}


def options(rule):
    """What torch's class takes, without groups."""
    _, names, _ = rule.torch
    return {theirs: getattr(rule, ours) for theirs, ours in names.items()}


def twin(rule, parameters):
    """torch's optimizer of the same rule."""
    return getattr(torch.optim, rule.torch[0])(parameters, **options(rule))
