"""The facts of a plan as plain data: what `s2h inspect --json` prints and `plan.json` holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..budget import Budget
from ..plan import Plan

#: The keys of `s2h inspect --json`.
KEYS = ("model", "input_size", "macs", "params", "layers", "groups", "frozen")


def describe(plan: Plan, model: str, input_size: tuple[int, int, int], budget: Budget | None = None) -> dict[str, Any]:
    """Facts of a plan; `budget` is None for a model that nothing was cut from.

    MACs are fvcore's, for one image. `layers[i]["params"]` is beside the keys that `s2h inspect --json` promises.
    """
    space = plan.space
    widths = plan.widths
    macs, full_macs = space.macs.by_row(widths), space.whole.macs.by_row(space.full)
    params, full_params = space.parameters.by_row(widths), space.whole.parameters.by_row(space.full)
    owner = {name: name if name in {x.name for x in space.layers} else name.rpartition(".")[0] for name in space.parameter_names}

    def channels(axis: np.ndarray | int, layer: int) -> list[int]:
        full = axis if isinstance(axis, int) else len(axis)
        if full_macs[layer] and not macs[layer]:  # in a block that is dropped
            return [0, full]
        return [full if isinstance(axis, int) else int(plan.kept(axis).sum()), full]

    def owned(layer: str) -> list[int]:
        mine = [i for i, name in enumerate(space.parameter_names) if owner[name] == layer]
        return [int(params[mine].sum()), int(full_params[mine].sum())]

    layers = [{"name": layer.name, "kind": layer.kind, "in": channels(layer.inputs, i), "out": channels(layer.outputs, i),
               "macs": [int(macs[i]), int(full_macs[i])], "params": owned(layer.name)} for i, layer in enumerate(space.layers)]
    return {
        "model": model,
        "input_size": list(input_size),
        "macs": {"full": int(full_macs.sum()), "pruned": int(macs.sum()), "ratio": plan.ratio, "target": budget and budget.flops,
                 "min_ratio": space.min_ratio},
        "params": {"full": int(full_params.sum()), "pruned": int(params.sum()), "ratio": params.sum() / full_params.sum()},
        "budget": budget and budget.shares,
        "dropped": [block.name for block in space.dropped],
        "layers": layers,
        "groups": [{"name": g.name, "size": g.size, "kept": int(n), "layers": list(g.layers)}
                   for g, n in zip(space.groups, widths)],
        "frozen": [{"layers": list(f.layers), "reason": f.reason, "channels": f.channels} for f in space.frozen],
    }


def public(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of a description that `s2h inspect --json` prints: exactly the promised keys."""
    out = {key: facts[key] for key in KEYS}
    out["layers"] = [{key: layer[key] for key in ("name", "kind", "in", "out", "macs")} for layer in facts["layers"]]
    return out
