"""A model by the name that users give it: a built-in one's, timm:NAME, torchvision:NAME, file.py:FACTORY, or the path
of an .onnx file, a run folder, a checkpoint or an artifact."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mest_compile.base import checks
from mest_compile.base.errors import DataError, MestError, NotInstalled, SpecError, UnknownName, UsageError
from mest_compile.base.names import meant
from mest_compile.models.catalog import BuiltIn, build_model, model_names
from mest_compile.models.inputs import Inputs
from mest_compile.models.pretrained import (
    PRETRAINED,
    classes_in,
    load_weights,
    pretrained_model,
    pretrained_names,
    read_weights,
)

if TYPE_CHECKING:
    import torch

NAMED = 6  # names that an error offers
CHECKPOINTS = ("checkpoint.safetensors", "state.safetensors")  # of run folders, and of artifacts


def model_to_read(
    name: str,
    input_shape: Sequence[int],
    classes: int = 10,
    width: float | None = None,
    seed: int = 0,
    pretrained: bool = False,
    weights: str | Path | None = None,
) -> torch.nn.Module | BuiltIn | str:
    """As `find_model`, for `mest.compile` alone: a built-in model with fresh weights is only made if reading it needs
    that."""
    if isinstance(name, str) and name in model_names() and not pretrained and weights is None:
        return BuiltIn(name, tuple(input_shape), classes, width, seed)
    return find_model(name, input_shape, classes, width, seed, pretrained, weights)


def find_model(
    name: str,
    input_shape: Sequence[int],
    classes: int = 10,
    width: float | None = None,
    seed: int = 0,
    pretrained: bool = False,
    weights: str | Path | None = None,
) -> torch.nn.Module | str:
    """The module, with fresh weights that the seed decides, or with pretrained ones and a new classifier; torch's
    random state stays as it was. Of an .onnx file and of what is trained already its path, which `mest.compile` takes
    as it is.

    name         built-in, or a package's model that gets a classifier for `classes`; or file.py:FACTORY, a function
                 that is given those of `input_shape`, `classes` and `width` that it has arguments for, or a module
    input_shape  (N, C, H, W) or (N, features)
    weights      a safetensors file or a state_dict that torch.save wrote; of other classes: all but the last layer's
    Raises UnknownName, UsageError, SpecError, BudgetError, NotInstalled where the package is missing, DataError where a
    file cannot be run or weights cannot be had, StateError where they are of another net.
    """
    if not isinstance(name, str):
        raise UnknownName(f"no model {checks.shown(name)}; wanted a name")
    source, _, rest = name.partition(":")
    own = not (source in _PACKAGES and rest) and ".py:" not in name
    of_file = "an .onnx file" if name.endswith(".onnx") else name if is_trained(name) else None
    if width is not None and (of_file or source in _PACKAGES):
        raise UsageError(f"{of_file or name} has its width already; leave out --width {width}")
    if weights is not None and (of_file or pretrained):
        raise UsageError(f"{of_file or '--pretrained'} has its weights already; leave out --weights {weights}")
    named = source in _PACKAGES or (name in PRETRAINED and width is None)
    if pretrained and not named:
        raise UsageError(
            f"{name}{'' if width is None else f' of width {width}'} comes without weights; pretrained are "
            f"{', '.join(pretrained_names())} and models of timm and torchvision"
        )
    if of_file:
        return name
    if own and name not in model_names():
        raise UnknownName(
            f"no model {name!r}; there are: {', '.join(model_names())}; or timm:NAME, torchvision:NAME, "
            f"file.py:FACTORY, a file.onnx, a run folder, a checkpoint or an artifact{meant(name, model_names())}"
        )
    if weights is not None:
        return _with_weights(partial(find_model, name, input_shape, width=width, seed=seed), name, classes, weights)
    if own and not pretrained:
        return build_model(name, tuple(input_shape), classes, width, seed)
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if own:
            return _with_classifier(pretrained_model(name, tuple(input_shape))[0], name, classes)
        if source in _PACKAGES:
            return _PACKAGES[source](rest, input_shape, classes, pretrained)
        return _from_file(name, input_shape, classes, width)


def is_trained(name: str | Path) -> bool:
    """Whether it is the path of a checkpoint, or of a run folder or artifact, which have one."""
    path = Path(name)
    return path.suffix == ".safetensors" or checkpoint_in(path) is not None


def checkpoint_in(folder: Path) -> Path | None:
    """Of a run folder or an artifact."""
    return next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)


def _with_weights(make: Callable[[int], Any], name: str, classes: int, weights: str | Path) -> torch.nn.Module:
    """make: the net of so many classes."""
    net, state = make(classes), read_weights(weights)
    there = classes_in(net, state)
    if there in (None, classes):
        load_weights(net, weights)
        return net
    net = make(there)
    load_weights(net, weights)
    return _with_classifier(net, name, classes)


def _timm(name: str, input_shape: Sequence[int], classes: int, pretrained: bool) -> torch.nn.Module:
    timm = _package("timm")
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    return _loaded(
        f"timm:{name}",
        pretrained,
        lambda: timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=input_shape[1]),
    )


def _torchvision(name: str, input_shape: Sequence[int], classes: int, pretrained: bool) -> torch.nn.Module:
    models = _package("torchvision").models
    if name not in (there := models.list_models(module=models)):
        raise _unknown("torchvision", name, there)
    if input_shape[1] != 3:
        raise SpecError(f"torchvision:{name} takes images of 3 channels, the input has {input_shape[1]}")
    if not pretrained:
        quiet = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}  # they warn if nobody says so
        return models.get_model(name, weights=None, num_classes=classes, **quiet)
    net = _loaded(f"torchvision:{name}", True, lambda: models.get_model(name, weights="DEFAULT"))
    return _with_classifier(net, f"torchvision:{name}", classes)


def packaged_inputs(name: str) -> Inputs | None:
    """What images timm:NAME or torchvision:NAME was trained on, as the package tells of its pretrained weights; None of
    other names. Raises NotInstalled, UnknownName, DataError where the package does not tell."""
    source, _, rest = name.partition(":")
    try:
        if source == "timm":
            told = _package("timm").get_pretrained_cfg(rest)
            size, crop, mean, std = told.input_size[1:], told.crop_pct, told.mean, told.std
        elif source == "torchvision":
            made = _package("torchvision").models.get_model_weights(rest).DEFAULT.transforms()
            side, whole = made.crop_size[0], made.resize_size[0]
            size, crop, mean, std = (side, side), min(1.0, side / whole), made.mean, made.std
        else:
            return None
    except ValueError as problem:  # torchvision's of a name that it has not
        raise UnknownName(f"{name}: {_first_line(problem)}") from problem
    except (AttributeError, TypeError) as problem:  # timm gives None of a model without weights
        raise DataError(
            f"{source} does not tell how images of {rest} were scaled; give inputs=mest.Inputs(...), on the command "
            "line --image, --mean and --std"
        ) from problem
    height, width = size
    pixels = (tuple(255.0 * value for value in values) for values in (mean, std))
    return Inputs((int(height), int(width)), float(crop), *pixels)


_PACKAGES: dict[str, Callable[[str, Sequence[int], int, bool], Any]] = {"timm": _timm, "torchvision": _torchvision}


def _with_classifier(net: torch.nn.Module, name: str, classes: int) -> torch.nn.Module:
    """With a new last layer, of as many outputs."""
    import torch

    layers = [(path, part) for path, part in net.named_modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)]
    path, last = layers[-1]
    if isinstance(last, torch.nn.Linear):
        new: torch.nn.Module = torch.nn.Linear(last.in_features, classes)
    elif last.kernel_size == (1, 1):
        new = torch.nn.Conv2d(last.in_channels, classes, 1)
    else:
        raise SpecError(f"{name} ends with {path}, which is no classifier that can be replaced")
    parent, _, child = path.rpartition(".")
    setattr(net.get_submodule(parent), child, new)
    return net


def _loaded(name: str, pretrained: bool, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        raise DataError(
            f"the pretrained weights of {name} cannot be had: {_first_line(error)}; leave --pretrained out for fresh "
            "ones"
        ) from error


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == name:
            raise NotInstalled(
                f"models of {name} need that package, which is not installed: pip install {name}"
            ) from error
        raise NotInstalled(f"{name} needs the package {error.name}, which is not installed") from error
    except (ImportError, RuntimeError, OSError) as error:  # compiled for another torch, for instance
        raise NotInstalled(
            f"{name} is installed and cannot be imported ({_first_line(error)}): install the version that belongs to "
            "this torch"
        ) from error


def _unknown(package: str, name: str, there: Sequence[str]) -> UnknownName:
    start = name.partition("_")[0]
    alike = [one for one in there if start and one.startswith(start)][:NAMED]
    return UnknownName(
        f"{package} has no model {name!r}" + (f"; it has: {', '.join(alike)}" if alike else "") + "; "
        f"{package}'s own list has all {len(there)}"
    )


def _from_file(name: str, input_shape: Sequence[int], classes: int, width: float | None) -> torch.nn.Module:
    import torch

    path, _, factory = name.rpartition(":")
    module = _run(Path(path))
    made = getattr(module, factory, None)
    if not callable(made):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownName(f"{path} has no function {factory!r}; it has: {', '.join(there[:NAMED]) or 'none'}")
    if isinstance(made, torch.nn.Module):
        return made
    takes = inspect.signature(made).parameters
    given: dict[str, Any] = {"input_shape": tuple(input_shape), "classes": classes, "width": width}
    if width is not None and "width" not in takes:
        raise UsageError(f"{name} takes no width; leave out --width {width}, or give the function that argument")
    try:
        net = made(**{key: value for key, value in given.items() if key in takes and value is not None})
    except MestError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise DataError(f"{name} failed with {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(net, torch.nn.Module):
        raise SpecError(f"{name} gives a {type(net).__name__}; wanted a torch.nn.Module")
    return net


def _run(path: Path) -> ModuleType:
    """The Python file as a module; what lies beside it can be imported in it."""
    if not path.is_file():
        raise DataError(f"no file {path}; wanted file.py:FACTORY, a function of it that gives a torch.nn.Module")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.absolute().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises
        raise DataError(f"{path} failed with {type(error).__name__}: {_first_line(error)}") from error
    finally:
        sys.path.remove(str(path.absolute().parent))
    return module


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
