"""What axes are made of: against numpy, which moves the numbers."""

import numpy as np
import pytest

from mest_compile.ir.arrangement import DIMS, Arrangement, Part, cut, inverse, merged, size_of, together, whole

IMAGE = (2, 12, 4, 6)


def numbers(arrangement, image=IMAGE):
    """The numbers of an image, counted as they lie, in the order of the axes."""
    places = np.zeros(1, int)
    strides = {dim: int(np.prod(image[place + 1 :])) for place, dim in enumerate(DIMS)}
    for axis in arrangement.axes:
        along = np.zeros(1, int)
        for part in axis:
            along = np.add.outer(along, np.arange(part.size) * part.stride * strides[part.dim]).ravel()
        places = np.add.outer(places, along).ravel()
    return places.reshape(arrangement.shape)


def test_views_are_numpys():
    """Reshapes and permutations, one after another, drawn at random."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        arrangement, array = Arrangement.plain(IMAGE), np.arange(np.prod(IMAGE)).reshape(IMAGE)
        for _ in range(6):
            order = rng.permutation(array.ndim).tolist()
            arrangement, array = arrangement.permuted(order), array.transpose(order)
            place = int(rng.integers(array.ndim))
            apart = *array.shape[:place], *split(array.shape[place], rng), *array.shape[place + 1 :]
            joined = array.shape[0] * array.shape[1], *array.shape[2:]
            for sizes in (joined, apart) if array.ndim > 5 else (apart,):
                after = arrangement.reshaped(sizes)
                if after is not None:  # now and then a part would not come apart so
                    assert after.shape == sizes and np.array_equal(numbers(after), array.reshape(sizes)), seed
            if after is not None and array.ndim < 7:
                arrangement, array = after, array.reshape(apart)
            assert np.array_equal(numbers(arrangement), array), seed


def split(size, rng):
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    first = int(rng.choice(divisors))
    return [first, size // first]


def test_what_would_not_come_apart_is_none():
    turned = Arrangement.plain(IMAGE).reshaped((2, 12, 24)).permuted((0, 2, 1))
    assert turned.reshaped((2, 4, 6, 12)) is not None and turned.reshaped((2, 18, 16)) is None
    assert cut((Part("C", 12, 1),), (5, 5)) is None and cut((Part("C", 12, 1),), (3, 2)) is None


def test_an_axis_is_said_in_as_few_parts_as_can_be():
    apart = cut((Part("W", 6, 1), Part("C", 12, 1)), (3, 2, 4, 3))
    assert [len(axis) for axis in apart] == [1, 1, 1, 1]
    assert merged(part for axis in apart for part in axis) == (Part("W", 6, 1), Part("C", 12, 1))
    assert merged([Part("H", 1, 1), Part("W", 1, 4)]) == ()


def test_a_copy_moves_what_is_seen_along():
    """Tokens of windows, heads apart, laid as an image of windows by tokens: the same numbers, and back again."""
    seen = Arrangement.plain(IMAGE).reshaped((2, 3, 4, 2, 2, 2, 3)).permuted((0, 3, 5, 1, 4, 6, 2))
    assert seen.shape == (2, 2, 2, 3, 2, 3, 4)
    axes = seen.axes
    image = {"N": axes[0], "C": axes[3] + axes[6], "H": axes[1] + axes[2], "W": axes[4] + axes[5]}
    laid = seen.moved(image)
    sizes = tuple(size_of(image[dim]) for dim in DIMS)
    copied = numbers(Arrangement(tuple(image.values()))).ravel()  # what lies where after the copy
    assert np.array_equal(copied[numbers(laid, sizes)], numbers(seen))
    back = inverse({dim: merged(image[dim]) for dim in DIMS})
    again = numbers(Arrangement(tuple(back[dim] for dim in DIMS)), sizes).ravel()
    assert np.array_equal(copied[again], np.arange(np.prod(IMAGE)))
    assert laid.moved(back) == seen


def test_axes_are_cut_together():
    a = [(Part("H", 4, 1), Part("W", 6, 1)), (Part("C", 12, 1),)]
    b = [(Part("W", 24, 1),), (Part("C", 3, 4), Part("H", 4, 1))]
    ours, others = together(a, b)
    assert [[part.size for part in axis] for axis in ours] == [[4, 6], [3, 4]]
    assert others == [(Part("W", 4, 6), Part("W", 6, 1)), (Part("C", 3, 4), Part("H", 4, 1))]
    assert together([(Part("C", 4, 3), Part("H", 3, 1))], [(Part("W", 3, 4), Part("W", 4, 1))]) is None


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((12,), (1, 12, 1, 1)), ((24, 12), (1, 12, 4, 6)), ((1, 24, 1), (1, 1, 4, 6)), ((1, 1, 1), (1, 1, 1, 1))],
)
def test_numbers_that_are_broadcast_lie_as_the_image(shape, wanted):
    tokens = Arrangement.plain(IMAGE).reshaped((2, 12, 24)).permuted((0, 2, 1))
    array = np.random.default_rng(0).standard_normal(shape)
    laid = tokens.physical(array, IMAGE)
    assert laid.shape == wanted
    image = np.broadcast_to(laid, IMAGE)
    assert np.array_equal(image.ravel()[numbers(tokens)], np.broadcast_to(array, tokens.shape))


def test_numbers_that_differ_between_examples_or_do_not_fit_are_none():
    tokens = Arrangement.plain(IMAGE).reshaped((2, 12, 24)).permuted((0, 2, 1))
    for shape in (2, 1, 1), (5,), (1, 1, 24, 12), (12, 12):
        assert tokens.physical(np.zeros(shape), IMAGE) is None
    assert Arrangement.plain(IMAGE).reshaped((2, 12, 2, 2, 6)).physical(np.zeros((2, 1, 1)), IMAGE) is None


def test_features_and_series_are_images():
    assert [len(axis) for axis in Arrangement.plain((3, 5)).axes] == [1, 1]
    assert Arrangement.plain((3, 5, 7)).axes[2] == (Part("W", 7, 1),)
    assert whole((3, 5, 7))["H"] == ()
