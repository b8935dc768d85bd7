"""The charts of the report as data for plotly. Colours are names of the page's CSS variables, such as "var(--soft)", so that they follow its theme."""

from __future__ import annotations

from typing import Any

from ..shown import in_chart

Figure = dict[str, Any]

#: Colours for groups that tie several layers, in turn; a group of one layer is plain.
GROUP_COLOURS = [f"var(--group-{i})" for i in range(8)]
#: Of the points of runs, once the colours are used up.
SYMBOLS = ("circle", "square", "diamond", "cross")
#: Pixels of a bar's row, of what is around the bars, and letters of a layer's name that have room beside them.
ROW, AROUND, LETTERS = 20, 90, 20


def _figure(data: list[dict], height: int, **layout: Any) -> Figure:
    base = {"height": height, "margin": {"l": 48, "r": 12, "t": 8, "b": 40}, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "inherit", "size": 12, "color": "var(--text)"}, "dragmode": False, "hoverlabel": {"align": "left"},
            "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}}
    return {"data": data, "layout": {**base, **layout}}


def _axis(title: str = "", **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 6}, "gridcolor": "var(--line)", "zerolinecolor": "var(--line)", "linecolor": "var(--line)", "fixedrange": True,
            "automargin": True, **more}


def _epochs(count: int, **more: Any) -> dict[str, Any]:
    """An axis of epochs, with ticks at whole ones."""
    return _axis("epoch", tick0=1, dtick=max(1, round(count / 8)), **more)


def training(rows: list[dict[str, float]], target: float | None) -> Figure:
    """Accuracy of soft and hard network, what lies between them, and the ratio, by epoch; `rows` are those of `summary.csv`."""
    epochs = [row["epoch"] for row in rows]

    def line(name: str, values: list, colour: str, axis: str, **more: Any) -> dict[str, Any]:
        return {"type": "scatter", "mode": "lines+markers", "x": epochs, "y": values, "name": name, "yaxis": axis, "connectgaps": False,
                "line": {"color": colour, "width": 2}, "marker": {"size": 5}, "hovertemplate": f"{name}, epoch %{{x}}: %{{y:.4g}}<extra></extra>", **more}

    soft, hard, mean = ([row.get(f"top1_{kind}") for row in rows] for kind in ("soft", "hard", "ema"))
    gaps = [None if s is None or h is None else s - h for s, h in zip(soft, hard)]
    data = [line("hard", hard, "var(--hard)", "y3")]
    if any(value is not None for value in soft):
        data.append(line("soft", soft, "var(--soft)", "y3"))
        data.append(line("soft − hard", gaps, "var(--muted)", "y2", showlegend=False))
    if any(value is not None for value in mean):
        data.append(line("hard, averaged weights", mean, "var(--group-2)", "y3"))
    data.append(line("ratio", [row.get("ratio") for row in rows], "var(--hard)", "y", showlegend=False))
    asked = target and {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": target, "y1": target, "line": {"color": "var(--muted)", "dash": "dot", "width": 1}}
    apart = any(gap is not None for gap in gaps)  # a band of its own, where there is anything in it
    axes = {"yaxis2": _axis("gap, points", domain=[0.34, 0.56])} if apart else {}
    return _figure(data, 520 if apart else 400, xaxis=_epochs(len(rows), anchor="y"), shapes=[asked] if asked else [],
                   yaxis=_axis("share of MACs", domain=[0, 0.24 if apart else 0.34], rangemode="tozero"), yaxis3=_axis("top-1, %", domain=[0.66 if apart else 0.48, 1]), **axes)


def _short(name: str) -> str:
    """A layer's name for a chart, its beginning left out where it is long."""
    return in_chart(name if len(name) <= LETTERS else "…" + name[1 - LETTERS:])


def _bars(layers: list[str], bars: list[dict], title: str, **layout: Any) -> Figure:
    """Horizontal bars, one row a layer, the first one on top."""
    axis = _axis(autorange="reversed", tickmode="array", tickvals=list(range(len(layers))), ticktext=[_short(name) for name in layers])
    axis["tickfont"] = {"size": 11}
    return _figure(bars, AROUND + ROW * len(layers), barmode="overlay", bargap=0.25, xaxis=_axis(title, rangemode="tozero", side="top", nticks=6), yaxis=axis,
                   **{"margin": {"l": 8, "r": 12, "t": 56, "b": 8}, "showlegend": False, **layout})


def channels(layers: list[dict], groups: list[dict]) -> Figure:
    """Output channels that each layer keeps, in front of those it had; layers of a group that ties several are coloured alike."""
    shown = [layer for layer in layers if _counts(layer) and layer["params"][1]]  # attention has no channels of its own
    tied = [group for group in groups if len(group["layers"]) > 1]
    colour = {name: GROUP_COLOURS[i % len(GROUP_COLOURS)] for i, group in enumerate(tied) for name in group["layers"]}
    of_group = {name: group["name"] for group in groups for name in group["layers"]}
    at, names = list(range(len(shown))), [layer["name"] for layer in shown]
    hover = [f"{in_chart(layer['name'])}<br>{layer['out'][0]} of {layer['out'][1]} channels" + (f"<br>group {in_chart(of_group[layer['name']])}" if layer["name"] in of_group else "<br>not cut")
             for layer in shown]
    common = {"type": "bar", "orientation": "h", "y": at, "text": hover, "textposition": "none", "hovertemplate": "%{text}<extra></extra>"}
    return _bars(names, [{**common, "x": [layer["out"][1] for layer in shown], "marker": {"color": "var(--line)"}},
                         {**common, "x": [layer["out"][0] for layer in shown], "marker": {"color": [colour.get(name, "var(--muted)") for name in names]}}],
                 "output channels")


def costs(layers: list[dict]) -> Figure:
    """MACs of each layer, before and after."""
    shown = [layer for layer in layers if _counts(layer)]
    at = list(range(len(shown)))
    hover = [f"{in_chart(layer['name'])}<br>{layer['macs'][1]:,} → {layer['macs'][0]:,} MACs" for layer in shown]
    common = {"type": "bar", "orientation": "h", "y": at, "text": hover, "textposition": "none", "hovertemplate": "%{text}<extra></extra>"}
    before = {**common, "name": "before", "x": [layer["macs"][1] for layer in shown], "marker": {"color": "var(--line)"}}
    after = {**common, "name": "after", "x": [layer["macs"][0] for layer in shown], "marker": {"color": "var(--hard)"}}
    return _bars([layer["name"] for layer in shown], [before, after], "MACs")


def _counts(layer: dict) -> bool:
    """Whether it is worth a row: norms and poolings have the channels of what is before them, and next to no MACs."""
    return "norm" not in layer["kind"] and "pool" not in layer["kind"]


def _heat(x: list, y: list[str], z: list[list[float]], title: str, hover: str, **more: Any) -> Figure:
    heat = {"type": "heatmap", "x": x, "y": list(range(len(y))), "z": z, "customdata": [[in_chart(name)] * len(x) for name in y], "xgap": 1, "ygap": 1,
            "hovertemplate": hover + "<extra></extra>", "colorscale": [[0, "var(--low)"], [1, "var(--hard)"]],
            "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": title, "side": "right"}}, **more}
    axis = _axis(autorange="reversed", tickmode="array", tickvals=list(range(len(y))), ticktext=[_short(name) for name in y])
    return _figure([heat], AROUND + ROW * len(y), xaxis=_epochs(len(x)), yaxis=axis, margin={"l": 8, "r": 8, "t": 8, "b": 48})


def widths(groups: list[str], shares: list[list[float]]) -> Figure:
    """The width of each group as a share of the whole, by epoch: `shares` is what `widths.csv` holds, (epochs, groups)."""
    return _heat(list(range(1, len(shares) + 1)), groups, [list(row) for row in zip(*shares)], "share kept", "%{customdata}<br>epoch %{x}: %{z:.1%}",
                 zmin=0, zmax=1)


def gates(bins: list[str], counts: list[list[float]]) -> Figure:
    """How many of all gates lie where between 0 and 1, by epoch: `counts` is what `gates.csv` holds, (epochs, bins)."""
    shares = [[count / max(1.0, sum(row)) for count in row] for row in counts]
    return _heat(list(range(1, len(counts) + 1)), bins[::-1], [list(row) for row in zip(*shares)][::-1], "share of gates",
                 "gates from %{customdata}<br>epoch %{x}: %{z:.1%}", zmin=0)


def accuracies(runs: list[dict]) -> Figure:
    """Top-1 against MACs, a point for each of {name, macs, top1}."""
    points = [{"type": "scatter", "mode": "markers", "x": [run["macs"]], "y": [run["top1"]], "name": in_chart(run["name"]), "marker": {"size": 12, "color": GROUP_COLOURS[i % len(GROUP_COLOURS)],
               "symbol": SYMBOLS[i // len(GROUP_COLOURS) % len(SYMBOLS)]}, "hovertemplate": f"{in_chart(run['name'])}<br>%{{x:.4s}} MACs, %{{y:.2f}} %<extra></extra>"}
              for i, run in enumerate(runs)]
    return _figure(points, 380 + ROW * len(runs), xaxis=_axis("MACs of one image", rangemode="tozero"), yaxis=_axis("top-1, %"), showlegend=True,
                   legend={"orientation": "v", "y": -0.2, "yanchor": "top", "x": 0})
