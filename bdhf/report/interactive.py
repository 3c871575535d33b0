"""The report as one page that opens offline: its text, and a chart for each experiment."""

from __future__ import annotations

import json
import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

_ASSETS = Path(__file__).parent / "assets"


def render(title: str, body: str, data: dict[str, Any]) -> str:
    """The whole page, with its styles, scripts and data inside; the same bytes for the same input.

    Args:
        title: plain text; also the heading where ``body`` has no ``<h1>``.
        body: trusted HTML. Each ``<div class="chart" data-experiment="NAME"></div>`` of it becomes
            the chart of the experiment of that name.
        data: the curves (``assets/page.js`` says in which form).
    """
    pages = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return pages.get_template("page.html").render(
        title=title,
        body=body,
        data=_json(data),
        style=_asset("page.css"),
        script=_asset("curves.js") + _asset("page.js"),
        plotly=get_plotlyjs(),
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """Strict JSON that cannot end the script element it stands in, whatever its strings hold."""
    text = json.dumps(_short(data), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # In JSON, "<" stands only in strings. Besides "</script", "<!--" has a meaning in a script.
    return text.replace("<", "\\u003c")


def _short(value: Any) -> Any:
    """Numbers to five significant digits, whole ones exactly, and null for those not finite."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    if not math.isfinite(number):
        return None
    if number.is_integer() and abs(number) < 1e15:  # counts, which some tables hold as floats
        return int(number)
    number = float(f"{number:.5g}")
    return int(number) if number.is_integer() and abs(number) < 1e15 else number
