"""A folder of image files, one subfolder a class."""

from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.data.dataset import Dataset, Split, source

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY_MODES = ("1", "L")
DEEP_MODES = ("I", "F")


@source("folder")
def folder(folder: Path | None) -> Split:
    """root/train/<class>/*.png|jpg|jpeg and root/test/<class>/...: (1, H, W) uint8 if every image is grey, else (3, H,
    W).

    Classes are numbered in the order of their folders' names. All images must have one size.
    """
    if folder is None:
        raise DataError("folder: give --data-folder with train/<class>/*.png and test/<class>/*.png in it")
    names = _class_names(folder / "train")
    unknown = sorted(set(_class_names(folder / "test")) - set(names))
    if unknown:
        raise DataError(f"{folder / 'test'} has the class {unknown[0]!r}, which {folder / 'train'} has not")
    files = {
        part: [(path, label) for label, name in enumerate(names) for path in _images(folder / part / name)]
        for part in ("train", "test")
    }
    for part, found in files.items():
        if not found:
            raise DataError(f"{folder / part} holds no {', '.join(SUFFIXES)} files")
    mode, size = _common_form([path for found in files.values() for path, _ in found])
    train = Dataset.of(*_read(files["train"], mode, size), folder.name, classes=len(names), names=names)
    return Split(train, Dataset.of(*_read(files["test"], mode, size), f"{folder.name} test", like=train))


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; a folder data set needs train/<class>/*.png and test/<class>/*.png")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def open_image(path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as problem:
        raise DataError(f"{path} is not a readable image; get it again or remove it") from problem


def _common_form(paths: list[Path]) -> tuple[str, tuple[int, int]]:
    """(Pillow mode, (width, height)) of all images, from their headers alone."""
    grey, size = True, None
    for path in paths:
        with open_image(path) as image:
            if image.mode.startswith(DEEP_MODES):
                raise DataError(
                    f"{path} has more than 8 bits a pixel (mode {image.mode}), which would be cut off; save it "
                    "with 8 bits"
                )
            grey = grey and image.mode in GREY_MODES
            size = size or image.size
            if image.size != size:
                raise DataError(
                    f"{path} is {image.size[0]}x{image.size[1]}, {paths[0]} is {size[0]}x{size[1]}; make all "
                    "images one size"
                )
    assert size is not None
    return "L" if grey else "RGB", size


def _read(files: list[tuple[Path, int]], mode: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(files), len(mode), size[1], size[0]), np.uint8)
    for slot, (path, _) in zip(images, files, strict=True):
        with open_image(path) as image:
            try:
                pixels = np.asarray(image.convert(mode))
            except (OSError, SyntaxError, ValueError) as problem:  # what Pillow raises on truncated and on damaged data
                raise DataError(f"{path} is damaged ({problem}); get it again or remove it") from problem
        slot[:] = np.atleast_3d(pixels).transpose(2, 0, 1)
    return images, np.array([label for _, label in files], np.int64)
