"""Images: what the data sets are, how they are read and split, and batches that can be replayed.

    facts.py     what is known of each data set, and what a split holds     a new data set: its entry here
    orders.py    which image comes when: in a data set, an epoch, a step    what share of it a batch is
    reading.py   small data sets from files, downloaded when missing        and its reader here
    files.py     which files are images, and what pixels they become        a type or format of image
    trees.py     folders of images, listed                                  or its layout here
    identity.py  what tells one data set from another of the same name      what else must stay the same
    splits.py    train, validation and test cut from what was read          `load_dataset`
    randaugment.py  RandAugment of a batch                              an operation of it
    augment.py   crops, flips and more as batched tensor code               a new augmentation
    preprocessing.py  how an image becomes a network's input, in one value  a step of it
    folders.py   batches of image files, by worker processes                `FolderBatches`
    batches.py   batches of pixels that live on the device                  `Batches`, `make_batches`

Each imports from those above it only. The names that others call are in `dataset.py`, the door.
"""
