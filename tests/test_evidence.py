"""What of the tables is judged, what is left aside, and tables that are refused."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bdhf.record import read_table, write_table
from bdhf.report import sections
from bdhf.report.evidence import along, read_evidence
from bdhf.report.page import make_report
from bdhf.report.readme import README
from bdhf.report.table import TableError, read_curves

Rows = list[dict[str, str]]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the committed tables of laptop scale."""
    folder = tmp_path / "laptop"
    folder.mkdir()
    for file in (README.parent / "results" / "laptop").glob("*.csv"):
        shutil.copy(file, folder)
    return tmp_path


def change(results: Path, name: str, how: Callable[[Rows], Rows]) -> None:
    path = results / "laptop" / name
    write_table(path, how(read_table(path)))


def with_values(of: dict[str, str], **values: str) -> Callable[[Rows], Rows]:
    """Change the rows that have certain values."""

    def changed(rows: Rows) -> Rows:
        assert any(of.items() <= row.items() for row in rows)
        return [row | values if of.items() <= row.items() else row for row in rows]

    return changed


HF = {"experiment": "autoencoder", "optimizer": "hf", "curvature_batch_size": "250"}


def test_runs_of_settings_that_shipped_once_are_shown_and_not_judged(results: Path) -> None:
    before = read_evidence(results, "laptop")
    assert len(before.cells["autoencoder", "hf"]) == 2
    change(results, "runs.csv", with_values({**HF, "changed": "", "study": ""}, settings="0ld"))
    found = read_evidence(results, "laptop")
    (left,) = found.cells["autoencoder", "hf"]
    assert left.key.curvature_batch_size == 500
    assert len(found.drawn("autoencoder")) == len(before.drawn("autoencoder"))
    (past,) = (cell for cell in found.others if cell.key.settings == "0ld")
    assert str(past) == "HF, mini-batch 2000, curvature 250 (settings-before=0ld)"
    verdicts = {v.claim.id: v for v in make_report(results, "laptop").verdicts}
    assert verdicts["A3"].why == "HF in experiment autoencoder has runs of 1 of 2 sizes"
    # What was measured on them is not judged either.
    runs = {row["run"] for row in found.times if row["experiment"] == "autoencoder"}
    assert not runs and any(row["experiment"] == "autoencoder" for row in before.times)


def test_a_run_as_shipped_is_a_figures_whatever_it_was_made_for(results: Path) -> None:
    before = read_evidence(results, "laptop").cells["autoencoder", "hf"]
    change(results, "runs.csv", with_values({**HF, "seed": "1", "changed": ""}, study="mine"))
    found = read_evidence(results, "laptop").cells["autoencoder", "hf"]
    assert [cell.key for cell in found] == [cell.key for cell in before]
    assert all(cell.seeds == [0, 1, 2] for cell in found)


def test_the_page_says_how_many_runs_were_there_before_the_rule(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that verdicts rest on: a claim's, not a trial's or somebody's own."""
    where = "runs here that verdicts rest on (the figures' and those with other blocks; tuning "
    where += "apart)"
    rows = read_table(results / "laptop" / "runs.csv")
    judged = [row["start"] for row in rows if row["study"] in ("", "blocks")]
    for early in (0, 10):
        monkeypatch.setattr(sections, "FIXED", sorted(judged)[early])
        said = f"Of the {len(judged)} {where} {early or 'none'} had begun before. "
        assert said in make_report(results, "laptop").markdown
    change(results, "runs.csv", with_values({**HF, "changed": "", "study": ""}, settings="0ld"))
    assert f"Of the {len(judged) - 3} {where}" in make_report(results, "laptop").markdown


def test_runs_are_counted_by_what_they_are_for(results: Path) -> None:
    counts = Counter(row["study"] for row in read_table(results / "laptop" / "runs.csv"))
    assert (
        f" {counts['']} runs of the figures (3 seeds an experiment), {counts['blocks']} runs of "
        f"the blocks study (3 seeds an experiment), {counts['tuning']} runs of the tuning study "
        "(1 seed an experiment); on "
    ) in make_report(results, "laptop").markdown


def test_what_diverged_as_shipped_in_the_tuning_is_said(results: Path) -> None:
    text = make_report(results, "laptop").markdown
    assert (
        "Experiment resnet was tuned at seed 0 only, where HF and block-diagonal HF as shipped "
        "diverge on this split"
    ) in text and text.count(" was tuned at seed ") == 1
    (line,) = [line for line in text.splitlines() if "held out for validation it did" in line]
    assert line.startswith("HF in experiment resnet, seed 0,")
    assert "hf-b1000-c125-seed0-34239a18, training loss nan at update 6" in line


def test_names_from_elsewhere_are_text(results: Path) -> None:
    hostile = "CPU | <img src=x onerror=alert(1)> *x*"
    change(results, "runs.csv", with_values(HF, processor=hostile))
    report = make_report(results, "laptop")
    assert "<img" not in report.html.split("<script")[0] and "<em>x</em>" not in report.html
    rows = [line for line in report.markdown.splitlines() if line.startswith("| cpu | CPU")]
    assert rows and all(r"\<img" in row for row in rows)
    assert all(row.replace(r"\|", "").count("|") == 10 for row in rows)


def test_equal_work_is_not_equal_updates(results: Path) -> None:
    """Block-diagonal HF is ahead by updates; by work less so, since its updates cost more."""
    ours, theirs = read_evidence(results, "laptop").pairs("autoencoder")[0]
    by_update = along(ours, theirs, "update", "train_loss")
    by_work = along(ours, theirs, "gradient_equivalents", "train_loss")
    assert sorted(by_update) == sorted(by_work) == [0, 1, 2]
    for seed in by_update:
        losses = (cell.course(seed, "train_loss")[-1] for cell in (ours, theirs))
        end = 1 - next(losses) / next(losses)
        assert by_update[seed][1] == pytest.approx(end)
        assert by_work[seed][0] < by_update[seed][0]
    assert all(share == pytest.approx((0, 0)) for share in along(ours, ours, "seconds",
               "train_loss").values())  # fmt: skip


def test_seeds_that_diverged_are_not_compared_at_equal_work(results: Path) -> None:
    ours, theirs = read_evidence(results, "laptop").pairs("resnet")[0]
    lost = {s for s, why in zip(ours.seeds, ours.curves.diverged, strict=True) if why}
    assert lost and set(along(ours, theirs, "update", "train_loss")) == set(ours.seeds) - lost


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def nonsense(path: Path) -> None:
    path.write_text(path.read_text().replace(",20,", ",oops,", 1))


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def without_a_column(path: Path) -> None:
    path.write_text(path.read_text().replace("update", "step", 1))


def twice(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1]]) + "\n")


def empty(path: Path) -> None:
    path.write_text(path.read_text().splitlines()[0] + "\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "curves.csv"),
        (nonsense, r"curves.csv, line \d+: ValueError.*oops"),
        (binary, "curves.csv"),
        (without_a_column, "curves.csv, line 2: KeyError.*update"),
        (twice, r"curves.csv, line \d+: .*in order, each once"),
        (empty, "curves.csv: run .* ends at update -1, by runs.csv at"),
    ],
)
def test_a_damaged_table_is_refused_by_name(
    damage: Callable[[Path], None], words: str, results: Path
) -> None:
    damage(results / "laptop" / "curves.csv")
    with pytest.raises(TableError, match=f"{words}.*git checkout gets it back"):
        read_curves(results, "laptop")


def test_a_scale_without_tables_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"make reproduce-all .*\(SCALE: demo, laptop, paper\)"):
        read_curves(tmp_path, "labtop")
