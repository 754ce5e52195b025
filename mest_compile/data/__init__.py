"""Data sets in memory and the batches made from them. A source is one file in sources/ that registers its name."""

from mest_compile.data.batching import batches, pad_crop_flip
from mest_compile.data.dataset import SOURCES, Dataset, Split, as_dataset, load

__all__ = ["SOURCES", "Dataset", "Split", "as_dataset", "batches", "load", "pad_crop_flip"]
