"""The types of the Hydra configs, and the checks that types cannot express.

The values are in ``configs/``. A key that is not declared here, or a value of another type, is
refused by Hydra; `checked` refuses the rest before anything is loaded or written.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bdhf.data import TRAIN_ROWS


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and what is allowed."""


@dataclass
class OptimizerConfig:
    """What all optimizers have."""

    name: str = MISSING
    lr: float = MISSING


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam (Kingma and Ba 2015), torch's implementation."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass
class HessianFreeConfig(OptimizerConfig):
    """`BlockDiagonalHF`; whether its blocks are the experiment's or one is decided by its name."""

    damping: float = MISSING
    cg_max_iter: int = MISSING
    cg_tol: float = MISSING
    cg_momentum: float = MISSING


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
    """Which data set, and where it lies or goes."""

    name: str = MISSING
    root: str = MISSING


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
class Config:
    """Everything a run depends on. Comments say what a key does; values are in ``configs/``."""

    experiment: str = MISSING
    scale: str = MISSING
    network: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = MISSING
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

    # These change neither the curve nor the run's folder.
    device: str = "auto"
    threads: int | None = None
    micro_batch: int | None = None
    time_limit: float | None = None
    checkpoint_seconds: float = 60.0
    results: str = "results"
    wandb: WandbConfig = field(default_factory=WandbConfig)
    target: TargetConfig = field(default_factory=TargetConfig)

    # Tables that the values above point into.
    hessian_free: HessianFreeSettings = field(default_factory=HessianFreeSettings)
    cells: dict[str, Any] = field(default_factory=dict)


#: Keys that change neither the curve nor the run's folder.
_OUTSIDE_THE_HASH = (
    "cell",
    "updates",
    "device",
    "threads",
    "micro_batch",
    "time_limit",
    "checkpoint_seconds",
    "results",
    "wandb",
    "target",
)


def register(experiment: str, network: type) -> None:
    """Tell Hydra the types, an experiment's own for its ``network`` node, and its config's name."""
    store = ConfigStore.instance()
    store.store(name="types", node=Config)
    store.store(group="optimizer", name="types_adam", node=AdamConfig)
    store.store(group="optimizer", name="types_hessian_free", node=HessianFreeConfig)
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
    _check_optimizer(config.optimizer)
    _check_sizes(config)
    _check_machine(config)
    return config


def settings_of(config: Config) -> dict[str, Any]:
    """The resolved values of a run, without the tables they came from."""
    values = asdict(config)
    del values["hessian_free"], values["cells"]
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


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a `ConfigError` that names the key, its value and what is allowed."""
    if not condition:
        raise ConfigError(f"{key}={value}: must be {allowed}")


def _check_cell(composed: DictConfig) -> None:
    name = composed.optimizer.name
    known = ", ".join(composed.cells)
    require(name in composed.cells, "optimizer.name", name, f"one of {known}")
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


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    zero_or_more = "0 or more, and finite"
    names = ("adam",) if isinstance(optimizer, AdamConfig) else ("hf", "bdhf")
    require(
        optimizer.name in names,
        "optimizer.name",
        optimizer.name,
        f"{' or '.join(names)} here; optimizer=adam, hf or bdhf chooses another optimizer",
    )
    if isinstance(optimizer, HessianFreeConfig):
        for name in ("lr", "damping", "cg_tol"):
            value = getattr(optimizer, name)
            require(0 <= value < math.inf, f"optimizer.{name}", value, zero_or_more)
        cap, momentum = optimizer.cg_max_iter, optimizer.cg_momentum
        require(cap >= 1, "optimizer.cg_max_iter", cap, "1 or more")
        require(0 <= momentum <= 1, "optimizer.cg_momentum", momentum, "from 0 to 1")
    if isinstance(optimizer, AdamConfig):
        require(0 <= optimizer.lr < math.inf, "optimizer.lr", optimizer.lr, zero_or_more)
        require(0 <= optimizer.eps < math.inf, "optimizer.eps", optimizer.eps, zero_or_more)
        inside = len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas)
        require(inside, "optimizer.betas", list(optimizer.betas), "two numbers from 0 to below 1")


def _check_sizes(config: Config) -> None:
    for key in ("batch_size", "updates", "evaluate_every", "evaluation_rows"):
        value = getattr(config, key)
        require(value >= 1, key, value, "1 or more")
    require(config.seed >= 0, "seed", config.seed, "0 or more")
    rows = config.curvature_batch_size
    if isinstance(config.optimizer, HessianFreeConfig):
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
    for optional in ("micro_batch", "threads"):
        value = getattr(config, optional)
        require(value is None or value >= 1, optional, value, "1 or more, or null")


def _check_machine(config: Config) -> None:
    limit, pause = config.time_limit, config.checkpoint_seconds
    require(limit is None or limit > 0, "time_limit", limit, "a number of seconds, or null")
    require(pause >= 0, "checkpoint_seconds", pause, "0 or more")
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
    rows = TRAIN_ROWS[config.data.name]
    allowed = f"at most {rows}, the size of the {config.data.name} training set"
    require(config.batch_size <= rows, "batch_size", config.batch_size, allowed)
