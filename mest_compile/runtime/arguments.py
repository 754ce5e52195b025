"""What a caller hands to a step: read as arrays, or refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import InputError, MestError, StateError
from mest_compile.base.foreign import is_tensor
from mest_compile.ir.graph import COUNTER
from mest_compile.ir.layouts.layout import LARGEST

_NO_NUMBERS = "cSUMmO"  # kinds of types: complex, texts, dates, objects


def array(value: Any, dtype: type, what: str, error: type[MestError] = InputError) -> np.ndarray:
    """A C-ordered numpy array of a numpy array, torch tensor or nested list; whole numbers where int64 is wanted.
    Raises `error`."""
    try:
        found = np.asarray(_of_torch(value) if is_tensor(value) else value)
        if dtype is np.int64 and found.dtype.kind not in "iu":
            raise error(f"{what} have type {found.dtype}; wanted whole numbers")
        if found.dtype.kind in _NO_NUMBERS:
            raise error(f"{what} have type {found.dtype}; wanted real numbers")
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise error(f"{what} have masked values; fill them first, for example by .filled(0)")
        if found.dtype == dtype:
            return np.ascontiguousarray(found)
        with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is refused as such
            return np.ascontiguousarray(found, dtype)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise error(f"{what} are no array of numbers ({' '.join(str(problem).split())})") from problem


def _of_torch(tensor: Any) -> Any:
    """Its numbers. Raises TypeError, ValueError or RuntimeError, as torch does, where there are none."""
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        raise TypeError("a tensor on the meta device has none")
    tensor = tensor.cpu()
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):  # what numpy has no word for: sparse, negated or conjugated views, bfloat16
        tensor = tensor.to_dense().resolve_conj().resolve_neg()
        return (tensor if tensor.is_complex() else tensor.float()).numpy()


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """Raises StateError when it is none."""
    if not isinstance(value, Mapping):
        raise StateError(f"{what} is {checks.shown(value)}; wanted a dict {{name: array}}")
    return value


def state(value: Any, shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{torch name: array} of a state_dict, float32 or, of what is kept unused, the type that it has. Counters of
    batches that the model does not have are left out, those that the state does not have stay as they are. Raises
    StateError; what is used must be finite.
    """
    found = {name: one for name, one in kept.items() if name.endswith(COUNTER)}
    found |= {
        str(name): one
        for name, one in mapping(value, "the state").items()
        if name in shapes or not str(name).endswith(COUNTER)
    }
    for name, one in found.items():
        found[name] = (
            _as_kept(one, kept[name].dtype, name) if name in kept else array(one, np.float32, name, StateError)
        )
    if bad := [name for name, one in found.items() if name not in kept and not np.isfinite(one).all()]:
        raise StateError(
            f"the state has values that are NaN or infinite in float32: in {shortened(bad)}; load an earlier one"
        )
    return found


def _as_kept(value: Any, dtype: np.dtype, name: str) -> np.ndarray:
    try:
        return np.array(_of_torch(value) if is_tensor(value) else value, dtype)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise StateError(f"{name} is no array of {dtype} ({' '.join(str(problem).split())})") from problem


def mask(value: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A bool array of that shape. Raises StateError when `value` is no mask of the layer."""
    found = array(value, np.float32, f"{name}: the mask's values", StateError)
    if found.shape != tuple(shape):
        raise StateError(f"{name}: the mask has shape {found.shape}, the weight {tuple(shape)}")
    live = found == 1
    if odd := np.count_nonzero(~live & (found != 0)):
        raise StateError(
            f"{name}: a mask is True where a weight lives, else False, or 1 and 0; {odd} values are others: "
            "compare scores "
            "with a threshold first"
        )
    return live


def gradients(value: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{weight name: float32 array} of all of `shapes`. Raises InputError; values must be finite."""
    if not isinstance(value, Mapping) or shapes.keys() - value.keys():
        missing = sorted(shapes) if not isinstance(value, Mapping) else sorted(shapes.keys() - value.keys())
        raise InputError(f"gradients lack {shortened(missing)}; wanted {{weight name: array}} of every sparse layer")
    found = {name: array(value[name], np.float32, f"gradients of {name}") for name in shapes}
    for name, shape in shapes.items():
        if found[name].shape != tuple(shape):
            raise InputError(f"gradients of {name} have shape {found[name].shape}, the weight {tuple(shape)}")
        if not np.isfinite(found[name]).all():
            raise InputError(f"gradients of {name} have values that are NaN or infinite; lower the learning rate")
    return found


def rates(lr: Any, usual: float, parts: int) -> list[float]:
    """The learning rate of each of `parts` parts, and last that of all else. lr: one for all, as many numbers where
    there are parts, or None for the usual one. Raises InputError."""
    if not parts or not isinstance(lr, list | tuple):
        return [usual if lr is None else checks.number("lr", lr, error=InputError)] * (parts + 1)
    if len(lr) != parts + 1:
        raise InputError(
            f"lr has {len(lr)} numbers; wanted one for each of {parts} parts that freeze, and one for all else"
        )
    return [checks.number(f"lr[{place}]", rate, error=InputError) for place, rate in enumerate(lr)]


def within_range(images: np.ndarray, activations: str) -> None:
    """Raises InputError for what is not finite, also as the step stores images: activations."""
    if not np.isfinite(images).all():
        raise InputError(
            f"{np.count_nonzero(~np.isfinite(images))} image values are NaN or infinite; clean the data first"
        )
    most = LARGEST.get(activations, np.inf)
    if (largest := float(np.abs(images).max())) > most:
        raise InputError(
            f'image values go up to {largest:g} in magnitude; activations="{activations}" holds {most:g} at '
            "most: scale the "
            'images, or compile with activations="float32"'
        )


def shortened(names: list[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
