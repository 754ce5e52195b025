"""Photos of any size as images of one size, from whatever holds them."""

import numpy as np
import pytest
from PIL import Image

from mest_compile.base.errors import DataError
from mest_compile.data import Dataset, Split
from mest_compile.data.pictures import fitted, read_picture, read_pictures
from mest_compile.models.inputs import Inputs

INPUTS = Inputs((8, 8))
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def save(path, colour, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def photos(tmp_path):
    """Five pictures of each of three colours, of several sizes."""
    for name, colour in COLOURS.items():
        for number in range(5):
            save(tmp_path / "photos" / name / f"{number}.png", colour, (9 + number, 20 - number))
    return tmp_path / "photos"


def colours_of(dataset):
    """The names of the colours that images are of, whole."""
    return [
        next(name for name, colour in COLOURS.items() if (image == np.array(colour)[:, None, None]).all())
        for image in dataset.images
    ]


def test_a_folder_is_split_by_itself_each_class_for_itself(photos):
    found = read_pictures(photos, INPUTS, seed=1)
    train, test = found.split.train, found.split.test
    assert found.classes == ("blue", "green", "red") and train.classes == test.classes == 3
    assert train.images.shape == (12, 3, 8, 8) and train.images.dtype == np.uint8 and len(test) == 3
    for part in (train, test):
        assert colours_of(part) == [found.classes[label] for label in part.labels]
    assert [file.split("/")[-2] for file in found.files] == ["blue", "green", "red"]
    again, other = (read_pictures(photos, INPUTS, seed=seed).files for seed in (1, 2))
    assert again == found.files != other
    (photos / "red").rename(photos / "test")  # a class of that name, beside no folder to train on
    assert read_pictures(photos, INPUTS).classes == ("blue", "green", "test")


@pytest.mark.parametrize("name", ["test", "val"])
def test_parts_of_a_folder_are_taken_as_they_are(tmp_path, name):
    for part, count in (("train", 3), (name, 2)):
        for colour in ("red", "blue"):
            for number in range(count):
                save(tmp_path / part / colour / f"{number}.jpg", COLOURS[colour])
    found = read_pictures(tmp_path, INPUTS)
    assert (len(found.split.train), len(found.split.test)) == (6, 4)
    save(tmp_path / name / "green" / "1.png", COLOURS["green"])
    with pytest.raises(DataError, match=f"{name} has the class 'green', which is not trained on"):
        read_pictures(tmp_path, INPUTS)


def test_a_validation_part_is_taken_or_drawn_of_what_is_trained_on(tmp_path):
    for part, count in (("train", 12), ("test", 3), ("valid", 2)):
        for colour in ("red", "blue"):
            for number in range(count):
                save(tmp_path / part / colour / f"{number}.jpg", COLOURS[colour])
    split = read_pictures(tmp_path, INPUTS, val_share=0.25).split
    assert (len(split.train), len(split.test), len(split.val)) == (24, 6, 4)
    images = np.arange(20, dtype=np.uint8)[:, None, None] * np.ones((20, 4, 4), np.uint8)
    labels = np.arange(20) % 2
    inputs, test = Inputs((4, 4), mean=(0.0,), std=(1.0,)), (images[:2], labels[:2])
    one, other = (read_pictures((images, labels), inputs, test, seed, val_share=0.3).split for seed in (0, 1))
    assert np.bincount(one.val.labels).tolist() == [3, 3] and len(one.test) == 2
    assert set(one.val.images[:, 0, 0, 0]) | set(one.train.images[:, 0, 0, 0]) == set(range(20))
    assert len(one.train) == 14 and not np.array_equal(one.val.images, other.val.images)
    assert read_pictures((images, labels), inputs, test).val is None
    assert read_pictures(test, inputs, test, val_share=0.3).val is None  # of one image a class none is left out
    assert len(read_pictures((images, labels), inputs, test, val=(images[:4], labels[:4])).split.val) == 4
    given = Split(*(Dataset.of(images[:count, None], labels[:count], "a", classes=2) for count in (20, 2, 6)))
    assert len(read_pictures(given, inputs, val_share=0.3).split.val) == 6


def test_a_csv_file_names_files_and_labels(photos):
    lines = [f"{name}/{number}.png,{name} things" for name in ("red", "blue") for number in range(5)]
    path = photos / "labels.csv"
    for first in ([], ["file,label"]):
        path.write_text("\n".join([*first, *lines]))
        found = read_pictures(path, INPUTS)
        assert found.classes == ("blue things", "red things") and len(found.split.train) == 8
        assert colours_of(found.split.test) == ["red", "blue"]  # as the lines come
    path.write_text("red/0.png,red\nred/99.png,red")
    with pytest.raises(DataError, match="line 2: no file .*99.png"):
        read_pictures(path, INPUTS)
    for line in ("red/0.png", "red/0.png, "):
        path.write_text(line)
        with pytest.raises(DataError, match="line 1: wanted a file and its label"):
            read_pictures(path, INPUTS)


class Shapes:
    """A torch-style Dataset of Pillow's images."""

    classes = ("dark", "light")

    def __init__(self, count=8):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        return Image.new("L", (6 + place, 7), 200 * (place % 2)), place % 2


def test_arrays_and_torch_datasets_hold_pixels():
    images = np.zeros((8, 6, 7), np.uint8)
    images[1::2] = 200
    labels = np.arange(8) % 2
    grey = [images, images[:, None], images[..., None]]
    forms = [*grey, np.repeat(grey[2], 3, -1), np.repeat(grey[1], 3, 1)]
    for given in [*((form, labels) for form in forms), Shapes()]:
        found = read_pictures(given, INPUTS)
        train = found.split.train
        assert train.images.shape == (6, 3, 8, 8) and (train.images == 200 * train.labels[:, None, None, None]).all()
    assert found.classes == ("dark", "light")
    grey = read_pictures((images, labels), Inputs((8, 8), mean=(0.0,), std=(1.0,)), test=(images[:3], labels[:3]))
    assert grey.split.train.images.shape == (8, 1, 8, 8) and len(grey.split.test) == 3
    assert grey.files == ("example 0", "example 1", "example 2") and grey.classes == ("0", "1")
    split = Split(Dataset.of(images[:, None], labels, "a"), Dataset.of(images[:2, None], labels[:2], "b"))
    assert len(read_pictures(split, INPUTS).split.test) == 2


def test_pictures_are_read_when_they_are_asked_for(photos):
    found = read_pictures(photos, INPUTS, seed=1)
    assert found.train.shape == (12, 3, 8, 8) and found.train[3:5].shape == (2, 3, 8, 8)
    assert np.array_equal(found.train[3:5], found.split.train.images[3:5])
    for path in photos.rglob("*.png"):  # whose headers were in order
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="is damaged"):
        found.test[:1]


def test_new_classes_take_the_places_of_spare_ones(photos):
    found = read_pictures(photos, INPUTS, seed=1, spare=2)
    assert found.classes == ("blue", "green", "red", "(spare 1)", "(spare 2)") and found.train.classes == 5
    for name in COLOURS:
        (photos / name).rename(photos / f"light {name}")
    more = read_pictures(photos, INPUTS, seed=1, known=found.classes)
    assert more.classes[3:] == ("light blue", "light green", "light red") and min(more.train.labels) == 3


def test_a_picture_is_cut_from_the_middle_turned_as_the_camera_was_and_resized_bicubic(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    inputs = Inputs((8, 8), 0.8)
    square = picture.crop((8, 3, 32, 27)).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(fitted(picture, inputs), np.asarray(square).transpose(2, 0, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png", inputs), fitted(picture.rotate(180), inputs))
    same = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    assert np.array_equal(fitted(same, INPUTS), np.asarray(same).transpose(2, 0, 1))  # nothing to do


def test_what_cannot_be_meant_is_refused(photos, tmp_path):
    images, labels = np.zeros((4, 6, 6), np.uint8), np.array([0, 1, 0, 1])
    for data, message in (
        (tmp_path / "nowhere", "no folder or CSV file .*nowhere"),
        (3, "a folder, a CSV file, .* not int"),
        ((images.astype(np.float32), labels), "images must be uint8 pixels .* not .* float32"),
        (Shapes(0), "of one example or more"),
        ((images, labels[:3]), "4 images and 3 labels"),
        ((images, labels - 1), "numbers of classes from 0 on"),
        ((images, np.zeros(4, np.int64)), "there is one class, '0'"),
        ((images, np.array([0, 0, 0, 1])), "class '1' has 1 images; wanted 2 or more"),
        ((np.zeros((4, 5, 6, 7), np.uint8), labels), "1 or 3 channels"),
    ):
        with pytest.raises(DataError, match=message):
            read_pictures(data, INPUTS)
    (photos / "red" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="3.png is not a readable image"):
        read_pictures(photos, INPUTS)
    with pytest.raises(DataError, match="no image to train on of class '1'"):
        read_pictures((images, labels * 2), INPUTS, test=(images, labels))
