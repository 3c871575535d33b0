"""What updates by two and by four processes say to each other.

torchrun --nproc-per-node 4 tests/traffic.py found.json

The file gets, for each case, the placement, the parameters and the counted work of the blocks, and
of each rank the products and the collectives of its last update.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from networks import make_case
from torch import nn

import bdhf
from bdhf.first_order import FirstOrder
from bdhf.work import count_work

#: Blocks that stop one after the other, and blocks that all go on to the cap.
SETTINGS: dict[str, dict[str, Any]] = {
    "early": {"lr": 0.5, "damping": 0.1, "cg_max_iter": 40, "cg_tol": 0.02},
    "cap": {"lr": 0.5, "damping": 1.0, "cg_max_iter": 5, "cg_tol": 0.0},
}


def case_of(group: Any, optimizer: str, settings: str, placement: Any) -> dict[str, Any]:
    """Two updates, of which the second starts warm."""
    case = make_case("cross-entropy mean", torch.float32)
    how: Any = {"process_group": group, "sharded": False}
    layers = [layer for layer in case.model.modules() if isinstance(layer, nn.Linear)]
    blocks = [list(layer.parameters()) for layer in layers]
    counted: list[float] = []
    if optimizer == "adam":
        blocks = [[p for block in blocks for p in block]]
        opt: Any = FirstOrder(torch.optim.Adam(case.model.parameters()), **how)
    else:
        if optimizer == "hf":
            blocks = [[p for block in blocks for p in block]]
        groups = [{"params": block} for block in blocks]
        how["placement"] = placement
        opt = bdhf.BlockDiagonalHF(groups, **SETTINGS[settings], **how)
        counted = count_work(case.model, case.criterion, case.batch, blocks).products
    for _ in range(2):
        opt.step(case.model, case.criterion, case.batch, case.batch)
    products = [block.products for block in opt.last_step.blocks]
    mine = {"products": products, "traffic": [asdict(said) for said in opt.last_step.traffic]}
    ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, mine, group)
    parameters = [sum(p.numel() for p in block) for block in blocks]
    placed = placement if isinstance(placement, str) else [asdict(team) for team in placement]
    return {"placement": placed, "parameters": parameters, "counted": counted, "ranks": ranks}


def cases(group: Any, size: int) -> dict[str, dict[str, Any]]:
    mixed = [bdhf.Team((0, 2), tuple(range(size - 1))), bdhf.Team((1,), (size - 1,))]
    found = {f"{size} adam": case_of(group, "adam", "", "data")}
    for settings in SETTINGS:
        found[f"{size} hf {settings}"] = case_of(group, "hf", settings, "counted")
        for k, placement in enumerate(("data", "counted", mixed)):
            found[f"{size} bdhf {settings} {k}"] = case_of(group, "bdhf", settings, placement)
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    found = cases(dist.group.WORLD, 4)
    if dist.get_rank() < 2:
        found |= cases(pair, 2)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that takes down its connections


if __name__ == "__main__":
    main()
