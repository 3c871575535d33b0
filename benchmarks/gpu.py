"""What updates cost on a GPU at the paper's sizes: benchmarks/gpu.py [--output benchmarks/gpu.md].

Milliseconds, medians of interleaved rounds with a clock that waits for the device; ratios to one
gradient of the same mini-batch by plain autograd, in the same round; shares of the roofline, from
rates measured in the same run. Peers that are not installed are left out. `--device cpu --rows 64`
rehearses it anywhere.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from problems import PROBLEMS, Problem
from products import PEERS, ours
from run import ITERATIONS, Thunk, gradient, in_turn, update
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bdhf import graphs
from bdhf.first_order import FirstOrder
from bdhf.linearization import Linearizer
from bdhf.machine import use_machine
from bdhf.record import version
from bdhf.work import multiply_adds

#: Mini-batch of HF, its curvature mini-batch, and Adam's smallest, as configs/scale/paper has them.
SIZES = {"autoencoder": (6000, 750, 125), "lstm": (6000, 750, 125), "resnet": (5000, 625, 125)}

#: Mini-batch and curvature mini-batch at which operations are counted: what they cost is a
#: constant and so much for each row of either.
_COUNTED = ((16, 8), (32, 8), (32, 16))


class Timed:
    """Something that is timed, and which way it went.

    Attributes:
        unit: the title of the gradient of its mini-batch.
        path: what `StepReport.path` said of the last call; empty where it is no update.
    """

    def __init__(self, work: Thunk, unit: str) -> None:
        self._work, self.unit = work, unit
        self.path = ""

    def __call__(self) -> None:
        found = self._work()
        self.path = found if isinstance(found, str) else ""


@dataclass(frozen=True)
class Cost:
    """What an operation has to compute and to move at least, in FLOP and bytes."""

    flop: float
    moved: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.moved + other.moved)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flop * times, self.moved * times)


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
    return with_rows(problem, len(problem.curvature_batch[0]))


def with_rows(problem: Problem, rows: int) -> Problem:
    """The same network on the first rows alone."""
    inputs, targets = problem.inputs[:rows], problem.targets[:rows]
    return replace(problem, inputs=inputs, targets=targets, curvature_rows=None)


#: Gradients, the units: of the whole mini-batch, the curvature mini-batch and Adam's smallest.
_WHOLE, _FEW, _SMALL = "gradient", "gradient, curvature mini-batch", "gradient, smallest mini-batch"

_GRAPHS = ", graphs asked for"


def timed_rows(problem: Problem, small: int, cuda_graphs: bool) -> dict[str, Timed]:
    """All that is timed, by title; with ``cuda_graphs`` updates also with graphs asked for."""
    linearizer = Linearizer()
    few, smallest = of_curvature(problem), with_rows(problem, small)
    found = {
        _WHOLE: Timed(gradient(problem), _WHOLE),
        _FEW: Timed(gradient(few), _FEW),
        _SMALL: Timed(gradient(smallest), _SMALL),
    }
    twins = dict(zip(problem.model.parameters(), problem.plain.parameters(), strict=True))
    for title, split in (("product", [few.parameters]), ("all blocks", few.blocks)):
        vectors = [[torch.randn_like(p) for p in block] for block in split]
        products = functools.partial(ours(few, split, linearizer), vectors)
        found[title] = Timed(products, _FEW)
        for name in ("torch.func", "curvlinops"):
            plain = [[twins[p] for p in block] for block in split]
            theirs = _peer(name, few, plain, vectors)
            if theirs is not None:
                found[f"{title}: {name}"] = Timed(theirs, _FEW)
    found["set-up"] = Timed(lambda: ours(few, few.blocks, linearizer), _FEW)
    for asked in (False, True) if cuda_graphs else (False,):
        how = _GRAPHS if asked else ""
        moving = copy.deepcopy(problem)
        whole = update(moving, [moving.parameters], cuda_graphs=asked)
        found[f"HF update{how}"] = Timed(whole, _WHOLE)
        moving = copy.deepcopy(problem)
        apart = update(moving, moving.blocks, cuda_graphs=asked)
        found[f"block-diagonal HF update{how}"] = Timed(apart, _WHOLE)
        first = adam(copy.deepcopy(problem), asked)
        found[f"Adam update{how}"] = Timed(first, _WHOLE)
        first = adam(copy.deepcopy(smallest), asked)
        found[f"Adam update, smallest mini-batch{how}"] = Timed(first, _SMALL)
    return found


def _peer(name: str, problem: Problem, blocks: Any, vectors: Any) -> Thunk | None:
    try:
        products = PEERS[name](problem, blocks)
        products(vectors)
    except Exception as error:  # not installed, or out of what it can do
        print(f"{problem.name}: {name} left out: {type(error).__name__}: {error}", flush=True)
        return None
    return functools.partial(products, vectors)


def adam(problem: Problem, cuda_graphs: bool) -> Thunk:
    """A step; it returns its path."""
    on_gpu = problem.inputs.is_cuda
    ways: dict[str, Any] = {"fused": True, "capturable": True} if on_gpu else {}
    opt = FirstOrder(torch.optim.Adam(problem.parameters, lr=0.0, **ways), cuda_graphs=cuda_graphs)
    batch = problem.inputs, problem.targets

    def step() -> str:
        opt.step(problem.model, problem.criterion, batch)
        assert opt.last_step is not None
        return opt.last_step.path

    return step


_RATE, _BANDWIDTH = "matrix products, float32, TFLOP/s", "copies, GB/s"


def rates(device: torch.device, size: int) -> dict[str, float]:
    """What the device reaches: matrix products in TFLOP/s by precision, copies in GB/s."""

    def seconds(work: Thunk) -> float:
        return statistics.median(in_turn({"work": work}, 20, 3, device)["work"])

    found = {}
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    for what, tf32 in ((_RATE, False), ("matrix products, TF32, TFLOP/s", True)):
        use_machine(None, tf32)
        found[what] = 2 * size**3 / seconds(lambda: a @ b) / 1e12
    use_machine(None)
    source = torch.empty(size * size * 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    found[_BANDWIDTH] = moved / seconds(lambda: target.copy_(source)) / 1e9
    return found


class _Moved(TorchDispatchMode):
    """Bytes of the tensors that operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.name.startswith("aten::empty"):
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor):  # of one that is expanded, what is there
                    size = tensor.numel() * tensor.element_size()
                    self.total += min(size, tensor.untyped_storage().nbytes())
        return result


def cost_of(work: Thunk) -> Cost:
    """What a call on the CPU takes; its traces are made before."""
    work()
    with _Moved() as moved:
        work()
    return Cost(multiply_adds(work), moved.total)


def costs(make: Callable[..., Problem], sizes: tuple[int, int, int]) -> dict[str, Cost]:
    """What each row takes at these sizes, from operations counted on the CPU at small ones.

    There, since kernels of our own hide from torch's counters.
    """
    counted = []
    for rows, few in _COUNTED:
        torch.manual_seed(0)
        problem = replace(make(rows=rows), curvature_rows=few)
        timed = timed_rows(problem, rows, cuda_graphs=False)
        counted.append({title: cost_of(row) for title, row in timed.items()})
    (rows, few), (more, _), (_, many) = _COUNTED
    found = {}
    for title, first in counted[0].items():
        second, third = counted[1][title], counted[2][title]
        of_row = (second + first * -1) * (1 / (more - rows))
        of_few = (third + second * -1) * (1 / (many - few))
        constant = first + of_row * -rows + of_few * -few
        whole = sizes[2] if title.endswith("smallest mini-batch") else sizes[0]
        found[title] = constant + of_row * whole + of_few * sizes[1]
    return found


def table(
    problem: Problem,
    timed: Mapping[str, Timed],
    seconds: Mapping[str, list[float]],
    needed: Mapping[str, Cost],
    found: Mapping[str, float],
) -> str:
    """Markdown; ``needed`` is what rows take, ``found`` what `rates` found."""
    rate, bandwidth = 1e12 * found[_RATE], 1e9 * found[_BANDWIDTH]
    few = len(problem.curvature_batch[0])
    lines = [
        f"### {problem.name}, mini-batch {len(problem.inputs)}, curvature {few}",
        "",
        "| | path | ms | in gradients | of the roofline | which is |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for title, times in seconds.items():
        row = timed[title]
        ratio = statistics.median(a / g for a, g in zip(times, seconds[row.unit], strict=True))
        middle = statistics.median(times)
        cells = [title.removesuffix(_GRAPHS), row.path, f"{1e3 * middle:.3f}", f"{ratio:.2f}"]
        cost = needed.get(title.removesuffix(_GRAPHS))
        if cost is None:
            cells += ["", ""]
        else:
            computing, moving = cost.flop / rate, cost.moved / bandwidth
            cells.append(f"{max(computing, moving) / middle:.0%}")
            cells.append("arithmetic" if computing > moving else "memory")
        lines.append(f"| {' | '.join(cells)} |")
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
mini-batch: products and set-up are on the curvature mini-batch, and in gradients of that one.
Updates have {ITERATIONS} CG iterations. *Path*: what an update says of itself (`last_step.path`);
*replayed* is as a CUDA graph. *Of the roofline*: which share of its time a row needs at the rates
measured: for its arithmetic at that of matrix products, or for the tensors that its operations read
and write at that of copies, whichever takes longer. Operations are counted one by one, as torch
makes them on a CPU; kernels that do several in one, or find tensors in a cache, move less, and may
come out above 100 %."""


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
        timed = timed_rows(problem, small, graphs.available(device))
        seconds = in_turn({**timed}, options.rounds, graphs.WARM_UP + 2, device)
        raw[name] = seconds  # type: ignore[assignment]
        needed = costs(PROBLEMS[name], (rows, few, small))
        text.append(table(problem, timed, seconds, needed, found))
        print("\n" + text[-1], flush=True)
        if options.output:
            options.output.write_text("\n\n".join(text) + "\n")
            options.output.with_suffix(".json").write_text(json.dumps(raw))


if __name__ == "__main__":
    main()
