"""Every shipped config composes and steps; every bad value is refused by name."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from suite import EXPERIMENTS, TINY, TINY_HF, composed, config, tiny

from bdhf.config import check_against_data, checked, settings_hash, settings_of
from bdhf.data import Images
from bdhf.errors import ConfigError
from bdhf.experiment import CONFIGS
from bdhf.machine import use_machine
from bdhf.runner import run

SCALES = sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml"))
OPTIMIZERS = sorted(path.stem for path in (CONFIGS / "optimizer").glob("*.yaml"))


def cells(experiment: str, scale: str, optimizer: str) -> int:
    return len(composed(experiment, f"scale={scale}").cells[optimizer])


SHIPPED = [
    (experiment, scale, optimizer, cell)
    for experiment, scale, optimizer in itertools.product(EXPERIMENTS, SCALES, OPTIMIZERS)
    for cell in range(cells(experiment, scale, optimizer))
]


def test_there_is_something_shipped() -> None:
    assert SCALES == ["demo", "laptop", "paper"]
    assert OPTIMIZERS == ["adam", "bdhf", "hf"]
    assert len(SHIPPED) == 3 * 3 * (1 + 2 + 3)


@pytest.mark.parametrize(("experiment", "scale", "optimizer", "cell"), SHIPPED)
def test_every_shipped_config_composes_and_steps(
    experiment: str, scale: str, optimizer: str, cell: int
) -> None:
    values = config(experiment, f"scale={scale}", f"optimizer={optimizer}", f"cell={cell}")
    parts = EXPERIMENTS[experiment]
    torch.manual_seed(0)
    model = parts.network(values.network)
    _, stepper = values.optimizer.make(model, parts.blocks)
    shape = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "digits": (1, 8, 8)}[values.data.name]
    data = torch.rand(4, *shape), torch.randint(10, (4,))
    (inputs, targets), _ = parts.prepare(Images(data, data, "", ""), values.network)
    before = [p.clone() for p in model.parameters()]
    loss = stepper.step(model, parts.criterion, (inputs, targets), (inputs[:2], targets[:2]))
    assert loss is not None and torch.isfinite(loss)
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("experiment", "batch", "updates", "damping", "cap"),
    [
        ("autoencoder", 6000, 20_000, 0.0, 30),
        ("lstm", 6000, 20_000, 0.01, 100),
        ("resnet", 5000, 10_000, 0.1, 30),
    ],
)
def test_paper_scale_is_the_table_in_its_source(
    experiment: str, batch: int, updates: int, damping: float, cap: int
) -> None:
    """Sizes that stand for the paper's: mini-batch; curvature an eighth, a quarter, a half."""
    rows = composed(experiment, "scale=paper").cells
    expected = [(batch, batch // part, 300) for part in (8, 4, 2)]
    for name in ("hf", "bdhf"):
        assert [(r.batch_size, r.curvature_batch_size, r.updates) for r in rows[name]] == expected
    assert [(r.batch_size, r.updates) for r in rows.adam] == [
        (size, updates) for size in (125, 1000, batch)
    ]
    optimizer = config(experiment, "scale=paper", "optimizer=bdhf").optimizer
    assert (optimizer.lr, optimizer.damping, optimizer.cg_max_iter) == (0.1, damping, cap)
    assert (optimizer.cg_tol, optimizer.cg_momentum) == (5e-4, 0.95)
    adam = config(experiment, "scale=paper", "optimizer=adam").optimizer
    assert (adam.lr, *adam.betas, adam.eps) == (0.001, 0.9, 0.999, 1e-8)


def test_documented_command_line_acts() -> None:
    values = config(
        "autoencoder",
        *["optimizer=bdhf", "batch_size=6000", "curvature_batch_size=750", "updates=30", "seed=1"],
        *["optimizer.lr=0.05", "device=cpu"],
    )
    assert (values.batch_size, values.curvature_batch_size, values.updates) == (6000, 750, 30)
    assert (values.seed, values.optimizer.lr, values.optimizer.name) == (1, 0.05, "bdhf")


def test_hash_covers_what_changes_the_curve_and_nothing_else() -> None:
    def hash_of(*overrides: str) -> str:
        return settings_hash(settings_of(config("autoencoder", *TINY_HF, *overrides)))

    original = hash_of()
    assert original == hash_of()
    for same in (
        "updates=9",
        "device=cpu",
        "threads=1",
        "micro_batch=7",
        "time_limit=60",
        "checkpoint_seconds=1",
        "data.root=/elsewhere",
        "results=elsewhere",
    ):
        assert hash_of(same) == original, same
    changed = {
        hash_of(other)
        for other in (
            "seed=1",
            "batch_size=61",
            "curvature_batch_size=21",
            "optimizer.lr=0.2",
            "optimizer.damping=0.5",
            "optimizer.cg_momentum=0.9",
            "network.widths=[64,12,7]",
            "evaluate_every=1",
            "evaluation_rows=50",
            "optimizer=hf",
        )
    }
    assert len(changed) == 10 and original not in changed

    # A setting added later, null by default, renames no run that was made before.
    values = settings_of(config("autoencoder", *TINY_HF))
    later = {**values, "new": None, "data": {**values["data"], "new": None}}
    assert settings_hash(later) == original != settings_hash({**values, "new": 1})


def test_saved_settings_are_resolved_and_without_helper_tables() -> None:
    values = settings_of(config("autoencoder", *TINY_HF))
    assert values["optimizer"]["damping"] == 0.0 and values["batch_size"] == 60
    assert "cells" not in values and "hessian_free" not in values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=3", "batchsize"),
        ("optimizer.learning_rate=3", "learning_rate"),
        ("optimizer.betas=[0.9,0.9]", "betas"),
        ("network.depth=3", "depth"),
        ("data.folder=x", "folder"),
        ("optimizer=sgd", "optimizer/sgd"),
        ("scale=desktop", "scale/desktop"),
        ("updates=many", "updates"),
        ("batch_size=1.5", "batch_size"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.cg_max_iter=2.5", "optimizer.cg_max_iter"),
        ("seed=null", "seed"),
        ("network.widths=3", "network.widths"),
        ("network.widths=[a]", "network.widths"),
        ("time_limit=soon", "time_limit"),
    ],
)
def test_typos_and_wrong_types_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ConfigError)) as caught:
        config("autoencoder", "optimizer=bdhf", override)
    text = f"{caught.value} {caught.value.__cause__}"
    assert message in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+batchsize=7", r"^batchsize is not a key: must be one of batch_size, cell, "),
        ("+optimizer.weigth_decay=1", r"^optimizer.weigth_decay is not a key: must be one of "),
        (
            "+data.folder=x",
            r"^data.folder is not a key: must be one of name, root, valid",
        ),
        ("optimizer.name=adam", r"^optimizer.name=adam: must be hf or bdhf here; optimizer=adam,"),
        ("network.widths=[64]", r"^network.widths=\[64\]: must be two or more numbers, 1 or more"),
        ("network.widths=[64,0]", r"^network.widths=\[64, 0\]: must be two or more numbers"),
        ("optimizer.damping=-1", r"^optimizer.damping=-1.0: must be 0 or more, and finite$"),
        ("optimizer.damping=inf", r"^optimizer.damping=inf: must be 0 or more, and finite$"),
        ("optimizer.lr=nan", r"^optimizer.lr=nan: must be 0 or more"),
        ("optimizer.cg_max_iter=0", r"^optimizer.cg_max_iter=0: must be 1 or more$"),
        ("optimizer.cg_tol=-0.1", r"^optimizer.cg_tol=-0.1: must be 0 or more"),
        ("optimizer.cg_momentum=1.1", r"^optimizer.cg_momentum=1.1: must be from 0 to 1$"),
        ("curvature_batch_size=60", r"^curvature_batch_size=60: must be from 1 to 59, below "),
        ("curvature_batch_size=0", r"^curvature_batch_size=0: must be from 1 to 59"),
        ("curvature_batch_size=null", r"^curvature_batch_size=None: must be from 1 to 59"),
        ("batch_size=0", r"^batch_size=0: must be 1 or more$"),
        ("updates=-3", r"^updates=-3: must be 1 or more$"),
        ("evaluate_every=0", r"^evaluate_every=0: must be 1 or more$"),
        ("evaluation_rows=0", r"^evaluation_rows=0: must be 1 or more$"),
        ("seed=-1", r"^seed=-1: must be 0 or more$"),
        ("micro_batch=0", r"^micro_batch=0: must be 1 or more, or null$"),
        ("threads=0", r"^threads=0: must be 1 or more, or null$"),
        ("time_limit=0", r"^time_limit=0.0: must be a number of seconds, or null$"),
        ("checkpoint_seconds=-1", r"^checkpoint_seconds=-1.0: must be 0 or more$"),
        ("device=gpu", r"^device=gpu: must be auto, cpu, cuda or cuda:N$"),
        ("device=meta", r"^device=meta: must be auto, cpu, cuda or cuda:N$"),
        ("device=cuda:99", r"^device=cuda:99: must be a device that is there: torch .* sees \d+"),
        ("cell=1", r"^cell=1: must be one of 0, the cells of optimizer=bdhf in autoencoder at"),
        ("cell=first", r"^cell=first: must be one of 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("autoencoder", "optimizer=bdhf", *TINY_HF, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", r"^optimizer.lr=-1.0: must be 0 or more"),
        ("optimizer.eps=-1", r"^optimizer.eps=-1.0: must be 0 or more"),
        ("optimizer.betas=[0.9]", r"^optimizer.betas=\[0.9\]: must be two numbers from 0"),
        ("optimizer.name=hf", r"^optimizer.name=hf: must be adam here; optimizer=adam, hf or"),
        ("optimizer.name=sgd", r"^optimizer.name=sgd: must be one of adam, hf, bdhf, which"),
        ("optimizer.betas=[0.9,1.0]", r"^optimizer.betas=\[0.9, 1.0\]: must be two numbers from 0"),
        ("curvature_batch_size=5", r"^curvature_batch_size=5: must be null for optimizer=adam$"),
    ],
)
def test_adams_values_out_of_range_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("autoencoder", "optimizer=adam", *TINY, override)


@pytest.mark.parametrize(
    ("experiment", "override", "message"),
    [
        ("autoencoder", "network.widths=[10,5]", r"^network.widths=\[10, 5\]: must be from 64 on"),
        ("lstm", "network.pool=9", r"^network.pool=9: must be at most 8, the image's"),
        ("lstm", "network.units=0", r"^network.units=0: must be 1 or more$"),
        ("lstm", "network.layers=-1", r"^network.layers=-1: must be 1 or more$"),
        ("resnet", "network.image_channels=3", r"^network.image_channels=3: must be 1, as the im"),
        ("resnet", "network.channels=[4]", r"^network.channels=\[4\]: must be two or more num"),
    ],
)
def test_networks_that_do_not_fit_are_refused(
    tmp_path: Path, experiment: str, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        values = tiny(experiment, "bdhf", override)
        values.results = str(tmp_path / "r")
        run(EXPERIMENTS[experiment], values)
    assert not (tmp_path / "r").exists()


def test_experiment_of_another_file_is_refused(tmp_path: Path) -> None:
    values = tiny("lstm", "bdhf", f"results={tmp_path}/r")
    message = r"^experiment=lstm: must be autoencoder here; experiments/lstm.py runs another"
    with pytest.raises(ConfigError, match=message):
        run(EXPERIMENTS["autoencoder"], values)
    assert not (tmp_path / "r").exists()


def test_batch_larger_than_the_data_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdhf.runner.load", None)  # would fail if it were called
    values = config("autoencoder", *TINY_HF, "batch_size=5000", f"results={tmp_path}")
    with pytest.raises(ConfigError, match=r"^batch_size=5000: must be at most 1437, the size of"):
        run(EXPERIMENTS["autoencoder"], values)
    check_against_data(config("autoencoder", *TINY_HF))


def test_refusals_leave_nothing_behind(tmp_path: object) -> None:
    with pytest.raises(ConfigError):
        run(
            EXPERIMENTS["autoencoder"],
            checked(composed("autoencoder", *TINY_HF, f"results={tmp_path}/r", "seed=-1")),
        )
    values = config("autoencoder", *TINY_HF, "batch_size=5000", f"results={tmp_path}/r")
    with pytest.raises(ConfigError):
        run(EXPERIMENTS["autoencoder"], values)
    assert not Path(f"{tmp_path}/r").exists()


def test_tf32_is_off_unless_asked_for() -> None:
    """Torch's own choice is TF32 for convolutions; saying no is the same run as saying nothing."""
    asked = ((), ("tf32=false",), ("tf32=true",))
    plain, no, yes = (config("resnet", "scale=demo", *more) for more in asked)
    plain_hash, no_hash, yes_hash = (settings_hash(settings_of(c)) for c in (plain, no, yes))
    assert plain_hash == no_hash != yes_hash
    for tf32, expected in ((yes.tf32, "tf32"), (no.tf32, "ieee")):
        use_machine(None, tf32)
        found = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
        assert [each.fp32_precision for each in found] == [expected] * 3
