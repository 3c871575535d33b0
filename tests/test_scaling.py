"""The model of updates on many devices: its formulas, and what real updates say to each other."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bdhf.distributed.placement import Team
from bdhf.record import read_table
from bdhf.report.devices import beyond_one_device, draw_scaling
from bdhf.report.scaling import METHODS, by_experiment, checked
from bdhf.report.sections import Picture
from bdhf.scaling.model import (
    Cost,
    Costs,
    Device,
    Network,
    Sizes,
    SolveCost,
    fitted,
    merged,
    network_from,
    predicted,
    said_by,
)
from bdhf.steps import Collective

FREE = Cost(0.0)
HERE, SILENT = Device(), Network(0.0, math.inf)


def costs(**changes: Any) -> Costs:
    """Two blocks, of 10 and 30 parameters; the first costs twice as much as the second."""
    solves = {
        (0,): SolveCost(Cost(1.0), Cost(0.0, 0.2), Cost(0.5)),
        (1,): SolveCost(Cost(1.0), Cost(0.0, 0.1), Cost(0.5)),
        (0, 1): SolveCost(Cost(2.0), Cost(0.0, 0.3), Cost(1.0)),
    }
    usual = Costs((10, 30), (2.0, 1.0), Cost(1.0, 0.01), Cost(4.0), FREE, solves)
    return replace(usual, **changes)


#: Ten rows of curvature, three and one CG iterations, and a warm start.
SIZES = Sizes(100, 10, (4, 2), cap=5)


def test_collectives_take_what_the_formulas_say() -> None:
    network = Network(latency=1e-3, bandwidth=1e6)

    def seconds(kind: str, ranks: int, size: int = 1000, calls: int = 1) -> float:
        return network.seconds(Collective(kind, ranks, calls, size))

    assert seconds("all_reduce", 2) == pytest.approx(2 * 1e-3 + 2 * 0.5 * 1e-3)
    assert seconds("all_reduce", 8) == pytest.approx(6e-3 + 2 * 7 / 8 * 1e-3)
    assert seconds("broadcast", 8) == pytest.approx(3e-3 + 1e-3)
    assert seconds("all_gather", 8) == pytest.approx(3e-3 + 7 / 8 * 1e-3)
    assert seconds("all_reduce", 5) == pytest.approx(6e-3 + 2 * 4 / 5 * 1e-3)  # three steps
    # Ten calls of a tenth wait ten times, and send as much.
    assert seconds("broadcast", 8, calls=10) == pytest.approx(30e-3 + 1e-3)
    assert seconds("broadcast", 1) == 0.0


def test_an_update_of_one_device_by_hand() -> None:
    teams = costs().teams(1, "counted")
    assert teams == [Team((0, 1), (0,))]
    model = predicted(costs(), SIZES, teams, HERE, Network(1.0, 1.0))
    # Set-up, the product of the warm start, a round of both blocks, two of the first one alone.
    solving = 2 + 3 + (3 + 1) + 2 * (2 + 1)
    assert model.seconds == pytest.approx((1 + 1) + 4 + solving)
    assert model.talking == 0 and model.traffic == ()


def test_blocks_apart_wait_for_the_slowest() -> None:
    model = predicted(costs(), SIZES, costs().teams(2, "counted"), HERE, SILENT)
    slowest = 1 + 2 + 3 * (2 + 0.5)
    assert model.seconds == pytest.approx((1 + 0.5) + 4 + slowest)
    assert model.traffic == (
        Collective("all_reduce", 2, 1, 4 * 41),
        Collective("broadcast", 2, 2, 4 * (40 + 8)),
    )


def test_data_parallel_shares_rows_and_talks_in_every_round() -> None:
    teams = costs().teams(2, "data")
    model = predicted(costs(), SIZES, teams, HERE, SILENT)
    assert model.seconds == pytest.approx((1 + 0.5) + 4 + 2 + 1.5 + (1.5 + 1) + 2 * (1 + 1))
    assert dict.fromkeys(model.traffic) == {
        # The gradient with the loss; the warm start and a round of 40 numbers, two of 10.
        Collective("all_reduce", 2, 5, 4 * (41 + 2 * 40 + 2 * 10)): None,
        # The solutions; four inner products at first, two a round, of two blocks each.
        Collective("broadcast", 2, 11, 4 * (48 + 10 * 2)): None,
    }
    slow = Network(latency=0.1, bandwidth=100.0)
    talking = 0.1 * (2 * 5 + 11) + 4 * (41 + 80 + 20) / 100 + 4 * (48 + 20) / 100
    found = predicted(costs(), SIZES, teams, HERE, slow)
    assert found.talking == pytest.approx(talking)
    assert found.seconds == pytest.approx(model.seconds + talking)


def test_messages_have_to_be_packed() -> None:
    packed = costs(packing=Cost(0.0, 1.0))
    extra = {}
    for ranks in (1, 2):
        teams = costs().teams(ranks, "data")
        pair = (predicted(c, SIZES, teams, HERE, SILENT).seconds for c in (packed, costs()))
        extra[ranks] = next(pair) - next(pair)
    # The gradient and the solutions, and the products of the rounds.
    assert extra == {1: 0.0, 2: pytest.approx(2 * 40 + 40 + 2 * 10)}


def test_fewer_cores_than_ranks_go_round() -> None:
    adam = Costs((40,), (), Cost(2.0), Cost(1.0), FREE)
    teams = adam.teams(4, "data")
    sizes = Sizes(8)
    assert predicted(adam, sizes, teams, Device(cores=4), SILENT).seconds == pytest.approx(3)
    assert predicted(adam, sizes, teams, Device(cores=2), SILENT).seconds == pytest.approx(6)
    # Of unequal ranks the sum counts, or the longest.
    assert Device(cores=1.5).stretched([3.0, 1.0]) == pytest.approx(1.0)
    assert Device(cores=1.0).stretched([3.0, 1.0]) == pytest.approx(4 / 3)
    assert Device(cores=1.0).stretched([0.0]) == 1.0


def test_launches_do_not_get_faster() -> None:
    cost = Cost(2.0, 0.5, launches=7)
    assert cost.seconds(Device(speed=10, launch=0.1), rows=4) == pytest.approx(0.4 + 0.7)


def test_rounds_go_on_until_somebody_looks() -> None:
    sizes = Sizes(1, 1, (31, 4), cap=30)
    assert [sizes.rounds(0, every) for every in (1, 8, 7)] == [30, 30, 30]
    assert [sizes.rounds(1, every) for every in (1, 2, 8)] == [3, 4, 8]
    fast, seldom = (Device(check_every=every) for every in (1, 8))
    teams = costs().teams(2, "data")
    counts = [predicted(costs(), SIZES, teams, d, SILENT).calls for d in (fast, seldom)]
    assert counts == [1 + 4 + 1 + 10, 1 + 6 + 1 + 14]  # five rounds, which is the cap


@pytest.mark.parametrize("placement", ["data", "counted"])
def test_more_devices_never_compute_longer_and_slower_networks_never_help(placement: str) -> None:
    def model(ranks: int, device: Device = HERE, network: Network = SILENT) -> float:
        return predicted(costs(), SIZES, costs().teams(ranks, placement), device, network).seconds

    times = [model(ranks) for ranks in (1, 2, 4, 8, 64, 1024)]
    assert times == sorted(times, reverse=True) and times[-1] < times[0]
    for worse in (Network(1e-3, math.inf), Network(0.0, 1e3)):
        later = [model(ranks, network=worse) for ranks in (2, 8, 64, 1024)]
        assert all(a > b for a, b in zip(later, times[1:2] + times[3:], strict=True))
    assert model(8, Device(speed=10)) == pytest.approx(model(8) / 10)


def test_a_line_is_found_again_and_is_nowhere_below_zero() -> None:
    assert fitted([(x, 2 + 3.0 * x) for x in (1, 10, 100)]) == pytest.approx((2, 3))
    fixed, slope = fitted([(1, 0.1), (2, 2.0), (4, 6.0)])
    assert fixed == 0 and slope > 0
    assert fitted([(1, 3.0), (5, 1.0)])[1] == 0
    # As many per cent off at 1 as at 100 counts as much.
    assert fitted([(1, 1.1), (100, 100.0)])[0] == pytest.approx(0.1, rel=0.1)


def test_latency_and_bandwidth_are_found_again() -> None:
    true = Network(2e-4, 3e8)
    said = [Collective(kind, 4, 1, n) for kind in ("all_reduce", "broadcast") for n in (4, 10**7)]
    found = network_from([(c, true.seconds(c)) for c in said])
    assert (found.latency, found.bandwidth) == pytest.approx((2e-4, 3e8))


def test_model_counts_what_real_updates_say(tmp_path: Path) -> None:
    """Every collective and every byte, of every rank of two and of four."""
    path = tmp_path / "found.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(Path(__file__).with_name("traffic.py"))
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "4", script, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert len(found) == 2 * 9
    stopped_apart = 0
    for name, case in found.items():
        facts = replace(
            costs(), parameters=tuple(case["parameters"]), counted=tuple(case["counted"])
        )
        size, placement = len(case["ranks"]), case["placement"]
        if isinstance(placement, str):
            teams = facts.teams(size, placement)
        else:
            teams = [Team(tuple(t["blocks"]), tuple(t["ranks"])) for t in placement]
        for rank, mine in enumerate(case["ranks"]):
            real = {(c["kind"], c["ranks"]): Collective(**c) for c in mine["traffic"]}
            sizes = Sizes(6, 6, tuple(mine["products"]))
            model = said_by(facts, sizes, teams, rank)
            assert {(c.kind, c.ranks): c for c in model} == real, (name, rank)
            stopped_apart += len(set(mine["products"])) > 1
    assert stopped_apart  # or it would say little


def test_collectives_of_one_kind_and_size_are_one() -> None:
    one, two = Collective("broadcast", 4, 2, 10), Collective("broadcast", 2, 1, 1)
    assert merged([one, two, one]) == (Collective("broadcast", 4, 4, 20), two)


ROOT = Path(__file__).resolve().parents[1]


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "scaling.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **variables},
    )


def test_committed_tables_are_what_was_measured_gives(tmp_path: Path) -> None:
    """Nothing is measured again, and the tables and the picture come out as they are."""
    folder = tmp_path / "laptop"
    folder.mkdir()
    committed = ROOT / "results" / "laptop"
    for name in ("curves.csv", "runs.csv", "scaling_measured.csv"):
        shutil.copy(committed / name, folder)
    done = script("laptop", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "scaling_measured.csv is there" in done.stdout
    for name in ("scaling_check.csv", "scaling.csv", "scaling.svg"):
        assert (folder / name).read_text() == (committed / name).read_text(), name
    assert (folder / "scaling.png").exists()
    before = read_table(folder / "scaling.csv")
    done = script("laptop", "--results", str(tmp_path), "--bandwidth", "1e9", "--speed", "400")
    assert done.returncode == 0, done.stderr
    for old, new in zip(before, read_table(folder / "scaling.csv"), strict=True):
        assert (new["bytes"], new["speed"]) == (old["bytes"], "400.0")
        slower = float(new["talking"]) > float(old["talking"])
        assert slower == (old["devices"] != "1")


def test_refusals(tmp_path: Path) -> None:
    done = script("laptop", "--speed", "0")
    assert done.returncode == 2 and "--speed=0.0: must be above 0" in done.stderr
    done = script("laptop", "--results", str(tmp_path))
    assert done.returncode == 1 and "curves.csv is not there; make collect" in done.stderr


@pytest.mark.slow
def test_parts_and_updates_are_measured_and_compared(tmp_path: Path) -> None:
    """What torchrun is given, at a size that takes seconds."""
    small = ["network.widths=[64,12,6]", "hessian_free.cg_max_iter=5", "seed=0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["--results", str(tmp_path), "--rounds", "1", "--experiments", "autoencoder"]
    path = str(ROOT / "scripts" / "scaling.py")
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "4", path, "demo", *arguments, "--overrides", *small],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_table(tmp_path / "demo" / "scaling_measured.csv")
    check = checked(rows)  # collectives and bytes are compared there
    expected = {(name, how, str(n)) for name, how in METHODS for n in (1, 2, 4)}
    expected.remove(("bdhf", "counted", "1"))
    assert {(r["optimizer"], r["placement"], r["processes"]) for r in check} == expected
    assert all(r["measured"] > 0 and r["predicted"] > 0 for r in check)
    model = by_experiment(rows)["autoencoder"].costs("bdhf")
    assert sum(model.parameters) == 64 * 12 * 2 + 12 * 6 * 2 + 12 + 6 + 12 + 64
    assert set(model.solves) == {(0,), (1,), (0, 1)}
    assert all(cost.product.launches > 0 for cost in model.solves.values())


def test_wrong_counts_are_found() -> None:
    rows = read_table(ROOT / "results" / "laptop" / "scaling_measured.csv")
    update = next(row for row in rows if row["part"] == "update" and row["processes"] == "2")
    update["said_bytes"] = str(int(update["said_bytes"]) + 4)
    with pytest.raises(AssertionError, match="said_bytes"):
        checked(rows)


def test_section_says_what_the_tables_say(tmp_path: Path) -> None:
    assert list(beyond_one_device(tmp_path)) == [] and draw_scaling(tmp_path) == []
    folder = ROOT / "results" / "laptop"
    parts = list(beyond_one_device(folder))
    (picture,) = [part for part in parts if isinstance(part, Picture)]
    assert picture.markdown().endswith("(scaling.png)")
    assert 'src="data:image/png;base64,' in picture.html()
    text = "\n".join(part for part in parts if isinstance(part, str))
    rows = read_table(folder / "scaling.csv")
    for row in rows:
        if row["devices"] == "64" and row["seconds_to_target"]:
            for metric in ("seconds", "seconds_to_target"):
                assert f" / {float(row[metric]):.3g} / " in text
    ratios = [float(row["ratio"]) for row in read_table(folder / "scaling_check.csv")]
    assert f"from {min(ratios):.2f} to {max(ratios):.2f}" in text
    for name in {row["experiment"] for row in rows}:
        mine = [row for row in rows if (row["experiment"], row["devices"]) == (name, "1024")]
        best = min(float(row["bytes_to_target"]) for row in mine if row["bytes_to_target"])
        line = next(part for part in text.splitlines() if part.startswith(f"- {name}, fewest"))
        assert f"({best / 1e6:.3g} MB)." in line
