"""mest-compile: a compiler for sparse training on devices.

Importing this package loads neither tvm nor torch; the names below are found when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see of the names in _HOME
    from mest_compile.base.errors import MestError as MestError
    from mest_compile.compiling import compile as compile
    from mest_compile.devices.session import rpc as rpc
    from mest_compile.hardware.target import Target as Target
    from mest_compile.ir.graph import LayerSpec as LayerSpec
    from mest_compile.measuring.speedtable import speed_table as speed_table
    from mest_compile.opening import load as load
    from mest_compile.opening import open_artifact as open_artifact
    from mest_compile.opening import to_torch as to_torch
    from mest_compile.operators.losses.bce import BCE as BCE
    from mest_compile.operators.losses.cross_entropy import CrossEntropy as CrossEntropy
    from mest_compile.operators.losses.distill import Distill as Distill
    from mest_compile.operators.losses.huber import Huber as Huber
    from mest_compile.operators.losses.mse import MSE as MSE
    from mest_compile.operators.losses.smooth_l1 import SmoothL1 as SmoothL1
    from mest_compile.operators.losses.soft_cross_entropy import SoftCrossEntropy as SoftCrossEntropy
    from mest_compile.operators.optimizers.adam import Adam as Adam
    from mest_compile.operators.optimizers.adamw import AdamW as AdamW
    from mest_compile.operators.optimizers.groups import Group as Group
    from mest_compile.operators.optimizers.rmsprop import RMSprop as RMSprop
    from mest_compile.operators.optimizers.sgd import SGD as SGD
    from mest_compile.sparsity.schemes.block import Block as Block
    from mest_compile.sparsity.schemes.channel import Channel as Channel
    from mest_compile.sparsity.schemes.dense import Dense as Dense
    from mest_compile.sparsity.schemes.filter import Filter as Filter
    from mest_compile.sparsity.schemes.pattern import Pattern as Pattern
    from mest_compile.sparsity.schemes.unstructured import Unstructured as Unstructured
    from mest_compile.training.loop import Trainer as Trainer
    from mest_compile.training.recipe import Recipe as Recipe

__version__ = "0.1.0"

_HOME = {
    "compile": "mest_compile.compiling",
    "load": "mest_compile.opening",
    "to_torch": "mest_compile.opening",
    "open_artifact": "mest_compile.opening",
    "rpc": "mest_compile.devices.session",
    "SGD": "mest_compile.operators.optimizers.sgd",
    "Adam": "mest_compile.operators.optimizers.adam",
    "AdamW": "mest_compile.operators.optimizers.adamw",
    "RMSprop": "mest_compile.operators.optimizers.rmsprop",
    "Group": "mest_compile.operators.optimizers.groups",
    "BCE": "mest_compile.operators.losses.bce",
    "CrossEntropy": "mest_compile.operators.losses.cross_entropy",
    "Distill": "mest_compile.operators.losses.distill",
    "Huber": "mest_compile.operators.losses.huber",
    "MSE": "mest_compile.operators.losses.mse",
    "SmoothL1": "mest_compile.operators.losses.smooth_l1",
    "SoftCrossEntropy": "mest_compile.operators.losses.soft_cross_entropy",
    "LayerSpec": "mest_compile.ir.graph",
    "Block": "mest_compile.sparsity.schemes.block",
    "Unstructured": "mest_compile.sparsity.schemes.unstructured",
    "Pattern": "mest_compile.sparsity.schemes.pattern",
    "Filter": "mest_compile.sparsity.schemes.filter",
    "Channel": "mest_compile.sparsity.schemes.channel",
    "Dense": "mest_compile.sparsity.schemes.dense",
    "Recipe": "mest_compile.training.recipe",
    "Trainer": "mest_compile.training.loop",
    "speed_table": "mest_compile.measuring.speedtable",
    "Target": "mest_compile.hardware.target",
    "MestError": "mest_compile.base.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mest_compile' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
