"""Data that is found, missing, corrupt or cut short."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from suite import mnist_folder, write_idx

from bdhf import data
from bdhf.data import DataError, load

NAMES = list(data._MNIST)


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Four small arrays that pass for MNIST, since their md5 sums are expected."""
    generator = np.random.default_rng(0)
    return {
        NAMES[0]: generator.integers(0, 256, (5, 28, 28)),
        NAMES[1]: generator.integers(0, 10, 5),
        NAMES[2]: generator.integers(0, 256, (3, 28, 28)),
        NAMES[3]: generator.integers(0, 10, 3),
    }


def write_all(
    arrays: dict[str, np.ndarray], folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = {
        name: hashlib.md5(write_idx(folder / f"{name}{suffix}", values)).hexdigest()
        for name, values in arrays.items()
    }
    monkeypatch.setattr(data, "_MNIST", sums)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "mnist", "MNIST/raw"])
def test_mnist_is_read_from_the_usual_places(
    small_mnist: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    suffix: str,
) -> None:
    write_all(small_mnist, tmp_path / folder, suffix, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    images = load("mnist", str(tmp_path))
    expected = torch.from_numpy(small_mnist[NAMES[0]]).float() / 255
    assert torch.equal(images.train_images, expected)
    assert torch.equal(images.test_labels, torch.from_numpy(small_mnist[NAMES[3]]))
    assert images.train_images.dtype == torch.float32 and images.train_labels.dtype == torch.int64
    assert sorted(tmp_path.rglob("*")) == before  # never written to
    assert str(tmp_path) in images.source


def test_checksum_does_not_depend_on_storage(
    small_mnist: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = set()
    for folder, suffix in (("a", ""), ("b", ".gz")):
        write_all(small_mnist, tmp_path / folder, suffix, monkeypatch)
        sums.add(load("mnist", str(tmp_path / folder)).sha256)
    assert len(sums) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "empty"])
@pytest.mark.parametrize("name", NAMES)
def test_corrupt_files_are_named(
    small_mnist: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: str,
) -> None:
    write_all(small_mnist, tmp_path, ".gz", monkeypatch)
    path = tmp_path / f"{name}.gz"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        plain = bytearray(gzip.decompress(content))
        plain[-1] ^= 1
        path.write_bytes(gzip.compress(bytes(plain)))
    elif damage == "not gzip":
        path.write_bytes(b"<html>404</html>")
    else:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=name) as caught:
        load("mnist", str(tmp_path))
    assert "Delete it to have it downloaded again, or put the right file there" in str(caught.value)


def test_missing_without_a_network_says_what_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    with pytest.raises(DataError) as caught:
        load("mnist", str(tmp_path))
    message = str(caught.value)
    assert message.startswith("MNIST is not there and cannot be downloaded")
    for part in (*NAMES, str(tmp_path / "MNIST" / "raw"), "data.root=FOLDER", "BDHF_DATA=FOLDER"):
        assert part in message


def test_unknown_data_set_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.name=svhn: must be one of digits, mnist"):
        load("svhn", "data")


def test_digits_ship_with_a_dependency() -> None:
    images = load("digits", "/nowhere")
    assert images.train_images.shape == (1437, 8, 8) and images.test_images.shape == (360, 8, 8)
    assert images.train_images.min() == 0 and images.train_images.max() == 1
    counts = images.test_labels.bincount(minlength=10)
    assert counts.min() > 20  # every class is in the test set
    again = load("digits", "/nowhere")
    assert torch.equal(images.train_images, again.train_images)


def test_real_mnist() -> None:
    images = load("mnist", mnist_folder())
    assert images.train_images.shape == (60000, 28, 28)
    assert images.test_images.shape == (10000, 28, 28)
    assert images.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert images.train_images.mean().item() == pytest.approx(0.1307, abs=1e-4)
