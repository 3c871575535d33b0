"""Real MNIST at the paper's size: what block-diagonal HF is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from suite import EXPERIMENTS, config, mnist_folder

from bdhf.experiment import run
from bdhf.record import read_metrics

pytestmark = pytest.mark.slow


def test_block_diagonal_hf_beats_hf_at_each_of_ten_updates(tmp_path: Path) -> None:
    """Mini-batch 6000, curvature 750; a plain trial program reached 22.8 and 30.1."""
    data = mnist_folder()
    torch.set_num_threads(2)
    errors = {}
    for optimizer in ("hf", "bdhf"):
        values = config(
            "autoencoder",
            "scale=paper",
            f"optimizer={optimizer}",
            "updates=10",
            "evaluate_every=1",
            f"data.root={data}",
        )
        values.results = str(tmp_path)
        folder = run(EXPERIMENTS["autoencoder"], values)
        assert folder.status == "finished"
        errors[optimizer] = [float(row["train_loss"] or 0) for row in read_metrics(folder.path)]
    print(errors)
    assert errors["bdhf"][-1] < 26
    assert len(errors["hf"]) == 11 and errors["hf"][0] == errors["bdhf"][0]
    pairs = zip(errors["bdhf"][1:], errors["hf"][1:], strict=True)
    assert all(blockwise < whole for blockwise, whole in pairs)
