"""mest-compile: a compiler for sparse training on devices.

Importing this package loads neither tvm nor torch; the names below are found when first used.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "compile": "mest_compile.compiling",
    "load": "mest_compile.opening", "to_torch": "mest_compile.opening", "open_artifact": "mest_compile.opening",
    "rpc": "mest_compile.devices.session",
    "SGD": "mest_compile.operators.optimizers.sgd", "AdamW": "mest_compile.operators.optimizers.adamw",
    "CrossEntropy": "mest_compile.operators.losses.cross_entropy", "MSE": "mest_compile.operators.losses.mse",
    "LayerSpec": "mest_compile.ir.graph",
    "Block": "mest_compile.sparsity.schemes.block", "Unstructured": "mest_compile.sparsity.schemes.unstructured",
    "Pattern": "mest_compile.sparsity.schemes.pattern", "Filter": "mest_compile.sparsity.schemes.filter",
    "Channel": "mest_compile.sparsity.schemes.channel", "Dense": "mest_compile.sparsity.schemes.dense",
    "Recipe": "mest_compile.training.recipe", "Trainer": "mest_compile.training.loop",
    "speed_table": "mest_compile.measuring.speedtable", "Target": "mest_compile.hardware.target",
    "MestError": "mest_compile.base.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'mest_compile' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted(__all__)
