"""Examples that come batch by batch: loaders, iterables, tables; and training and validation parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mest_compile.base.errors import DataError, UsageError
from mest_compile.data import Dataset, Stream, as_dataset, batches, load, parts

IMAGES = np.arange(23, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 3, 3), np.float32)
LABELS = np.arange(23) % 4


class Batches:
    """Of the examples above, in batches of `size`, in a new order each time; changed by `change`."""

    def __init__(self, size=7, change=lambda images, labels: (images, labels)):
        self.size, self.change, self.begun = size, change, 0

    def __iter__(self):
        self.begun += 1
        for start in range(0, 23, self.size):
            yield self.change(IMAGES[start : start + self.size], LABELS[start : start + self.size])


@pytest.mark.parametrize("size", [1, 5, 7, 23])
def test_batches_of_any_size_become_the_steps(size):
    stream = Stream(Batches(size), "mine", classes=4)
    assert len(stream) == 23 and stream.shape == (2, 3, 3)
    drawn = list(batches(stream, 5, np.random.default_rng(0), augment=True))
    assert [len(images) for images, _, _ in drawn] == [5, 5, 5, 5]
    assert np.concatenate([images[:, 0, 0, 0] for images, _, _ in drawn]).tolist() == list(range(20))
    assert np.concatenate([labels for _, labels, _ in drawn]).tolist() == LABELS[:20].tolist()
    whole = list(parts(stream, 5))
    assert [len(images) for images, _ in whole] == [5, 5, 5, 5, 3] and whole[-1][0][-1, 0, 0, 0] == 22
    assert [len(images) for images, _ in parts(stream, 23)] == [23]


def test_a_torch_loader_is_drawn_anew_each_epoch_with_its_transforms():
    class Noisy(torch.utils.data.Dataset):
        classes = ("a", "b", "c", "d")
        drawn = 0

        def __len__(self):
            return 23

        def __getitem__(self, place):
            Noisy.drawn += 1
            return torch.from_numpy(IMAGES[place]) + Noisy.drawn, int(LABELS[place])

    stream = Stream(torch.utils.data.DataLoader(Noisy(), 4), "loader", classes=4)
    assert len(stream) == 23 and stream.reading.classes == Noisy.classes and stream.reading.inputs is None
    first, second = ([images.copy() for images, _, _ in stream.epoch(4)] for _ in range(2))
    assert len(first) == len(second) == 5 and all((b > a).all() for a, b in zip(first, second))


def test_parts_in_order_are_the_data_sets_own():
    data = Dataset.of((IMAGES * 4).astype(np.uint8), LABELS, "mine")
    found = list(parts(data, 8))
    np.testing.assert_array_equal(np.concatenate([images for images, _ in found]), data.normalise(data.images))
    assert [len(labels) for _, labels in found] == [8, 8, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (x.astype(np.uint8), y), "images are uint8, and nobody says how they are scaled"),
        (lambda x, y: (x / 0 * 0, y), "hold NaN or infinity"),
        (lambda x, y: (x, y + 2), "labels must be in 0..3, found 2..5"),
        (lambda x, y: (x, y - 2), "labels must be in 0..3, found -2..1"),
        (lambda x, y: (x[:-1], y), "6 of them and 7 labels"),
        (lambda x, y: (x[:, :, : 2 + (y[0] == 0)], y), "batch 1: images have shape"),
        (lambda x, y: x, "must be a pair"),
        (lambda x, y: {"pixels": x, "label": y}, "a table with the keys pixels, label; wanted one of image"),
        (lambda x, y: (np.zeros((7, 9, 9, 3), np.float32), y), r"their channels are last: give images.transpose"),
    ],
)
def test_batches_that_cannot_be_trained_on_are_said(change, said):
    with np.errstate(all="ignore"), pytest.raises(DataError, match=said):
        list(Stream(Batches(change=change), "mine", classes=4).epoch(5))


def test_what_can_be_gone_through_once_is_refused():
    with pytest.raises(DataError, match="can be gone through once, and every epoch goes through it"):
        Stream(iter(Batches()), "mine", classes=4)
    with pytest.raises(DataError, match="less than 24 examples"):
        list(Stream(Batches(), "mine", classes=4).epoch(24))
    with pytest.raises(DataError, match="there are no examples"):
        Stream(Batches(23, lambda x, y: (x[:0], y[:0])), "mine", classes=4)


@pytest.mark.parametrize("keys", [("image", "label"), ("pixel_values", "labels"), ("img", "fine_label")])
def test_examples_may_be_tables(keys):
    listed = [dict(zip(keys, pair)) for pair in zip(IMAGES, LABELS)]
    data = as_dataset(listed)
    np.testing.assert_array_equal(data.images, IMAGES)
    assert data.labels.tolist() == LABELS.tolist()
    stream = Stream(Batches(change=lambda x, y: dict(zip(keys, (x, y)))), "mine", classes=4)
    assert next(iter(stream.epoch(2)))[1].tolist() == [0, 1]
    with pytest.raises(DataError, match="example 0 is a table with the keys a, b"):
        as_dataset([{"a": 1, "b": 2}])


def test_a_validation_part_is_drawn_of_each_class_alike():
    split = load("digits", val_split=0.25, seed=3)
    again, other = load("digits", val_split=0.25, seed=3), load("digits", val_split=0.25, seed=4)
    whole = load("digits").train
    assert len(split.train) + len(split.val) == len(whole) and split.val.describe() == again.val.describe()
    assert split.val.describe()["crc32"] != other.val.describe()["crc32"]
    shares = np.bincount(split.val.labels) / np.bincount(whole.labels)
    assert abs(shares - 0.25).max() < 0.01 and (split.train.mean == whole.mean).all()
    for share in (1.0, -0.1, 1e-6):
        with pytest.raises(UsageError, match="val_split"):
            load("digits", val_split=share)
    with pytest.raises(UsageError, match="images of digits have one size; leave resize out"):
        load("digits", resize=(4, 4))


@pytest.fixture
def folders(tmp_path):
    """One class red, one blue, images of several sizes."""

    def make(*roots):
        for root in roots:
            for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
                (tmp_path / root / name).mkdir(parents=True)
                for side in (10, 12):
                    Image.new("RGB", (side, side + 2), colour).save(tmp_path / root / name / f"{side}.png")
        return tmp_path

    return make


def test_a_folder_may_have_a_validation_part_and_no_test(folders):
    split = load("folder", folders("train", "valid"), resize=(6, 4))
    assert split.known_test is None and len(split.train) == len(split.val) == 4
    assert split.train.shape == (3, 6, 4) and split.train.names == ("blue", "red")
    assert (split.train.images[0] == np.array([0, 0, 200])[:, None, None]).all()
    with pytest.raises(DataError, match="has no test part"):
        split.test  # noqa: B018
    with pytest.raises(UsageError, match="has a validation part already"):
        load("folder", folders(), resize=(6, 4), val_split=0.5)


def test_a_folder_of_classes_alone_is_all_to_train_on(folders):
    split = load("folder", folders("."), resize=(5, 5), val_split=0.5)
    assert (len(split.train), len(split.val), split.known_test) == (2, 2, None)
    with pytest.raises(DataError, match="make all images one size, or give --resize 12x10"):
        load("folder", folders())


def test_known_sets_say_what_they_allow_and_others_nothing():
    digits, mine = load("digits").train, as_dataset((IMAGES, LABELS))
    assert (digits.shift, digits.flip) == (True, False) and (mine.shift, mine.flip) == (False, False)
    assert replace(mine, shift=True).shift
