"""From a command line to the runs it asks for, by Hydra's grammar and configs."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bdhf.config import Config, check_against_data, checked, register
from bdhf.errors import ConfigError, require
from bdhf.experiment import CONFIGS, experiment_names, find_experiment
from bdhf.record import RunFolder, first_line
from bdhf.runner import title

#: What `title` tells of a run anyway.
_IN_TITLE = ("experiment", "optimizer", "cell", "batch_size", "curvature_batch_size", "seed")

#: The one config of all experiments, ``configs/run.yaml``.
CONFIG_NAME = "run"


@dataclass(frozen=True)
class GridRun:
    """One run of a sweep.

    Attributes:
        overrides: how Hydra composes its config.
        config: the config.
        label: the run in a few words that tell it from the others.
    """

    overrides: tuple[str, ...]
    config: Config
    label: str

    def folder(self) -> RunFolder:
        """Its folder as it is now."""
        return RunFolder(self.config)


@dataclass(frozen=True)
class Grid:
    """What a command line asks for.

    Attributes:
        runs: in the order in which they are made: all of one seed, figures' before studies', then
            all of the next.
        refused: what is wrong with the others, each message once, with the number of runs.
        hydra: overrides that are Hydra's own, such as the launcher's.
    """

    runs: list[GridRun]
    refused: Counter[str]
    hydra: list[str]

    def composed(self, run: GridRun) -> DictConfig:
        """A run's config with Hydra's own part, which launchers are made from."""
        return compose(CONFIG_NAME, [*self.hydra, *run.overrides], return_hydra_config=True)


def expand(arguments: Sequence[str]) -> Grid:
    """The grid of ``key=value,value`` arguments, as Hydra's ``--multirun`` has it.

    ``experiment`` is all of them unless it is given. Keys that are not given are swept as
    ``hydra.sweeper.params`` of the experiment at that scale says; with ``study=NAME``, as each line
    of ``configs/studies/NAME.yaml`` for that experiment and scale says, and ``study=null,NAME`` is
    both; keys that are given then choose among a line's values (seeds replace them). Hydra must be
    initialized.

    Raises:
        ConfigError: an argument is no list of values, or there is no such study.
    """
    for name in experiment_names():
        register(name, find_experiment(name).settings)
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    given = parser.parse_overrides(list(arguments))
    own = [o for o in given if not o.is_hydra_override()]
    axes = {"experiment": _values("experiment", experiment_names())}
    axes |= {o.get_key_element(): _choices(o) for o in own}
    hydra = [str(o.input_line) for o in given if o.is_hydra_override()]
    runs: dict[Path, GridRun] = {}
    refused = Counter[str]()
    for point in _points(axes, parser, refused):
        for run in _runs(point, refused):
            # Two cells may be one run, where sizes are given on the command line.
            path = run.folder().path
            known = runs.setdefault(path, run)
            if run.config.updates > known.config.updates:
                runs[path] = run
    return Grid(sorted(runs.values(), key=_order), refused, hydra)


def _order(run: GridRun) -> tuple[int, bool]:
    return run.config.seed, run.config.study is not None


@dataclass(frozen=True)
class _Point:
    """Overrides without their seed, the seeds to take with them, and the keys that are told."""

    overrides: tuple[str, ...]
    seeds: list[str]
    telling: set[str]


def _points(
    axes: dict[str, list[str]], parser: OverridesParser, refused: Counter[str]
) -> Iterator[_Point]:
    outer = ("experiment", "scale", "study")  # what the defaults of the others hang on
    for chosen in itertools.product(*(axes[key] for key in outer if key in axes)):
        try:
            composed = compose(CONFIG_NAME, list(chosen), return_hydra_config=True)
        except HydraException as error:
            refused[str(error)] += 1
            continue
        params = composed.hydra.sweeper.params
        lines = [[f"{key}={value}" for key, value in params.items()]]
        if composed.study is not None:
            lines = _study_lines(composed.study, composed.experiment, composed.scale)
        for line in lines:
            parsed = parser.parse_overrides([f"seed={params.get('seed', 0)}", *line])
            inner = {o.get_key_element(): _choices(o) for o in parsed}
            given = {key: values for key, values in axes.items() if key not in outer}
            if composed.study is not None:  # what is given chooses among the study's runs
                given |= {
                    key: [value for value in inner[key] if value in values]
                    for key, values in given.items()
                    if key in inner and key != "seed"
                }
            inner |= given
            seeds = inner.pop("seed")
            telling = {key for key, values in {**axes, **inner}.items() if len(values) > 1}
            if composed.study is not None:  # its lines differ in what they set
                telling |= {key for key in inner if key.startswith("optimizer.")}
            for point in itertools.product(*inner.values()):
                yield _Point((*chosen, *point), seeds, telling - set(_IN_TITLE))


def _study_lines(study: str, experiment: str, scale: str) -> list[list[str]]:
    """What a study's file says for an experiment at a scale; nothing is fine too."""
    known = sorted(path.stem for path in (CONFIGS / "studies").glob("*.yaml"))
    require(study in known, "study", study, f"null or one of {', '.join(known)}")
    found: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "studies" / f"{study}.yaml"))
    return [line.split() for line in found.get(experiment, {}).get(scale, [])]


def _runs(point: _Point, refused: Counter[str]) -> Iterator[GridRun]:
    overrides = point.overrides
    values = [text for text in overrides if text.partition("=")[0] in point.telling]
    config: Config | None = None
    for seed in point.seeds:
        mine = (*overrides, seed)
        number = seed.partition("=")[2]
        try:
            # Composing takes a twentieth of a second, and nothing else depends on the seed,
            # unless somebody says ${seed}.
            if config is not None and number.isdecimal() and "$" not in "".join(overrides):
                config = dataclasses.replace(config, seed=int(number))
            else:
                config = checked(compose(CONFIG_NAME, list(mine)))
                check_against_data(config)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            message = str(error)
            if error.__cause__ is not None:
                message += f": {first_line(error.__cause__)}"
            refused[message] += 1
            config = None
            continue
        yield GridRun(mine, config, " ".join([title(config), *values]))


def _choices(override: Override) -> list[str]:
    """Each value of a sweep as an override; an override that is no sweep as it is."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: a sweep takes lists, choices and ranges only")
    return _values(key, override.sweep_string_iterator())


def _values(key: str, values: Sequence[str] | Iterator[str]) -> list[str]:
    return [f"{key}={value}" for value in values]
