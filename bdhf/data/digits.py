"""The 1,797 8x8 digits that ship with scikit-learn: real data without a download."""

from __future__ import annotations

from pathlib import Path

import torch

from bdhf.data.images import Images, images_from_bytes


def load_digits(root: Path) -> Images:
    """Every fifth digit, in a fixed shuffle, is for testing; ``root`` is not needed."""
    from sklearn import datasets

    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    test, train = order[::5], order[torch.arange(len(order)) % 5 != 0]
    pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.uint8)
    return images_from_bytes(
        (pixels[train], labels[train]),
        (pixels[test], labels[test]),
        "scikit-learn's digits (UCI optical recognition of handwritten digits)",
        levels=16,
    )
