"""Arrays, tensors, labels and examples as callers have them, read as what they are or refused: nothing is rounded, cut
or turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import DataError
from mest_compile.base.foreign import is_picture, is_tensor

INDEXED = ("P", "PA")  # Pillow's images whose pixels are places in a table of colours


@runtime_checkable
class Array(Protocol):
    """Whatever numpy makes an array of: its own, torch's, another library's."""

    @property
    def shape(self) -> Any: ...


@runtime_checkable
class Examples(Protocol):
    """A torch-style Dataset: [i] is (image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: Any, /) -> Any: ...


def array_of(value: Any, what: str) -> np.ndarray:
    """A numpy array of an array, a torch tensor wherever and however it is stored, or nested lists. Raises
    DataError."""
    if np.ma.is_masked(value):
        raise DataError(f"{what} are a masked array, whose masked values would become numbers; fill them first")
    try:
        if is_tensor(value):
            value = (
                value.detach().to_dense()
                if str(getattr(value, "layout", "torch.strided")) != "torch.strided"
                else value.detach()
            )
            value = value.cpu().resolve_conj().resolve_neg()
            value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
        return np.asarray(value)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ) as problem:  # torch: NotImplementedError of a tensor without data is one of them
        raise DataError(f"{what} are no array of numbers ({' '.join(str(problem).split())[:200]})") from problem


def labels_of(value: Any, name: str, numbers: bool = False) -> np.ndarray:
    """Labels (n,) or (n, H, W) as int64, or numbers as float32. Raises DataError unless they are whole numbers by type,
    or real ones."""
    labels = array_of(value, f"{name}: the labels")
    if numbers:
        if labels.dtype.kind not in "iufb":
            raise DataError(f"{name}: labels must be real numbers, not {labels.dtype}")
        with np.errstate(over="ignore"):  # what is beyond float32 is refused as infinite
            return labels.astype(np.float32, copy=False)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{name}: labels must be integers, not {labels.dtype}; number the classes from 0 and give "
            "labels.astype('int64')"
        )
    if labels.dtype == np.uint64 and labels.size and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{name}: labels must be in 0..classes - 1, found {labels.max()}")
    return labels.astype(np.int64, copy=False)


IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x", "input", "inputs")
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "fine_label")


def pair_of(sample: Any, what: str) -> tuple[Any, Any]:
    """(image, label), or those of a batch, of a pair or of a table with one key for each. Raises DataError."""
    if isinstance(sample, Mapping):
        found = [[key for key in keys if key in sample] for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if [len(keys) for keys in found] == [1, 1]:
            return sample[found[0][0]], sample[found[1][0]]
        raise DataError(
            f"{what} is a table with the keys {', '.join(map(str, sample))}; wanted one of {', '.join(IMAGE_KEYS)} and "
            f"one of {', '.join(LABEL_KEYS)}"
        )
    try:
        image, label = sample
    except (TypeError, ValueError) as problem:
        raise DataError(f"{what} must be a pair (image, label), or a table of the two") from problem
    return image, label


def arranged(images: np.ndarray, name: str) -> np.ndarray:
    """(n, C, H, W) uint8 or float32 of (n, C, H, W), (n, H, W) or (n, features). Raises DataError."""
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{name}: images must be uint8 or floating point, not {images.dtype}; convert them")
    if images.ndim not in (2, 3, 4):
        raise DataError(f"{name}: images must be (n, C, H, W), (n, H, W) or (n, features), not {images.shape}")
    if images.ndim == 4 and images.shape[3] in (1, 3, 4) and images.shape[1] == images.shape[2] > 4:
        found = images.shape[1:]
        raise DataError(
            f"{name}: images must be (n, C, H, W), not {images.shape}{turned(found, (found[2], *found[:2]))}"
        )
    with np.errstate(over="ignore"):  # what is beyond float32 is refused as infinite
        images = images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)
    return images[:, :, None, None] if images.ndim == 2 else images[:, None] if images.ndim == 3 else images


def gather(data: Examples, name: str, numbers: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a torch-style Dataset, read once; labels are numbers, or classes. Raises DataError unless all
    examples are alike."""
    images: np.ndarray | None = None
    labels = np.empty(len(data), np.int64)
    for i in range(len(data)):
        try:
            sample = data[i]
        except (TypeError, ValueError, KeyError, IndexError) as problem:
            raise DataError(f"{name}: example {i} must be a pair (image, label)") from problem
        image, label = pair_of(sample, f"{name}: example {i}")
        array = _image(image, f"{name}: the image of example {i}")
        if images is None:
            images = np.empty((len(data), *array.shape), array.dtype)
        if array.shape != images.shape[1:] or array.dtype != images.dtype:
            raise DataError(
                f"{name}: example {i} is {array.shape} {array.dtype}, example 0 is {images.shape[1:]} {images.dtype}; "
                f"all must be alike"
            )
        images[i] = array
        what = f"{name}: the label of example {i}"
        found = labels_of(label, what, numbers) if numbers or np.ndim(label) == 2 else np.int64(_label(label, what))
        if i == 0:
            labels = np.empty((len(data), *found.shape), found.dtype)
        if found.shape != labels.shape[1:]:
            raise DataError(f"{what} has shape {found.shape}, that of example 0 {labels.shape[1:]}; all must be alike")
        labels[i] = found
    if images is None:
        raise DataError(f"{name}: there are no examples")
    return images, labels


def turned(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What to do about images of shape `found` that are `wanted` with their channels last; "" where they are not."""
    if len(found) == len(wanted) == 3 and found != wanted and found == (*wanted[1:], wanted[0]):
        return "; their channels are last: give images.transpose(0, 3, 1, 2)"
    return ""


def _image(image: Any, what: str) -> np.ndarray:
    """One image; of floating point as float32, so that examples of several widths are alike."""
    if not is_picture(image):
        array = array_of(image, what)
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False) if np.issubdtype(array.dtype, np.floating) else array
    # A PIL image, what torchvision gives without a transform, has its channels last.
    if image.mode in INDEXED:
        raise DataError(
            f"{what} holds places in a table of colours (mode {image.mode}), no brightness; convert it to RGB or L"
        )
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def _label(label: Any, what: str) -> int:
    array = array_of(label, what)
    if array.size == 1 and array.dtype.kind in "iubf":
        value = array.item()
        if value == value and abs(value) <= np.iinfo(np.int64).max and value == int(value):
            return int(value)
    raise DataError(f"{what} must be an integer, not {checks.shown(label)}")
