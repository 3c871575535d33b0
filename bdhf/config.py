"""The types of the Hydra configs, and the checks that types cannot express.

The values are in ``configs/``. A key that is not declared here, or a value of another type, is
refused by Hydra; `checked` refuses the rest before anything is loaded or written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bdhf.data import TRAIN_ROWS
from bdhf.distributed.placement import Placement
from bdhf.errors import ConfigError, require
from bdhf.methods import Method, settings_types


@dataclass
class HessianFreeSettings:
    """What an experiment sets for HF and block-diagonal HF alike."""

    lr: float = 0.1
    damping: float = MISSING
    cg_max_iter: int = MISSING
    cg_tol: float = 5e-4
    cg_momentum: float = 0.95


@dataclass
class DataConfig:
    """Which data set, and where it lies or goes.

    With ``validation_rows``, so many rows of the training set, drawn at random, are held out and
    take the place of the test set: for tuning.
    """

    name: str = MISSING
    root: str = MISSING
    validation_rows: int | None = None


@dataclass
class WandbConfig:
    """Where runs are mirrored in Weights & Biases: ``disabled``, ``offline`` or ``online``."""

    mode: str = "disabled"
    project: str = "bdhf"
    entity: str | None = None  # whose project; null: the account's own


@dataclass
class TargetConfig:
    """What a run should reach, to count the updates it needs; no metric: no target."""

    metric: str | None = None
    value: float = 0.0


@dataclass
class FigureConfig:
    """How an experiment's curves are drawn: its figure's number and title, and what is shown."""

    number: int = MISSING
    title: str = MISSING
    panels: dict[str, str] = field(default_factory=dict)  # labels of metrics, from top to bottom


@dataclass
class Config:
    """Everything a run depends on. Comments say what a key does; values are in ``configs/``."""

    experiment: str = MISSING
    scale: str = MISSING
    network: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: Method = MISSING
    seed: int = 0

    # Which of the optimizer's cells gives the four sizes below, where they are not given: its
    # number, as text, since OmegaConf takes only text inside an interpolation.
    cell: str = "0"
    batch_size: int = MISSING
    curvature_batch_size: int | None = None
    updates: int = MISSING
    evaluate_every: int = MISSING
    # Rows of the fixed random subsets on which training is followed, of the training set and of the
    # test set each; at the end both are evaluated whole.
    evaluation_rows: int = 10_000

    # Whether a GPU may round the arguments of matrix products and convolutions to ten bits; null:
    # no. Part of the hash, since nothing has shown yet that it leaves the curves alone.
    tf32: bool | None = None

    # These change neither the curve nor the run's folder.
    device: str = "auto"
    # Whether updates on a GPU are recorded once and replayed.
    cuda_graphs: bool = True
    threads: int | None = None
    micro_batch: int | None = None
    # Under torchrun: which ranks solve which blocks (counted, measured or data; see
    # `bdhf.BlockDiagonalHF`), and for how long one waits for another that does not answer, or
    # evaluates.
    placement: str = "counted"
    collective_seconds: float = 600.0
    time_limit: float | None = None
    checkpoint_seconds: float = 60.0
    results: str = "results"
    wandb: WandbConfig = field(default_factory=WandbConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    figure: FigureConfig | None = None
    # Which of configs/studies/ the run belongs to; null: the figures.
    study: str | None = None

    # Tables that the values above point into.
    hessian_free: HessianFreeSettings = field(default_factory=HessianFreeSettings)
    cells: dict[str, Any] = field(default_factory=dict)


#: Keys that change neither the curve nor the run's folder.
_OUTSIDE_THE_HASH = (
    "cell",
    "updates",
    "device",
    "cuda_graphs",
    "threads",
    "micro_batch",
    "placement",
    "collective_seconds",
    "time_limit",
    "checkpoint_seconds",
    "results",
    "wandb",
    "target",
    "study",
)


def register(experiment: str, network: type) -> None:
    """Tell Hydra the types, an experiment's own for its ``network`` node, and its config's name."""
    store = ConfigStore.instance()
    store.store(name="types", node=Config)
    for name, settings in settings_types().items():
        store.store(group="optimizer", name=f"types_{name}", node=settings)
    store.store(group="network", name=experiment, node=network)
    # The same config for all, configs/run.yaml, with this experiment chosen.
    chosen = {"defaults": ["run", {"override experiment": experiment}, "_self_"]}
    store.store(name=experiment, node=chosen)


def checked(composed: DictConfig) -> Config:
    """The composed config, resolved and checked.

    Raises:
        ConfigError: a value is missing or out of range; the message names its key.
    """
    _check_cell(composed)
    try:
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    _refuse_unknown(composed, config)
    config.tf32 = config.tf32 or None  # the same, and so the same hash
    config.optimizer.check()
    _check_sizes(config)
    _check_machine(config)
    return config


def settings_of(config: Config) -> dict[str, Any]:
    """The resolved values of a run, without the tables they came from and how it is drawn."""
    values = asdict(config)
    del values["hessian_free"], values["cells"], values["figure"]
    return values


def settings_hash(settings: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    """Eight hex digits over all of `settings_of` that changes a run's curve.

    What is null stays out, so that a setting added later, null by default, renames no run.

    Args:
        settings: a run's settings, from `settings_of` or its ``config.yaml``.
        without: further keys to leave out: runs that differ in these alone have the same hash.
    """
    values = {k: v for k, v in settings.items() if k not in (*_OUTSIDE_THE_HASH, *without)}
    values["data"] = {k: v for k, v in values["data"].items() if k != "root"}
    text = json.dumps(_without_nulls(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def changed_settings(
    settings: dict[str, Any], shipped: dict[str, Any], cells: list[dict[str, Any]]
) -> str:
    """What a run has that is not as shipped, as ``optimizer.lr=0.05 ...``; empty: nothing.

    Seed and what is outside the hash do not count. Sizes, and with them the number of updates and
    how often it was evaluated, are compared with those of the cell that has the same mini-batches;
    where there is none, the mini-batches themselves count.
    """
    sizes = ("batch_size", "curvature_batch_size")
    mine = [cell for cell in cells if all(cell[key] == settings[key] for key in sizes)]
    expected = {**shipped, **dict.fromkeys(sizes)}
    expected |= mine[0] if mine else {key: settings[key] for key in ("updates", "evaluate_every")}
    aside = ({*_OUTSIDE_THE_HASH} - {"updates"}) | {"seed"}
    now, before = (
        _flat({key: value for key, value in values.items() if key not in aside})
        for values in (settings, expected)
    )
    keys = sorted(key for key in now if key != "data.root" and now[key] != before.get(key))
    return " ".join(f"{key}={now[key]}".replace(" ", "") for key in keys)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def device_of(config: Config) -> torch.device:
    """The device to train on; ``auto`` is the first GPU where there is one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


#: What a cell gives, unless it is given on its own.
_OF_THE_CELL = ("batch_size", "curvature_batch_size", "updates", "evaluate_every")


def _check_cell(composed: DictConfig) -> None:
    name = composed.optimizer.name
    given = not any(OmegaConf.is_interpolation(composed, key) for key in _OF_THE_CELL)
    if given and name not in composed.cells:
        return
    allowed = (
        f"one of {', '.join(composed.cells)}, which have sizes in {composed.experiment} at "
        f"scale={composed.scale}; for another one give {', '.join(_OF_THE_CELL)}"
    )
    require(name in composed.cells, "optimizer.name", name, allowed)
    numbers = [str(number) for number in range(len(composed.cells[name]))]
    require(
        composed.cell in numbers,
        "cell",
        composed.cell,
        f"one of {', '.join(numbers) or 'none'}, the cells of optimizer={name} in "
        f"{composed.experiment} at scale={composed.scale}",
    )


def _refuse_unknown(node: Any, typed: Any, prefix: str = "") -> None:
    """Hydra's ``+key=value`` adds keys that no type declares, and nothing would read."""
    known = [item.name for item in fields(typed)]
    for key in node:
        if key not in known:
            raise ConfigError(
                f"{prefix}{key} is not a key: must be one of {', '.join(sorted(known))}"
            )
        if is_dataclass(getattr(typed, key)):
            _refuse_unknown(node[key], getattr(typed, key), f"{prefix}{key}.")


def _check_sizes(config: Config) -> None:
    for key in ("batch_size", "updates", "evaluate_every", "evaluation_rows"):
        value = getattr(config, key)
        require(value >= 1, key, value, "1 or more")
    require(config.seed >= 0, "seed", config.seed, "0 or more")
    rows = config.curvature_batch_size
    if config.optimizer.uses_curvature:
        require(
            rows is not None and 1 <= rows < config.batch_size,
            "curvature_batch_size",
            rows,
            f"from 1 to {config.batch_size - 1}, below batch_size={config.batch_size}: the "
            "curvature mini-batch is a strict subset of the mini-batch",
        )
    else:
        name = config.optimizer.name
        require(rows is None, "curvature_batch_size", rows, f"null for optimizer={name}")
    held_out = config.data.validation_rows
    for key, value in (
        ("micro_batch", config.micro_batch),
        ("threads", config.threads),
        ("data.validation_rows", held_out),
    ):
        require(value is None or value >= 1, key, value, "1 or more, or null")


def _check_machine(config: Config) -> None:
    limit, pause = config.time_limit, config.checkpoint_seconds
    require(limit is None or limit > 0, "time_limit", limit, "a number of seconds, or null")
    require(pause >= 0, "checkpoint_seconds", pause, "0 or more")
    patience = config.collective_seconds
    require(0 < patience < 1e6, "collective_seconds", patience, "a number of seconds, below 1e6")
    placements = get_args(Placement)
    allowed = f"one of {', '.join(placements)}"
    require(config.placement in placements, "placement", config.placement, allowed)
    modes = ("disabled", "offline", "online")
    require(
        config.wandb.mode in modes, "wandb.mode", config.wandb.mode, f"one of {', '.join(modes)}"
    )
    metrics = ("train_loss", "test_loss", "test_accuracy", "averaged_test_accuracy")
    metric = config.target.metric
    allowed = f"one of {', '.join(metrics)}, or null"
    require(metric is None or metric in metrics, "target.metric", metric, allowed)
    allowed = "auto, cpu, cuda or cuda:N"
    try:
        device = device_of(config)
    except RuntimeError:
        raise ConfigError(f"device={config.device}: must be {allowed}") from None
    require(device.type in ("cpu", "cuda"), "device", config.device, allowed)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        require(
            (device.index or 0) < count,
            "device",
            config.device,
            f"a device that is there: torch {torch.__version__} sees {count} CUDA devices; "
            "device=cpu always works",
        )


def check_against_data(config: Config) -> None:
    """Refuse an unknown data set, and sizes that its training set cannot fill."""
    names = ", ".join(sorted(TRAIN_ROWS))
    require(config.data.name in TRAIN_ROWS, "data.name", config.data.name, f"one of {names}")
    rows, held_out = TRAIN_ROWS[config.data.name], config.data.validation_rows or 0
    allowed = f"below {rows}, the size of the {config.data.name} training set"
    require(held_out < rows, "data.validation_rows", held_out, allowed)
    left = f" without {held_out} held out" if held_out else ""
    allowed = f"at most {rows - held_out}, the size of the {config.data.name} training set{left}"
    require(config.batch_size <= rows - held_out, "batch_size", config.batch_size, allowed)
