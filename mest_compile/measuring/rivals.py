"""Other trainers' step of a `Case`: SparseProp and onnxruntime-training. Nothing here needs tvm."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mest_compile.base.errors import UsageError
from mest_compile.measuring.case import Built, Case
from mest_compile.measuring.dense_torch import torch_model, torch_step, usual_rule

if TYPE_CHECKING:
    import torch

SWAPPED_ABOVE = 0.8  # SparseProp leaves layers dense that are not sparser than this
SPARSEPROP_VECTOR = 8  # examples that its convolution takes at a time; those left over it leaves out


# SparseProp.
# SparseProp.


def load_sparseprop() -> None:
    import sparseprop.utils  # noqa: F401


def build_sparseprop(case: Case) -> Built:
    """Unstructured whatever the case's scheme is. SparseProp times each layer and keeps it dense where its own kernel
    is slower."""
    sparsity = case.options.one_sparsity
    if sparsity is None or sparsity <= SWAPPED_ABOVE:
        raise UsageError(
            f"SparseProp leaves layers dense that are not more than {SWAPPED_ABOVE:.0%} sparse; the case has "
            f"{case.options.sparsity}"
        )
    if left := case.input_shape[0] % SPARSEPROP_VECTOR:
        raise UsageError(
            f"SparseProp's convolution takes {SPARSEPROP_VECTOR} examples at a time and would leave out the last "
            f"{left} of "
            f"{case.input_shape[0]}, without a word; give a batch that is a multiple of {SPARSEPROP_VECTOR}"
        )
    import torch
    from sparseprop.utils import swap_modules_with_sparse

    torch.set_num_threads(case.threads)
    model = torch_model(case)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, keep in unstructured_masks(model, case).items():
            parameters[name].mul_(torch.from_numpy(keep))
    # Per layer it measures its kernels against the dense one, on inputs of the case's size.
    swapped = swap_modules_with_sparse(model, case.input_shape)
    layers = [part for part in swapped.modules() if type(part).__module__.startswith("sparseprop")]
    return Built(
        torch_step(swapped, case, channels_last=False), notes=(f"{len(layers)} layers run SparseProp's kernels",)
    )


def unstructured_masks(model: torch.nn.Module, case: Case) -> dict[str, np.ndarray]:
    """{weight name: bool array}: the masks that our step of the case starts with when its scheme is unstructured."""
    from mest_compile.frontend import from_torch
    from mest_compile.hardware.target import find_target
    from mest_compile.planning.layers import plan_layers
    from mest_compile.sparsity.room import masked_layers

    options = case.but(scheme="unstructured").options
    graph, weights = from_torch(model, case.input_shape)
    masks, rng = {}, np.random.default_rng(options.seed)
    for name, layer in masked_layers(plan_layers(graph, options, find_target(options.target))).items():
        spec, scheme, weight = layer.spec, layer.scheme, weights[name]
        energy = scheme.energy(spec, weight.reshape(spec.weight_shape))
        keep = scheme.start(spec, energy, scheme.live_units(spec, layer.sparsity), rng)
        masks[name] = scheme.expand(spec, keep).reshape(weight.shape)
    return masks


# onnxruntime-training.


def load_onnxruntime() -> None:
    import onnxruntime.training.artifacts  # noqa: F401
    import torch  # noqa: F401


def build_onnxruntime(case: Case) -> Built:
    """Dense. Its SGD has neither momentum nor weight decay, so its step does less than the others'."""
    import onnx
    import onnxruntime
    import torch
    from onnxruntime.training import artifacts
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    model = torch_model(case)
    images, labels = case.batch()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            model,
            (torch.from_numpy(images),),
            str(path),
            dynamo=False,
            opset_version=14,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.TRAINING,
        )
        graph = onnx.load(path)
        graph.ir_version = 8  # the newest that this onnxruntime reads
        trained = {name for name, _ in model.named_parameters()}
        names = [tensor.name for tensor in graph.graph.initializer]
        artifacts.generate_artifacts(
            graph,
            requires_grad=[name for name in names if name in trained],
            frozen_params=[name for name in names if name not in trained],
            loss=artifacts.LossType.CrossEntropyLoss,
            optimizer=artifacts.OptimType.SGD,
            artifact_directory=folder,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
        state = CheckpointState.load_checkpoint(str(Path(folder, "checkpoint")))
        module = Module(str(Path(folder, "training_model.onnx")), state, None, session_options=options)
        optimizer = Optimizer(str(Path(folder, "optimizer_model.onnx")), module)
    optimizer.set_learning_rate(usual_rule(case).lr)
    module.train()

    def step() -> float:
        loss = module(images, labels)
        optimizer.step()
        module.lazy_reset_grad()
        return float(loss)

    return Built(step, notes=("its SGD has neither momentum nor weight decay",))
