"""What a data set is, and how one that is given as arrays of bytes becomes one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

#: Inputs and targets, one row a sample.
Data = tuple[Tensor, Tensor]


class DataError(RuntimeError):
    """Data that is missing or corrupt; the message names the file and what to do."""


@dataclass(frozen=True)
class Images:
    """A labelled data set of images.

    Attributes:
        train, test: pixels, float32 (rows, channels, height, width) from 0 to 1, and labels,
            int64 (rows,).
        source: which form of the data set it is, for the run's provenance (no path: tables made
            from it are shared).
        sha256: over the decoded bytes, so that it does not depend on how they were stored.
    """

    train: Data
    test: Data
    source: str
    sha256: str


def images_from_bytes(train: Data, test: Data, source: str, levels: int = 255) -> Images:
    """A data set from pixels (rows, channels, height, width) and labels, both uint8."""
    return Images(_scaled(train, levels), _scaled(test, levels), source, digest(train, test))


def digest(train: Data, test: Data) -> str:
    """The sha256 of a data set's decoded bytes."""
    found = hashlib.sha256()
    for tensor in (*train, *test):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def with_validation(images: Images, rows: int) -> Images:
    """The training set without ``rows`` samples drawn at random, which become the test set.

    The draw is always the same, so that runs which are compared hold out the same samples.
    """
    inputs, labels = images.train
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[:rows], order[rows:].sort().values
    source = f"{images.source}, {rows} of the training set held out as the test set"
    train, test = ((inputs[chosen], labels[chosen]) for chosen in (kept, held_out))
    return Images(train, test, source, images.sha256)


def _scaled(data: Data, levels: int) -> Data:
    pixels, labels = data
    return pixels.to(torch.float32).div_(levels), labels.long()
