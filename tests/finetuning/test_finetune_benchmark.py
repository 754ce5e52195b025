"""The benchmark of fine-tuning: its images and its table."""

import finetune
import numpy as np


def test_digits_are_drawn_by_seed():
    images, labels = finetune.drawn(2, 0)
    assert images.shape == (20, 96, 96, 3) and images.dtype == np.uint8 and np.bincount(labels).tolist() == [2] * 10
    assert np.array_equal(images, finetune.drawn(2, 0)[0]) and not np.array_equal(images, finetune.drawn(2, 1)[0])


def test_each_class_has_as_many_examples():
    labels = np.arange(100) % 10
    places = finetune.chosen(labels, labels, 3, np.random.default_rng(0))
    assert len(set(places)) == 30 and np.bincount(labels[places]).tolist() == [3] * 10
    assert finetune.grown(np.full((1, 28, 28), 7, np.uint8)).tolist() == np.full((1, 96, 96, 3), 7).tolist()


def test_the_table_has_medians_over_seeds():
    runs = [
        {
            "contestant": contestant,
            "data": "digits",
            "accuracy": 0.5 + seed / 10,
            "seconds": 2.0 + seed,
            "cold_compiling_seconds": 1.0,
            "peak_bytes": 2.0**20 * (seed + 1),
        }
        for contestant in finetune.CONTESTANTS
        for seed in range(3)
    ]
    table = finetune.table({"runs": runs})
    assert "| digits | ours | 60.0% | 3.0 | 1.0 | 2 |" in table and table.count("\n") == 1 + len(finetune.CONTESTANTS)
