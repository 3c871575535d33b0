"""What only a GPU can show. `make test` skips these where there is none, and says so."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from networks import Case, make_case
from suite import EXPERIMENTS, tiny
from torch import Tensor, nn

import bdhf
from bdhf import fused_lstm
from bdhf.batches import Batch
from bdhf.config import Config
from bdhf.data import load
from bdhf.first_order import FirstOrder
from bdhf.linearization import AutogradLinearization, Linearizer
from bdhf.machine import use_machine
from bdhf.peephole_lstm import PeepholeLSTM
from bdhf.runner import set_up
from bdhf.training import Training
from bdhf.update import Update

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no GPU here (torch.cuda.is_available())"
)

SETTINGS = {"lr": 0.5, "damping": 0.01, "cg_max_iter": 12, "cg_tol": 5e-4}
NETWORKS = (
    "tanh MLP, MSE mean",
    "cross-entropy mean",
    "BCE with logits mean",
    "peephole LSTM",
    "residual CNN",
    "tied parameters",
    "batch norm",
    "convex loss of one's own",
)


def on_gpu(case: Case) -> Case:
    model = copy.deepcopy(case.model)
    places = {p: k for k, p in enumerate(case.model.parameters())}
    moved = list(model.to(GPU).parameters())
    batch = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(GPU), case.batch)
    blocks = [[moved[places[p]] for p in block] for block in case.blocks]
    criterion = case.criterion
    if isinstance(criterion, nn.Module):
        criterion = copy.deepcopy(criterion).to(GPU)
    return Case(model, criterion, batch, blocks)


def hessian_free(case: Case, **more: Any) -> bdhf.BlockDiagonalHF:
    return bdhf.BlockDiagonalHF([{"params": b} for b in case.blocks], **{**SETTINGS, **more})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).cpu().double() for p in model.parameters()])


def moved_round(batch: Any, k: int) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.roll(k, 0), batch)


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the GPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_updates_are_those_of_the_cpu(name: str, cuda_graphs: bool) -> None:
    """In double precision, also recorded and replayed."""
    here = make_case(name, torch.float64)
    there = on_gpu(here)
    one, other = hessian_free(here), hessian_free(there, cuda_graphs=cuda_graphs)
    for k in range(6):
        one.step(here.model, here.criterion, moved_round(here.batch, k))
        other.step(there.model, there.criterion, moved_round(there.batch, k))
        assert one.last_step is not None and other.last_step is not None
        assert [b.reason for b in one.last_step.blocks] == [
            b.reason for b in other.last_step.blocks
        ]
    torch.testing.assert_close(weights(here.model), weights(there.model), rtol=1e-7, atol=1e-9)
    assert ("replayed" in other.last_step.path) == cuda_graphs
    assert "not replayed" not in other.last_step.path


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_waits_inside_an_update(name: str) -> None:
    case = on_gpu(make_case(name, torch.float32))
    opt = hessian_free(case)
    for _ in range(2):  # traces, and what libraries set up
        opt.step(case.model, case.criterion, case.batch)
    groups = opt.param_groups
    update = Update(
        case.model,
        case.criterion,
        case.batch,
        case.batch,
        groups,
        case.blocks,
        opt.state,
        None,
        opt._linearizer,
    )
    with no_waiting():
        update.begin()
        for _ in range(3):
            update.round(list(range(len(groups))))


def made(experiment: str, optimizer: str, **changes: Any) -> Training:
    config: Config = tiny(experiment, optimizer, "device=cuda", "updates=8")
    for key, value in changes.items():
        setattr(config, key, value)
    images = load(config.data.name, config.data.root, None)
    return set_up(EXPERIMENTS[experiment], config, images)


@pytest.mark.parametrize("optimizer", ["adam", "hf", "bdhf"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_are_replayed_to_the_same_weights(
    experiment: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    for cuda_graphs in (True, False):
        training = made(experiment, optimizer, cuda_graphs=cuda_graphs)
        for _ in range(8):
            training.update()
        training.settle()
        assert training.optimizer.last_step is not None
        path = training.optimizer.last_step.path
        assert path.endswith(", replayed") == cuda_graphs and "not replayed" not in path
        found.append(weights(training.problem.model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_steps_of_adam_wait_for_nothing(experiment: str) -> None:
    training = made(experiment, "adam")
    for _ in range(5):
        training.update()
    with no_waiting():
        for _ in range(3):
            training.update()


def lstm(units: int = 10) -> PeepholeLSTM:
    torch.manual_seed(0)
    model = PeepholeLSTM(1, units, 3, outputs=10)
    for layer in model.layers:
        nn.init.normal_(layer.peepholes, std=0.3)
    return model.to(GPU)


@pytest.mark.parametrize("rows", [1, 33, 1000])
@pytest.mark.parametrize("units", [4, 10, 32])
def test_kernels_of_the_lstm_against_autograd_in_double_precision(units: int, rows: int) -> None:
    model = lstm(units)
    *lower, top = model.layers
    blocks = [
        *(list(x.parameters()) for x in lower),
        [*top.parameters(), *model.readout.parameters()],
    ]
    sequences = torch.rand(rows, 49, 1, device=GPU)
    exact_model = copy.deepcopy(model).double()
    places = {p: k for k, p in enumerate(model.parameters())}
    exact = list(exact_model.parameters())
    exact_blocks = [[exact[places[p]] for p in block] for block in blocks]
    reference = AutogradLinearization.of(exact_model, exact_blocks, sequences.double())
    assert fused_lstm.usable(sequences, units)
    with torch.no_grad():
        own = model.linearize(blocks, sequences)
        outputs = model(sequences)
    assert own is not None
    torch.testing.assert_close(outputs.double(), reference.outputs, rtol=1e-5, atol=1e-6)
    directions = [[torch.randn_like(p) for p in block] for block in blocks]
    cotangents = [[torch.randn_like(own.outputs)] for _ in blocks]
    with torch.no_grad():
        found = [own.tangents(directions), own.adjoints(cotangents)]
    wide = torch.utils._pytree.tree_map(Tensor.double, (directions, cotangents))
    expected = [reference.tangents(wide[0]), reference.adjoints(wide[1])]
    for one, other in zip(found, expected, strict=True):
        for block, right in zip(one, other, strict=True):
            for x, y in zip(block, right, strict=True):
                assert float((x.double() - y).norm() / y.norm()) < 1e-5


def test_convolutions_are_in_full_precision_unless_asked() -> None:
    """Torch's own choice is TF32, whose products have ten bits."""
    images, kernel = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
    exact = nn.functional.conv2d(images.double(), kernel.double())
    errors = {}
    for tf32 in (True, None):
        use_machine(None, tf32)
        found = nn.functional.conv2d(images.to(GPU), kernel.to(GPU)).cpu().double()
        errors[tf32] = float((found - exact).norm() / exact.norm())
    assert errors[None] < 2e-6
    if torch.cuda.get_device_capability()[0] >= 8:
        assert errors[True] > 10 * errors[None]


def reads_back(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that asks for a value in the middle."""
    scale = 1.0 if float(outputs.detach().sum()) > 1e9 else 2.0
    return scale * nn.functional.cross_entropy(outputs, targets)


def allocates_from_the_host(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that nothing warns of, and that cannot be captured."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("not while a graph is captured")
    return nn.functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize("loss", [reads_back, allocates_from_the_host])
def test_what_cannot_be_captured_leaves_torch_as_it_was(loss: Any) -> None:
    case = on_gpu(make_case("cross-entropy mean", torch.float64))
    opt = hessian_free(case, cuda_graphs=True)
    first = FirstOrder(torch.optim.SGD(case.model.parameters(), lr=0.1), cuda_graphs=True)
    stream = torch.cuda.current_stream()
    for _ in range(5):
        opt.step(case.model, loss, case.batch)
        first.step(case.model, loss, case.batch)
    assert opt.last_step is not None and "not replayed" in opt.last_step.path
    assert first.last_step is not None and "not replayed" in first.last_step.path
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    for _ in range(5):
        opt.step(case.model, case.criterion, case.batch)
    assert opt.last_step.path.endswith(", replayed")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_a_second_gpu() -> None:
    weights_by_device = []
    for device in ("cuda:0", "cuda:1"):
        training = made("lstm", "bdhf", device=device)
        for _ in range(8):
            training.update()
        training.settle()
        weights_by_device.append(weights(training.problem.model))
    torch.testing.assert_close(*weights_by_device, rtol=1e-4, atol=1e-6)


def test_a_gradient_norm_and_losses_are_not_overwritten() -> None:
    case = on_gpu(make_case("cross-entropy mean", torch.float64))
    opt = hessian_free(case, cuda_graphs=True)
    losses, norms = [], []
    for k in range(6):
        batch: Batch = moved_round(case.batch, k)
        expected = case.criterion(case.model(batch[0]), batch[1]).detach()
        losses.append((opt.step(case.model, case.criterion, batch), expected))
        assert opt.last_step is not None
        norms.append(opt.last_step.gradient_norm)
    for loss, expected in losses:
        torch.testing.assert_close(loss, expected)
    assert len({float(norm) for norm in norms}) == len(norms)


def test_adam_on_a_gpu_is_adam_on_the_cpu() -> None:
    here = make_case("residual CNN", torch.float64)
    there = on_gpu(here)
    one = FirstOrder(torch.optim.Adam(here.model.parameters()))
    ways: dict[str, Any] = {"fused": True, "capturable": True}
    other = FirstOrder(torch.optim.Adam(there.model.parameters(), **ways), cuda_graphs=True)
    for k in range(8):
        one.step(here.model, here.criterion, moved_round(here.batch, k))
        other.step(there.model, there.criterion, moved_round(there.batch, k))
    assert other.last_step is not None and other.last_step.path == "gradient, replayed"
    torch.testing.assert_close(weights(here.model), weights(there.model), rtol=1e-6, atol=1e-8)
    # A state of either goes on on the other device.
    state = copy.deepcopy(other.state_dict())
    one.load_state_dict(state)
    one.step(here.model, here.criterion, here.batch)


def test_traces_hold_on_the_gpu() -> None:
    case = on_gpu(make_case("residual CNN", torch.float32))
    linearizer = Linearizer()
    for _ in range(2):
        _, path = linearizer(case.model, case.blocks, case.batch[0])
        assert path == "traced"
