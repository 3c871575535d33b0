"""How the cost of products and updates grows, drawn to benchmarks/growth.png.

    python benchmarks/growth.py

Against the mini-batch (the autoencoder), the number of blocks, the depth (a tanh network of equal
layers) and the number of CG iterations; in gradients of the same network and mini-batch, one core.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from problems import Problem, autoencoder_problem
from products import ours
from run import Thunk, gradient, in_turn, update
from torch import nn

from bdhf import split_into_blocks
from bdhf.linearization import Linearizer
from bdhf.machine import use_machine


def deep(layers: int, blocks: int = 2, rows: int = 500, width: int = 256) -> Problem:
    """A tanh network of equal layers."""
    pairs = itertools.chain.from_iterable(
        (nn.Linear(width, width), nn.Tanh()) for _ in range(layers)
    )
    model = nn.Sequential(*pairs)
    inputs, targets = torch.randn(rows, width), torch.randn(rows, width)
    groups = [list(group["params"]) for group in split_into_blocks(model, blocks)]
    return Problem("deep", model, model, nn.MSELoss(), inputs, targets, groups)


def round_of(problem: Problem) -> Thunk:
    """One product with each block."""
    vectors = [[torch.randn_like(p) for p in block] for block in problem.blocks]
    return functools.partial(ours(problem, problem.blocks, Linearizer()), vectors)


def in_gradients(problem: Problem, timed: Iterable[Thunk], repeats: int = 5) -> list[float]:
    """Medians over interleaved repeats, each divided by the gradient's time of its own repeat."""
    thunks = {str(k): thunk for k, thunk in enumerate([gradient(problem), *timed])}
    units, *rows = in_turn(thunks, repeats).values()
    ratios = ([s / unit for s, unit in zip(row, units, strict=True)] for row in rows)
    return [sorted(column)[repeats // 2] for column in ratios]


def against_mini_batch(axes: Axes) -> None:
    sizes = [50, 125, 250, 500, 1000, 2000]
    rows = []
    for size in sizes:
        problem = autoencoder_problem(size)
        whole = Problem(**{**vars(problem), "blocks": [problem.parameters]})
        rows.append(in_gradients(problem, [round_of(whole), round_of(problem)]))
    for label, values in zip(("whole matrix", "2 blocks"), zip(*rows, strict=True), strict=True):
        axes.plot(sizes, values, "o-", label=label)
    axes.set(xlabel="mini-batch (autoencoder)", ylabel="products of a CG round", xscale="log")


def against_blocks(axes: Axes) -> None:
    counts = [1, 2, 4, 8, 16]
    found = [in_gradients(p, [round_of(p)])[0] for p in (deep(16, count) for count in counts)]
    axes.plot(counts, found, "o-", label="measured")
    base = found[0]
    # Counted: a layer of a block costs 4 multiply-adds a weight, one above it 2.
    axes.plot(counts, [base * (b + 3) / 4 for b in counts], ":", label="(B + 3) / 4, counted")
    axes.set(xlabel="blocks (16 layers)", ylabel="products of a CG round", xticks=counts)


def against_depth(axes: Axes) -> None:
    depths = [2, 4, 8, 16, 32]
    found = [in_gradients(p, [round_of(p)])[0] for p in (deep(depth) for depth in depths)]
    axes.plot(depths, found, "o-", label="2 blocks")
    axes.set(xlabel="layers", ylabel="products of a CG round", xticks=depths)


def against_iterations(axes: Axes) -> None:
    counts = [1, 5, 10, 20, 30]
    problem = deep(8)
    for label, blocks in (("1 block", [problem.parameters]), ("2 blocks", problem.blocks)):
        thunks = [update(problem, blocks, count) for count in counts]
        axes.plot(counts, in_gradients(problem, thunks), "o-", label=label)
    axes.set(xlabel="CG iterations (8 layers)", ylabel="update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("growth.png"))
    options = parser.parse_args()
    use_machine(threads=1)
    torch.manual_seed(0)
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    drawn = (against_mini_batch, against_blocks, against_depth, against_iterations)
    for axes, draw in zip(grid.flat, drawn, strict=True):
        draw(axes)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.suptitle("Cost in gradients of the same mini-batch, one core")
    figure.savefig(options.output, dpi=110)
    print(f"drew {options.output}")


if __name__ == "__main__":
    main()
