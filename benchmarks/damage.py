"""Damages values, bytes and files, for `fuzz.py`: what a stranger may write into the files that s2h reads."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from PIL import Image

#: A file that appears where code of a case has run.
CANARY = "CANARY"
MARK = "<x-mark"
HOSTILE = f"\x1b]0;owned\x07\x1b[31m{MARK} onload=x></script>\r\n\u202e%{{y}}|`@BODY@"
OPERATORS = [
    "torch.ops.inductor._reinterpret_tensor.default",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.as_strided.default",
    "operator.floordiv",
    "torch.ops.aten.set_.source_Tensor",
    "torch.ops.aten.empty.memory_format",
    "torch.ops.aten.resize_.default",
    "torch.load",
    "builtins.eval",
    "torch.ops.aten.view.dtype",
    "torch.ops.aten.conv2d.default",
    "torch.ops.aten.repeat.default",
    "torch.ops.aten.randn.default",
    "os.system",
    "torch.ops.aten.relu.default",
    "torch.ops.aten._unsafe_view.default",
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    65537,
    2**31,
    2**63,
    10**30,
    -(10**30),
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
]
WORDS = [
    "",
    " ",
    HOSTILE,
    "a" * 100_000,
    "evil.py:build",
    "net.py:build",
    "../evil.py:build",
    "/dev/zero",
    "/etc/passwd",
    "..",
    "resnet18",
    "hf://a/b",
    "\x00",
    "\ud800",
    "{x.__class__}",
    "%s%n",
    "cuda:99",
    "1e999",
    "auto",
    "²",
    "nan",
    "=1+1",
    "-",
    "--help",
    "a\nb",
    "é\u0301",
    *OPERATORS,
]


def any_value(rng: random.Random) -> Any:
    return rng.choice(
        [
            None,
            True,
            False,
            rng.choice(NUMBERS),
            rng.choice(NUMBERS),
            rng.choice(WORDS),
            rng.choice(WORDS),
            [],
            {},
            [[]],
            {"": None},
            {"node": "x"},
            {"tuple": []},
            {"slice": [0, 2**62, 1]},
            {"float": "nan"},
            {"torch": "load"},
            [rng.choice(NUMBERS)] * 3,
            [1] * 10_000,
        ]
    )


def change_value(rng: random.Random, value: Any) -> Any:
    """A value near or far from a JSON value."""
    if isinstance(value, bool) or value is None or rng.random() < 0.4:
        return any_value(rng)
    if isinstance(value, (int, float)):
        return rng.choice(
            [-value, value + 1, value - 1, value * 2, value * 10**6, float(value), str(value), [value], value / 3]
        )
    if isinstance(value, str):
        return rng.choice(
            [value[:-1], value + HOSTILE, value.upper(), value + "x", rng.choice(OPERATORS), [value], value * 1000]
        )
    if isinstance(value, list):
        return rng.choice(
            [
                value[1:],
                value * 2,
                value[::-1],
                value + [any_value(rng)],
                dict(enumerate(map(str, value))),
                value * 50,
                [value],
            ]
        )
    return rng.choice([{}, [value], list(value), {**value, "more": any_value(rng)}, dict(reversed(value.items()))])


#: Keys whose values say what is built, called or opened, and values that a stranger would write there.
TARGETS: dict[str, list[Any]] = {
    "model": ["evil.py:build", "./evil.py:build", "evil:build", "torch:load", "hf://a/b", "several"],
    "teacher": ["evil.py:build"],
    "weights": ["/dev/zero", "evil.py"],
    "data": ["/dev/zero", "/", "evil.py", {}],
    "target": OPERATORS,
    "name": [HOSTILE],
    "reason": [HOSTILE],
    "layers": [[HOSTILE]],
    "place": [HOSTILE],
    "versions": [{HOSTILE: HOSTILE}],
    "input_size": [[3, 12_000, 12_000], [3, HOSTILE, 16], [3, 2**40, 16], [0, 0, 0]],
    "classes": [[HOSTILE, "light"], ["dark", "light", "x"], [], "dark"],
    "class": ["Sequential", "Upsample", HOSTILE],
    "out_channels": [10**9],
    "kernel_size": [{"tuple": [10**6, 10**6]}],
    "split": [{"val_fraction": 2}, {"spec": "x"}],
    "interpolation": ["random", "__class__"],
}


def at_targets(rng: random.Random, root: Any) -> Any:
    """JSON data with a value at one of the keys of `TARGETS` changed, if there is one."""
    found, left = [], [root]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            found += [(item, key) for key in item if key in TARGETS]
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
    if found:
        name = rng.choice(sorted({key for _, key in found}))
        container, key = rng.choice([(container, key) for container, key in found if key == name])
        container[key] = rng.choice(TARGETS[key])
    return root


def places(rng: random.Random, root: Any) -> tuple[Any, Any]:
    """A container in JSON data and a key of it: at each level all keys are as likely."""
    container, key = root, rng.choice(list(root) if isinstance(root, dict) else range(len(root)))
    while isinstance(container[key], (dict, list)) and container[key] and rng.random() < 0.8:
        container = container[key]
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    return container, key


def change_json(rng: random.Random, root: Any) -> Any:
    """JSON data with one to three changes."""
    if rng.random() < 0.3:
        return at_targets(rng, root)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not isinstance(root, (dict, list)) or not root:
            return root
        container, key = places(rng, root)
        kind = rng.choice(["value", "value", "value", "value", "remove", "rename", "duplicate", "swap"])
        if kind == "value":
            container[key] = change_value(rng, container[key])
        elif kind == "remove":
            del container[key]
        elif kind == "swap":
            other, its = places(rng, root)
            try:
                container[key], other[its] = json.loads(json.dumps([other[its], container[key]]))
            except (RecursionError, KeyError, IndexError):
                pass
        elif isinstance(container, list):
            container.insert(key, container[key])
        else:
            container[rng.choice(WORDS[:20] + list(container))] = (
                container.pop(key) if kind == "rename" else container[key]
            )
    return root


def json_file(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.1:
        return rng.choice(
            [
                b"",
                b"null",
                b"[]",
                b"{}",
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"1" * 10_000,
                content.replace(b"{", b'{"model": 1,', 1),
                b"\xff\xfe" + content,
                content.replace(b'"', b"'"),
                content + content,
                b'{"network": {}}',
            ]
        )
    if rng.random() < 0.1:
        return change_bytes(rng, content)
    return json.dumps(change_json(rng, json.loads(content)), ensure_ascii=rng.random() < 0.9).encode(
        "utf-8", "surrogatepass"
    )


def yaml_file(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.2:
        laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
        return rng.choice(
            [
                b"",
                b"- a",
                b"a",
                laughs.encode(),
                b"&a [*a]",
                f"model: !!python/object/apply:os.system ['touch {CANARY}']\n".encode(),
                b"? [a]\n: b",
                b"{" * 20_000,
                b"[" * 20_000,
                b"epochs: &e 1\nwarmup_epochs: *e\n",
                b"<<: {epochs: 1}\n",
                content + content,
                content + laughs.encode(),
                b"epochs: 0o7\nlr: .inf\n",
                b"lr: 1:30\n",
                b"epochs: 2001-01-01\n",
            ]
        )
    if rng.random() < 0.15:
        return change_bytes(rng, content)
    try:
        return yaml.safe_dump(change_json(rng, yaml.safe_load(content)), sort_keys=False).encode(
            "utf-8", "surrogatepass"
        )
    except (yaml.YAMLError, TypeError):
        return change_bytes(rng, content)


def csv_file(rng: random.Random, content: bytes) -> bytes:
    rows = [line.split(",") for line in content.decode().splitlines()]
    if rng.random() < 0.3 or not rows or not rows[0]:
        return change_bytes(rng, content)
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = str(any_value(rng))[:200_000]
    if rng.random() < 0.3:
        rows.append(rng.choice(rows)[: rng.randrange(3)])
    return "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        kind = rng.choice(["flip", "flip", "flip", "cut", "insert", "zero", "drop"])
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut" and rng.random() < 0.3:
            del data[at:]
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif kind == "zero":
            data[at : at + 8] = rng.choice([b"\0", b"\xff"]) * len(data[at : at + 8])
        elif kind == "drop":
            del data[at : at + rng.choice([1, 4, 100])]
    return bytes(data)


def zip_file(rng: random.Random, content: bytes) -> bytes:
    """An archive with a member changed; its checksums are right."""
    if rng.random() < 0.3:
        return change_bytes(rng, content)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        chosen = rng.choice(names)
        for name in names:
            member = source.read(name)
            if name == chosen:
                kind = rng.choice(["change", "change", "change", "remove", "rename", "long"])
                if kind == "remove":
                    continue
                if kind == "long":
                    member += b" " * (1 << 26)
                elif kind == "change":
                    member = (
                        json_file(rng, member)
                        if member[:1] in (b"{", b"[")
                        else change_bytes(rng, member)
                        if member
                        else b"x"
                    )
                name = name + "x" if kind == "rename" else name
            target.writestr(name, member, zipfile.ZIP_DEFLATED if len(member) > 1 << 25 else zipfile.ZIP_STORED)
    return out.getvalue()


class Trap:
    def __reduce__(self) -> tuple:
        return os.mkdir, (CANARY,)


def torch_file(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.8:
        return zip_file(rng, content)
    out = io.BytesIO()
    torch.save(
        rng.choice(
            [
                Trap(),
                {"state_dict": Trap()},
                {},
                [],
                {"a": 1},
                {1: torch.zeros(1)},
                {"state_dict": {"x": None}},
                torch.zeros(2),
                {"stem.weight": torch.zeros(1)},
                {"model": {"stem.weight": torch.full((8, 3, 3, 3), float("nan"))}},
            ]
        ),
        out,
    )
    return out.getvalue()


def checkpoint_file(rng: random.Random, content: bytes) -> bytes:
    """A checkpoint with one value changed, at any depth: a number, a tensor, a key."""
    if rng.random() < 0.5:
        return torch_file(rng, content)
    out = io.BytesIO()
    torch.save(change_state(rng, torch.load(io.BytesIO(content), weights_only=True)), out)
    return out.getvalue()


def change_state(rng: random.Random, state: Any) -> Any:
    """A state of tensors and plain data with one value changed."""
    container, key = places(rng, state)
    value = container[key]
    if rng.random() < 0.2:
        del container[key]
    elif isinstance(value, torch.Tensor) and rng.random() < 0.8:
        container[key] = rng.choice([value[None], value.flatten()[:-1], value.double() * torch.nan, value.bool(), -value.float(), 0])
    else:
        container[key] = rng.choice([change_value(rng, value) if not isinstance(value, torch.Tensor) else None, torch.zeros(2), "x"])
    return state


def safetensors_file(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.4:
        return change_bytes(rng, content)
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    if rng.random() < 0.4:
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E5M2", "C64"])
    else:
        header = change_json(rng, header)
    text = json.dumps(header).encode()
    body = content[8 + size :]
    if rng.random() < 0.2:
        body = np.full(len(body) // 4, rng.choice([np.nan, np.inf, 1e38, 0.0]), np.float32).tobytes()
    return struct.pack("<Q", len(text) if rng.random() < 0.9 else rng.choice([0, 1 << 40, 2**64 - 1])) + text + body


def onnx_file(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.4:
        return change_bytes(rng, content)
    model = onnx.load_from_string(content)
    graph = model.graph
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    kind = rng.choice(
        ["operator", "input", "dims", "external", "metadata", "attribute", "domain", "output", "opset", "loop"]
    )
    if kind == "operator":
        node.op_type = rng.choice(
            ["Loop", "If", "Relu", "Tile", "ConstantOfShape", "Expand", "Resize", "Nope", "MatMul", "Softmax"]
        )
    elif kind == "input":
        node.input[0] = rng.choice(["images", "", "nope", *node.output])
    elif kind == "dims":
        tensor.dims[:] = rng.choice([[2**40], [], [-1], [0], [1] * 20, list(tensor.dims)[::-1]])
    elif kind == "external":
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(
            key="location",
            value=rng.choice(["/etc/passwd", "../net.py", "plan.json", "", "model.safetensors", "/dev/zero", "\x00"]),
        )
    elif kind == "metadata":
        for entry in model.metadata_props:
            entry.value = json_file(rng, entry.value.encode()).decode(errors="replace")
    elif kind == "attribute":
        for attribute in node.attribute:
            attribute.ints[:] = [rng.choice([0, -1, 2**40, 3, 10**6]) for _ in attribute.ints]
    elif kind == "domain":
        node.domain = rng.choice(["com.microsoft", "evil", HOSTILE])
    elif kind == "output":
        graph.output[0].name = rng.choice([node.output[0], "nope"])
    elif kind == "opset":
        model.opset_import[0].version = rng.choice([0, 1, 9999, -1])
    else:
        graph.node.add(op_type="Loop").attribute.append(
            onnx.helper.make_attribute("body", onnx.helper.make_graph([], "b", [], []))
        )
    return model.SerializeToString()


def replace_file(rng: random.Random, path: Path) -> None:
    """Puts something that is no regular file of this kind in a file's place."""
    path.unlink()
    kind = rng.choice(["pipe", "zero", "folder", "loop", "gone", "outside", "sparse", "empty"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 36)
    elif kind == "empty":
        path.touch()
    elif kind != "gone":
        path.symlink_to({"zero": "/dev/zero", "loop": path.name, "outside": "/etc/passwd"}[kind])


def change_images(rng: random.Random, folder: Path) -> None:
    """A folder of images as no one should have it."""
    for _ in range(rng.choice([1, 2, 3])):
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        path = rng.choice(files)
        kind = rng.choice(
            ["bytes", "bytes", "replace", "rename", "class", "remove", "text", "huge", "mode", "loop", "split"]
        )
        if kind == "bytes":
            path.write_bytes(change_bytes(rng, path.read_bytes()))
        elif kind == "replace":
            replace_file(rng, path)
        elif kind == "rename":
            path.rename(
                path.with_name(
                    rng.choice(
                        [
                            "\x1b[31m.png",
                            "a\nb.png",
                            "a.PNG",
                            "._a.png",
                            "a.jpg",
                            "a",
                            "é.webp",
                            "-x.png",
                            "x" * 200 + ".png",
                            MARK + ">.png",
                            "a.png.exe",
                        ]
                    )
                )
            )
        elif kind == "class":
            (
                path.parent.parent
                / rng.choice(["\x1b[2J", ".hidden", "__MACOSX", "third", MARK + ">", "dark ", "DARK", "a\nb"])
            ).mkdir(exist_ok=True)
        elif kind == "remove":
            shutil.rmtree(rng.choice([path.parent, path.parent.parent]), ignore_errors=True)
            if not any(path.is_file() for path in folder.rglob("*")):
                return
        elif kind == "text":
            path.write_text(HOSTILE, encoding="utf-8", errors="replace")
        elif kind == "huge":
            head = b"BM" + struct.pack(
                "<IIIIiiHHIIiiII", 54, 0, 54, 40, rng.choice([1, 60_000, 2**30]), 60_000, 1, 24, 0, 0, 0, 0, 0, 0
            )
            path.with_suffix(".bmp").write_bytes(head)
        elif kind == "mode":
            mode, ending = rng.choice(
                [
                    ("1", "png"),
                    ("I;16", "png"),
                    ("F", "tif"),
                    ("CMYK", "tif"),
                    ("LA", "png"),
                    ("P", "gif"),
                    ("RGBA", "png"),
                    ("I", "tif"),
                ]
            )
            Image.new(mode, rng.choice([(16, 16), (1, 1), (1, 500), (300, 2)])).save(path.with_name(f"new.{ending}"))
        elif kind == "loop":
            (path.parent / f"loop{rng.randrange(99)}").symlink_to(rng.choice([".", "..", "/proc", folder.absolute()]))
        else:
            old = rng.choice([p for p in folder.iterdir() if p.is_dir()] or [folder])
            if old != folder:
                old.rename(folder / rng.choice(["test", "validation", "Train", "VAL", "extra"]))
