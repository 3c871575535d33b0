"""Blocks drawn at random: the same network and the same matrix, its rows in another order."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from networks import Case, block_diagonal, dense_ggn, make_case
from suite import EXPERIMENTS, tiny, without_clocks
from torch import Tensor, nn

import bdhf
from bdhf.config import Config
from bdhf.curvature import GaussNewton
from bdhf.errors import ConfigError
from bdhf.random_blocks import RandomBlocks
from bdhf.record import RunFolder, read_metrics
from bdhf.runner import run
from bdhf.training import Row

NETWORKS = (
    "tanh MLP, MSE mean",
    "peephole LSTM",
    "residual CNN",
    "several inputs and outputs",
    "embedding and layer norm",
)
SETTINGS = {"lr": 0.5, "damping": 0.1, "cg_max_iter": 8, "cg_tol": 5e-4, "cg_momentum": 0.95}


def in_equal_blocks(network: nn.Module, count: int, seed: int = 0) -> RandomBlocks:
    """In blocks of sizes that differ by one at most."""
    scalars = sum(p.numel() for p in network.parameters())
    sizes = [len(part) for part in torch.empty(scalars).tensor_split(count)]
    return RandomBlocks(network, sizes, seed)


def pair(name: str, count: int) -> tuple[Case, Case]:
    """A network, and itself in random blocks."""
    plain, other = make_case(name, torch.float64), make_case(name, torch.float64)
    model = in_equal_blocks(other.model, count)
    blocks = [[block] for block in model.blocks]
    return plain, dataclasses.replace(other, model=model, blocks=blocks)


def flat(tensors: list[Tensor | None], like: list[Tensor]) -> Tensor:
    pairs = zip(tensors, like, strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])


def weights(model: nn.Module) -> Tensor:
    """All scalars, in the order of the plain network."""
    scalars = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return scalars[model.order.argsort()] if isinstance(model, RandomBlocks) else scalars


def called(case: Case) -> dict[str, Tensor]:
    inputs = case.batch[0]
    outputs = case.model(**inputs) if isinstance(inputs, dict) else case.model(inputs)
    return outputs if isinstance(outputs, dict) else {"": outputs}


# The network


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_start_outputs_and_gradients_are_the_networks(name: str, count: int) -> None:
    plain, random = pair(name, count)
    assert torch.equal(weights(random.model), weights(plain.model))
    expected, found = called(plain), called(random)
    for key, values in expected.items():
        assert not isinstance(values, Tensor) or torch.equal(found[key], values)
    gradients = []
    for case, outputs in ((plain, expected), (random, found)):
        loss = case.criterion(outputs.get("", outputs), case.batch[1])
        parameters = list(case.model.parameters())
        gradients.append(
            flat(list(torch.autograd.grad(loss, parameters, allow_unused=True)), parameters)
        )
    assert gradients[0].norm() > 0
    torch.testing.assert_close(
        gradients[1][random.model.order.argsort()], gradients[0], rtol=1e-12, atol=0
    )


def numbered(*sizes: int) -> nn.Sequential:
    """A network whose scalars are 0, 1, 2, ... in its own order."""
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
    first = 0
    for parameter in model.parameters():
        parameter.data = torch.arange(first, first + parameter.numel()).view_as(parameter) * 1.0
        first += parameter.numel()
    return model


@pytest.mark.parametrize("sizes", [[113], [56, 45, 12], [1, 2, 110], [1] * 113])
def test_blocks_have_the_sizes_asked_for_and_every_scalar_is_in_one(sizes: list[int]) -> None:
    blocks = list(RandomBlocks(numbered(6, 8, 5, 2), sizes).blocks)
    assert [len(block) for block in blocks] == sizes
    assert torch.cat(blocks).sort().values.tolist() == list(range(113))


def test_blocks_take_from_every_layer_alike() -> None:
    """Unlike blocks of layers: half of each layer's scalars, to within what is drawn by chance."""
    first, second = in_equal_blocks(numbered(40, 40, 40, 40), 2).blocks
    for layer in range(3):
        low, high = 1640 * layer, 1640 * (layer + 1)
        shares = [((low <= block) & (block < high)).float().mean() for block in (first, second)]
        assert all(abs(share - 1 / 3) < 0.05 for share in shares)


def test_draw_depends_on_its_seed_alone_and_takes_from_no_other_stream() -> None:
    network = numbered(6, 8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = in_equal_blocks(network, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = (in_equal_blocks(numbered(6, 8), 3, seed) for seed in (0, 1))
    assert torch.equal(same.order, one.order)
    assert not torch.equal(other.order, one.order)


def test_state_dict_comes_back_into_another_start() -> None:
    case = pair("tanh MLP, MSE mean", 3)[1]
    state = copy.deepcopy(case.model.state_dict())
    assert list(state) == ["blocks.0", "blocks.1", "blocks.2"]  # no second copy of the network
    start = make_case("tanh MLP, MSE mean", torch.float64, seed=5).model
    other = dataclasses.replace(case, model=in_equal_blocks(start, 3))
    assert not torch.equal(called(other)[""], called(case)[""])
    other.model.load_state_dict(state)
    assert torch.equal(called(other)[""], called(case)[""])


def test_copies_are_apart() -> None:
    """The average of the weights is one."""
    case = pair("tanh MLP, MSE mean", 2)[1]
    expected = called(case)[""].detach().clone()
    copied = dataclasses.replace(case, model=copy.deepcopy(case.model))
    with torch.no_grad():
        copied.model.blocks[0].add_(1.0)
    assert torch.equal(called(case)[""], expected)
    assert not torch.equal(called(copied)[""], expected)


def test_mode_reaches_the_network() -> None:
    dropout = nn.Dropout(0.5)
    model = in_equal_blocks(nn.Sequential(nn.Linear(4, 100), dropout), 2)
    x = torch.ones(1, 4)
    assert (model(x) == 0).any()
    model.eval()
    assert not dropout.training and not (model(x) == 0).any()
    assert model.train() is model and dropout.training and (model(x) == 0).any()


def shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("network", "sizes", "message"),
    [
        (shared, [6, 6], r"^random blocks: modules of this network share parameters$"),
        (
            frozen,
            [12, 12],
            r"^random blocks: this network has frozen parameters, which would move$",
        ),
        (
            lambda: nn.BatchNorm1d(3),
            [3, 3],
            r"^random blocks: this network has buffers, which nothing",
        ),
        (
            lambda: nn.Linear(3, 2),
            [3, 4],
            r"^sizes=\[3, 4\]; each must be 1 .* all add up to 8, the",
        ),
        (
            lambda: nn.Linear(3, 2),
            [9, -1],
            r"^sizes=\[9, -1\]; each must be 1 or more, and all add",
        ),
        (lambda: nn.Linear(3, 2), [], r"^sizes=\[\]; each must be 1 or more, and all add up to 8"),
    ],
)
def test_networks_that_cannot_be_so_split_are_refused(
    network: functools.partial[nn.Module], sizes: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RandomBlocks(network(), sizes)


# The matrix


@pytest.mark.parametrize("name", NETWORKS[:3])
def test_matrix_is_the_networks_with_its_rows_in_another_order(name: str) -> None:
    plain, random = pair(name, 3)
    expected, found = dense_ggn(plain, 0), dense_ggn(random, 0)
    places = random.model.order.argsort()
    assert expected.norm() > 0 and not torch.equal(places, places.sort().values)
    torch.testing.assert_close(found[places][:, places], expected, rtol=0, atol=1e-13)

    # And what the optimizer multiplies with are its blocks.
    inside = block_diagonal(found, random)
    assert (found - inside).norm() > 0.1 * found.norm()  # there is something to leave out
    vector = torch.randn(len(found), dtype=torch.float64)
    pieces = vector.split([len(block) for block in random.model.blocks])
    matrix = GaussNewton(random.model, random.criterion, random.batch, random.blocks)
    assert matrix.path == "traced"  # not the slow way
    product = torch.cat([p for p in matrix.products(pieces) if p is not None])
    torch.testing.assert_close(product, inside @ vector, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS[:3])
def test_updates_with_one_block_are_those_of_hf(name: str) -> None:
    plain, random = pair(name, 1)
    start = weights(plain.model)
    for case in (plain, random):
        opt = bdhf.BlockDiagonalHF(case.model.parameters(), **SETTINGS)
        for _ in range(3):
            few = case.batch[0][:3], case.batch[1][:3]
            opt.step(case.model, case.criterion, case.batch, few)
    moved = (weights(plain.model) - start).norm()
    difference = (weights(plain.model) - weights(random.model)).norm()
    assert moved > 0.01 * start.norm() and difference < 1e-9 * moved


def test_several_blocks_are_another_update() -> None:
    found = []
    for count in (1, 2, 3):
        case = pair("tanh MLP, MSE mean", count)[1]
        opt = bdhf.BlockDiagonalHF([{"params": block} for block in case.blocks], **SETTINGS)
        opt.step(case.model, case.criterion, case.batch)
        found.append(weights(case.model))
    assert all((a - b).norm() > 1e-3 for a, b in ((found[0], found[1]), (found[1], found[2])))


# Runs


@functools.cache
def settings(experiment: str, blocks: str) -> Config:
    shorter = ["network.pool=4", "network.layers=1"] if experiment == "lstm" else []
    return tiny(experiment, "bdhf", f"optimizer.blocks={blocks}", *shorter)


def made(results: Path, experiment: str, blocks: str, updates: int = 4) -> RunFolder:
    config = dataclasses.replace(
        settings(experiment, blocks), results=str(results), updates=updates
    )
    ended = run(EXPERIMENTS[experiment], config, shown=False)
    assert ended.status == "finished"
    return ended.folder


def metrics(folder: RunFolder) -> list[Row]:
    return without_clocks(read_metrics(folder.path))


def products(folder: RunFolder) -> list[float]:
    return json.loads((folder.path / "provenance.json").read_text())["work"]["products"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_train_in_random_blocks_and_continue_from_a_checkpoint(
    tmp_path: Path, experiment: str
) -> None:
    whole = made(tmp_path / "whole", experiment, "random-2")
    rows = metrics(whole)
    assert [row["update"] for row in rows] == [0, 2, 4]
    assert len({row["train_loss"] for row in rows}) == 3
    assert {name for name in rows[0] if "cg" in name} == {"cg_iterations_0", "cg_iterations_1"}
    first, second = products(whole)
    assert first == second  # both need all of the network

    made(tmp_path / "cut", experiment, "random-2", updates=2)
    cut = made(tmp_path / "cut", experiment, "random-2")
    assert len(cut.provenance["sessions"]) == 2
    assert metrics(cut) == rows


def test_start_of_a_run_is_that_of_the_experiments_own_blocks(tmp_path: Path) -> None:
    """One block of the experiment's, two, three, and random ones: the same weights and batches."""
    rows = {
        blocks: metrics(made(tmp_path, "autoencoder", blocks))
        for blocks in ("null", "2", "3", "random-2")
    }
    assert len({(r[0]["train_loss"], r[0]["test_loss"]) for r in rows.values()}) == 1
    # Its two blocks of layers are the encoder and the decoder, which the experiment has.
    assert rows["2"] == rows["null"]
    assert "cg_iterations_2" in rows["3"][0] and "cg_iterations_3" not in rows["3"][0]
    ends = {r[-1]["train_loss"] for r in rows.values()}
    assert len(ends) == 3
    assert len(list(tmp_path.glob("runs/*/*/*/config.yaml"))) == 4  # and a folder each


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("50", r"^optimizer.blocks=50: count=50; must be between 1 and 4, the number of modules"),
        (
            "random-50",
            r"^optimizer.blocks=random-50: count=50; must be between 1 and 4, the number",
        ),
    ],
)
def test_more_blocks_than_the_network_has_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: str, message: str
) -> None:
    monkeypatch.setattr("bdhf.runner.load", None)  # would fail if it were called
    config = settings("autoencoder", "null")
    optimizer = dataclasses.replace(config.optimizer, blocks=blocks)
    results = tmp_path / "r"
    config = dataclasses.replace(config, optimizer=optimizer, results=str(results))
    with pytest.raises(ConfigError, match=message) as caught:
        run(EXPERIMENTS["autoencoder"], config)
    assert "\n" not in str(caught.value)
    assert not results.exists()
