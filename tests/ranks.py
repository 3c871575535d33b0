"""Updates that several ranks make together, compared with those of one process.

torchrun --nproc-per-node 2 tests/ranks.py results.json

Every check runs on all ranks; the file gets, for each check, what went wrong on each rank.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import Case, make_case
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import bdhf
import bdhf.distributed.update
from bdhf.first_order import FirstOrder
from bdhf.steps import Collective

SETTINGS: dict[str, Any] = {"lr": 0.5, "damping": 1.0, "cg_max_iter": 6}
UPDATES = 3

Check = Callable[[], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def part(batch: tuple[Any, Any], bounds: list[int], place: int | None = None) -> tuple[Any, Any]:
    """This rank's rows."""
    place = rank() if place is None else place
    inputs, targets = batch
    return inputs[bounds[place] : bounds[place + 1]], targets[bounds[place] : bounds[place + 1]]


def uneven(rows: int) -> list[int]:
    """Bounds of parts: the first has one row, and of more than two the last has none."""
    if size() == 2:
        return [0, 1, rows]
    return [0, *(min(1 + 2 * k, rows) for k in range(size() - 2)), rows, rows]


def nothing_for_the_first(rows: int) -> list[int]:
    return [0, 0, *(rows * k // (size() - 1) for k in range(1, size()))]


def groups_of(case: Case) -> list[dict[str, Any]]:
    return [{"params": block} for block in case.blocks]


def assert_close(one: nn.Module, other: nn.Module, tolerance: float = 1e-11) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        error = float((p - q).detach().norm())
        assert error <= tolerance * float(p.detach().norm()), f"{error:.1e}"


def assert_same_everywhere(model: nn.Module) -> None:
    mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(theirs, mine)
    assert all(torch.equal(mine, other) for other in theirs)


def compare(
    name: str,
    whole: bool = False,
    batch_bounds: Callable[[int], list[int]] = uneven,
    rows: int = 4,
    settings: dict[str, Any] = SETTINGS,
    micro_batch: int | None = None,
    edit: Callable[[Case], None] = lambda case: None,
    **how: Any,
) -> bdhf.BlockDiagonalHF:
    """Some updates by one process and by all ranks: loss, weights, gradients, reports."""
    alone, case = (make_case(name, torch.float64) for _ in range(2))
    for either in (alone, case):
        edit(either)
    how.setdefault("process_group", dist.group.WORLD)
    one = bdhf.BlockDiagonalHF(groups_of(alone), **settings)
    all_ = bdhf.BlockDiagonalHF(groups_of(case), **settings, **how, sharded=not whole)
    few = alone.batch[0][:rows], alone.batch[1][:rows]
    given, few_given = case.batch, few
    if not whole:
        given = part(case.batch, batch_bounds(len(case.batch[1])))
        few_given = part(few, batch_bounds(rows))
    for _ in range(UPDATES):
        expected = one.step(alone.model, alone.criterion, alone.batch, few)
        found = all_.step(case.model, case.criterion, given, few_given, micro_batch=micro_batch)
        assert expected is not None and found is not None
        torch.testing.assert_close(found, expected.double(), rtol=1e-11, atol=0)
    assert_close(alone.model, case.model)
    assert_same_everywhere(case.model)
    assert one.last_step is not None and all_.last_step is not None
    for b, own in zip(one.last_step.blocks, all_.last_step.blocks, strict=True):
        # What is stopped by rounding may go on for one more.
        slack = int(b.reason == "converged")
        assert own.reason == b.reason and abs(own.iterations - b.iterations) <= slack, f"{own}, {b}"
        assert own.products - own.iterations == b.products - b.iterations
        assert abs(own.value - b.value) <= 1e-9 * abs(b.value)
    torch.testing.assert_close(all_.last_step.gradient_norm, one.last_step.gradient_norm)
    for p, q in zip(alone.model.parameters(), case.model.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-14)
    assert all_.last_step.path.endswith(f", rank {rank()} of {size()}")
    return all_


def said(opt: bdhf.BlockDiagonalHF, kind: str, ranks: int) -> Collective | None:
    assert opt.last_step is not None
    found = [c for c in opt.last_step.traffic if (c.kind, c.ranks) == (kind, ranks)]
    return found[0] if found else None


@check
def networks_with_shards() -> None:
    for name in (
        "tanh MLP, MSE mean",
        "cross-entropy sum, smoothed",
        "BCE with logits mean",
        "peephole LSTM",
        "tied parameters",
        "frozen parameters",
        "parameters in no block",
        "residual CNN",
        "channels-last",
    ):
        for placement in ("counted", "data"):
            compare(name, placement=placement)


@check
def networks_with_the_same_batches() -> None:
    for name in ("tanh MLP, MSE mean", "cross-entropy mean", "peephole LSTM", "attention"):
        for placement in ("counted", "measured", "data"):
            compare(name, whole=True, rows=3, placement=placement)


@check
def fewer_rows_than_ranks() -> None:
    for placement in ("counted", "data"):
        compare("tanh MLP, MSE mean", whole=True, rows=1, placement=placement)


@check
def a_rank_without_rows() -> None:
    for placement in ("counted", "measured", "data"):
        compare("cross-entropy mean", batch_bounds=nothing_for_the_first, placement=placement)


@check
def one_block_is_data_parallel() -> None:
    def join(case: Case) -> None:
        case.blocks = [[p for block in case.blocks for p in block]]

    opt = compare("tanh MLP, MSE mean", edit=join)
    reduced = said(opt, "all_reduce", size())
    assert reduced is not None and opt.last_step is not None
    # The gradient, and every product.
    assert reduced.calls == 1 + opt.last_step.products
    numbers = sum(p.numel() for p in opt.param_groups[0]["params"])
    assert reduced.bytes == 8 * (numbers * reduced.calls + 1)


@check
def teams_of_one_are_silent_during_cg() -> None:
    def blocks_of(case: Case) -> None:
        layers = [list(layer.parameters()) for layer in case.model if isinstance(layer, nn.Linear)]
        case.blocks = layers

    teams: list[Any] = [bdhf.Team((0, 2), (1,)), bdhf.Team([1], [0])]  # type: ignore[arg-type]
    teams += [bdhf.Team((), (k,)) for k in range(2, size())]
    opt = compare("tanh MLP, MSE mean", whole=True, edit=blocks_of, placement=teams)
    reduced, sent = said(opt, "all_reduce", size()), said(opt, "broadcast", size())
    assert reduced is not None and reduced.calls == 1
    assert sent is not None and sent.calls == 2
    assert opt.last_step is not None and len(opt.last_step.traffic) == 2


@check
def fewer_ranks_than_blocks() -> None:
    def single(case: Case) -> None:
        case.blocks = [[p] for block in case.blocks for p in block]

    for whole in (False, True):
        compare("tanh MLP, MSE mean", whole=whole, edit=single)


@check
def a_mesh_gives_the_teams() -> None:
    shapes = [(size(), 1), (1, size()), (2, size() // 2)]
    for shape in shapes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("blocks", "data"))
        for whole in (False, True):
            compare("tanh MLP, MSE mean", whole=whole, process_group=mesh)
    mesh = init_device_mesh("cpu", (size(),))
    for placement in ("data", "counted"):
        compare("tanh MLP, MSE mean", process_group=mesh, placement=placement)


@check
def micro_batches() -> None:
    for placement in ("counted", "data"):
        compare("tanh MLP, MSE mean", whole=True, micro_batch=1, placement=placement)


@check
def a_block_that_stops_early_or_is_frozen() -> None:
    settings = {"lr": 0.5, "damping": 0.1, "cg_max_iter": 40, "cg_tol": 0.05}
    for placement in ("counted", "data"):
        compare("cross-entropy mean", settings=settings, placement=placement)

    def freeze(case: Case) -> None:
        for p in case.blocks[0]:
            p.requires_grad_(False)

    for placement in ("counted", "data"):
        compare("tanh MLP, MSE mean", edit=freeze, placement=placement)


@check
def looking_at_every_eighth_iteration() -> None:
    from bdhf import cg

    before = dict(cg.CHECK_EVERY)
    cg.CHECK_EVERY["cpu"] = 8
    try:
        settings = {"lr": 0.5, "damping": 0.1, "cg_max_iter": 40, "cg_tol": 0.05}
        for placement in ("counted", "data"):
            compare("cross-entropy mean", settings=settings, placement=placement)
    finally:
        cg.CHECK_EVERY.update(before)


@check
def ranks_cannot_drift_apart() -> None:
    """Inner products may differ on each rank; here by far, so that it shows where they count."""
    dot, noise = torch.dot, 0.01 * rank()
    alone, case = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
    settings = {"lr": 0.5, "damping": 0.01, "cg_max_iter": 60, "cg_tol": 1e-3}
    opt = bdhf.BlockDiagonalHF(
        groups_of(case), **settings, process_group=dist.group.WORLD, placement="data"
    )
    torch.dot = lambda a, b: dot(a, b) + noise
    try:
        for _ in range(UPDATES):
            opt.step(case.model, case.criterion, part(case.batch, uneven(6)))
    finally:
        torch.dot = dot
    assert_same_everywhere(case.model)
    one = bdhf.BlockDiagonalHF(groups_of(alone), **settings)
    for _ in range(UPDATES):
        one.step(alone.model, alone.criterion, alone.batch)
    assert_close(alone.model, case.model, 1e-9)


@check
def gradients_found_after_ddp() -> None:
    """A model in DDP: its own backward pass, clipping, then only the curvature is ours."""
    for placement in ("counted", "data"):
        alone, case = (make_case("tanh MLP, MSE mean", torch.float64) for _ in range(2))
        wrapped = DistributedDataParallel(case.model)
        one = bdhf.BlockDiagonalHF(groups_of(alone), **SETTINGS)
        opt = bdhf.BlockDiagonalHF(
            groups_of(case), **SETTINGS, process_group=dist.group.WORLD, placement=placement
        )
        rows = len(case.batch[1]) // size() * size()
        bounds = [rows * k // size() for k in range(size() + 1)]
        for _ in range(UPDATES):
            batch = alone.batch[0][:rows], alone.batch[1][:rows]
            for model, mine, optimizer in (
                (alone.model, batch, one),
                (wrapped, part(batch, bounds), opt),
            ):
                optimizer.zero_grad()
                case.criterion(model(mine[0]), mine[1]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step(model, case.criterion, curvature_batch=mine)
        assert_close(alone.model, case.model)
        assert_same_everywhere(case.model)


@check
def a_model_in_ddp() -> None:
    """`step` computes the gradient itself, and leaves DDP able to go on."""
    alone, case = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
    wrapped = DistributedDataParallel(case.model)
    one = bdhf.BlockDiagonalHF(groups_of(alone), **SETTINGS)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS, process_group=dist.group.WORLD)
    for _ in range(UPDATES):
        one.step(alone.model, alone.criterion, alone.batch)
        opt.step(wrapped, case.criterion, part(case.batch, uneven(6)))
    assert_close(alone.model, case.model)


@check
def adam() -> None:
    for sharded in (True, False):
        alone, case = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
        one = FirstOrder(torch.optim.Adam(alone.model.parameters(), 0.01))
        opt = FirstOrder(
            torch.optim.Adam(case.model.parameters(), 0.01),
            process_group=dist.group.WORLD,
            sharded=sharded,
        )
        for _ in range(UPDATES):
            mine = part(case.batch, uneven(6)) if sharded else case.batch
            expected = one.step(alone.model, alone.criterion, alone.batch)
            found = opt.step(case.model, case.criterion, mine)
            torch.testing.assert_close(found, expected.double(), rtol=1e-11, atol=0)
        assert_close(alone.model, case.model)
        assert opt.last_step is not None
        assert {c.kind for c in opt.last_step.traffic} - {"all_gather"} == {"all_reduce"}


@check
def some_of_the_ranks() -> None:
    """A process group without rank 0, which has a life of its own."""
    members = list(range(1, size()))
    group = dist.new_group(members)
    if rank() == 0:
        return
    alone, case = (make_case("tanh MLP, MSE mean", torch.float64) for _ in range(2))
    one = bdhf.BlockDiagonalHF(groups_of(alone), **SETTINGS)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS, process_group=group, sharded=False)
    assert (opt.ranks is None) == (len(members) == 1)
    if len(members) > len(case.blocks):
        with pytest.raises(ValueError, match="holds some of the processes only, which cannot"):
            opt.step(case.model, case.criterion, case.batch)
        opt = bdhf.BlockDiagonalHF(
            groups_of(case), **SETTINGS, process_group=group, sharded=False, placement="data"
        )
    for _ in range(UPDATES):
        one.step(alone.model, alone.criterion, alone.batch)
        opt.step(case.model, case.criterion, case.batch)
    assert_close(alone.model, case.model)


@check
def state_goes_on_alone() -> None:
    """A state that several ranks left continues in one process, warm starts and all."""
    alone, case = (make_case("tanh MLP, MSE mean", torch.float64) for _ in range(2))
    one = bdhf.BlockDiagonalHF(groups_of(alone), **SETTINGS)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS, process_group=dist.group.WORLD)
    for _ in range(2):
        one.step(alone.model, alone.criterion, alone.batch)
        opt.step(case.model, case.criterion, part(case.batch, uneven(6)))
    later = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    later.load_state_dict(opt.state_dict())
    for _ in range(2):
        one.step(alone.model, alone.criterion, alone.batch)
        later.step(case.model, case.criterion, case.batch)
    assert_close(alone.model, case.model)
    twin = copy.deepcopy(opt)
    assert twin.ranks is None and opt.ranks is not None


class WithExtra(nn.Module):
    """Takes something that has no rows beside what has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) + 0 * extra.sum())


@check
def what_ranks_do_not_share_is_refused_by_all() -> None:
    """Nobody waits for a rank that has other batches, other states, or an error."""
    world: Any = dist.group.WORLD

    def fresh(**how: Any) -> tuple[Case, bdhf.BlockDiagonalHF]:
        case = make_case("tanh MLP, MSE mean", torch.float64)
        return case, bdhf.BlockDiagonalHF(groups_of(case), process_group=world, **how)

    for sharded in (True, False):
        case, opt = fresh(sharded=sharded)
        x, y = case.batch
        with pytest.raises(ValueError, match="batch has 5 rows of inputs and 6 of targets; put"):
            opt.step(case.model, case.criterion, (x[:5], y))
    case, opt = fresh(sharded=False)
    x, y = case.batch
    for other in ((x[: 4 + (rank() == 0)], y[: 4 + (rank() == 0)]), (x + rank(), y)):
        with pytest.raises(ValueError, match="were given different mini-batches with sharded=Fal"):
            opt.step(case.model, case.criterion, other)
    case, opt = fresh()
    if rank() == 0:
        one = bdhf.BlockDiagonalHF(groups_of(case), lr=0.0)
        one.step(case.model, case.criterion, case.batch)
        opt.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="the ranks have different optimizer states, or param"):
        opt.step(case.model, case.criterion, part(case.batch, uneven(6)))
    case, opt = fresh()
    costs = bdhf.distributed.update.product_costs
    bdhf.distributed.update.product_costs = lambda *_: [][0]
    try:
        with pytest.raises(ValueError, match="rank 0 could not tell what products cost; give pla"):
            opt.step(case.model, case.criterion, part(case.batch, uneven(6)))
    finally:
        bdhf.distributed.update.product_costs = costs
    for placement, refused in (("data", False), ("counted", True)):
        torch.manual_seed(0)
        model = WithExtra().double()
        groups = bdhf.blocks_from_modules(model.first, model.second)
        opt = bdhf.BlockDiagonalHF(groups, process_group=world, placement=placement)
        batch = (torch.randn(3, 4).double(), torch.ones(3 + rank()).double()), torch.randn(3, 3)
        if refused:
            with pytest.raises(ValueError, match="tensors differ between ranks in more than their"):
                opt.step(model, nn.MSELoss(), batch)
        else:
            opt.step(model, nn.MSELoss(), batch)


@check
def refusals() -> None:
    """What would not add up, and arguments of no use, are named; nobody waits for anybody."""
    world: Any = dist.group.WORLD

    def step(name: str, edit: Callable[[Case], None] = lambda case: None) -> None:
        case = make_case(name, torch.float64)
        edit(case)
        opt = bdhf.BlockDiagonalHF(groups_of(case), process_group=world, sharded=False)
        opt.step(case.model, case.criterion, case.batch)

    for name, words in (
        ("batch norm", "process_group with batch norm in training"),
        ("cross-entropy, class weights", "process_group with class weights"),
        ("cross-entropy, ignored targets", "process_group with targets equal to ignore_index"),
        ("convex loss of one's own", "process_group needs a criterion whose `reduction`"),
    ):
        with pytest.raises(ValueError, match=words):
            step(name)

    def hf(**how: Any) -> bdhf.BlockDiagonalHF:
        case = make_case("tanh MLP, MSE mean", torch.float64)
        return bdhf.BlockDiagonalHF(groups_of(case), **{"process_group": world, **how})

    with pytest.raises(ValueError, match=r"placement='best'; must be one of counted, measured"):
        hf(placement="best")
    with pytest.raises(ValueError, match=r"placement holds \(0, 1\); give bdhf.Team"):
        hf(placement=[(0, 1)])
    with pytest.raises(ValueError, match="placement has ranks .*; each of 0 to"):
        hf(placement=[bdhf.Team((0, 1), (0,))])
    everyone = tuple(range(size()))
    opt = hf(placement=[bdhf.Team((0,), everyone)], sharded=False)
    case = make_case("tanh MLP, MSE mean", torch.float64)
    opt = bdhf.BlockDiagonalHF(
        groups_of(case),
        process_group=world,
        placement=[bdhf.Team((0,), everyone)],
        sharded=False,
    )
    with pytest.raises(ValueError, match=r"placement has blocks \[0\]; each of 0 to 1 must be in"):
        opt.step(case.model, case.criterion, case.batch)
    mesh = init_device_mesh("cpu", (size(), 1, 1))
    with pytest.raises(ValueError, match="a mesh of 3 dimensions"):
        hf(process_group=mesh)
    mesh = init_device_mesh("cpu", (size(), 1))
    with pytest.raises(ValueError, match="placement='data' puts all ranks in one team"):
        hf(process_group=mesh, placement="data")
    nothing = Tensor(0, 4).double(), Tensor(0, 3).double()
    with pytest.raises(ValueError, match="curvature_batch is empty on all ranks"):
        opt.ranks = hf().ranks
        opt.step(case.model, case.criterion, case.batch, nothing)
    with pytest.raises(ValueError, match="batch is empty on all ranks"):
        opt.step(case.model, case.criterion, nothing, case.batch)
    case = make_case("cross-entropy, ignored targets", torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case), process_group=world)
    words = "with targets equal to" if rank() == 1 else "rank 1 refuses its rows, and says itself"
    with pytest.raises(ValueError, match=words):
        opt.step(case.model, case.criterion, part(case.batch, [0, 2, 3, 3, 3][: size() + 1]))
    case = make_case("tanh MLP, MSE mean", torch.float64)
    mine = part(case.batch, uneven(6))
    case.criterion(case.model(mine[0]), mine[1]).backward()  # and nobody reduces it
    opt = bdhf.BlockDiagonalHF(groups_of(case), process_group=world)
    with pytest.raises(ValueError, match="in p.grad, and the ranks have different ones; reduce"):
        opt.step(case.model, case.criterion, curvature_batch=mine)
    for make in (
        lambda model: bdhf.BlockDiagonalHF(model.parameters(), process_group=world),
        lambda model: FirstOrder(torch.optim.SGD(model.parameters()), process_group=world),
    ):
        case = make_case("tanh MLP, MSE mean", torch.float64, seed=rank())
        with pytest.raises(ValueError, match="the ranks have different weights; build the model"):
            make(case.model).step(case.model, case.criterion, case.batch)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results: dict[str, list[str]] = {}
    for name, function in CHECKS.items():
        fault = ""
        try:
            function()
        except Exception:
            fault = traceback.format_exc()
        faults: list[Any] = [None] * size()
        dist.all_gather_object(faults, fault)
        results[name] = faults
        if rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that takes down its connections


if __name__ == "__main__":
    main()
