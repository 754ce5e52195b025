"""Data sources on tiny files of each format, damaged files, augmentation and batches."""

import gzip
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mest_compile.base.errors import DataError, UnknownName
from mest_compile.data import Dataset, as_dataset, batches, load, pad_crop_flip
from mest_compile.data.sources.idx import DEBIAN_FOLDER

RNG = np.random.default_rng(0)


def bytes_of(*shape, high=256):
    return RNG.integers(0, high, shape, dtype=np.uint8)


def write_idx(path, array):
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder, suffix=".gz", train=7, test=3):
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[part] = bytes_of(count, 28, 28), bytes_of(count, high=10)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", arrays[part][0])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", arrays[part][1])
    return arrays


def write_cifar10(folder, rows=3):
    images, labels = bytes_of(6 * rows, 3072), bytes_of(6 * rows, high=10)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        part = slice(i * rows, (i + 1) * rows)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels[part, None], images[part]]).tobytes())
    return images.reshape(-1, 3, 32, 32), labels


def test_digits_are_embedded_stratified_and_the_same_every_time():
    split, again = load("digits"), load("digits")
    assert split.train.images.shape == (1442, 1, 8, 8) and split.test.images.shape == (355, 1, 8, 8)
    assert not split.train.flip and (split.train.images.min(), split.train.images.max()) == (0, 255)  # as pictures are
    assert split.train.describe() == again.train.describe() and split.test.describe() == again.test.describe()
    shares = np.bincount(split.test.labels) / (np.bincount(split.train.labels) + np.bincount(split.test.labels))
    assert (abs(shares - 0.2) < 0.01).all()
    assert split.test.reading == split.train.reading
    normal = split.train.normalise(split.train.images)
    assert abs(normal.mean()) < 1e-4 and abs(normal.std() - 1) < 1e-4
    with pytest.raises(DataError, match="takes no folder"):
        load("digits", "somewhere")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_reads_idx_files(tmp_path, suffix):
    arrays = write_fashion(tmp_path, suffix)
    split = load("fashion-mnist", tmp_path)
    for data, part in ((split.train, "train"), (split.test, "t10k")):
        assert (data.images == arrays[part][0][:, None]).all() and (data.labels == arrays[part][1]).all()
    assert split.test.mean is split.train.mean and split.train.classes == 10 and split.train.images.dtype == np.uint8


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian_is_whole():
    split = load("fashion-mnist")
    assert len(split.train) == 60_000 and np.bincount(split.test.labels).tolist() == [1000] * 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: b"",
        lambda data: gzip.compress(b"\0\0\x08\x03" + bytes(20)),
        lambda data: gzip.compress(gzip.decompress(data)[:-1]),
        lambda data: b"no gzip",
        lambda data: data[:30],
    ],
)
def test_damaged_idx_files_are_named(tmp_path, damage):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz .*get it again"):
        load("fashion-mnist", tmp_path)


def test_missing_fashion_mnist_says_where_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="--data-folder or apt-get install dataset-fashion-mnist"):
        load("fashion-mnist", tmp_path)
    monkeypatch.setattr("mest_compile.data.sources.idx.DEBIAN_FOLDER", tmp_path / "none")
    with pytest.raises(DataError, match="--data-folder or apt-get install dataset-fashion-mnist"):
        load("fashion-mnist")


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", bytes_of(6, high=10))
    with pytest.raises(DataError, match="7 images need as many"):
        load("fashion-mnist", tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.full(7, 10, np.uint8))
    with pytest.raises(DataError, match=r"labels must be in 0\.\.9"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_cifar10_reads_the_binary_version(tmp_path, nested):
    folder = tmp_path / "cifar-10-batches-bin" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    images, labels = write_cifar10(folder)
    split = load("cifar10", tmp_path)
    assert (split.train.images == images[:15]).all() and (split.train.labels == labels[:15]).all()
    assert (split.test.images == images[15:]).all() and (split.test.labels == labels[15:]).all()
    assert split.train.pad == 4 and split.train.flip


def test_cifar100_reads_the_fine_labels(tmp_path):
    images, fine = bytes_of(4, 3072), bytes_of(4, high=100)
    for name in ("train", "test"):
        (tmp_path / f"{name}.bin").write_bytes(np.hstack([fine[:, None] // 5, fine[:, None], images]).tobytes())
    split = load("cifar100", tmp_path)
    assert (split.train.labels == fine).all() and split.test.classes == 100
    assert (split.test.images == images.reshape(-1, 3, 32, 32)).all()


@pytest.mark.parametrize(
    ("name", "folder", "test_file"),
    [("cifar10", "cifar-10-batches-py", "test_batch"), ("cifar100", "cifar-100-python", "test")],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_python_version_is_refused_and_nothing_in_it_runs(tmp_path, name, folder, test_file, nested):
    where = tmp_path / folder if nested else tmp_path
    where.mkdir(exist_ok=True)
    (where / test_file).write_bytes(
        b"cio\nopen\n(V" + str(tmp_path / "written").encode() + b"\nVw\ntR."
    )  # opens a file for writing
    with pytest.raises(DataError, match=f"{name}: .* has the python version, which is pickles.*binary version"):
        load(name, tmp_path)
    assert not (tmp_path / "written").exists()


def test_damaged_and_missing_cifar_binaries_are_named(tmp_path):
    with pytest.raises(DataError, match="give --data-folder"):
        load("cifar10")
    with pytest.raises(DataError, match=r"no test_batch\.bin in"):
        load("cifar10", tmp_path)
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_2\.bin holds 9218 bytes, not whole rows of 3073"):
        load("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_2\.bin cannot be read"):
        load("cifar10", tmp_path)


def write_images(root, mode="RGB", size=(6, 5), classes=("ant", "bee")):
    pixels = {}
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                array = bytes_of(size[1], size[0], 3) if mode == "RGB" else bytes_of(size[1], size[0])
                Image.fromarray(array).save(root / part / name / f"{i}.png")
                pixels[part, name, i] = array
    return pixels


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_image_folders_are_read_in_the_order_of_their_names(tmp_path, mode):
    pixels = write_images(tmp_path, mode)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    split = load("folder", tmp_path)
    assert split.train.images.shape == (4, len(mode), 5, 6) and split.train.labels.tolist() == [0, 0, 1, 1]
    assert (split.test.images[3] == np.atleast_3d(pixels["test", "bee", 1]).transpose(2, 0, 1)).all()


def test_one_colour_image_makes_the_folder_colour(tmp_path):
    pixels = write_images(tmp_path, "L")
    Image.fromarray(bytes_of(5, 6, 3)).save(tmp_path / "train" / "bee" / "1.png")
    split = load("folder", tmp_path)
    assert split.train.images.shape == (4, 3, 5, 6) and (split.train.images[0] == pixels["train", "ant", 0]).all()


def test_bad_image_folders_are_errors(tmp_path):
    with pytest.raises(DataError, match="give --data-folder"):
        load("folder")
    with pytest.raises(DataError, match="needs train/<class>"):
        load("folder", tmp_path)
    write_images(tmp_path)
    path = tmp_path / "train" / "bee" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"bee/1\.png"):
        load("folder", tmp_path)
    path.write_text("text")
    with pytest.raises(DataError, match="not a readable image"):
        load("folder", tmp_path)
    Image.fromarray(bytes_of(4, 4, 3)).save(path)
    with pytest.raises(DataError, match="is 4x4, .* is 6x5; make all images one size"):
        load("folder", tmp_path)
    path.write_bytes(whole)
    (tmp_path / "test" / "wasp").mkdir()
    with pytest.raises(DataError, match="the class 'wasp'"):
        load("folder", tmp_path)


def test_a_folder_without_images_is_an_error(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match="train holds no .png"):
        load("folder", tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownName, match="cifar10, cifar100, digits, fashion-mnist, folder"):
        load("imagenet")


class Pairs:
    """Like a torch Dataset."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_torch_tensors_and_datasets_are_accepted():
    torch = pytest.importorskip("torch")
    images, labels = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    for data in ((images, labels), torch.utils.data.TensorDataset(images, labels)):
        dataset = as_dataset(data)
        assert dataset.images.dtype == np.float32 and dataset.classes == 3
        assert (
            dataset.images == images.numpy().astype(np.float32)
        ).all() and dataset.labels.tolist() == labels.tolist()
        assert (dataset.normalise(dataset.images) == dataset.images).all()  # float images are taken as they are
    assert as_dataset(dataset) is dataset


def test_pil_images_grey_images_and_features_become_channels():
    coloured = bytes_of(5, 6, 3)
    assert (as_dataset(Pairs([(Image.fromarray(coloured), 0)] * 2)).images[1] == coloured.transpose(2, 0, 1)).all()
    assert as_dataset((bytes_of(4, 5, 6), np.zeros(4, int))).images.shape == (4, 1, 5, 6)
    features = as_dataset((RNG.random((4, 9)), np.arange(4)))
    assert features.images.shape == (4, 9, 1, 1) and features.pad == 0


def test_a_test_set_is_normalised_like_its_training_set():
    train = as_dataset((bytes_of(9, 3, 8, 8), np.arange(9)))
    test = as_dataset((bytes_of(2, 3, 8, 8), np.zeros(2, int)), like=train)
    assert test.mean is train.mean and test.classes == 9
    with pytest.raises(DataError, match="images are"):
        as_dataset((bytes_of(2, 1, 8, 8), np.zeros(2, int)), like=train)


def test_each_channel_is_standardised_by_its_own_mean_and_its_own_deviation():
    images = np.empty((2, 3, 4, 4), np.uint8)
    images[0] = np.array([10, 100, 70])[:, None, None]
    images[1] = np.array([20, 140, 70])[:, None, None]
    data = as_dataset((images, np.arange(2)))
    assert data.mean.tolist() == [15, 120, 70] and data.std.tolist() == [
        5,
        20,
        1,
    ]  # that of a constant channel would be 0
    assert data.normalise(images)[:, :, 0, 0].tolist() == [[-1, -1, 0], [1, 1, 0]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros((2, 1, 4, 4)), np.zeros(2)), "labels must be integers"),
        ((np.zeros((2, 1, 4, 4)), np.zeros(3, int)), "2 images need as many"),
        ((np.full((2, 1, 4, 4), np.nan), np.zeros(2, int)), "NaN"),
        ((np.zeros((2, 1, 4, 4), np.int32), np.zeros(2, int)), "uint8 or floating point"),
        ((np.zeros((2, 1, 1, 4, 4)), np.zeros(2, int)), r"must be \(n, C, H, W\)"),
        ((np.zeros((2, 1, 4, 4)), np.array([0, -1])), "labels must be in"),
        ((np.zeros((0, 1, 4, 4)), np.zeros(0, int)), "no examples"),
        (Pairs([]), "no examples"),
        (Pairs([3]), "must be a pair"),
        (Pairs([(np.zeros((1, 2, 2)), 0.5)]), "must be an integer"),
        (Pairs([(np.zeros((1, 2, 2)), 0), (np.zeros((1, 3, 3)), 0)]), "example 1 is"),
        (7, "not int"),
    ],
)
def test_data_that_is_no_data_set_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        as_dataset(data)


LABELS = {
    "float": [0.7, 1.7],
    "whole floats": [0.0, 1.0],
    "complex": [0 + 1j, 1],
    "text": ["0", "1"],
    "bool": [False, True],
    "date": np.array([0, 1], "M8[D]"),
    "beyond int64": np.array([0, 2**63], np.uint64),
    "negative": [0, -1],
    "vectors": [[0], [1]],
    "masked": np.ma.array([0, 1], mask=[True, False]),
}
IMAGES = {
    "complex": np.ones((2, 1, 4, 4), complex),
    "masked": np.ma.array(np.ones((2, 1, 4, 4)), mask=True),
    "int": np.ones((2, 1, 4, 4), int),
    "bool": np.ones((2, 1, 4, 4), bool),
    "text": np.full((2, 1, 4, 4), "a"),
    "beyond float32": np.full((2, 1, 4, 4), 1e39),
    "channels last": np.zeros((2, 8, 8, 3), np.uint8),
    "one channel last": np.zeros((2, 28, 28, 1), np.uint8),
}


@pytest.mark.parametrize("where", ["Python", "files"])
@pytest.mark.parametrize(
    ("kind", "name"), [*(("labels", name) for name in LABELS), *(("images", name) for name in IMAGES)]
)
def test_arrays_that_would_change_silently_are_refused_in_python_and_in_files_alike(tmp_path, where, kind, name):
    images, labels = np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 1])
    images, labels = (images, LABELS[name]) if kind == "labels" else (IMAGES[name], labels)
    if where == "Python":
        with pytest.raises(DataError) as caught:
            as_dataset((images, labels))
    elif name == "masked":
        pytest.skip("a file of arrays has no masks")
    else:
        for part in ("train", "test"):
            np.savez(tmp_path / part, images=images, labels=labels)
        with pytest.raises(DataError) as caught:
            load("arrays", tmp_path)
    assert "\n" not in str(caught.value)
    if "last" in name:
        assert "their channels are last: give images.transpose(0, 3, 1, 2)" in str(caught.value)


def test_arrays_in_files_are_read_as_arrays_in_python(tmp_path):
    images, labels = RNG.random((6, 5, 7)), np.array([0, 1, 2, 0, 1, 2], np.uint8)
    for part in ("train", "test"):
        np.savez_compressed(tmp_path / part, images=images, labels=labels)
    split, wanted = load("arrays", tmp_path), as_dataset((images, labels))
    for data in (split.train, split.test):
        assert (data.images == wanted.images).all() and (data.labels == wanted.labels).all() and not data.flip


def in_both_places(content, offset, value):
    """Another byte of an entry of a zip file, where it stands and in the list at the end."""
    changed, listed = bytearray(content), content.index(b"PK\1\2")
    changed[offset] = changed[listed + offset + 2] = value
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, start: content[:start] + b"\x07" + content[start + 1 :],  # a block of no known type
        lambda content, start: content[: start + 40] + bytes(40) + content[start + 80 :],
        lambda content, start: in_both_places(content, 8, 99),  # an unknown method
        lambda content, start: in_both_places(content, 6, 1),  # said to be encrypted
        lambda content, start: content[:-30],
        lambda content, start: content[40:],
        lambda content, start: b"",
        lambda content, start: b"no zip",
    ],
)
def test_a_damaged_file_of_arrays_is_named(tmp_path, damage):
    for part in ("train", "test"):
        np.savez_compressed(tmp_path / part, images=RNG.random((20, 1, 8, 8)), labels=np.arange(20))
    path = tmp_path / "train.npz"
    content = path.read_bytes()
    changed = damage(content, 30 + len("images.npy") + content[28])
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(DataError, match=r"train\.npz cannot be read .*; write it with np.savez") as caught:
        load("arrays", tmp_path)
    assert "\n" not in str(caught.value)


def test_random_damages_of_a_file_of_arrays_are_refused_or_harmless(tmp_path):
    images, labels, rng = RNG.random((20, 1, 8, 8)).astype(np.float32), np.arange(20), np.random.default_rng(0)
    for part in ("train", "test"):
        np.savez_compressed(tmp_path / part, images=images, labels=labels)
    path = tmp_path / "train.npz"
    content, refused = path.read_bytes(), 0
    for _ in range(200):
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            data = load("arrays", tmp_path).train
            assert (data.images == images).all() and (data.labels == labels).all()
        except DataError:
            refused += 1
    assert refused > 100


ODD = {
    "no label": lambda image: (image, None),
    "text": lambda image: (image, "a"),
    "NaN": lambda image: (image, float("nan")),
    "half": lambda image: (image, 0.5),
    "vector": lambda image: (image, np.array([0, 1])),
    "too large": lambda image: (image, 2**70),
    "unsigned": lambda image: (image, np.uint64(2**63)),
    "complex": lambda image: (image, 1j),
    "date": lambda image: (image, np.datetime64(0, "D")),
    "image alone": lambda image: image[0],
    "nothing": lambda image: (),
    "no image": lambda image: (None, 0),
    "a table": lambda image: {"a": 1},
    "meta": lambda image: (image.to("meta"), 0),
    "complex image": lambda image: (image * 1j, 0),
    "a list": lambda image: ([[1], [2, 3]], 0),
    "masked": lambda image: (np.ma.array(image.numpy(), mask=True), 0),
    "table of colours": lambda image: (Image.new("P", (8, 8)), 0),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_examples_are_refused_in_one_line_that_names_them(name):
    torch = pytest.importorskip("torch")
    with pytest.raises(DataError, match="arrays: ") as caught:
        as_dataset(Pairs([ODD[name](torch.ones(1, 8, 8))] * 2))
    assert "\n" not in str(caught.value)


def test_tensors_are_read_as_what_they_are_however_they_are_stored():
    torch = pytest.importorskip("torch")
    image = torch.rand(1, 8, 8)
    stored = (
        image.to_sparse(),
        torch._neg_view(-image),
        image.clone().requires_grad_(),
        image.double(),
        image[None].expand(3, 1, 8, 8)[1],
    )
    for tensor in stored:
        assert (as_dataset(Pairs([(tensor, torch.tensor([1])), (tensor, np.int16(0))])).images == image.numpy()).all()
        both = torch.stack([tensor.to_dense() if tensor.is_sparse else tensor] * 2)
        assert (as_dataset((both, torch.tensor([0, 1]))).images == image.numpy()).all()
    assert (as_dataset(Pairs([(image.bfloat16(), 0)])).images == image.bfloat16().float().numpy()).all()


@pytest.mark.parametrize(("first", "second"), [(np.uint8, np.float32), (np.float32, np.uint8), (np.uint8, np.int64)])
def test_examples_of_mixed_types_are_refused(first, second):
    items = [(np.zeros((1, 8, 8), first), 0), (np.full((1, 8, 8), 300).astype(second), 1)]
    with pytest.raises(DataError, match=r"example 1 is .*, example 0 is .*; all must be alike"):
        as_dataset(Pairs(items))


def test_images_of_more_than_8_bits_are_not_cut(tmp_path):
    write_images(tmp_path, "L")
    Image.fromarray(np.full((5, 6), 40000, np.uint16)).save(tmp_path / "train" / "bee" / "1.png")
    with pytest.raises(DataError, match=r"bee/1.png has more than 8 bits a pixel"):
        load("folder", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"std": np.zeros(1, np.float32)},
        {"std": np.full(1, np.inf, np.float32)},
        {"mean": np.full(1, np.nan, np.float32)},
        {"mean": np.zeros(2, np.float32)},
    ],
)
def test_statistics_that_no_image_can_be_divided_by_are_refused(change):
    with pytest.raises(DataError, match="mean and std must be 1 finite numbers"):
        replace(as_dataset((bytes_of(3, 1, 8, 8), np.arange(3))), **change)


def test_labels_that_steps_do_not_read_are_refused():
    with pytest.raises(DataError, match=r"3 images need as many int64 labels, not \(3,\) int32"):
        replace(as_dataset((bytes_of(3, 1, 8, 8), np.arange(3))), labels=np.arange(3, dtype=np.int32))


def test_only_data_sets_known_to_allow_it_are_mirrored(tmp_path):
    for name in ("cifar", "fashion", "images"):
        (tmp_path / name).mkdir()
    write_cifar10(tmp_path / "cifar")
    write_fashion(tmp_path / "fashion")
    write_images(tmp_path / "images")
    assert load("cifar10", tmp_path / "cifar").train.flip and load("fashion-mnist", tmp_path / "fashion").train.flip
    assert not load("folder", tmp_path / "images").train.flip and not load("digits").train.flip
    plain = as_dataset((bytes_of(3, 1, 8, 8), np.arange(3)))
    assert not plain.flip and not Dataset(plain.images, plain.labels, 3, plain.mean, plain.std, "plain").flip
    split = load("cifar10", tmp_path / "cifar")
    assert split.train.describe() != replace(split.train, flip=False).describe()


def test_what_tells_data_apart_covers_labels_and_order():
    images, labels = bytes_of(9, 1, 8, 8), np.arange(9)
    crc = as_dataset((images, labels)).describe()["crc32"]
    assert as_dataset((images.copy(), labels.copy())).describe()["crc32"] == crc
    assert (
        as_dataset((images, labels[::-1])).describe()["crc32"] != crc
        and as_dataset((images[::-1], labels)).describe()["crc32"] != crc
    )


@pytest.mark.parametrize("flip", [False, True])
def test_pad_crop_flip_gives_what_a_loop_gives(flip):
    images = bytes_of(50, 3, 8, 6)
    before = images.copy()
    result = pad_crop_flip(images, np.random.default_rng(5), pad=2, flip=flip)
    rng = np.random.default_rng(5)
    top, left = rng.integers(0, 5, size=(2, 50))
    mirrored = rng.random(50) < 0.5 if flip else np.zeros(50, bool)
    for i in range(50):
        wanted = np.zeros((3, 12, 10), np.uint8)
        wanted[:, 2:10, 2:8] = images[i]
        wanted = wanted[:, top[i] : top[i] + 8, left[i] : left[i] + 6]
        assert (result[i] == (wanted[..., ::-1] if mirrored[i] else wanted)).all()
    assert (images == before).all() and result.dtype == np.uint8
    assert set(top) == set(range(5)) and (not flip or 0 < mirrored.sum() < 50)


def numbered(count=23):
    """Images that hold their own index."""
    images = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, 2, 8, 8)).copy()
    return Dataset.of(images, np.arange(count), "numbered")


def test_an_epoch_shows_every_example_at_most_once_in_whole_batches():
    data, rng = numbered(), np.random.default_rng(1)
    epochs = [list(batches(data, 5, rng, augment=False)) for _ in range(2)]
    for epoch in epochs:
        shown = np.concatenate([indices for _, _, indices in epoch])
        assert len(epoch) == 4 and len(set(shown.tolist())) == 20
        for images, labels, indices in epoch:
            assert images.shape == (5, 2, 8, 8) and images.dtype == np.float32 and images.flags.c_contiguous
            assert (images[:, 0, 0, 0] == indices).all() and (labels == indices).all()
    orders = [np.concatenate([indices for _, _, indices in epoch]) for epoch in epochs]
    assert (orders[0] != orders[1]).any()
    left_out = [set(range(23)) - set(order.tolist()) for order in orders]
    assert left_out[0] != left_out[1]


def test_batches_are_a_function_of_their_generator():
    data = Dataset.of(bytes_of(40, 3, 32, 32), RNG.integers(0, 4, 40), "random", shift=True)
    first, again = (list(batches(data, 8, np.random.default_rng(7), augment=True)) for _ in range(2))
    plain = list(batches(data, 8, np.random.default_rng(7), augment=False))
    for one, two, unaugmented in zip(first, again, plain, strict=True):
        assert all((a == b).all() for a, b in zip(one, two, strict=True))
        assert (one[2] == unaugmented[2]).all() and (one[0] != unaugmented[0]).any()


def test_a_data_set_that_allows_mirroring_alone_is_not_shifted():
    data = Dataset.of(bytes_of(40, 1, 8, 8), np.zeros(40, int), "random", flip=True)
    for images, _, places in batches(data, 40, np.random.default_rng(7), augment=True):
        plain = data.normalise(data.images[places])
        same, mirrored = ((images == one).all((1, 2, 3)) for one in (plain, plain[..., ::-1]))
        assert (same | mirrored).all() and same.any() and mirrored.any()


def test_a_data_set_smaller_than_a_batch_is_an_error_at_once():
    with pytest.raises(DataError, match="23 examples do not fill one batch of 24"):
        batches(numbered(), 24, np.random.default_rng(0), augment=False)


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mest-batches")]


def test_the_worker_ends_when_iteration_stops_early_and_its_errors_arrive():
    iterator = batches(numbered(), 5, np.random.default_rng(0), augment=False)
    next(iterator)
    assert len(workers()) == 1
    iterator.close()
    assert not workers()
    shifted = replace(numbered(), shift=True)

    class Broken:
        def permutation(self, among):
            return among

        def integers(self, *_, **__):
            raise RuntimeError("no random numbers")

    with pytest.raises(RuntimeError, match="no random numbers"):
        list(batches(shifted, 5, Broken(), augment=True))
    assert not workers()
