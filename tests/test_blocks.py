"""Helpers that split a model into blocks."""

from __future__ import annotations

import itertools

import pytest
from networks import TiedAutoencoder
from torch import nn

import bdhf
from bdhf.blocks import _balanced_bounds


def sizes(groups: list[dict[str, list[nn.Parameter]]]) -> list[int]:
    return [sum(p.numel() for p in group["params"]) for group in groups]


def test_blocks_from_modules_takes_modules_and_lists_of_them() -> None:
    a, b, c = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)
    groups = bdhf.blocks_from_modules(a, [b, c])
    assert [p.shape for p in groups[0]["params"]] == [a.weight.shape, a.bias.shape]
    assert sizes(groups) == [9, 12 + 4]


def test_shared_parameters_go_to_the_first_block() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    groups = bdhf.blocks_from_modules(first, second)
    assert sizes(groups) == [12, 3]
    bdhf.BlockDiagonalHF(groups)  # accepted: no parameter is in two groups


def test_block_without_parameters_is_refused() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="block 1 has no parameter that is not already in"):
        bdhf.blocks_from_modules(layer, nn.Tanh())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_split_is_contiguous_complete_and_keeps_layers_whole(count: int) -> None:
    model = nn.Sequential(*[nn.Linear(a, a + 1) for a in (4, 5, 3, 9)])
    groups = bdhf.split_into_blocks(model, count)
    assert len(groups) == count
    flat = [p for group in groups for p in group["params"]]
    assert [id(p) for p in flat] == [id(p) for p in model.parameters()]
    block_of = {id(p): k for k, group in enumerate(groups) for p in group["params"]}
    assert all(block_of[id(m.weight)] == block_of[id(m.bias)] for m in model)


def test_split_is_the_most_even_one() -> None:
    """Against every possible split."""
    weights = [7, 1, 4, 4, 9, 2, 2, 5]
    for count in range(1, 9):
        bounds = _balanced_bounds(weights, count)
        cuts = itertools.combinations(range(1, len(weights)), count - 1)
        best = min(
            sum(sum(weights[a:b]) ** 2 for a, b in itertools.pairwise((0, *inner, len(weights))))
            for inner in cuts
        )
        assert len(bounds) == count + 1
        assert sum(sum(weights[a:b]) ** 2 for a, b in itertools.pairwise(bounds)) == best


def test_split_counts_tied_parameters_once() -> None:
    model = TiedAutoencoder()
    groups = bdhf.split_into_blocks(model, 2)
    assert sum(sizes(groups)) == sum(p.numel() for p in model.parameters())


def test_split_balances_what_is_trained() -> None:
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)])
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    assert sizes(bdhf.split_into_blocks(model, 2)) == [30, 30]


def test_split_wants_the_module() -> None:
    with pytest.raises(TypeError, match="model is a generator; give the module to split"):
        bdhf.split_into_blocks(nn.Linear(2, 2).parameters(), 1)


@pytest.mark.parametrize("count", [0, 3, 1.5])
def test_split_refuses_impossible_counts(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count={count}; must be between 1 and 2, the number"):
        bdhf.split_into_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), count)
