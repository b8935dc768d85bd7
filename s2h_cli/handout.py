"""What lies beside the artifacts of a result, for people without s2h: a script for each format that classifies images, and a model card."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from . import CONVENTION, artifacts, computed, exports
from .config import Config
from .files import writing
from .pixels import decode
from .shown import as_code, code_block, in_markdown
from .source import is_run, short_name

SCRIPT = '''"""python {name} IMAGE ...    says what each image shows. Needs {needs}, numpy and pillow."""
import json
import sys
from pathlib import Path

import numpy as np
{imports}
from PIL import Image, ImageOps

{decode}

file = str(Path(__file__).with_name("{file}"))
{load}
(channels, *size), mean, std = about["input_size"], np.array(about["mean"], np.float32), np.array(about["std"], np.float32)
for path in sys.argv[1:] or sys.exit(__doc__):
    try:
        image = decode(Image.open(path), "L" if channels == 1 else "RGB")
    except Exception as error:
        sys.exit(f"cannot read image '{{path}}' ({{error}})")
    high, wide = (int(n / about["crop_pct"]) for n in size)  # what the image must fill; the input is cut from its middle
    if high == wide:
        width, height = (high if n == min(image.size) else int(high * n / min(image.size)) for n in image.size)
    else:
        scale = min(image.height / high, image.width / wide)
        width, height = round(image.width / scale), round(image.height / scale)
    image = image.resize((width, height), getattr(Image.Resampling, about["interpolation"].upper()))
    left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
    pixels = np.asarray(image.crop((left, top, left + size[1], top + size[0])), np.float32).reshape(*size, channels) / 255
    logits = {run}
    print(path, about["classes"][int(logits.argmax())])
'''
BATCH = "((pixels - mean) / std).transpose(2, 0, 1)[None]"

#: What differs from format to format.
SCRIPTS = {
    "onnx": {"needs": "onnxruntime", "imports": "import onnxruntime",
             "load": 'network = onnxruntime.InferenceSession(file)\nabout = json.loads(network.get_modelmeta().custom_metadata_map["s2h.json"])',
             "run": f'network.run(None, {{"images": {BATCH}}})[0]'},
    "torchscript": {"needs": "torch", "imports": "import torch",
                    "load": 'extra = {"s2h.json": ""}\nnetwork = torch.jit.load(file, _extra_files=extra)\nabout = json.loads(extra["s2h.json"])',
                    "run": f"network(torch.from_numpy({BATCH}))"},
    "pt2": {"needs": "torch", "imports": "import torch",
            "load": 'extra = {"s2h.json": ""}\nnetwork = torch.export.load(file, extra_files=extra).module()\nabout = json.loads(extra["s2h.json"])',
            "run": f"network(torch.from_numpy({BATCH}))"},
}

CARD = """---
library_name: s2h
pipeline_tag: image-classification
tags: [image-classification, pruning]
---

# {title}

{what}. It classifies images of {size} px into {count} classes: {classes}.

{rows}

{convention}. Accuracy is top-1 on the validation images of {data}.

{files}

## Use it

Nothing of s2h, and none of the code of the model it was cut from, is needed. Preprocessing and class names are inside each file.

{scripts}

With s2h, as an ordinary `torch.nn` network to train on:

```python
import s2h_cli

model = s2h_cli.load(".")   # this folder, or hf://USER/NAME
```

## How it was made

{command}

With {versions}. `plan.json` says what was kept of each layer, `report.html` what happened. Its weights come from {origin}.
"""


def write_handout(folder: Path, config: Config) -> None:
    """Writes scripts and card into the folder of a result with its artifacts. `config`: the settings of its run."""
    plan = artifacts.read_plan(folder, *computed.KEYS, "results")
    with writing(folder) as aside:
        scripts = []
        for format, parts in SCRIPTS.items():
            file = exports.EXPORTS[format].file if format in exports.EXPORTS else ""
            if (folder / file).is_file():
                name = f"infer_{format}.py"
                (aside / name).write_text(SCRIPT.format(name=name, file=file, decode=inspect.getsource(decode), **parts), encoding="utf-8")
                scripts.append(f"python {name} image.jpg".ljust(40) + f"# {parts['needs']}")
        (aside / "README.md").write_text(card(folder, plan, config, scripts), encoding="utf-8", errors="replace")


def card(folder: Path, plan: dict[str, Any], config: Config, scripts: list[str]) -> str:
    macs, params, results, classes = plan["macs"], plan["params"], plan["results"], plan["data"]["classes"]
    top1 = results.get("top1", {})
    rows = [("top-1, %", *(f"{top1[name]:.2f}" if name in top1 else "" for name in ("start", "exported"))),
            ("MACs", f"{macs['full']:,}", f"{macs['pruned']:,}"), ("parameters", f"{params['full']:,}", f"{params['pruned']:,}"),
            ("weights, MB", f"{results['bytes_before'] / 1e6:.2f}" if "bytes_before" in results else "", f"{(folder / artifacts.WEIGHTS).stat().st_size / 1e6:.2f}")]
    files = [(as_code(file), f"{(folder / file).stat().st_size / 1e6:.2f}", f"{found['difference']:.1e}", f"{found['top1']:.2f}" if "top1" in found else "")
             for file, found in results.get("files", {}).items() if (folder / file).is_file()]
    name = short_name(plan["model"])
    if config.method == "dense":
        title, what = f"{in_markdown(name)}, trained", f"{in_markdown(name)} as it was trained; nothing was cut"
    else:
        title, what = f"{in_markdown(name)}, {macs['ratio']:.3f} of its MACs", f"A small dense network, cut from {name} in training (method: {in_markdown(config.method)})"
    return CARD.format(
        title=title, what=what, origin=origin(config, name), files=_table(["file", "MB", "difference from the network", "top-1, %"], files),
        size=in_markdown("x".join(map(str, plan["input_size"][1:]))), count=len(classes), classes=", ".join(map(in_markdown, classes[:10])) + (", …" if len(classes) > 10 else ""), rows=_table(["", "before", "after"], rows),
        convention=CONVENTION, data=as_code(config.data), scripts=code_block("\n".join(scripts), "sh"), command=code_block(config.command(), "sh"),
        versions=", ".join(in_markdown(f"{name} {version}") for name, version in plan["versions"].items() if version))


def origin(config: Config, name: str) -> str:
    """Where the weights come from, and whose licences hold for them."""
    if is_run(config.model) or config.weights:
        return f"those of {as_code(config.weights or config.model)} and from your data: the licences of both hold for it"
    if config.pretrained:
        return f"those that are published for {in_markdown(name)}, if there are any, and from your data: the licences of both hold for it"
    return "random ones, and from your data, whose licence holds for it"


def _table(columns: list[str], rows: list[Any]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))
