"""mest-compile: a compiler for sparse training on devices.

Importing this package loads neither tvm nor torch; the names below are found when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see: the names in _HOME, and the plug-ins that come with the package
    from mest_compile.base.errors import MestError as MestError
    from mest_compile.base.plugins import plug_in as plug_in
    from mest_compile.budgeting import Choice as Choice
    from mest_compile.checking import check as check
    from mest_compile.choosing import choose_trainable as choose_trainable
    from mest_compile.compiling import compile as compile
    from mest_compile.devices.session import rpc as rpc
    from mest_compile.exporting import read_safetensors as read_safetensors
    from mest_compile.exporting import to_onnx as to_onnx
    from mest_compile.exporting import to_safetensors as to_safetensors
    from mest_compile.exporting import to_torch as to_torch
    from mest_compile.finetuning.ondevice import learn as learn
    from mest_compile.finetuning.tuning import finetune as finetune
    from mest_compile.hardware.target import Target as Target
    from mest_compile.ir.graph import LayerSpec as LayerSpec
    from mest_compile.measuring.speedtable import speed_table as speed_table
    from mest_compile.models.inputs import Inputs as Inputs
    from mest_compile.models.inputs import Reading as Reading
    from mest_compile.opening import load as load
    from mest_compile.opening import open_artifact as open_artifact
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
    from mest_compile.sparsity.schemes.nm import NM as NM
    from mest_compile.sparsity.schemes.pattern import Pattern as Pattern
    from mest_compile.sparsity.schemes.unstructured import Unstructured as Unstructured
    from mest_compile.sweeping.sweep import sweep as sweep
    from mest_compile.training.loop import Trainer as Trainer
    from mest_compile.training.recipe import Recipe as Recipe
    from mest_compile.training.run import Silent as Silent
    from mest_compile.training.writers import CsvWriter as CsvWriter
    from mest_compile.training.writers import TensorBoardWriter as TensorBoardWriter
    from mest_compile.training.writers import WandbWriter as WandbWriter
    from mest_compile.tuning.tuned import tune as tune

__version__ = "0.2.0"

_HOME = {
    "compile": "mest_compile.compiling",
    "check": "mest_compile.checking",
    "choose_trainable": "mest_compile.choosing",
    "Choice": "mest_compile.budgeting",
    "load": "mest_compile.opening",
    "read_safetensors": "mest_compile.exporting",
    "to_torch": "mest_compile.exporting",
    "to_onnx": "mest_compile.exporting",
    "to_safetensors": "mest_compile.exporting",
    "open_artifact": "mest_compile.opening",
    "rpc": "mest_compile.devices.session",
    "finetune": "mest_compile.finetuning.tuning",
    "learn": "mest_compile.finetuning.ondevice",
    "Inputs": "mest_compile.models.inputs",
    "Reading": "mest_compile.models.inputs",
    "Group": "mest_compile.operators.optimizers.groups",
    "LayerSpec": "mest_compile.ir.graph",
    "Recipe": "mest_compile.training.recipe",
    "Silent": "mest_compile.training.run",
    "Trainer": "mest_compile.training.loop",
    "CsvWriter": "mest_compile.training.writers",
    "TensorBoardWriter": "mest_compile.training.writers",
    "WandbWriter": "mest_compile.training.writers",
    "tune": "mest_compile.tuning.tuned",
    "speed_table": "mest_compile.measuring.speedtable",
    "sweep": "mest_compile.sweeping.sweep",
    "Target": "mest_compile.hardware.target",
    "MestError": "mest_compile.base.errors",
    "plug_in": "mest_compile.base.plugins",
}

# Registries whose classes are public under their own names, those of files that somebody adds too: module -> registry.
_PLUG_INS = {
    "mest_compile.operators.losses.loss": "LOSSES",
    "mest_compile.operators.optimizers.optimizer": "OPTIMIZERS",
    "mest_compile.sparsity.scheme": "SCHEMES",
}


def _plug_ins() -> dict[str, type]:
    """Every loss, optimizer and scheme by the name of its class. Raises DuplicateName when two share one."""
    found: dict[str, type] = {}
    for module, registry in _PLUG_INS.items():
        for kind in getattr(importlib.import_module(module), registry).load().values():
            name, home = kind.__name__, kind.__module__
            if name in _HOME or found.setdefault(name, kind) is not kind:
                from mest_compile.base.errors import DuplicateName

                other = _HOME.get(name) or found[name].__module__
                raise DuplicateName(f"mest.{name} is what both {other} and {home} have; rename the class of one")
    return found


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "__all__":
        return __dir__()
    plug_ins = _plug_ins() if name[0].isupper() else {}  # what is no class is looked for without loading any
    if name not in plug_ins:
        there = ", ".join(sorted([*_HOME, *plug_ins]))
        raise AttributeError(f"module 'mest_compile' has no attribute {name!r}; it has: {there}")
    return plug_ins[name]


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOME, *_plug_ins()])
