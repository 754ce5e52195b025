"""Whether the last blocks are kept as they were trained."""

from types import SimpleNamespace

import numpy as np
import pytest

from mest_compile.data import Dataset, Split
from mest_compile.finetuning.work import Work


def split(labels):
    plain = np.zeros(1, np.float32), np.ones(1, np.float32)
    data = Dataset(np.zeros((len(labels), 1, 2, 2), np.float32), labels, 2, *plain, "a")
    return Split(data, data, data)


def answering(right, labels):
    """A step that is right where it is said to be."""
    return SimpleNamespace(predict=lambda images: np.eye(2)[np.where(right, labels, 1 - labels)])


@pytest.mark.parametrize(
    ("lost", "gained", "kept"), [(0, 0, True), (1, 0, True), (2, 0, False), (3, 9, True), (9, 3, False), (9, 6, True)]
)
def test_blocks_are_kept_unless_they_are_worse_than_chance_makes_of_equals(lost, gained, kept, caplog):
    labels = np.arange(20) % 2
    before, after = np.ones(20, bool), np.ones(20, bool)
    after[:lost], before[lost : lost + gained] = False, False
    work = SimpleNamespace(pooled=split(labels), images=lambda data: data.images)
    found = Work._no_worse(work, answering(after, labels), split(labels), answering(before, labels))
    assert found == kept and len(caplog.messages) == (not kept)


def test_without_validation_images_they_are_kept():
    labels = np.arange(4) % 2
    data = split(labels)
    work = SimpleNamespace(pooled=Split(data.train, data.test), images=lambda part: part.images)
    assert Work._no_worse(work, None, Split(data.train, data.test), None)
