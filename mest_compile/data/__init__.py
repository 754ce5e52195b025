"""Data sets in memory and the batches made from them. A source is one file in sources/ that registers its name."""

from mest_compile.data.batching import batches, batches_of, pad_crop_flip, parts
from mest_compile.data.dataset import SOURCES, Dataset, Split, as_dataset, load
from mest_compile.data.streams import Stream

__all__ = [
    "SOURCES",
    "Dataset",
    "Split",
    "Stream",
    "as_dataset",
    "batches",
    "batches_of",
    "load",
    "pad_crop_flip",
    "parts",
]
