"""Hessian-free optimization and block-diagonal Hessian-free optimization: one optimizer."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING
from torch import nn

from bdhf.blocks import ParamGroup, split_into_blocks
from bdhf.methods import ConfigError, Method, require
from bdhf.optimizer import BlockDiagonalHF
from bdhf.random_blocks import RandomBlocks
from bdhf.training import StepOptimizer


@dataclass
class HessianFree(Method):
    """Settings of `BlockDiagonalHF`: ``hf`` has one block, ``bdhf`` the experiment's.

    ``blocks`` gives ``bdhf`` others (for claim H1): ``8`` are so many of layers, contiguous in
    depth and of sizes as equal as layers allow; ``random-8`` have the same sizes, and are drawn at
    random scalar by scalar, once for all runs.
    """

    names: ClassVar[tuple[str, ...]] = ("hf", "bdhf")
    uses_curvature: ClassVar[bool] = True

    damping: float = MISSING
    cg_max_iter: int = MISSING
    cg_tol: float = MISSING
    cg_momentum: float = MISSING
    blocks: str | None = None

    def check(self) -> None:
        super().check()
        for name in ("damping", "cg_tol"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optimizer.{name}", value, "0 or more, and finite")
        cap, momentum = self.cg_max_iter, self.cg_momentum
        require(cap >= 1, "optimizer.cg_max_iter", cap, "1 or more")
        require(0 <= momentum <= 1, "optimizer.cg_momentum", momentum, "from 0 to 1")
        known = self.blocks is None or re.fullmatch(r"(random-)?[1-9]\d*", self.blocks)
        allowed = "a number, random-NUMBER, or null for the experiment's blocks"
        require(bool(known), "optimizer.blocks", self.blocks, allowed)
        if self.name == "hf":
            allowed = "null for optimizer=hf, which has one block; optimizer=bdhf takes blocks"
            require(self.blocks is None, "optimizer.blocks", self.blocks, allowed)

    def prepare(self, model: nn.Module) -> nn.Module:
        kind, count = self._chosen()
        if kind != "random":
            return model
        with self._refusals_named():
            layers = split_into_blocks(model, count)
            sizes = [sum(p.numel() for p in group["params"]) for group in layers]
            return RandomBlocks(model, sizes)

    def make(
        self, model: nn.Module, blocks: Callable[[Any], list[ParamGroup]]
    ) -> tuple[list[ParamGroup], StepOptimizer]:
        kind, count = self._chosen()
        if self.name == "hf":
            groups = [{"params": list(model.parameters())}]
        elif kind == "random":
            groups = [{"params": [parameter]} for parameter in model.parameters()]
        elif kind == "contiguous":
            with self._refusals_named():
                groups = split_into_blocks(model, count)
        else:
            groups = blocks(model)
        settings = self.keywords()
        del settings["blocks"]
        return groups, BlockDiagonalHF(groups, **settings)

    @contextlib.contextmanager
    def _refusals_named(self) -> Iterator[None]:
        """Blocks that the network cannot have are a setting's fault."""
        try:
            yield
        except ValueError as error:
            raise ConfigError(f"optimizer.blocks={self.blocks}: {error}") from error

    def _chosen(self) -> tuple[str, int]:
        """Which kind of blocks, and how many where that is asked."""
        if self.blocks is None:
            return "experiment", 0
        kind, _, count = self.blocks.rpartition("-")
        return kind or "contiguous", int(count)
