"""The door to the data: data sets in splits, and batches of them that can be replayed. The rooms are in `images/`.

    splits = load_dataset("digits", "data", image_size=16)
    train = make_batches(splits.train, splits.facts, batch_size=128, device="cpu", seed=42, aug="basic")
    images, labels = train.batch(state=0, epoch=3, step=7)     # the same bits whenever it is asked for

Images are uint8 until a batch is made; a batch is float32 [B, 3, H, W], normalised once by the mean and standard
deviation of the data set, or of pretrained weights (`shown`). Which images validate is fixed, whatever the seed.
"""

from images.batches import Batches, make_batches
from images.facts import DATASETS, DataError, DatasetFacts, FolderSplit, Split, Splits
from images.files import read_rgb
from images.folders import FolderBatches
from images.identity import difference
from images.orders import balanced_order
from images.preprocessing import Preprocessing, preprocessing_of
from images.reading import read_idx
from images.splits import dataset_facts, first_images, folder_identity, joined, load_dataset, split_sizes

__all__ = [
    "DATASETS",
    "Batches",
    "DataError",
    "DatasetFacts",
    "FolderBatches",
    "FolderSplit",
    "Preprocessing",
    "Split",
    "Splits",
    "balanced_order",
    "dataset_facts",
    "difference",
    "first_images",
    "folder_identity",
    "joined",
    "load_dataset",
    "make_batches",
    "preprocessing_of",
    "read_idx",
    "read_rgb",
    "split_sizes",
]
