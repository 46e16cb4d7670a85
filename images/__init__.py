"""Images: what is known of the data sets, how they are read and split, and batches that can be replayed.

    facts.py          what is known of each data set, and what a split holds
    orders.py         the order of images, and which share of a batch a process shows
    reading.py        small data sets from files, downloaded when missing
    files.py          which files are images, and how they become pixels
    trees.py          folders of images, listed
    identity.py       what distinguishes one data set from another of the same name
    splits.py         train, validation and test: `load_dataset`
    randaugment.py    RandAugment of a batch
    augment.py        crops, flips and more as batched tensor code
    preprocessing.py  how an image becomes a network's input, as one value
    folders.py        batches of image files, by worker processes: `FolderBatches`
    batches.py        batches of pixels that stay on the device: `Batches`, `make_batches`

Each imports only those above it. `dataset.py` has the names that other packages use.
"""
