"""What is wrong with a configuration."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and what is allowed."""


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a `ConfigError` that names the key, its value and what is allowed."""
    if not condition:
        raise ConfigError(f"{key}={value}: must be {allowed}")
