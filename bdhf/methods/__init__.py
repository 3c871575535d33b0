"""The optimizers that are compared, one file each: settings, their checks, and how one is made.

A file here and a config of the same name in ``configs/optimizer/`` are a new one. The file has a
subclass of `Method`; the config begins with ``defaults: [types_<name of the file>]``.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from omegaconf import MISSING
from torch import nn

from bdhf.blocks import ParamGroup
from bdhf.errors import ConfigError, require
from bdhf.training import StepOptimizer

__all__ = ["ConfigError", "Method", "require", "settings_types"]


@dataclass
class Method:
    """What all of them have: the settings are the fields, and part of a run's hash."""

    #: The values that ``optimizer.name`` may have; none: any.
    names: ClassVar[tuple[str, ...]] = ()
    #: Whether an update takes a curvature mini-batch.
    uses_curvature: ClassVar[bool] = False

    name: str = MISSING
    lr: float = MISSING

    def check(self) -> None:
        """Refuse values that make no sense, with a `ConfigError`."""
        require(
            not self.names or self.name in self.names,
            "optimizer.name",
            self.name,
            f"{' or '.join(self.names)} here; optimizer=adam, hf or bdhf chooses another optimizer",
        )
        require(0 <= self.lr < math.inf, "optimizer.lr", self.lr, "0 or more, and finite")

    def prepare(self, model: nn.Module) -> nn.Module:
        """The network to train, with the same outputs as ``model``; most methods take it as is."""
        return model

    def make(
        self, model: nn.Module, blocks: Callable[[Any], list[ParamGroup]]
    ) -> tuple[list[ParamGroup], StepOptimizer]:
        """The optimizer, and the blocks it solves (none for a first-order method).

        Args:
            model: what `prepare` returned.
            blocks: splits the experiment's network as the experiment has it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method make")

    def keywords(self) -> dict[str, Any]:
        """The settings but for the name, as most constructors take them."""
        values = asdict(self)
        del values["name"]
        return values


def settings_types() -> dict[str, type[Method]]:
    """The settings of each file in this folder, by its name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        contents = vars(importlib.import_module(f"{__name__}.{module.name}"))
        own = [value for value in contents.values() if _is_own(value, f"{__name__}.{module.name}")]
        if len(own) != 1:
            raise TypeError(
                f"{__name__}.{module.name} has {len(own)} subclasses of Method; it needs one"
            )
        found[module.name] = own[0]
    return found


def _is_own(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and value.__module__ == module
