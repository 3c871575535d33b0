"""Updates that are recorded and replayed; on a CPU by a stand-in for CUDA graphs."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import tape
import torch
from networks import Case, make_case
from torch import Tensor, nn

import bdhf
import bdhf.cg
import bdhf.graphs
import bdhf.update
from bdhf.first_order import FirstOrder
from bdhf.peephole_lstm import PeepholeLSTM

SETTINGS = {"lr": 0.5, "damping": 0.01, "cg_max_iter": 6, "cg_tol": 5e-4}

NETWORKS = (
    "tanh MLP, MSE mean",
    "cross-entropy mean",
    "BCE with logits mean",
    "peephole LSTM",
    "residual CNN",
    "tied parameters",
    "frozen parameters",
    "parameters in no block",
    "batch norm",
    "convex loss of one's own",
)


@pytest.fixture(autouse=True, params=[1, 8], ids=["every round", "every eighth"])
def _graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Looking at which systems have stopped as on a CPU, and as on a GPU."""
    monkeypatch.setattr(bdhf.graphs, "available", lambda device: True)
    monkeypatch.setattr(bdhf.graphs, "record", tape.record)
    monkeypatch.setitem(bdhf.cg.CHECK_EVERY, "cpu", request.param)


def batches(case: Case, count: int) -> list[Any]:
    """The case's batch with its rows moved round: other numbers, the same shapes."""

    def moved(k: int) -> Any:
        return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.roll(k, 0), case.batch)

    return [moved(k) for k in range(count)]


def train(
    case: Case, opt: Any, updates: int, curvature_rows: int | None = None
) -> tuple[list[str], list[float]]:
    """Paths and losses, update by update."""
    paths, losses = [], []
    for batch in batches(case, updates):
        few = None
        if curvature_rows is not None:
            cut = torch.utils._pytree.tree_map_only(Tensor, lambda x: x[:curvature_rows], batch)
            few = cut
        losses.append(opt.step(case.model, case.criterion, batch, curvature_batch=few))
        paths.append(opt.last_step.path)
    return paths, [float(loss) for loss in losses]  # read late: none may be overwritten


def hessian_free(case: Case, cuda_graphs: bool, **settings: Any) -> bdhf.BlockDiagonalHF:
    groups = [{"params": block} for block in case.blocks]
    return bdhf.BlockDiagonalHF(groups, **{**SETTINGS, **settings}, cuda_graphs=cuda_graphs)


def weights(case: Case) -> Tensor:
    state = [*case.model.parameters(), *case.model.buffers()]
    return torch.cat([x.detach().reshape(-1).double() for x in state])


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_replayed_updates_are_the_plain_ones(name: str, rows: int | None) -> None:
    one, other = (make_case(name, torch.float64) for _ in range(2))
    plain, recorded = hessian_free(one, False), hessian_free(other, True)
    assert train(one, plain, 6, rows)[1] == train(other, recorded, 6, rows)[1]
    paths = train(other, recorded, 1, rows)[0] + train(one, plain, 1, rows)[0]
    assert paths == ["traced, replayed", "traced"]
    assert torch.equal(weights(one), weights(other))
    assert plain.last_step is not None and recorded.last_step is not None
    assert plain.last_step.blocks == recorded.last_step.blocks
    assert torch.equal(plain.last_step.gradient_norm, recorded.last_step.gradient_norm)
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


def test_blocks_that_stop_at_different_times_leave_the_recording() -> None:
    """Also in an order that no recorded round has seen before."""
    one, other = (make_case("tanh MLP, MSE mean", torch.float64) for _ in range(2))
    plain, recorded = hessian_free(one, False), hessian_free(other, True)
    for caps in ([2, 5], [2, 5], [5, 2], [5, 2]):
        for opt, case in ((plain, one), (recorded, other)):
            for group, cap in zip(opt.param_groups, caps, strict=True):
                group["cg_max_iter"] = cap
            train(case, opt, 3)
        assert recorded.last_step is not None and plain.last_step is not None
        assert [b.iterations for b in recorded.last_step.blocks] == caps
        assert recorded.last_step.blocks == plain.last_step.blocks
    assert torch.equal(weights(one), weights(other))


def test_the_suites_lstm_is_recorded() -> None:
    cases = []
    for _ in range(2):
        torch.manual_seed(0)
        model = PeepholeLSTM(1, 4, 3, 5).double()
        blocks = [list(layer.parameters()) for layer in model.layers]
        blocks[-1] += list(model.readout.parameters())
        inputs, targets = torch.randn(7, 6, 1).double(), torch.randint(5, (7,))
        cases.append(Case(model, nn.CrossEntropyLoss(), (inputs, targets), blocks))
    one, other = cases
    plain, recorded = hessian_free(one, False), hessian_free(other, True)
    for opt in (plain, recorded):
        for group, cap in zip(opt.param_groups, (2, 7, 4), strict=True):
            group["cg_max_iter"] = cap
    assert train(one, plain, 6)[1] == train(other, recorded, 6)[1]
    assert torch.equal(weights(one), weights(other))
    assert recorded.last_step is not None
    assert recorded.last_step.path == "brought by the network, replayed"


def test_a_scheduler_moves_lr_without_a_new_recording_and_other_settings_make_one() -> None:
    one, other = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
    plain, recorded = hessian_free(one, False), hessian_free(other, True)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (plain, recorded)]
    paths = []
    for update in range(8):
        for opt, case, schedule in zip((plain, recorded), (one, other), schedules, strict=True):
            if update == 5:
                opt.param_groups[0]["damping"] = 1.0
            opt.step(case.model, case.criterion, case.batch)
            schedule.step()
        assert recorded.last_step is not None
        paths.append(recorded.last_step.path)
    assert torch.equal(weights(one), weights(other))
    plainly, replayed = "traced", "traced, replayed"
    # The first update has no warm start, and so is another kind than those after it.
    assert paths == [plainly] * 3 + [replayed] * 2 + [plainly] * 2 + [replayed]


def test_a_loaded_state_is_the_one_that_goes_on() -> None:
    one, other = (make_case("tanh MLP, MSE mean", torch.float64) for _ in range(2))
    plain, recorded = hessian_free(one, False), hessian_free(other, True)
    for opt, case in ((plain, one), (recorded, other)):
        train(case, opt, 2)
        early = copy.deepcopy(opt.state_dict())
        train(case, opt, 4)
        opt.load_state_dict(early)
        train(case, opt, 5)
    assert recorded.last_step is not None and recorded.last_step.path == "traced, replayed"
    assert torch.equal(weights(one), weights(other))


def test_a_loss_that_keeps_its_targets_is_recorded() -> None:
    """Also where a round with fewer blocks is made for the first time in a later update."""
    one, other = (make_case("tanh MLP, MSE mean", torch.float64) for _ in range(2))
    plain, recorded = hessian_free(one, False), hessian_free(other, True)
    criterion = nn.HuberLoss(delta=0.1)
    for update in range(8):
        for opt, case in ((plain, one), (recorded, other)):
            for group, tol in zip(opt.param_groups, (0.0, 0.0), strict=True):
                group["cg_tol"] = tol
            batch = batches(case, update + 1)[-1]
            opt.step(case.model, criterion, batch)
    assert torch.equal(weights(one), weights(other))
    assert recorded.last_step is not None and "replayed" in recorded.last_step.path


def test_inputs_may_be_parts_of_larger_tensors() -> None:
    one, other = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
    plain, recorded = hessian_free(one, False), hessian_free(other, True)
    wide = torch.randn(6, 9, dtype=torch.float64)
    for k in range(6):
        for opt, case in ((plain, one), (recorded, other)):
            inputs = (wide + k)[:, 2:6]
            opt.step(case.model, case.criterion, (inputs, case.batch[1]))
    assert recorded.last_step is not None and recorded.last_step.path == "traced, replayed"
    assert torch.equal(weights(one), weights(other))


def test_a_batch_that_is_not_finite_changes_no_weights() -> None:
    case = make_case("tanh MLP, MSE mean", torch.float64)
    opt = hessian_free(case, True)
    train(case, opt, 4)
    before = weights(case)
    inputs, targets = case.batch
    opt.step(case.model, case.criterion, (inputs, targets * float("nan")))
    assert torch.equal(weights(case), before)
    train(case, opt, 1)
    assert weights(case).isfinite().all() and not torch.equal(weights(case), before)


@pytest.mark.parametrize("name", ["dropout", "cross-entropy mean"])
def test_updates_that_are_not_replayed_are_not_kept_either(name: str) -> None:
    case = make_case(name, torch.float64)
    opt = hessian_free(case, True)
    alive = []
    for _ in range(8):
        opt.step(case.model, case.criterion, case.batch, micro_batch=2)
        gc.collect()
        alive.append(sum(type(x) is bdhf.update.Update for x in gc.get_objects()))
    assert alive[-1] == alive[2]


def reads_back(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that asks for a value in the middle."""
    scale = 1.0 if float(outputs.detach().sum()) > 1e9 else 2.0
    return scale * nn.functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("dropout", {}, "the network draws random numbers"),
        ("cross-entropy mean", {"micro_batch": 2}, "batches are cut by micro_batch"),
        (
            "cross-entropy mean",
            {"criterion": reads_back},
            "_local_scalar_dense: operation",
        ),
    ],
)
def test_what_cannot_be_replayed_is_made_as_usual(
    name: str, changes: dict[str, Any], why: str
) -> None:
    found = []
    for cuda_graphs in (False, True):
        case = make_case(name, torch.float64)
        criterion = changes.get("criterion", case.criterion)
        opt = hessian_free(case, cuda_graphs)
        for batch in batches(case, 5):
            opt.step(case.model, criterion, batch, micro_batch=changes.get("micro_batch"))
        found.append(weights(case))
        assert opt.last_step is not None
    assert torch.equal(*found)
    assert f", not replayed: {why}" in opt.last_step.path


def test_gradients_found_in_the_parameters_are_used_as_usual() -> None:
    case = make_case("cross-entropy mean", torch.float64)
    opt = hessian_free(case, True)
    for _ in range(4):
        opt.zero_grad()
        case.criterion(case.model(case.batch[0]), case.batch[1]).backward()
        assert opt.step(case.model, case.criterion, curvature_batch=case.batch) is None
    assert opt.last_step is not None
    assert (
        opt.last_step.path
        == "traced, not replayed: gradients are found in p.grad, wherever that is"
    )


def first_order(case: Case, make: Callable[..., Any], cuda_graphs: bool) -> FirstOrder:
    return FirstOrder(make(case.model.parameters()), cuda_graphs=cuda_graphs)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["cross-entropy mean", "residual CNN", "batch norm"])
def test_steps_of_first_order_optimizers(
    name: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch lets Adam be captured on accelerators only.
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda: ["cpu"])
    one, other = (make_case(name, torch.float64) for _ in range(2))
    make = OPTIMIZERS[optimizer]
    plain, recorded = first_order(one, make, False), first_order(other, make, True)
    assert train(one, plain, 6)[1] == train(other, recorded, 6)[1]
    assert train(other, recorded, 1)[0] == ["gradient, replayed"]
    train(one, plain, 1)
    for opt, case in ((plain, one), (recorded, other)):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.param_groups[0]["lr"] = 0.001
        train(case, opt, 4)
        assert opt.last_step is not None
    assert plain.last_step is not None and recorded.last_step is not None
    assert recorded.last_step.path == "gradient, replayed"
    assert torch.equal(weights(one), weights(other))
    assert torch.equal(plain.last_step.gradient_norm, recorded.last_step.gradient_norm)


def test_a_first_order_step_that_cannot_be_replayed_says_why() -> None:
    """Torch's Adam reads its count of steps back unless it is told not to."""
    case = make_case("cross-entropy mean", torch.float64)
    opt = FirstOrder(torch.optim.Adam(case.model.parameters()), cuda_graphs=True)
    assert train(case, opt, 4)[0][-1].startswith("gradient, not replayed: ")
    case = make_case("dropout", torch.float64)
    opt = FirstOrder(torch.optim.SGD(case.model.parameters()), cuda_graphs=True)
    why = "gradient, not replayed: the network draws random numbers"
    assert train(case, opt, 4)[0][-1] == why


class Whim(nn.Module):
    """It draws from Python's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.choice((1.0, -1.0))


def test_a_first_order_step_that_draws_elsewhere_is_not_replayed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Whim())
    opt = FirstOrder(torch.optim.SGD(model.parameters(), lr=0.1), cuda_graphs=True)
    for _ in range(4):
        opt.step(model, nn.CrossEntropyLoss(), (torch.randn(6, 4), torch.randint(3, (6,))))
    assert opt.last_step is not None
    assert opt.last_step.path == "gradient, not replayed: the network draws random numbers"


def test_a_state_that_was_cleared_begins_anew() -> None:
    one, other = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
    make = OPTIMIZERS["SGD"]
    plain, recorded = first_order(one, make, False), first_order(other, make, True)
    for opt, case in ((plain, one), (recorded, other)):
        train(case, opt, 5)
        opt.optimizer.state.clear()
        train(case, opt, 5)
    assert torch.equal(weights(one), weights(other))


def test_only_the_last_few_recordings_are_kept() -> None:
    recordings: bdhf.graphs.Recordings[list[int]] = bdhf.graphs.Recordings()
    made: list[int] = []

    def make(kind: int) -> list[int]:
        made.append(kind)
        return [kind]

    kinds = range(recordings.most)
    for _ in range(bdhf.graphs.WARM_UP + 1):
        found = [recordings.find(kind, functools.partial(make, kind)) for kind in kinds]
    assert made == list(kinds) and found == [[kind] for kind in kinds]
    recordings.find(99, lambda: [99])
    assert recordings.find(0, lambda: [0]) is None  # forgotten, and warming up again
    assert recordings.find(1, lambda: [1]) is None
    assert recordings.find(3, list) == [3]
