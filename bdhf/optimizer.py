"""Block-diagonal Hessian-free optimization (Zhang, Xiong, Bradbury, Socher 2017)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from bdhf import graphs
from bdhf.batches import Batch, Criterion, checked_batch
from bdhf.distributed.placement import Placement, Team
from bdhf.distributed.ranks import Ranks, ranks_of
from bdhf.distributed.update import SharedUpdate
from bdhf.graphs import NoGraphError, Recordings
from bdhf.linearization import Linearizer
from bdhf.steps import BlockStep, StepReport
from bdhf.update import RecordedUpdate, Update

_FROZEN = BlockStep(0, "converged", 0.0, 0)


class BlockDiagonalHF(Optimizer):
    """Block-diagonal Hessian-free optimization; with one param group, Hessian-free optimization.

    The param groups are the blocks. An update solves, for each block ``b`` independently and by
    truncated conjugate gradient (CG), ``min_Δ ½ Δᵀ(G_bb + λI)Δ + g_bᵀΔ``, where ``g`` is the
    gradient on a mini-batch and ``G`` the generalised Gauss-Newton matrix on a curvature
    mini-batch, and then takes ``w ← w + lr · Δ`` (Zhang et al. 2017, section 3)::

        opt = BlockDiagonalHF(blocks_from_modules(model.encoder, model.decoder), lr=0.1)
        loss = opt.step(model, criterion, (inputs, targets), curvature_batch=(few, their_targets))

    Args:
        params: the blocks as param groups (`blocks_from_modules` and `split_into_blocks` make
            them), or a plain iterable of parameters: one block. Each group may override any of
            the settings below.
        lr: ``α``, the fraction of the solution that is taken; 0 or more.
        damping: ``λ``, Tikhonov damping; 0 or more.
        cg_max_iter: the most CG iterations for a block; 1 or more.
        cg_tol: ε of the relative-progress rule (Martens 2010, section 4.4); 0 switches it off.
        cg_momentum: CG starts from this constant times the block's last solution, from 0
            (a cold start) to 1.
        cuda_graphs: on a GPU, record an update at the third of its kind and replay it from then
            on, which saves nearly all of the time that Python takes (up to most of an update, for
            small networks). Until the kind changes (another network or loss, other shapes, modes,
            settings but ``lr``), `step` does again what it did, whatever else may have changed in
            network or loss. On a CPU it does nothing, and with several ranks neither.
        process_group: ranks that make every update together, a group of `torch.distributed` or a
            mesh of one or two dimensions; the rows of the latter are teams. All call `step` alike,
            and have the same weights and state afterwards. None: this process alone.
        placement: which ranks solve which blocks. ``"counted"``: in teams, balanced by the
            multiply-adds of a product with each block; ``"measured"``: by its time at the first
            update; ``"data"``: all ranks solve all blocks, on parts of the curvature mini-batch.
            Or a list of `Team`.
        sharded: whether each rank passes `step` rows of its own, as with DDP; False: all pass the
            same mini-batches, and each takes its part of them. Samples are along the first
            dimension. Dropout draws masks for each share anew: those of gradient and curvature
            differ then.

    The default values are this project's choices for the paper's experiments.

    Raises:
        ValueError: a setting is out of its range, a parameter is complex, or there is no such
            process group or placement.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        damping: float = 0.0,
        cg_max_iter: int = 30,
        cg_tol: float = 5e-4,
        cg_momentum: float = 0.95,
        *,
        cuda_graphs: bool = False,
        process_group: ProcessGroup | DeviceMesh | None = None,
        placement: Placement | Sequence[Team] = "counted",
        sharded: bool = True,
    ) -> None:
        #: The ranks that make updates together; None: this process alone.
        self.ranks: Ranks | None = ranks_of(process_group, placement, sharded)
        #: What the last update did (a `StepReport`); None before the first.
        self.last_step: StepReport | None = None
        #: Whether updates are recorded and replayed on a GPU.
        self.cuda_graphs = cuda_graphs
        self._forget()
        defaults = {
            "lr": lr,
            "damping": damping,
            "cg_max_iter": cg_max_iter,
            "cg_tol": cg_tol,
            "cg_momentum": cg_momentum,
        }
        _check_settings(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.last_step, self.cuda_graphs = None, getattr(self, "cuda_graphs", False)
        self.ranks = getattr(self, "ranks", None)  # a copy or a pickle is of one process
        self._forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also of another number of ranks; see `torch.optim.Optimizer`."""
        super().load_state_dict(state_dict)
        if self.ranks is not None:
            self.ranks.compared = False

    def _forget(self) -> None:
        """What was kept from one update to the next to save time."""
        self._linearizer = Linearizer()
        self._recordings: Recordings[RecordedUpdate] = Recordings()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a block; see `torch.optim.Optimizer.add_param_group`."""
        _check_settings(param_group)
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.is_complex():
                self.param_groups.pop()
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has dtype {parameter.dtype}; "
                    "BlockDiagonalHF needs real parameters"
                )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        model: nn.Module | None = None,
        criterion: Criterion | None = None,
        batch: Batch | None = None,
        curvature_batch: Batch | None = None,
        *,
        micro_batch: int | None = None,
        closure: None = None,
    ) -> Tensor | None:
        """Make one update.

        Parameters that do not require a gradient are left out, as are parameters of the model
        that are in no group. The gradient is left in ``p.grad``.

        Args:
            model: the network whose parameters are in the param groups.
            criterion: the loss, called as ``criterion(outputs, targets)``; returns a scalar, and
                is convex in the outputs (else a block's solve may stop at negative curvature).
            batch: ``(inputs, targets)`` for the gradient; inputs are a tensor, a tuple
                (``model(*inputs)``) or a dict (``model(**inputs)``). None: use the gradients
                found in ``p.grad``, after clipping, accumulation or DDP.
            curvature_batch: the same for curvature, in the paper a strict subset of ``batch``.
                None: use ``batch``.
            micro_batch: process both batches in pieces of this many rows: less memory for more
                work, with equal results (but for dropout, whose masks may be other ones). Tensors
                are cut along their first dimension.
            closure: refused; `step` computes gradient and curvature itself.

        Returns:
            The loss before the update, a detached scalar on the device; None if ``batch`` is.

        Raises:
            TypeError: ``model`` is not a module (a closure, say), or a batch is not a pair.
            ValueError: an argument is missing, a parameter is not the model's or none is
                trainable, or ``micro_batch`` would change the result.
        """
        _check_arguments(model if closure is None else closure, criterion, batch, curvature_batch)
        assert model is not None
        assert criterion is not None
        may_be_empty = self.ranks is not None and self.ranks.sharded
        if batch is not None:
            batch = checked_batch(batch, "batch", may_be_empty)
        if curvature_batch is None:
            assert batch is not None
            curvature_batch = batch
        else:
            curvature_batch = checked_batch(curvature_batch, "curvature_batch", may_be_empty)
        groups, blocks = self._trainable_blocks(model)
        what = model, criterion, batch, curvature_batch, groups, blocks, self.state
        how = micro_batch, self._linearizer
        update = (
            Update(*what, *how) if self.ranks is None else SharedUpdate(*what, *how, self.ranks)
        )
        update, path = self._made(update)
        # A recording's memory is used again.
        loss = None if update.loss is None else update.loss.clone()
        norm = update.gradient_norm.clone()
        solved = {
            id(group): BlockStep(r.iterations, r.reason, r.value, r.products)
            for group, r in zip(groups, update.finish(), strict=True)
        }
        steps = [solved.get(id(group), _FROZEN) for group in self.param_groups]
        traffic = () if self.ranks is None else self.ranks.traffic()
        self.last_step = StepReport(steps, norm, path, traffic)
        return loss

    def _made(self, update: Update) -> tuple[Update, str]:
        """The update but for its last step, replayed where that is possible, and its path."""
        device = update.parameters[0].device
        together = isinstance(update, SharedUpdate)
        if together or not (self.cuda_graphs and graphs.available(device)):
            update.make()
            return update, update.path
        kind: Hashable = None
        try:
            kind = update.kind()
            recorded = self._recordings.find(kind, lambda: RecordedUpdate(update))
            if recorded is not None:
                made = recorded.made(update)
                if recorded.trouble is not None:
                    self._recordings.give_up(kind, recorded.trouble)
                return made, f"{made.path}, replayed"
            update.make_watched()
            return update, update.path
        except NoGraphError as error:
            why = str(error)
            self._recordings.give_up(kind, why)
        if not update.is_made:
            update.make()
        return update, f"{update.path}, not replayed: {why}"

    def _trainable_blocks(
        self, model: nn.Module
    ) -> tuple[list[dict[str, Any]], list[list[nn.Parameter]]]:
        """The param groups with trainable parameters, and those parameters."""
        known = set(model.parameters())
        for position, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter not in known:
                    raise ValueError(
                        f"param group {position} holds a parameter of shape "
                        f"{tuple(parameter.shape)} that is not in the model "
                        f"({type(model).__name__}); pass step() the model whose parameters the "
                        "optimizer was given"
                    )
        pairs = [(g, [p for p in g["params"] if p.requires_grad]) for g in self.param_groups]
        groups = [group for group, block in pairs if block]
        if not groups:
            raise ValueError("no parameter in the param groups requires a gradient")
        return groups, [block for _, block in pairs if block]


def _check_arguments(
    model: Any, criterion: Criterion | None, batch: Any, curvature_batch: Any
) -> None:
    if not isinstance(model, nn.Module):
        hint = (
            "; step() takes no closure: it computes the gradient and curvature itself"
            if callable(model)
            else ""
        )
        raise TypeError(
            f"step() got a {type(model).__name__} as model{hint}. Call it as "
            "opt.step(model, criterion, (inputs, targets))"
        )
    if criterion is None:
        raise ValueError("step() needs a criterion: opt.step(model, criterion, (inputs, targets))")
    if isinstance(criterion, type):
        raise TypeError(
            f"criterion is the class {criterion.__name__}; give a loss: {criterion.__name__}()"
        )
    if batch is None and curvature_batch is None:
        raise ValueError("batch=None uses the gradients in p.grad and then needs a curvature_batch")


def _check_settings(settings: dict[str, Any]) -> None:
    ranges = {
        "lr": (0, math.inf),
        "damping": (0, math.inf),
        "cg_max_iter": (1, math.inf),
        "cg_tol": (0, math.inf),
        "cg_momentum": (0, 1),
    }
    for name, (low, high) in ranges.items():
        if name not in settings:
            continue
        value = settings[name]
        kind, described = (int, "whole number") if name == "cg_max_iter" else (float, "number")
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ValueError(f"{name}={value!r}; must be a {described}, {low} or more")
        if not low <= value <= high or value == math.inf:
            allowed = f"from {low} to {high}" if high < math.inf else f"{low} or more and finite"
            raise ValueError(f"{name}={value!r}; must be {allowed}")
