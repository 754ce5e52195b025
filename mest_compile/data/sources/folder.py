"""A folder of image files, one subfolder a class."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError, NotInstalled
from mest_compile.data.dataset import Dataset, Split, source
from mest_compile.models.inputs import Inputs

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY_MODES = ("1", "L")
DEEP_MODES = ("I", "F")


VALS = ("val", "valid", "validation")  # names of folders


@source("folder", resized=lambda folder, size: _split(folder, size))
def folder(folder: Path | None) -> Split:
    """root/train/<class>/*.png|jpg|jpeg, and where they are there root/test/<class>/... and root/val/<class>/...; or
    root/<class>/... alone. (1, H, W) uint8 if every image is grey, else (3, H, W).

    Classes are numbered in the order of their folders' names. All images must have one size, or be resized.
    """
    return _split(folder)


def _split(folder: Path | None, resize: tuple[int, int] | None = None) -> Split:
    """resize: (height, width) that images are cut and resized to; None: they have one size."""
    if folder is None:
        raise DataError("folder: give --data-folder with train/<class>/*.png and test/<class>/*.png in it")
    roots = {"train": folder / "train" if (folder / "train").is_dir() else folder, "test": folder / "test"}
    roots["val"] = next((folder / name for name in VALS if (folder / name).is_dir()), folder / VALS[0])
    if roots["train"] is folder:  # classes themselves
        roots = {"train": folder}
    names = _class_names(roots["train"])
    if not names:
        raise DataError(
            f"{roots['train']} holds no folders, one a class; a folder data set needs train/<class>/*.png, and "
            "test/<class>/*.png to be tested on"
        )
    files: dict[str, list[tuple[Path, int]]] = {}
    for part, root in roots.items():
        if part != "train" and not root.is_dir():
            continue
        if unknown := sorted(set(_class_names(root)) - set(names)):
            raise DataError(f"{root} has the class {unknown[0]!r}, which {roots['train']} has not")
        files[part] = [(path, label) for label, name in enumerate(names) for path in _images(root / name)]
        if not files[part]:
            raise DataError(f"{root} holds no {', '.join(SUFFIXES)} files in folders, one a class")
    mode, size = _common_form([path for found in files.values() for path, _ in found], resize)
    train = Dataset.of(*_read(files["train"], mode, size), folder.name, classes=len(names), names=names)
    others = {
        part: Dataset.of(*_read(files[part], mode, size), f"{folder.name} {part}", like=train)
        for part in ("test", "val")
        if part in files
    }
    return Split(train, others.get("test"), others.get("val"))


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; a folder data set needs train/<class>/*.png and test/<class>/*.png")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def open_image(path: Path) -> Any:
    """Raises DataError, NotInstalled."""
    try:
        from PIL import Image
    except ImportError as problem:
        raise NotInstalled(
            f"{path} is a picture, and reading one needs Pillow, which is not installed: pip install pillow, or give "
            "pixels as arrays"
        ) from problem
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as problem:
        raise DataError(f"{path} is not a readable image; get it again or remove it") from problem


def _common_form(paths: list[Path], resize: tuple[int, int] | None) -> tuple[str, tuple[int, int]]:
    """(Pillow mode, (height, width)) of all images, from their headers alone."""
    grey, size = True, resize
    for path in paths:
        with open_image(path) as image:
            check_depth(image, path)
            grey = grey and image.mode in GREY_MODES
            size = size or (image.size[1], image.size[0])
            if resize is None and image.size != (size[1], size[0]):
                raise DataError(
                    f"{path} is {image.size[0]}x{image.size[1]}, {paths[0]} is {size[1]}x{size[0]}; make all images "
                    f"one size, or give --resize {size[0]}x{size[1]}"
                )
    assert size is not None
    return "L" if grey else "RGB", size


def check_depth(image: Any, path: Path) -> None:
    """Raises DataError for one of Pillow's images that 8 bits a pixel cannot hold."""
    if image.mode.startswith(DEEP_MODES):
        raise DataError(
            f"{path} has more than 8 bits a pixel (mode {image.mode}), which would be cut off; save it with 8 bits"
        )


def _read(files: list[tuple[Path, int]], mode: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """size: (height, width)."""
    images = np.empty((len(files), len(mode), *size), np.uint8)
    inputs = Inputs(size, mean=(0.0,) * len(mode), std=(1.0,) * len(mode))
    for slot, (path, _) in zip(images, files, strict=True):
        slot[:] = read_picture(path, inputs)
    return images, np.array([label for _, label in files], np.int64)


def read_picture(path: str | os.PathLike, inputs: Inputs) -> np.ndarray:
    """(C, height, width) uint8 of a file, as `fitted`. Raises DataError."""
    with open_image(Path(path)) as picture:
        check_depth(picture, Path(path))
        try:
            return fitted(picture, inputs)
        except (OSError, SyntaxError, ValueError) as problem:  # what Pillow raises on truncated and on damaged data
            raise DataError(f"{path} is damaged ({problem}); get it again or remove it") from problem


def fitted(picture: Any, inputs: Inputs) -> np.ndarray:
    """(C, height, width) uint8 of one of Pillow's images, cut and resized, bicubic."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture).convert("L" if inputs.channels == 1 else "RGB")
    width_height = inputs.size[1], inputs.size[0]
    box = inputs.window(*picture.size)
    if box != (0, 0, *picture.size):
        picture = picture.crop(box)
    if picture.size != width_height:
        picture = picture.resize(width_height, Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)
