"""`make bench`: what products and updates cost, beside the peers, in gradients.

    python benchmarks/run.py [PROBLEM ...] [--rounds 7] [--output benchmarks/results.md]

The unit is g, one gradient of the same mini-batch by plain autograd. Everything of a problem is
timed in turn, round after round, in one process on one core, and each time is divided by the
gradient's of its own round; a cell is the median over the rounds, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from problems import PROBLEMS, Blocks, Problem
from products import PEERS, ours
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdhf import BlockDiagonalHF
from bdhf.first_order import FirstOrder
from bdhf.linearization import Linearizer
from bdhf.machine import synchronize, use_machine

#: What each row should cost at most (ours), by problem.
GOALS = {
    "product": {
        "autoencoder": 1.25,
        "resnet": 1.15,
        "lstm": 0.25,
        "vgg": 1.35,
        "transformer": 1.35,
    },
    "all blocks": {"autoencoder": 1.55, "resnet": 1.55, "lstm": 0.40},
    "set-up": {"autoencoder": 0.7, "resnet": 0.7, "lstm": 0.7},
    "HF update": {"autoencoder": 41.0, "resnet": 37.0, "lstm": 9.0},
    "block-diagonal HF update": {"autoencoder": 50.0, "resnet": 49.0, "lstm": 13.5},
    "Adam update": {"lstm": 0.5},
    "memory": dict.fromkeys(("autoencoder", "resnet", "lstm"), 2.0),
}
ITERATIONS = 30
CPU = torch.device("cpu")
Thunk = Callable[[], object]


def gradient(problem: Problem) -> Thunk:
    """The unit."""
    parameters = list(problem.plain.parameters())

    def compute() -> None:
        loss = problem.criterion(problem.plain(problem.inputs), problem.targets)
        torch.autograd.grad(loss, parameters)

    return compute


def update(
    problem: Problem, blocks: Blocks, iterations: int = ITERATIONS, cuda_graphs: bool = False
) -> Thunk:
    """An update of so many CG iterations, gradient and curvature on the same mini-batch.

    Neither tolerance nor momentum, so that there are as many products whatever the numbers; a
    learning rate of 0, so that all updates are made at the same point. Each returns its path.
    """
    opt = BlockDiagonalHF(
        [{"params": block} for block in blocks],
        lr=0.0,
        damping=1e-4,
        cg_max_iter=iterations,
        cg_tol=0.0,
        cg_momentum=0.0,
        cuda_graphs=cuda_graphs,
    )
    batch = problem.inputs, problem.targets

    def step() -> str:
        opt.step(problem.model, problem.criterion, batch, curvature_batch=problem.curvature_batch)
        assert opt.last_step is not None
        made = {block.iterations for block in opt.last_step.blocks}
        assert made == {iterations}, opt.last_step
        return opt.last_step.path

    return step


def adam(problem: Problem) -> Thunk:
    opt = FirstOrder(torch.optim.Adam(problem.parameters, lr=0.0))
    batch = problem.inputs, problem.targets
    return lambda: opt.step(problem.model, problem.criterion, batch)


def rows(problem: Problem) -> dict[str, Thunk]:
    """All that is timed for a problem, by name; the first is the unit."""
    whole, blocks = [problem.parameters], problem.blocks
    twins = dict(zip(problem.model.parameters(), problem.plain.parameters(), strict=True))
    linearizer = Linearizer()
    found: dict[str, Thunk] = {"gradient": gradient(problem)}
    for title, split in (("product", whole), ("all blocks", blocks)):
        plain = [[twins[p] for p in block] for block in split]
        vectors = [[torch.randn_like(p) for p in block] for block in split]
        products = ours(problem, split, linearizer)
        found[f"{title}: ours"] = functools.partial(products, vectors)
        expected = products(vectors)
        for name, peer in PEERS.items():
            with sdpa_kernel(SDPBackend.MATH):
                theirs = _plain_attention(functools.partial(peer(problem, plain), vectors))
            _check(f"{problem.name}, {name}", theirs(), expected)
            found[f"{title}: {name}"] = theirs
    found["set-up: ours"] = lambda: ours(problem, blocks, linearizer)
    moving = copy.deepcopy(problem)  # since the peers' kept graphs forbid updates
    found["HF update: ours"] = update(moving, [moving.parameters])
    found["block-diagonal HF update: ours"] = update(moving, moving.blocks)
    found["Adam update: ours"] = adam(moving)
    return found


def _plain_attention(thunk: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Torch's fused attention has no forward mode; ours takes care of that by itself."""

    def called() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return thunk()

    return called


def _check(name: str, found: list[Tensor], expected: list[Tensor]) -> None:
    pairs = zip(found, expected, strict=True)
    error = max(float((a.detach() - b).norm() / b.norm()) for a, b in pairs)
    # In float32, rounding may turn a ReLU on or off.
    assert error < 1e-2, f"{name}: products differ by {error:.1e} from ours"


def measure(problem: Problem, rounds: int) -> dict[str, list[float]]:
    """Seconds of each row in each round."""
    return in_turn(rows(problem), rounds)


def in_turn(
    timed: dict[str, Thunk], rounds: int, warm_up: int = 1, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of each thunk in each round; in a round all are called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for row in timed.values():
        for _ in range(warm_up):
            row()  # traces, and first touches of memory
    gc.disable()
    for _ in range(rounds):
        for name, row in timed.items():
            synchronize(device)
            started = time.perf_counter()
            row()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    gc.enable()
    return seconds


def cell(ratios: list[float]) -> str:
    ordered = sorted(ratios)
    digits = 2 if ordered[len(ordered) // 2] < 10 else 1
    middle, least, greatest = (
        f"{value:.{digits}f}" for value in (ordered[len(ordered) // 2], ordered[0], ordered[-1])
    )
    return f"**{middle}** ({least} to {greatest})"


def memory(name: str) -> float:
    """Peak memory of an HF update over that of a gradient, each in a process of its own."""
    peaks = []
    for what in ("gradient", "update"):
        command = [sys.executable, str(Path(__file__).with_name("memory.py")), name, what]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    return peaks[1] / peaks[0]


def table(name: str, problem: Problem, seconds: dict[str, list[float]], peak: float) -> str:
    units = seconds.pop("gradient")
    ways = ["ours", *PEERS]
    lines = [
        f"### {problem.name}, mini-batch {len(problem.inputs)}, {len(problem.blocks)} blocks",
        "",
        "| in gradients | goal | " + " | ".join(ways) + " |",
        "| --- | --- | " + " | ".join("---" for _ in ways) + " |",
    ]
    for title in dict.fromkeys(row.split(":")[0] for row in seconds):
        cells = []
        for way in ways:
            times = seconds.get(f"{title}: {way}")
            pairs = zip(times or (), units, strict=times is not None)
            cells.append(cell([a / g for a, g in pairs]) if times else "")
        lines.append(f"| {title} | {_goal(title, name)} | " + " | ".join(cells) + " |")
    title = "peak memory of an HF update, in that of a gradient"
    unmeasured = " |" * (len(ways) - 1)
    lines.append(f"| {title} | {_goal('memory', name)} | **{peak:.2f}** |{unmeasured}")
    return "\n".join(lines)


def _goal(title: str, name: str) -> str:
    goal = GOALS[title].get(name)
    return "" if goal is None else f"{goal:g}"


def header(rounds: int) -> str:
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "curvlinops-for-pytorch", "backpack-for-pytorch")
    }
    described = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"""# What an update costs

Made by `make bench` at {commit or "an unknown commit"}: {described}; Python
{platform.python_version()}, {platform.machine()}, one core ({_processor()}), float32.

The unit is one gradient of the same mini-batch by plain autograd: the LSTM as a plain loop of
cells, the ResNet in torch's usual layout (the experiment runs it in channels-last). Medians of
{rounds} interleaved rounds, in brackets the least and the greatest. *Product*: with the whole
Gauss-Newton matrix; *all blocks*: one with each diagonal block, a round of CG; *set-up*: what
products need once an update. Updates are a gradient and {ITERATIONS} CG iterations on the same
mini-batch. torch.func computes `jvp` and `vjp` anew; curvlinops is its `GGNLinearOperator`;
BackPACK's `ggn_vector_product_from_plist` has its forward pass kept. Freed memory is kept for
reuse (`bdhf.machine`), for all of them alike. *Goal*: what we set out to reach; some are missed."""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", choices=[[], *PROBLEMS], help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    use_machine(threads=1)
    text = [header(options.rounds)]
    print(text[0], flush=True)
    for name in options.problems or PROBLEMS:
        torch.manual_seed(0)
        problem = PROBLEMS[name]()
        text.append(table(name, problem, measure(problem, options.rounds), memory(name)))
        print("\n" + text[-1], flush=True)
        if options.output:
            options.output.write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
