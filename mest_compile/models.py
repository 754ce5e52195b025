"""Built-in models: plain torch modules for small images, with torchvision's attribute names. torch is imported when one is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mest_compile import checks
from mest_compile.errors import SpecError, UnknownName
from mest_compile.spec import FLOAT_BYTES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Model:
    """How a built-in model is made: `make(input_shape, classes, width)` gives the module with torch's own initial values."""

    make: Callable[[tuple[int, ...], int, int], Any]
    width: int
    summary: str


def model_names() -> list[str]:
    return sorted(MODELS)


def build_model(name: str, input_shape: tuple[int, ...], classes: int = 10, width: int | None = None, seed: int = 0) -> torch.nn.Module:
    """A built-in model with fresh weights. The same arguments give the same weights; torch's random state stays as it was.

    input_shape  (N, C, H, W), `mlp` also (N, features); N is not used
    width        channels of the first stage (`mlp`: hidden features); None: the model's own
    Raises UnknownName, SpecError, UsageError, BudgetError (more weights than this machine has memory).
    """
    if not isinstance(name, str) or name not in MODELS:
        raise UnknownName(f"no model {checks.shown(name)}; there are: {', '.join(model_names())}")
    width = MODELS[name].width if width is None else checks.whole("width", width, 1, ", or None for the model's own", SpecError)
    classes, seed = checks.whole("classes", classes, 2, error=SpecError), checks.whole("seed", seed)
    input_shape = checks.shape("input_shape", input_shape, SpecError)
    if len(input_shape) not in ((2, 4) if name == "mlp" else (4,)):
        raise SpecError(f"{name} takes an input_shape of (N, C, H, W){' or (N, features)' if name == 'mlp' else ''}, got {input_shape}")
    import torch

    with torch.random.fork_rng(devices=[]):
        _check_memory(name, MODELS[name], input_shape, classes, width)
        torch.manual_seed(seed)
        module = MODELS[name].make(input_shape, classes, width)
        for part in module.modules():
            if isinstance(part, torch.nn.Conv2d):      # as MEST does; linear layers and BatchNorm keep torch's own
                torch.nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return module


def _check_memory(name: str, model: Model, input_shape: tuple[int, ...], classes: int, width: int) -> None:
    """Raises BudgetError when this machine has no room for the weights, none of which are made for that."""
    import torch

    try:
        with torch.device("meta"):
            elems = sum(weight.numel() for weight in model.make(input_shape, classes, width).parameters())
    except (RuntimeError, OverflowError, TypeError) as problem:  # torch tells sizes by 64 bits
        raise SpecError(f"{name} with a width of {width} and {classes} classes has more weights than torch can count; "
                        f"give it a smaller width") from problem
    checks.memory(FLOAT_BYTES * elems, f"{name} with a width of {width}")


def _mlp(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
    from math import prod

    from torch import nn

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(prod(input_shape[1:]), width)
            self.fc2 = nn.Linear(width, width)
            self.fc3 = nn.Linear(width, classes)

        def forward(self, x):
            x = self.fc1(x.flatten(1)).relu()
            return self.fc3(self.fc2(x).relu())

    return MLP()


def _resnet(blocks: tuple[int, ...]) -> Callable[[tuple[int, ...], int, int], Any]:
    """A residual net of two-convolution blocks with a 3x3 stem; each stage has twice the channels and half the size."""

    def make(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
        from torch import nn

        class Block(nn.Module):
            def __init__(self, inputs, outputs, stride):
                super().__init__()
                self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
                self.bn1 = nn.BatchNorm2d(outputs)
                self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
                self.bn2 = nn.BatchNorm2d(outputs)
                self.downsample = None
                if stride != 1 or inputs != outputs:
                    self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

            def forward(self, x):
                shortcut = x if self.downsample is None else self.downsample(x)
                y = self.bn1(self.conv1(x)).relu()
                return (self.bn2(self.conv2(y)) + shortcut).relu()

        class ResNet(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv1 = nn.Conv2d(input_shape[1], width, 3, 1, 1, bias=False)
                self.bn1 = nn.BatchNorm2d(width)
                channels = width
                for stage, count in enumerate(blocks):
                    outputs, parts = width << stage, []
                    for index in range(count):
                        parts.append(Block(channels, outputs, 2 if stage and index == 0 else 1))
                        channels = outputs
                    self.add_module(f"layer{stage + 1}", nn.Sequential(*parts))
                self.fc = nn.Linear(channels, classes)

            def forward(self, x):
                x = self.bn1(self.conv1(x)).relu()
                for stage in range(len(blocks)):
                    x = self.get_submodule(f"layer{stage + 1}")(x)
                return self.fc(x.mean((2, 3)))

        return ResNet()

    return make


def _vgg(stages: tuple[int, ...]) -> Callable[[tuple[int, ...], int, int], Any]:
    """VGG with BatchNorm: `stages` counts the 3x3 convolutions between pools; channels are width times 1, 2, 4, 8, 8."""

    def make(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
        from torch import nn

        class VGG(nn.Module):
            def __init__(self):
                super().__init__()
                parts: list[nn.Module] = []
                channels, size = input_shape[1], min(input_shape[2:])
                for stage, count in enumerate(stages):
                    for _ in range(count):
                        outputs = width * min(8, 2 ** stage)
                        parts += [nn.Conv2d(channels, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                        channels = outputs
                    if size > 1:                       # 8x8 and 28x28 images are down to one pixel before the last stage
                        parts.append(nn.MaxPool2d(2))
                        size //= 2
                self.features = nn.Sequential(*parts)
                self.classifier = nn.Linear(channels, classes)

            def forward(self, x):
                return self.classifier(self.features(x).mean((2, 3)))

        return VGG()

    return make


MODELS = {
    "mlp": Model(_mlp, 1024, "three linear layers; width is the hidden size"),
    "resnet20": Model(_resnet((3, 3, 3)), 16, "ResNet-20 for small images"),
    "resnet32": Model(_resnet((5, 5, 5)), 16, "ResNet-32 for small images; the method's paper uses width 32"),
    "resnet18": Model(_resnet((2, 2, 2, 2)), 64, "ResNet-18 with a 3x3 stem"),
    "vgg11": Model(_vgg((1, 1, 2, 2, 2)), 64, "VGG-11 with BatchNorm and one linear classifier"),
    "vgg19": Model(_vgg((2, 2, 4, 4, 4)), 64, "VGG-19 with BatchNorm and one linear classifier"),
}
