"""Adam (Kingma and Ba 2015), torch's implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from bdhf.blocks import ParamGroup
from bdhf.first_order import FirstOrder
from bdhf.methods import Method, require
from bdhf.training import StepOptimizer


@dataclass
class Adam(Method):
    """Its settings."""

    names: ClassVar[tuple[str, ...]] = ("adam",)

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def check(self) -> None:
        super().check()
        require(0 <= self.eps < math.inf, "optimizer.eps", self.eps, "0 or more, and finite")
        inside = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(inside, "optimizer.betas", list(self.betas), "two numbers from 0 to below 1")

    def make(
        self, model: nn.Module, blocks: Callable[[Any], list[ParamGroup]]
    ) -> tuple[list[ParamGroup], StepOptimizer]:
        parameters = list(model.parameters())
        # On a GPU one kernel, and a count of steps there, so that a step can be recorded.
        on_gpu = all(p.is_cuda for p in parameters)
        ways: dict[str, Any] = {"fused": True, "capturable": True} if on_gpu else {}
        return [], FirstOrder(torch.optim.Adam(parameters, **self.keywords(), **ways))
