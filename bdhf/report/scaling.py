"""Beyond one device: `bdhf.scaling` fitted to what was measured, checked, and extrapolated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bdhf.experiment import shipped
from bdhf.report.evidence import Cell, Evidence
from bdhf.scaling.model import (
    Cost,
    Costs,
    Device,
    Network,
    Prediction,
    Sizes,
    SolveCost,
    fitted,
    network_from,
    predicted,
    said_by,
)
from bdhf.steps import Collective

#: Devices to which is extrapolated.
DEVICES = tuple(2**k for k in range(11))

#: Optimizers, and who solves which blocks.
METHODS = (("adam", "data"), ("hf", "data"), ("bdhf", "data"), ("bdhf", "counted"))

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Assumed:
    """Devices and network of the extrapolation. No GPU and no such network was measured.

    Attributes:
        speed: of a device, in cores of the machine that was measured. 200: an H100 has 67 TFLOP/s
            in single precision by its data sheet; of that 30 % are 20 TFLOP/s, and a core here does
            about 0.1.
        launch: seconds that an operation takes beside its arithmetic: 10 µs, what Python, torch and
            the driver take for it, since updates of several ranks are not recorded.
        latency, bandwidth: of the network: 10 µs, and 25 GB/s, a link of 200 Gbit/s a device.
        check_every: CG iterations between two looks, as on a GPU.
    """

    speed: float = 200.0
    launch: float = 1e-5
    latency: float = 1e-5
    bandwidth: float = 25e9
    check_every: int = 8

    @property
    def device(self) -> Device:
        """What computes."""
        return Device(self.speed, self.launch, check_every=self.check_every)

    @property
    def network(self) -> Network:
        """What connects it."""
        return Network(self.latency, self.bandwidth)


@dataclass(frozen=True)
class Measured:
    """The rows of ``scaling_measured.csv`` of one experiment."""

    rows: Rows

    def of(self, part: str, **wanted: Any) -> list[Mapping[str, str]]:
        """Rows of a part in which these columns are so."""
        sought = {"part": part, **{k: str(v) for k, v in wanted.items()}}
        return [r for r in self.rows if all(r[k] == v for k, v in sought.items())]

    def cost(self, part: str, **wanted: Any) -> Cost:
        """A part's cost; of several sizes, the line through their times."""
        found = self.of(part, **wanted)
        launches = float(found[0]["launches"])
        if len(found) == 1:
            return Cost(seconds(found[0]), launches=launches)
        return Cost(*fitted([(float(r["rows"]), seconds(r)) for r in found]), launches)

    def costs(self, optimizer: str) -> Costs:
        """What an update of an optimizer takes."""
        kind = "hf" if optimizer == "adam" else optimizer  # for Adam the whole is one block
        blocks = self.of("block", optimizer=kind)
        sets = {r["blocks"] for r in self.of("algebra", optimizer=optimizer)}
        (packed,) = self.of("packing")
        return Costs(
            tuple(int(r["parameters"]) for r in blocks),
            () if optimizer == "adam" else tuple(float(r["counted"]) for r in blocks),
            self.cost("gradient"),
            self.cost("step", optimizer=optimizer),
            Cost(0.0, seconds(packed) / float(packed["rows"]), float(packed["launches"])),
            {tuple(map(int, s.split("+"))): self._solve(optimizer, s) for s in sorted(sets)},
        )

    def _solve(self, optimizer: str, blocks: str) -> SolveCost:
        parts = (
            self.cost(p, optimizer=optimizer, blocks=blocks)
            for p in ("set-up", "product", "algebra")
        )
        return SolveCost(*parts)

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows of the mini-batch and of the curvature mini-batch."""
        few = (int(r["rows"]) for r in self.of("product"))
        return max(int(r["rows"]) for r in self.of("gradient")), max(few)

    def machine(self, processes: int) -> tuple[Device, Network]:
        """This machine with so many processes: its cores, and what they say to each other."""
        if processes == 1:
            return Device(), Network(0.0, math.inf)
        ((alone,), (crowded,)) = (self.of("crowd", processes=n) for n in (1, processes))
        points = [
            (Collective(kind, processes, 1, int(r["bytes"])), seconds(r))
            for kind in ("all_reduce", "broadcast")
            for r in self.of(kind, processes=processes)
        ]
        cores = processes * seconds(alone) / seconds(crowded)
        return Device(cores=cores), network_from(points)


def seconds(row: Mapping[str, str]) -> float:
    """The fastest round's: whatever else a machine does only adds to it."""
    return float(row["least"])


def by_experiment(rows: Rows) -> dict[str, Measured]:
    """What was measured of each experiment."""
    names = dict.fromkeys(row["experiment"] for row in rows)
    return {name: Measured([r for r in rows if r["experiment"] == name]) for name in names}


def checked(rows: Rows) -> list[dict[str, Any]]:
    """Each measured update beside what the model says of it.

    Raises:
        AssertionError: the collectives are not those that the model counts.
    """
    found = []
    for name, measured in by_experiment(rows).items():
        for row in measured.of("update"):
            costs = measured.costs(row["optimizer"])
            processes = int(row["processes"])
            products = tuple(int(n) for n in row["products"].split("+") if n)
            sizes = Sizes(*measured.sizes, products)
            teams = costs.teams(processes, row["placement"])
            device, network = measured.machine(processes)
            model = predicted(costs, sizes, teams, device, network)
            said = said_by(costs, sizes, teams, rank=0)
            counts = sum(c.calls for c in said), sum(c.bytes for c in said)
            assert counts == (int(row["calls"]), int(row["said_bytes"])), (counts, row)
            found.append(
                {
                    "experiment": name,
                    **{k: row[k] for k in ("optimizer", "placement", "processes", "products")},
                    "collectives": counts[0],
                    "bytes": counts[1],
                    "measured": seconds(row),
                    "predicted": _short(model.seconds),
                    "ratio": round(model.seconds / seconds(row), 3),
                    "talking": _short(model.talking),
                    "cores": round(device.cores, 2) if processes > 1 else 1,
                    "latency": _short(network.latency),
                    "bandwidth": _short(network.bandwidth) if processes > 1 else None,
                    "others": row["others"],
                }
            )
    return found


def extrapolated(
    rows: Rows, evidence: Evidence, scale: str, assumed: Assumed
) -> list[dict[str, Any]]:
    """What updates take on many devices, and what it takes to get to the experiment's target."""
    found = []
    for name, measured in by_experiment(rows).items():
        for optimizer, placement in METHODS:
            for cell in _cells(evidence, name, optimizer, measured.sizes):
                sizes = _sizes(cell, scale)
                costs = measured.costs(optimizer)
                for devices in DEVICES:
                    teams = costs.teams(devices, placement)
                    device, network = assumed.device, assumed.network
                    model = predicted(costs, sizes, teams, device, network)
                    at_once = predicted(costs, sizes, teams, replace(device, launch=0.0), network)
                    found.append(
                        {
                            "experiment": name,
                            "optimizer": optimizer,
                            "placement": placement,
                            "batch_size": cell.key.batch_size,
                            "curvature_batch_size": cell.key.curvature_batch_size,
                            "products": "+".join(map(str, sizes.products)),
                            "dearest": _dearest(costs),
                            "devices": devices,
                            **_of_update(model, at_once),
                            **_to_target(model, cell, evidence),
                            **asdict(assumed),
                        }
                    )
    return found


def _cells(evidence: Evidence, name: str, optimizer: str, sizes: tuple[int, int]) -> list[Cell]:
    """All cells of Adam, which may choose; of the others the one that was measured."""
    cells = evidence.cells.get((name, optimizer), [])
    return [
        cell
        for cell in cells
        if optimizer == "adam" or sizes == (cell.key.batch_size, cell.key.curvature_batch_size)
    ]


def _sizes(cell: Cell, scale: str) -> Sizes:
    """A cell's sizes, with the median of CG's iterations over evaluations and seeds."""
    key = cell.key
    if key.curvature_batch_size is None:
        return Sizes(key.batch_size)
    columns = (cell.curves.columns[f"cg_iterations_{k}"][:, 1:] for k in range(99)
               if f"cg_iterations_{k}" in cell.curves.columns)  # fmt: skip
    products = [round(float(np.nanmedian(c))) + 1 for c in columns if np.isfinite(c).any()]
    cap = shipped(key.experiment, scale, key.optimizer)[0]["optimizer"]["cg_max_iter"]
    return Sizes(key.batch_size, key.curvature_batch_size, tuple(products), cap)


def _dearest(costs: Costs) -> float | None:
    """The share of the dearest block in the counted work of a round."""
    return _short(max(costs.counted) / sum(costs.counted)) if costs.counted else None


def _of_update(model: Prediction, at_once: Prediction) -> dict[str, Any]:
    """Of it in collectives, and in launches, which ``at_once`` does without."""
    return {
        "collectives": model.calls,
        "bytes": model.bytes,
        "seconds": _short(model.seconds),
        "talking": _short(model.talking),
        "launching": _short(model.seconds - at_once.seconds),
    }


def _to_target(model: Prediction, cell: Cell, evidence: Evidence) -> dict[str, Any]:
    """The same of all updates until the target is met: the median over the seeds, if they do."""
    goal = evidence.targets[cell.key.experiment]
    if goal.metric is None:
        return {}
    needed = [last for _, last in cell.updates_to_target(goal).values()]
    updates = statistics.median_low(needed)
    met = sum(map(math.isfinite, needed))
    facts = {"target": f"{goal.metric} {goal.value:g}", "met": f"{met} of {len(needed)}"}
    if not math.isfinite(updates):
        return facts
    return {
        **facts,
        "updates_to_target": int(updates),
        "collectives_to_target": int(updates * model.calls),
        "bytes_to_target": int(updates * model.bytes),
        "seconds_to_target": _short(updates * model.seconds),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
