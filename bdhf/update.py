"""One update of `BlockDiagonalHF`: gradient, curvature, and the blocks' systems."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdhf.batches import Batch, Criterion
from bdhf.cg import CGResult, Systems
from bdhf.curvature import GaussNewton, flattened, unflattened, wide_dtype
from bdhf.functional import RandomState, other_generators
from bdhf.gradient import loss_and_gradient
from bdhf.graphs import Fixed, Graphs, NoGraphError, kind_of, watched
from bdhf.linearization import Linearizer


@dataclass
class Update:
    """The parts of an update; `begin` and `round` wait for nothing, and may be recorded.

    Attributes:
        model, criterion, micro_batch: as `BlockDiagonalHF.step` takes them.
        batch: for the gradient; None: the gradients in ``p.grad`` are used.
        curvature_batch: for curvature.
        groups: settings of each block.
        blocks: their parameters, trainable ones only.
        state: of the optimizer, with the last solutions.
        linearizer: keeps traces from one update to the next.
    """

    model: nn.Module
    criterion: Criterion
    batch: Batch | None
    curvature_batch: Batch
    groups: Sequence[dict[str, Any]]
    blocks: list[list[nn.Parameter]]
    state: MutableMapping[Tensor, Any]
    micro_batch: int | None
    linearizer: Linearizer

    def __post_init__(self) -> None:
        self.loss: Tensor | None = None
        self.is_made = False  # but for the last step
        self._draws = False  # whether the network drew random numbers

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all blocks."""
        return [p for block in self.blocks for p in block]

    def make(self) -> None:
        """All but the last step, `finish`."""
        self.begin()
        self.systems.run(self.round)
        self.is_made = True

    def make_watched(self) -> None:
        """`make`; raises a `NoGraphError` afterwards where this could not be replayed."""
        waits: list[str] = []
        device = self.parameters[0].device
        before = other_generators()

        def watched_round(active: list[int]) -> None:
            with watched(device, waits):
                self.round(active)

        with watched(device, waits):
            self.begin()
        self.systems.run(watched_round)
        self.is_made = True
        if other_generators() != before:
            self._draws = True
        self._check_recordable()
        if waits:
            raise NoGraphError(waits[0])

    def begin(self) -> None:
        """Compute the gradient, linearise, and start the systems."""
        random_state = RandomState.capture(self.parameters)
        if self.batch is not None:
            self.loss = self.loss_and_gradient(self.batch)
            self._draws = not RandomState.capture(self.parameters).equals(random_state)
        elif all(p.grad is None for p in self.parameters):
            raise ValueError(
                "batch=None uses the gradients in p.grad, and there are none; "
                "call loss.backward() first, or pass a batch"
            )
        descents = [_flat_gradient(block).neg_() for block in self.blocks]
        norms = torch._foreach_norm(descents)
        self.gradient_norm = torch.linalg.vector_norm(
            torch.stack([n.to(norms[0].device) for n in norms])
        )
        self.start(descents, random_state)

    def loss_and_gradient(self, batch: Batch) -> Tensor:
        """Write the gradient to ``p.grad``, and return the loss."""
        return loss_and_gradient(
            self.model, self.criterion, batch, self.parameters, self.micro_batch
        )

    def start(self, descents: list[Tensor], random_state: RandomState) -> None:
        """Linearise, and start the systems ``(G_bb + λI) Δ = -g_b`` from these right-hand sides."""
        self.matrix = self.linearized(self.curvature_batch, self.blocks, random_state)
        self.systems = self.systems_of(range(len(self.blocks)), descents)
        self.systems.start(self.matrix.products)

    def linearized(
        self, batch: Batch, blocks: list[list[nn.Parameter]], random_state: RandomState
    ) -> GaussNewton:
        """The curvature of these blocks on a batch.

        Linearised from the random state before the gradient: on the same batch, gradient and
        curvature then see the same dropout masks.
        """
        return GaussNewton(
            self.model,
            self.criterion,
            batch,
            blocks,
            self.micro_batch,
            random_state,
            self.linearizer,
        )

    def systems_of(self, blocks: Sequence[int], descents: list[Tensor], **more: Any) -> Systems:
        """The systems of some of the blocks, not started yet."""
        groups = [self.groups[k] for k in blocks]
        return Systems(
            [descents[k] for k in blocks],
            [self._warm_start(self.groups[k], self.blocks[k], descents[k]) for k in blocks],
            max_iter=[group["cg_max_iter"] for group in groups],
            tol=[group["cg_tol"] for group in groups],
            damping=[group["damping"] for group in groups],
            **more,
        )

    @property
    def path(self) -> str:
        """How products were computed (see `StepReport.path`)."""
        return self.matrix.path

    def round(self, active: list[int]) -> None:
        """One CG iteration of the blocks that are ``active``."""
        self.systems.round(self.matrix.products, active)

    def solved(self) -> list[CGResult]:
        """What was found for each block."""
        return self.systems.results()

    def finish(self) -> list[CGResult]:
        """Step along the solutions, and keep them for the next warm start."""
        results = self.solved()
        for group, block, solved in zip(self.groups, self.blocks, results, strict=True):
            changes = unflattened(solved.solution, block)
            torch._foreach_add_(list[Tensor](block), changes, alpha=group["lr"])
            for p, change in zip(block, changes, strict=True):
                kept = self._last_solution(p)
                if kept is None:
                    self.state[p]["cg_solution"] = change.clone()
                else:  # in place, where a recording looks for it
                    kept.copy_(change)
        return results

    def _warm_start(
        self, group: dict[str, Any], block: list[nn.Parameter], descent: Tensor
    ) -> Tensor | None:
        """The last solution times ``cg_momentum``; None where that is zero."""
        last = [self._last_solution(p) for p in block]
        if group["cg_momentum"] == 0 or all(solution is None for solution in last):
            return None
        pairs = zip(last, block, strict=True)
        whole = [torch.zeros_like(p) if solution is None else solution for solution, p in pairs]
        return flattened(whole, descent.dtype).mul_(group["cg_momentum"])

    def _last_solution(self, parameter: nn.Parameter) -> Tensor | None:
        return self.state.get(parameter, {}).get("cg_solution")

    def _check_recordable(self) -> None:
        if self.batch is None:
            raise NoGraphError("gradients are found in p.grad, wherever that is")
        if self.micro_batch is not None:
            raise NoGraphError("batches are cut by micro_batch")
        if self._draws:
            raise NoGraphError("the network draws random numbers")
        if self.matrix.path.startswith("autograd"):
            raise NoGraphError("the network could not be traced")

    def kind(self) -> Hashable:
        """Updates of one kind can be one recording."""
        last = [self._last_solution(p) for p in self.parameters]
        settings = [
            [value for name, value in group.items() if name not in ("params", "lr")]
            for group in self.groups
        ]
        return kind_of(
            self.model,
            self.criterion,
            (self.batch, self.curvature_batch),
            [solution for solution in last if solution is not None],
            [settings, [[p.data_ptr() for p in block] for block in self.blocks], self.micro_batch],
        )


class RecordedUpdate:
    """Updates of one kind, on batches that are copied to where the recording has them.

    Attributes:
        trouble: why it is of no use any more, if so.
    """

    def __init__(self, update: Update) -> None:
        self.trouble: str | None = None
        self._whole = update.curvature_batch is update.batch
        self._batches = Fixed(update.batch), Fixed(() if self._whole else update.curvature_batch)
        self._update = Update(
            update.model,
            update.criterion,
            self._batches[0].values,
            self._batches[0 if self._whole else 1].values,
            update.groups,
            update.blocks,
            update.state,
            None,
            update.linearizer,
        )
        self._graphs = Graphs(update.parameters[0].device)

    def made(self, update: Update) -> Update:
        """`Update.make`; what is returned can `finish`.

        Raises:
            NoGraphError: this cannot be recorded, and nothing was done.
        """
        self._batches[0].fill(update.batch)
        if not self._whole:
            self._batches[1].fill(update.curvature_batch)
        recorded = self._update
        self._graphs.do("begin", self._begin, at_once=True)
        for parameter, gradient in zip(recorded.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        recorded.systems.run(self._round)
        return recorded

    def _round(self, active: list[int]) -> None:
        if self.trouble is None:
            try:
                self._graphs.do(tuple(active), lambda: self._update.round(active))
                return
            except NoGraphError as error:  # the beginning is done, so go on from there
                self.trouble = str(error)
        self._update.round(active)

    def _begin(self) -> None:
        self._update.begin()
        self._gradients = [p.grad for p in self._update.parameters]


def _flat_gradient(block: list[nn.Parameter]) -> Tensor:
    """The block's gradient as one vector, in single precision or wider."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in block]
    return flattened(found, wide_dtype(block))
