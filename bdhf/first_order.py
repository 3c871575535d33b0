"""First-order optimizers behind the call that `BlockDiagonalHF` answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bdhf.batches import Batch, Criterion
from bdhf.gradient import loss_and_gradient
from bdhf.optimizer import StepReport


class FirstOrder:
    """Any optimizer of `torch.optim`, called as ``step(model, criterion, batch)``.

    With it, one training loop serves first- and second-order methods alike::

        opt = FirstOrder(torch.optim.Adam(model.parameters()))
        loss = opt.step(model, criterion, (inputs, targets))

    Args:
        optimizer: the optimizer; its parameters, state and settings are the wrapped ones'.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.last_step: StepReport | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        self.optimizer.load_state_dict(state)

    def step(
        self,
        model: nn.Module,
        criterion: Criterion,
        batch: Batch,
        curvature_batch: Batch | None = None,
        *,
        micro_batch: int | None = None,
    ) -> Tensor:
        """Compute the gradient on ``batch``, let the optimizer step, and return the loss.

        ``curvature_batch`` is there for the sake of one call for all optimizers, and ignored.
        The loss is that before the update: a detached scalar on the device.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        loss = loss_and_gradient(model, criterion, batch, parameters, micro_batch)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self.optimizer.step()
        self.last_step = StepReport([], norm, "gradient")
        return loss
