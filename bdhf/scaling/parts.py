"""The parts of an update, and whole updates by several processes, timed in turn.

What `bdhf.scaling.model` is made of and checked against.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdhf.batches import Batch, cut
from bdhf.cg import Systems
from bdhf.config import Config
from bdhf.curvature import GaussNewton, flattened
from bdhf.data import load
from bdhf.distributed.placement import balanced_teams
from bdhf.distributed.ranks import Ranks
from bdhf.experiment import Experiment
from bdhf.gradient import loss_and_gradient
from bdhf.linearization import Linearizer
from bdhf.optimizer import BlockDiagonalHF
from bdhf.record import processor
from bdhf.scaling.model import NUMBER
from bdhf.scaling.turns import Others, Row, Timed, in_turn, spread
from bdhf.training import batch_indices, stream_seed
from bdhf.update import Update
from bdhf.work import count_work

#: How many processes make updates together.
PROCESSES = (1, 2, 4)

#: Shares of a mini-batch on which parts are timed, so that fixed and growing costs come apart.
_SHARES = (1, 2, 4, 16)

Blocks = list[list[nn.Parameter]]


def mini_batches(experiment: Experiment, config: Config) -> list[Batch]:
    """The first two mini-batches of a run; all processes get those of the first one."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        images = load(config.data.name, config.data.root, config.data.validation_rows)
        inputs, targets = experiment.prepare(images, config.network)[0]
        for k in range(len(found)):
            rows = batch_indices(k, config.batch_size, len(inputs), config.seed)
            found[k] = inputs[rows], targets[rows]
    dist.broadcast_object_list(found)
    return found


def measure(experiment: Experiment, configs: Mapping[str, Config], rounds: int) -> list[Row]:
    """Everything of one experiment, at the sizes of block-diagonal HF's config."""
    *fewer, most = PROCESSES
    if dist.get_world_size() != most:
        raise ValueError(f"{dist.get_world_size()} processes; there must be {most}")
    groups: list[Any] = [dist.new_group(list(range(count))) for count in fewer]
    groups.append(dist.group.WORLD)
    batches = mini_batches(experiment, configs["bdhf"])
    problem = _Problem(experiment, configs, batches)
    timed = [
        *problem.facts(),
        *problem.parts(),
        *problem.crowds(),
        *_talks(sum(p.numel() for p in problem.model.parameters()), groups),
        *problem.updates(groups),
    ]
    others = Others()
    in_turn(timed, rounds)
    machine = {"rounds": rounds, "others": others.busy(), "processor": processor()}
    columns = ("part", "optimizer", "placement", "blocks", "processes", "rows", "bytes")
    return [
        {
            "experiment": experiment.name,
            **dict.fromkeys(columns),
            **one.row,
            "processes": one.processes,
            **spread(one.seconds),
            **one.after(),
            **machine,
            "torch": torch.__version__,
        }
        for one in timed
    ]


@dataclass
class _Problem:
    """One experiment's network and optimizers, in each process alike."""

    experiment: Experiment
    configs: Mapping[str, Config]
    batches: list[Batch]

    def __post_init__(self) -> None:
        self.config = config = self.configs["bdhf"]
        torch.manual_seed(stream_seed("initialisation", config.seed))
        self.model = config.optimizer.prepare(self.experiment.network(config.network)).train()
        assert config.curvature_batch_size is not None
        self.few = config.curvature_batch_size
        self.batch = self.batches[1]
        self.criterion = self.experiment.criterion

    def optimizer(self, name: str) -> Any:
        """One that leaves the weights as they are, so that all updates are of the same."""
        settings = dataclasses.replace(self.configs[name].optimizer, lr=0.0)
        return settings.make(self.model, self.experiment.blocks)[1]

    def blocks(self, name: str) -> Blocks:
        return [list(group["params"]) for group in self.optimizer(name).param_groups]

    def counted(self, blocks: Blocks) -> list[float]:
        work = count_work(self.model, self.criterion, cut(self.batch, 0, 2), blocks)
        return work.products

    def facts(self) -> Iterator[Timed]:
        """The blocks: their parameters, and the counted work of a product with each."""
        for name in ("hf", "bdhf"):
            blocks = self.blocks(name)
            for k, (block, work) in enumerate(zip(blocks, self.counted(blocks), strict=True)):
                numbers = sum(p.numel() for p in block)
                facts = {"parameters": numbers, "counted": float(f"{work:.6g}")}
                yield Timed({"part": "block", "optimizer": name, "blocks": k, **facts}, None)

    def parts(self) -> Iterator[Timed]:
        """The parts of an update, by one process while the others rest."""
        parameters = [p for block in self.blocks("hf") for p in block]
        for share in _SHARES:
            rows = max(1, self.config.batch_size // share)
            batch = cut(self.batch, 0, rows)
            call = functools.partial(
                loss_and_gradient, self.model, self.criterion, batch, parameters
            )
            yield _counted({"part": "gradient", "rows": rows}, call)
        vectors = [p.detach().clone() for p in parameters]
        numbers = sum(p.numel() for p in parameters)
        yield _counted(
            {"part": "packing", "rows": numbers},
            lambda: flattened(vectors, torch.float32).mul_(0.5).split([1, numbers - 1]),
        )
        adam = self.optimizer("adam").optimizer
        yield _counted({"part": "step", "optimizer": "adam"}, functools.partial(_step, adam))
        for name in ("hf", "bdhf"):
            blocks = self.blocks(name)
            yield _counted({"part": "step", "optimizer": name}, self._silent_update(name))
            for chosen in _sets(self.counted(blocks)):
                what = {"optimizer": name, "blocks": "+".join(map(str, chosen))}
                yield from self._solve(what, [blocks[k] for k in chosen])

    def _solve(self, what: Row, blocks: Blocks) -> Iterator[Timed]:
        """Set-up, product and vector algebra of some blocks side by side."""
        linearizer = Linearizer()
        directions: list[Tensor | None] = [torch.randn(_length(block)) for block in blocks]
        for share in _SHARES:
            rows = max(1, self.few // share)
            batch = cut(self.batch, 0, rows)
            setup = functools.partial(
                GaussNewton, self.model, self.criterion, batch, blocks, linearizer=linearizer
            )
            yield _counted({"part": "set-up", **what, "rows": rows}, setup)
            product = functools.partial(setup().products, directions)
            yield _counted({"part": "product", **what, "rows": rows}, product)
        systems = _started(blocks)
        products = _Silence(blocks).products
        algebra = functools.partial(systems.round, products, range(len(blocks)))
        yield _counted({"part": "algebra", **what}, algebra)

    def _silent_update(self, name: str) -> Callable[[], object]:
        """An update of one iteration, with the gradient there and products that cost nothing."""
        optimizer = self.optimizer(name)
        groups = [{**group, "cg_max_iter": 1} for group in optimizer.param_groups]
        blocks = [list(group["params"]) for group in groups]
        state = {p: {"cg_solution": torch.randn_like(p)} for block in blocks for p in block}

        @torch.no_grad()
        def update() -> None:
            made = _SilentUpdate(
                self.model, self.criterion, None, self.batch, groups, blocks, state, None,
                Linearizer(),
            )  # fmt: skip
            made.make()
            made.finish()

        return update

    def crowds(self) -> Iterator[Timed]:
        """CG iterations with all blocks by several processes at once, each for itself."""
        blocks = self.blocks("bdhf")
        batch = cut(self.batch, 0, self.few)
        matrix = GaussNewton(self.model, self.criterion, batch, blocks)
        systems = _started(blocks)
        call = functools.partial(systems.round, matrix.products, range(len(blocks)))
        for count in PROCESSES:
            yield Timed({"part": "crowd", "optimizer": "bdhf"}, call, count, calls=5)

    def updates(self, groups: Sequence[Any]) -> Iterator[Timed]:
        """Whole updates: all optimizers and placements, by each number of processes."""
        for count, group in zip(PROCESSES, groups, strict=True):
            for name, placement in (
                ("adam", "data"),
                ("hf", "data"),
                ("bdhf", "data"),
                ("bdhf", "counted"),
            ):
                if count == 1 and placement == "counted":
                    continue
                what = {"part": "update", "optimizer": name, "placement": placement}
                whole = _WholeUpdate(self, name)
                if count > 1 and dist.get_rank() < count:
                    whole.optimizer.ranks = Ranks(group, placement, sharded=False)  # type: ignore[arg-type]
                yield Timed(
                    {**what, "rows": self.config.batch_size}, whole.make, count, 1,
                    whole.put_back, whole.report,
                )  # fmt: skip


class _WholeUpdate:
    """An update from the same weights and the same last solution, time and again."""

    def __init__(self, problem: _Problem, name: str) -> None:
        self.optimizer = problem.optimizer(name)
        self._problem = problem
        self._kept: dict[Tensor, Tensor] | None = None

    def _on(self, batch: Batch) -> None:
        problem = self._problem
        few = cut(batch, 0, problem.few)
        self.optimizer.step(problem.model, problem.criterion, batch, few)

    def make(self) -> None:
        self._on(self._problem.batch)

    def put_back(self) -> None:
        """The last solution, first found on another mini-batch, as in training."""
        if not isinstance(self.optimizer, BlockDiagonalHF):
            return
        if self._kept is None:
            self._on(self._problem.batches[0])
            self._kept = {p: s["cg_solution"].clone() for p, s in self.optimizer.state.items()}
        for p, solution in self._kept.items():
            self.optimizer.state[p]["cg_solution"].copy_(solution)

    def report(self) -> Row:
        """What the last one did; the collectives are this process's."""
        done = self.optimizer.last_step
        if done is None:  # this process has no part in it
            return {}
        return {
            "products": "+".join(str(block.products) for block in done.blocks),
            "calls": sum(said.calls for said in done.traffic),
            "said_bytes": sum(said.bytes for said in done.traffic),
        }


def _talks(parameters: int, groups: Sequence[Any]) -> Iterator[Timed]:
    """Collectives of a number, of all parameters, and of something between."""
    for count, group in zip(PROCESSES, groups, strict=True):
        for numbers in sorted({1, max(2, parameters // 30), parameters} if count > 1 else ()):
            tensor = torch.zeros(numbers)
            turns = [
                functools.partial(dist.broadcast, tensor, k, group=group) for k in range(count)
            ]
            reduce = functools.partial(dist.all_reduce, tensor, group=group)
            for kind, calls in (("all_reduce", [reduce] * count), ("broadcast", turns)):
                row = {"part": kind, "bytes": NUMBER * numbers}
                times = 2 if numbers > 50_000 else 20
                yield Timed(row, functools.partial(_each, calls), count, times, each=count)


def _each(calls: Sequence[Callable[[], object]]) -> None:
    """Each waits for the one before: a broadcast's source has to have got the last one."""
    for call in calls:
        call()


class _SilentUpdate(Update):
    """An update whose products cost nothing."""

    def linearized(self, batch: Any, blocks: Any, random_state: Any) -> Any:
        return _Silence(blocks)


class _Silence:
    """Products that are there already: as many numbers, and nothing computed."""

    def __init__(self, blocks: Blocks) -> None:
        self._found: list[Tensor | None] = [torch.rand(_length(block)) for block in blocks]

    def products(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return self._found


def _started(blocks: Blocks) -> Systems:
    systems = Systems([torch.rand(_length(block)) for block in blocks], max_iter=10**6)
    systems.start(_Silence(blocks).products)
    return systems


def _length(block: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in block)


def _step(optimizer: torch.optim.Optimizer) -> None:
    """What follows the gradient in an update of a first-order method."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    optimizer.step()


def _sets(counted: Sequence[float]) -> list[tuple[int, ...]]:
    """The blocks that a team may have, with any number of ranks."""
    every = range(len(counted))
    found = {tuple(every), *((k,) for k in every)}
    for ranks in range(2, len(counted)):
        found |= {team.blocks for team in balanced_teams(counted, ranks)}
    return sorted(found)


def _counted(row: Row, call: Callable[[], object]) -> Timed:
    """One to be timed, with the operations of which it consists."""

    def launches() -> Row:
        with _Operations() as operations:
            call()
        return {"launches": operations.count}

    return Timed(row, call, after=launches)


class _Operations(TorchDispatchMode):
    """Counts operations that would be work for a device: all but views."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
