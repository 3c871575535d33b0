"""What updates cost on a GPU at the paper's sizes: benchmarks/gpu.py [--output benchmarks/gpu.md].

Milliseconds, medians of interleaved rounds with a clock that waits for the device; ratios to one
gradient of the same mini-batch by plain autograd, in the same round. Peers that are not installed
are left out. `--device cpu --rows 64` rehearses it anywhere.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from problems import PROBLEMS, Problem
from products import PEERS, ours
from run import ITERATIONS, Thunk, gradient, in_turn, update
from torch import Tensor

from bdhf import graphs
from bdhf.first_order import FirstOrder
from bdhf.gradient import loss_and_gradient
from bdhf.linearization import Linearizer
from bdhf.machine import use_machine
from bdhf.record import version
from bdhf.work import count_work, multiply_adds

#: Mini-batch of HF, its curvature mini-batch, and Adam's smallest, as configs/scale/paper has them.
SIZES = {"autoencoder": (6000, 750, 125), "lstm": (6000, 750, 125), "resnet": (5000, 625, 125)}

_ON_CURVATURE = ("gradient, curvature", "product", "all blocks", "set-up")


def on_device(problem: Problem, device: torch.device, curvature_rows: int) -> Problem:
    """The problem there; plain and own network share parameters still, if they did."""
    places = [[_place(problem.model, p) for p in block] for block in problem.blocks]
    alone = problem.plain is problem.model
    model = problem.model.to(device)
    plain = model if alone else problem.plain.to(device)
    parameters = list(model.parameters())
    return replace(
        problem,
        model=model,
        plain=plain,
        criterion=problem.criterion.to(device),
        inputs=problem.inputs.to(device),
        targets=problem.targets.to(device),
        blocks=[[parameters[k] for k in block] for block in places],
        curvature_rows=curvature_rows,
    )


def _place(model: torch.nn.Module, parameter: Tensor) -> int:
    return next(k for k, p in enumerate(model.parameters()) if p is parameter)


def of_curvature(problem: Problem) -> Problem:
    """The same network on the curvature mini-batch alone."""
    inputs, targets = problem.curvature_batch
    return replace(problem, inputs=inputs, targets=targets, curvature_rows=None)


def timed_rows(problem: Problem, small: int) -> dict[str, Thunk]:
    """All that is timed, by name; ``gradient`` is the unit of what has the whole mini-batch."""
    linearizer = Linearizer()
    few = of_curvature(problem)
    found: dict[str, Thunk] = {
        "gradient": gradient(problem),
        "gradient, curvature mini-batch": gradient(few),
    }
    twins = dict(zip(problem.model.parameters(), problem.plain.parameters(), strict=True))
    for title, split in (("product", [few.parameters]), ("all blocks", few.blocks)):
        vectors = [[torch.randn_like(p) for p in block] for block in split]
        found[title] = functools.partial(ours(few, split, linearizer), vectors)
        for name in ("torch.func", "curvlinops"):
            plain = [[twins[p] for p in block] for block in split]
            theirs = _peer(name, few, plain, vectors)
            if theirs is not None:
                found[f"{title}: {name}"] = theirs
    found["set-up"] = lambda: ours(few, few.blocks, linearizer)
    for cuda_graphs in (False, True):
        how = ", replayed" if cuda_graphs else ""
        moving = copy.deepcopy(problem)
        found[f"HF update{how}"] = update(moving, [moving.parameters], cuda_graphs=cuda_graphs)
        moving = copy.deepcopy(problem)
        found[f"block-diagonal HF update{how}"] = update(
            moving, moving.blocks, cuda_graphs=cuda_graphs
        )
        for rows in (small, len(problem.inputs)):
            found[f"Adam update, {rows}{how}"] = adam(copy.deepcopy(problem), rows, cuda_graphs)
    return found


def _peer(name: str, problem: Problem, blocks: Any, vectors: Any) -> Thunk | None:
    try:
        products = PEERS[name](problem, blocks)
        products(vectors)
    except Exception as error:  # not installed, or out of what it can do
        print(f"{problem.name}: {name} left out: {type(error).__name__}: {error}", flush=True)
        return None
    return functools.partial(products, vectors)


def adam(problem: Problem, rows: int, cuda_graphs: bool) -> Thunk:
    on_gpu = problem.inputs.is_cuda
    ways: dict[str, Any] = {"fused": True, "capturable": True} if on_gpu else {}
    opt = FirstOrder(torch.optim.Adam(problem.parameters, lr=0.0, **ways), cuda_graphs=cuda_graphs)
    batch = problem.inputs[:rows], problem.targets[:rows]
    return lambda: opt.step(problem.model, problem.criterion, batch)


def rates(device: torch.device, size: int) -> dict[str, float]:
    """What the device reaches: matrix products in TFLOP/s by precision, copies in GB/s."""

    def seconds(work: Thunk) -> float:
        return statistics.median(in_turn({"work": work}, 20, 3, device)["work"])

    found = {}
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    for name, tf32 in (("float32", False), ("TF32", True)):
        use_machine(None, tf32)
        found[f"matrix products, {name}, TFLOP/s"] = 2 * size**3 / seconds(lambda: a @ b) / 1e12
    use_machine(None)
    source = torch.empty(size * size * 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    found["copies, GB/s"] = moved / seconds(lambda: target.copy_(source)) / 1e9
    return found


def arithmetic(problem: Problem) -> dict[str, float]:
    """FLOP a sample of what is timed, by torch's formulas, counted on the CPU."""
    model = copy.deepcopy(problem.model).cpu()
    parameters = list(model.parameters())
    places = [[_place(problem.model, p) for p in block] for block in problem.blocks]
    blocks = [[parameters[k] for k in block] for block in places]
    batch = problem.inputs[:2].cpu(), problem.targets[:2].cpu()
    criterion = copy.deepcopy(problem.criterion).cpu()
    once = multiply_adds(lambda: loss_and_gradient(model, criterion, batch, parameters)) / 2
    (whole,) = count_work(model, criterion, batch, [parameters]).products
    apart = count_work(model, criterion, batch, blocks).products
    return {"gradient": once, "product": once * whole, "all blocks": once * sum(apart)}


def table(problem: Problem, seconds: dict[str, list[float]], rate: float) -> str:
    """Markdown; ``rate`` is the measured one of matrix products, in FLOP/s."""
    few, work = of_curvature(problem), arithmetic(problem)
    lines = [
        f"### {problem.name}, mini-batch {len(problem.inputs)}, curvature {len(few.inputs)}",
        "",
        "| | ms | in gradients | of the matrix rate |",
        "| --- | --- | --- | --- |",
    ]
    for title, times in seconds.items():
        on_few = title.startswith(_ON_CURVATURE)
        units = seconds["gradient, curvature mini-batch" if on_few else "gradient"]
        ratio = statistics.median(a / g for a, g in zip(times, units, strict=True))
        middle = statistics.median(times)
        flop = work.get(title.split(",")[0], 0.0) * len((few if on_few else problem).inputs)
        share = f"{flop / middle / rate:.0%}" if flop else ""
        lines.append(f"| {title} | {1e3 * middle:.3f} | {ratio:.2f} | {share} |")
    return "\n".join(lines)


def header(device: torch.device, found: dict[str, float], rounds: int) -> str:
    """What was measured, and where."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    code = version()
    commit = f"{code['git_describe']}{' with changes' if code['git_dirty'] else ''}"
    reached = "; ".join(f"{what}: {rate:.4g}" for what, rate in found.items())
    return f"""# What an update costs on a GPU

Made by `benchmarks/gpu.py` at {commit} on one {name}, torch
{torch.__version__}, float32 without TF32. Measured in the same run: {reached}.

Medians of {rounds} interleaved rounds. The unit is one gradient by plain autograd of the same
mini-batch (for what is computed on the curvature mini-batch: of that one). Products and set-up are
on the curvature mini-batch; updates have {ITERATIONS} CG iterations. *Replayed*: as a CUDA graph.
*Of the matrix rate*: the arithmetic's share of what large matrix products reach."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", choices=[[], *SIZES], help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, help="at most so many in a mini-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --rows 64 rehearses this")
    use_machine(threads=None)
    found = rates(device, 8192 if device.type == "cuda" else 512)
    text, raw = [header(device, found, options.rounds)], {"rates": found}
    print(text[0], flush=True)
    for name in options.problems or SIZES:
        sizes = SIZES[name]
        rows, few, small = (min(size, options.rows or size) for size in sizes)
        torch.manual_seed(0)
        problem = on_device(PROBLEMS[name](rows=rows), device, few)
        warm_up = graphs.WARM_UP + 2
        seconds = in_turn(timed_rows(problem, small), options.rounds, warm_up, device)
        raw[name] = seconds  # type: ignore[assignment]
        rate = found["matrix products, float32, TFLOP/s"] * 1e12
        text.append(table(problem, seconds, rate))
        print("\n" + text[-1], flush=True)
        if options.output:
            options.output.write_text("\n\n".join(text) + "\n")
            options.output.with_suffix(".json").write_text(json.dumps(raw))


if __name__ == "__main__":
    main()
