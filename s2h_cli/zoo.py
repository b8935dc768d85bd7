"""What is known of the models by name: the measurements of `benchmarks/zoo.py`, packaged as `zoo.json`."""

from __future__ import annotations

import fnmatch
import json
from importlib import resources
from typing import Any, NamedTuple

from .errors import UserError
from .source import TORCHVISION, torchvision_names


class Known(NamedTuple):
    """One model: its row of `zoo.json`, or None where it was not measured."""

    name: str
    row: dict[str, Any] | None


def load() -> dict[str, Any]:
    """{"versions": {package: version}, "models": {name: row}}; `docs/zoo.md` explains the rows."""
    return json.loads((resources.files(__package__) / "zoo.json").read_text())


def known(glob: str | None) -> list[Known]:
    """The measured models, or with a glob all of timm and torchvision that match it.

    Raises:
        UserError: nothing matches.
    """
    import timm

    rows = load()["models"]
    if glob is None:
        names = list(rows)
    else:
        every = [*timm.list_models(), *(TORCHVISION + name for name in torchvision_names())]
        names = [name for name in every if fnmatch.fnmatchcase(name, glob)]
        if not names:
            raise UserError(f"no model matches '{glob}'; s2h models lists those measured, and '*' matches any text, as in 'resnet*'")
    return [Known(name, rows.get(name)) for name in names]


def passes(row: dict[str, Any]) -> bool:
    """Whether every check of `docs/zoo.md` went well."""
    return not (row.get("died") or row.get("refused") or row["failed"])
