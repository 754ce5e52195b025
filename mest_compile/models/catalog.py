"""Built-in models: plain torch modules, most for small images, with torchvision's attribute names. torch is imported
when one is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mest_compile.base import checks
from mest_compile.base.errors import NotInstalled, SpecError, UnknownName
from mest_compile.ir.layouts.layout import FLOAT_BYTES
from mest_compile.models.gated import _efficientnet_b0, _mobilenetv3_small
from mest_compile.models.mlp import _autoencoder, _mlp
from mest_compile.models.mobilenet import _ds_cnn, _efficientnet_lite, _mobilenetv1, _mobilenetv2
from mest_compile.models.resnet import _resnet
from mest_compile.models.transformer import _cct, _deit_tiny
from mest_compile.models.vgg import _vgg

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Model:
    """How a built-in model is made: `make(input_shape, classes, width)` gives the module with torch's own initial
    values. rounds: it makes whole channels of any width."""

    make: Callable[[tuple[int, ...], int, Any], Any]
    width: int
    summary: str
    rounds: bool = False


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A built-in model with fresh weights that nobody has made: what reading it gave before may be known."""

    name: str
    input_shape: tuple[int, ...]
    classes: int = 10
    width: float | None = None
    seed: int = 0

    def made(self) -> torch.nn.Module:
        """Raises as `build_model`."""
        return build_model(self.name, self.input_shape, self.classes, self.width, self.seed)


def model_names() -> list[str]:
    return sorted(MODELS)


def build_model(
    name: str, input_shape: tuple[int, ...], classes: int = 10, width: float | None = None, seed: int = 0
) -> torch.nn.Module:
    """A built-in model with fresh weights. The same arguments give the same weights; torch's random state stays as it
    was.

    input_shape  (N, C, H, W), nets of linear layers also (N, features); N is not used
    width        channels of the first stage, or hidden features, an int; a float, such as 0.35, is what the model's own
                 are multiplied by; None: the model's own
    Raises UnknownName, SpecError, UsageError, BudgetError (more weights than this machine has memory), NotInstalled.
    """
    if not isinstance(name, str) or name not in MODELS:
        raise UnknownName(f"no model {checks.shown(name)}; there are: {', '.join(model_names())}")
    width = _width(name, MODELS[name], width)
    classes, seed = checks.whole("classes", classes, 1, error=SpecError), checks.whole("seed", seed)
    input_shape = checks.shape("input_shape", input_shape, SpecError)
    of_features = name in OF_FEATURES
    if len(input_shape) not in ((2, 4) if of_features else (4,)):
        raise SpecError(
            f"{name} takes an input_shape of (N, C, H, W){' or (N, features)' if of_features else ''}, got "
            f"{input_shape}"
        )
    try:
        import torch
    except ImportError as problem:
        raise NotInstalled(
            f"the built-in model {name} is made with torch, which is not installed: pip install torch --index-url "
            "https://download.pytorch.org/whl/cpu; or give an .onnx file"
        ) from problem

    with torch.random.fork_rng(devices=[]):
        _check_memory(name, MODELS[name], input_shape, classes, width)
        torch.manual_seed(seed)
        module = MODELS[name].make(input_shape, classes, width)
        for part in module.modules():
            if isinstance(part, torch.nn.Conv2d):  # as MEST does; linear layers and BatchNorm keep torch's own
                torch.nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
                with torch.no_grad():  # torch counts all outputs as those of an input, which are one group's
                    part.weight *= part.groups**0.5
    return module


def _width(name: str, model: Model, width: Any) -> float:
    """Channels, a whole number unless the model rounds. Raises SpecError."""
    if width is None:
        return model.width
    if not isinstance(width, float):
        return checks.whole("width", width, 1, ", a share of the model's own such as 0.5, or None for these", SpecError)
    found = model.width * checks.number("width", width, error=SpecError)
    if found < 1 or not (model.rounds or found.is_integer()):
        wanted = "1 or more" if model.rounds else "a whole number of 1 or more"
        raise SpecError(f"width {width:g} of {name} is {found:g} channels, its own are {model.width}; wanted {wanted}")
    return found if model.rounds else int(found)


def _check_memory(name: str, model: Model, input_shape: tuple[int, ...], classes: int, width: float) -> None:
    """Raises BudgetError when this machine has no room for the weights, none of which are made for that."""
    import torch

    try:
        with torch.device("meta"):
            elems = sum(weight.numel() for weight in model.make(input_shape, classes, width).parameters())
    except (RuntimeError, OverflowError, TypeError) as problem:  # torch tells sizes by 64 bits
        raise SpecError(
            f"{name} with a width of {width} and {classes} classes has more weights than torch can count; "
            f"give it a smaller width"
        ) from problem
    checks.memory(FLOAT_BYTES * elems, f"{name} with a width of {width}")


OF_FEATURES = ("autoencoder", "mlp")  # they take (N, features) as well

MODELS = {
    "autoencoder": Model(_autoencoder, 128, "MLPerf Tiny's anomaly detector; classes are what it gives back, 640"),
    "cct": Model(_cct, 256, "CCT-7/3x1, a compact transformer for small images; width is a token's"),
    "deit-tiny": Model(_deit_tiny, 192, "DeiT-tiny; patches of 16 pixels, of images below 64 of 4; width is a token's"),
    "ds-cnn": Model(_ds_cnn, 64, "DS-CNN, MLPerf Tiny's keyword spotter, for 1x49x10 inputs"),
    "efficientnet-b0": Model(_efficientnet_b0, 32, "EfficientNet-B0 with squeeze-and-excitation", True),
    "efficientnet-lite0": Model(_efficientnet_lite(), 32, "EfficientNet-lite0; width scales the blocks alone", True),
    "efficientnet-lite1": Model(_efficientnet_lite(1.1), 32, "EfficientNet-lite1; width scales the blocks alone", True),
    "efficientnet-lite2": Model(
        _efficientnet_lite(1.2, 1.1), 32, "EfficientNet-lite2; width scales the blocks alone", True
    ),
    "mlp": Model(_mlp, 1024, "three linear layers; width is the hidden size"),
    "mobilenetv1": Model(_mobilenetv1, 32, "MobileNet; MLPerf Tiny's of a quarter of the channels is width 0.25"),
    "mobilenetv2": Model(_mobilenetv2, 32, "MobileNetV2; all channels are multiples of 8", True),
    "mobilenetv3-small": Model(_mobilenetv3_small, 16, "MobileNetV3-small with squeeze-and-excitation", True),
    "resnet8": Model(_resnet((1, 1, 1)), 16, "ResNet-8, MLPerf Tiny's for small images"),
    "resnet20": Model(_resnet((3, 3, 3)), 16, "ResNet-20 for small images"),
    "resnet32": Model(_resnet((5, 5, 5)), 16, "ResNet-32 for small images; the method's paper uses width 32"),
    "resnet18": Model(_resnet((2, 2, 2, 2)), 64, "ResNet-18; of images below 64 pixels with a 3x3 stem"),
    "resnet50": Model(_resnet((3, 4, 6, 3), True), 64, "ResNet-50; of images below 64 pixels with a 3x3 stem"),
    "vgg11": Model(_vgg((1, 1, 2, 2, 2)), 64, "VGG-11 with BatchNorm and one linear classifier"),
    "vgg19": Model(_vgg((2, 2, 4, 4, 4)), 64, "VGG-19 with BatchNorm and one linear classifier"),
}
