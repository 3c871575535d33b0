"""First-order optimizers behind the call that `BlockDiagonalHF` answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from bdhf import graphs
from bdhf.batches import Batch, Criterion
from bdhf.distributed.ranks import ranks_of
from bdhf.distributed.shares import shared_loss_and_gradient, split
from bdhf.functional import RandomState, other_generators
from bdhf.gradient import loss_and_gradient
from bdhf.graphs import Fixed, Graphs, NoGraphError, Recordings, kind_of
from bdhf.steps import StepReport

#: Settings of torch's optimizers that say how they compute on this device, not what.
_WAYS = ("foreach", "fused", "capturable")

#: Makes a step on a batch; returns the loss and the norm of the gradient.
_Make = Callable[[Batch], tuple[Tensor, Tensor]]


class FirstOrder:
    """Any optimizer of `torch.optim`, called as ``step(model, criterion, batch)``.

    With it, one training loop serves first- and second-order methods alike::

        opt = FirstOrder(torch.optim.Adam(model.parameters()))
        loss = opt.step(model, criterion, (inputs, targets))

    Args:
        optimizer: the optimizer; its parameters, state and settings are the wrapped ones'.
        cuda_graphs: on a GPU, record a step at the third of its kind and replay it from then on,
            as `BlockDiagonalHF` does; here a changed ``lr`` is another kind. Torch's Adam and its
            like need ``capturable=True`` for it.
        process_group, sharded: ranks that split every mini-batch, as for `BlockDiagonalHF`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        cuda_graphs: bool = False,
        process_group: ProcessGroup | DeviceMesh | None = None,
        sharded: bool = True,
    ) -> None:
        self.optimizer = optimizer
        self.ranks = ranks_of(process_group, sharded=sharded)
        # Torch warns of steps that could be captured and are not, as our first ones are not.
        optimizer._warned_capturable_if_run_uncaptured = True
        self.cuda_graphs = cuda_graphs
        self.last_step: StepReport | None = None
        self._recordings: Recordings[_RecordedStep] = Recordings()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned, also on another device."""
        pairs = zip(state["param_groups"], self.param_groups, strict=True)
        groups = [
            group | {name: own[name] for name in _WAYS if name in own} for group, own in pairs
        ]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        self._recordings = Recordings()

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
        device = parameters[0].device
        ranks = self.ranks

        def make(batch: Batch) -> tuple[Tensor, Tensor]:
            if ranks is None:
                loss = loss_and_gradient(model, criterion, batch, parameters, micro_batch)
            else:
                share = split(ranks, model, criterion, batch).share(0, batch)
                what = model, criterion, share, parameters, micro_batch
                loss = shared_loss_and_gradient(ranks, *what)
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            self.optimizer.step()
            return loss, norm

        if ranks is None and self.cuda_graphs and graphs.available(device):
            groups = [{**group, "params": len(group["params"])} for group in self.param_groups]
            settings = [groups, self._state(), micro_batch]
            loss, norm, path = self._replayed(model, criterion, settings, make, batch, parameters)
        else:
            loss, norm = make(batch)
            path = "gradient" if ranks is None else f"gradient, {ranks}"
        self.last_step = StepReport([], norm, path, ranks.traffic() if ranks else ())
        return loss

    def _state(self) -> list[Any]:
        """What the optimizer keeps of each parameter."""
        return [value for kept in self.optimizer.state.values() for value in kept.values()]

    def _replayed(
        self,
        model: nn.Module,
        criterion: Criterion,
        settings: list[Any],
        make: _Make,
        batch: Batch,
        parameters: list[nn.Parameter],
    ) -> tuple[Tensor, Tensor, str]:
        """``make(batch)``, replayed where that is possible, and the path."""
        kind: Hashable = None
        made: tuple[Tensor, Tensor] | None = None
        try:
            kind = kind_of(model, criterion, batch, [], settings)
            recorded = self._recordings.find(kind, lambda: _RecordedStep(make, batch, parameters))
            if recorded is not None:
                return *recorded(batch), "gradient, replayed"
            random_state, others = RandomState.capture(parameters), other_generators()
            waits: list[str] = []
            with graphs.watched(parameters[0].device, waits):
                made = make(batch)
            same = RandomState.capture(parameters).equals(random_state)
            if not same or other_generators() != others:
                raise NoGraphError("the network draws random numbers")
            if not all(self._is_there(value, parameters) for value in self._state()):
                raise NoGraphError("the optimizer keeps numbers elsewhere than on the GPU")
            if waits:
                raise NoGraphError(waits[0])
            return *made, "gradient"
        except NoGraphError as error:
            why = str(error)
            self._recordings.give_up(kind, why)
        return *(made or make(batch)), f"gradient, not replayed: {why}"

    @staticmethod
    def _is_there(value: Any, parameters: list[nn.Parameter]) -> bool:
        """Whether a replay moves it on."""
        if value is None:
            return True
        return isinstance(value, Tensor) and any(value.device == p.device for p in parameters)


class _RecordedStep:
    """Steps of one kind, on batches that are copied to where the recording has them."""

    def __init__(self, make: _Make, batch: Batch, parameters: list[nn.Parameter]) -> None:
        self._make, self._parameters = make, parameters
        self._batch = Fixed(batch)
        self._graphs = Graphs(parameters[0].device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self._batch.fill(batch)
        self._graphs.do("step", self._step, at_once=True)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        loss, norm = self._made
        return loss.clone(), norm.clone()  # the recording's memory is used again

    def _step(self) -> None:
        self._made = self._make(self._batch.values)
        self._gradients = [parameter.grad for parameter in self._parameters]
