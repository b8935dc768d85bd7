"""A result is data: whatever its files say, they are loaded or refused in one line, nothing that they name is run, and no fact that
follows from the network is believed."""

import copy
import io
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from helpers import random_plan, randomise
from safetensors.torch import load_file, save_file
from torch import nn
from toy import PRUNE, s2h

from s2h_cli import artifacts, bench, computed, config, handout, network_json, operators, sizes
from s2h_cli.budget import Budget
from s2h_cli.errors import UserError
from s2h_cli.files import read_regular
from s2h_cli.graph import capture
from s2h_cli.plan import Space
from s2h_cli.rebuild import rebuild
from s2h_cli.report import page, tables
from s2h_cli.report.facts import describe
from s2h_cli.rules import RULES
from s2h_cli.run import read_table

NASTY = [None, True, -1, 0, 3, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\x1b[2J\n", "../../etc/passwd", "__class__", "evil.py:build",
         [], [[]], {}, {"node": "x"}, {"torch": "load"}, [1e308, 1e308]]
#: Stands for a value that is taken away.
GONE = object()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.b = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 2)
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x):
        x = self.depthwise(self.norm(self.a(x)).relu())
        return self.head((self.b(x) + self.shift).flatten(2).mean(-1))


def small_and_plan():
    network = capture(randomise(Net()), (3, 8, 8)).network
    space = Space(network, divisor=1)
    plan = random_plan(space, share=0.5)
    data = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0, "classes": ["a", "b"],
            "split": {"val_fraction": 0.1}}
    results = {"top1": {"hard": 50.0, "exported": 50.0}, "files": {"model.safetensors": {"difference": 0.0, "top1": 50.0}}, "bytes_before": 1000}
    return rebuild(network, plan), {**describe(plan, "resnet18", (3, 8, 8), Budget(flops=0.9)), "kept_indices": plan.by_group(), "data": data, "results": results}


SMALL, PLAN = small_and_plan()


@pytest.fixture
def result(tmp_path):
    artifacts.save(tmp_path / "run", SMALL, copy.deepcopy(PLAN))
    return tmp_path / "run"


def places(value, path=()):
    """Every place in nested data; of a list's entries the first and the last, of entries of one kind a few."""
    yield path
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys if len(keys) < 8 and isinstance(value, dict) else [*keys[:3], *keys[-1:]] if isinstance(value, dict) else sorted({*keys[:1], *keys[-1:]}):
        yield from places(value[key], (*path, key))


def mutations(data):
    """Texts of JSON, each with one place of the data replaced, or without it."""
    for path in places(data):
        for value in [*NASTY, GONE]:
            changed = copy.deepcopy(data)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if not path:
                changed = None if value is GONE else value
            elif value is GONE:
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            yield path, value, json.dumps(changed)


def refused(action):
    """Whether an action is refused; any other exception is raised. (The command line shows each error as one line: test_shown.)"""
    try:
        action()
    except UserError:
        return True
    return False


# -- every field of every file ----------------------------------------------------------------------------------------


def test_each_field_of_a_plan_is_refused_or_harmless(result, monkeypatch):
    weights = load_file(result / "model.safetensors")
    monkeypatch.setattr(artifacts, "load_file", lambda path: weights)
    plan = json.loads((result / "plan.json").read_text())

    def read():
        network = artifacts.load(result)
        assert network(torch.zeros(1, *network.meta["input_size"])).shape == (1, 2)
        tables.PlainConsole(file=io.StringIO()).print(tables.inspection(computed.checked(result).plan))
        json.dumps(page.single(page.read_run(result)), allow_nan=False)
        handout.card(result, artifacts.read_plan(result, *computed.KEYS, "results"), config.Config(model="net", data="digits"), [])

    read()
    found = []
    for path, value, text in mutations(plan):
        (result / "plan.json").write_text(text)
        try:
            found.append(refused(read))
        except Exception as error:
            pytest.fail(f"{'.'.join(map(str, path))} = {value!r}: {type(error).__name__}: {error}")
    assert 0 < found.count(False) < len(found) / 4


def test_each_field_of_figures_is_refused_or_harmless(result):
    rows = [{"format": "eager", "batch": 1, "network": name, "timing": {"low": 0.1, "median": 0.2, "high": 0.3, "blocks": 5}} for name in ("resnet18", "run")]
    figures = {"place": "a CPU", "rows": [*rows, {"format": "onnx", "batch": 1, "network": "run", "failed": "why"}],
               "pairs": [{"before": "resnet18", "after": "run", "macs": 0.5, "kinds": {"convolutions": [0.1, 0.1]}, "reasons": ["why"]}]}
    for _, value, text in mutations(figures):
        (result / "bench.json").write_text(text)
        if not refused(lambda: bench.read(result)):
            tables.PlainConsole(file=io.StringIO()).print(tables.latencies(bench.read(result)))
            json.dumps(page.single(page.read_run(result)), allow_nan=False)
    table = {"nodes": ["a", "head"], "nanoseconds": [[1.0] * 5] * 2, "whole": 1.0, "least": 0.5, "error": 0.1}
    for _, value, text in mutations(table):
        (result / "latency.json").write_text(text)
        refused(lambda: read_table(result / "latency.json", SMALL))


def test_each_setting_of_a_file_is_refused_or_of_its_type(tmp_path):
    needed = {"model": "resnet18", "data": "digits", "flops": 0.5}
    path = tmp_path / "args.yaml"
    for name in asdict(config.configure(needed)):
        for value in NASTY:
            path.write_text(yaml.safe_dump({**needed, name: value}))
            refused(lambda: config.configure({}, file=path, trust=False).command())
    for text in ("a: &a [1]\nb: *a", "[" * 2000, "? [a]\n: b", "!!python/object/apply:os.system [ls]", "x: 2020-99-99", "\x00", "a: 1e999", "- &x x\n" * 99):
        path.write_text(text)
        with pytest.raises(UserError):
            config.configure(needed, file=path)


def test_tables_of_numbers_are_numbers(result):
    for text in ("epoch,a\n1\n", "epoch,a\n1,x\n", "", "\x00", 'a,"' + "x" * 200_000, "epoch\n" + "1\n" * 3):
        (result / "widths.csv").write_text(text)
        (result / "summary.csv").write_text(text)
        refused(lambda: page.read_run(result))


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "bench.json", "args.yaml", "summary.csv"])
def test_only_regular_files_are_read(result, name, tmp_path):
    path = result / name
    (result / "args.yaml").write_text("model: resnet18\ndata: digits\nflops: 0.5\n")

    def fifo():
        os.mkfifo(path)

    for make in (fifo, lambda: path.symlink_to("/dev/zero"), path.mkdir, lambda: path.symlink_to(path), lambda: path.symlink_to("/nowhere/at/all")):
        path.unlink(missing_ok=True)
        make()
        if not path.exists() and name in ("bench.json", "args.yaml", "summary.csv"):
            page.read_run(result)  # it does without
        else:
            with pytest.raises(UserError, match=re.escape(name)):
                page.read_run(result)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_large_files_are_not_read(result):
    for name in ("plan.json", "model.safetensors"):
        os.truncate(result / name, 1 << 40)
        with pytest.raises(UserError, match="larger than"):
            artifacts.load(result)
    with pytest.raises(UserError, match="larger than"):
        read_regular(result / "plan.json", 1000)


@pytest.mark.parametrize("text, words", [("[" * 100_000, "too deep"), ('{"network": {}, "network": {}}', "twice"), ('{"network": NaN}', "NaN"), ("{", "not JSON")])
def test_json_that_s2h_does_not_write(result, text, words):
    (result / "plan.json").write_text(text)
    with pytest.raises(UserError, match=f"plan.json.*{words}"):
        artifacts.load(result)


def without(name):
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize("change, words", [
    (lambda w: {name: t.half() if t.is_floating_point() else t for name, t in w.items()}, "float16"),
    (without("head.weight"), "head.weight is in plan.json but not"), (lambda w: {**w, "more": torch.zeros(1)}, "more is in model.safetensors but not"),
    (lambda w: {**w, "head.weight": torch.zeros(5, 5)}, "head.weight has shape"), (lambda w: {**w, "a.weight": w["a.weight"] * float("nan")}, "not finite"),
    (lambda w: {**w, "shift": torch.ones(7)}, "cannot run"), (lambda w: {}, "not in model.safetensors")])
def test_weights_that_do_not_fit(result, change, words):
    save_file(change(load_file(result / "model.safetensors")), result / "model.safetensors")
    with pytest.raises(UserError, match=words):
        artifacts.load(result)


# -- facts ------------------------------------------------------------------------------------------------------------

FACTS = [("macs", "pruned"), ("macs", "full"), ("macs", "ratio"), ("params", "pruned"), ("params", "ratio"), ("input_size", 1), ("data", "input_size", 2),
         *(("groups", i, key) for i in range(len(PLAN["groups"])) for key in ("size", "kept")),
         *(("layers", i, key, 0) for i in range(len(PLAN["layers"])) for key in ("in", "out", "macs", "params")),
         *(("layers", i, "params", 1) for i, layer in enumerate(PLAN["layers"]) if layer["kind"] != "mean")]


@pytest.mark.parametrize("place", FACTS, ids=lambda place: ".".join(map(str, place)))
def test_what_follows_from_the_network_is_computed(result, place):
    for change in (lambda n: n + 1, lambda n: n * 2, lambda n: n / 2 if isinstance(n, float) else n // 2):
        plan = json.loads((result / "plan.json").read_text())
        inner = plan
        for key in place[:-1]:
            inner = inner[key]
        before, inner[place[-1]] = inner[place[-1]], change(inner[place[-1]])
        if inner[place[-1]] == before:
            continue
        with pytest.raises(UserError, match="plan.json"):
            other = result.parent / "other"
            other.mkdir(exist_ok=True)
            (other / "plan.json").write_text(json.dumps(plan))
            (other / "model.safetensors").write_bytes((result / "model.safetensors").read_bytes())
            computed.checked(other)


# -- operators and sizes ----------------------------------------------------------------------------------------------


def test_every_operator_that_has_a_rule_is_on_the_list():
    names = {name.split(".")[0] for name in operators.OPERATORS | operators.FILLED.keys()}
    assert set(RULES) - {"drop_path"} <= names


@pytest.mark.parametrize("name", sorted(name for name in operators.OPERATORS if hasattr(torch.ops.aten, name.split(".")[0])))
def test_operators_on_the_list_write_to_nothing_but_their_first_argument(name):
    operator, overload = name.split(".")
    found = getattr(getattr(torch.ops.aten, operator), overload)._schema
    written = [i for i, argument in enumerate(found.arguments) if argument.alias_info is not None and argument.alias_info.is_write]
    assert written == ([0] if name in operators.IN_PLACE else [])
    assert not any(argument.name.endswith(("name", "file", "filename", "stride_", "storage_offset")) for argument in found.arguments)
    assert not operator.startswith(("as_strided", "set_", "resize", "empty", "_reinterpret", "from_", "record_stream"))


@pytest.mark.parametrize("name", ["torch.ops.inductor._reinterpret_tensor.default", "torch.ops.aten.as_strided.default", "torch.ops.aten.set_.source_Tensor",
                                  "torch.ops.aten.resize_.default", "torch.ops.aten.empty_strided.default", "torch.ops.aten.from_file.default",
                                  "torch.ops.aten.view.dtype", "torch.ops.prim.NumToTensor.Scalar", "torch.ops.aten._local_scalar_dense.default"])
def test_no_other_operator_is_called(result, name):
    plan = json.loads((result / "plan.json").read_text())
    node = next(node for node in plan["network"]["nodes"] if node["op"] == "call_function")
    node["target"] = name
    (result / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=re.escape(name)):
        artifacts.load(result)


def test_memory_that_nobody_wrote_to_is_filled(tmp_path):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            return self.head(x.flatten(1)) * torch.empty(2).zero_() + torch.ones(2)

    network = capture(Empty(), (3, 2, 2)).network
    text = json.dumps(network_json.network_to_json(network))
    assert "aten.empty" not in text
    loaded = network_json.network_from_json(json.loads(text), dict(network.state_dict()))
    assert torch.equal(loaded(torch.ones(2, 3, 2, 2)), torch.ones(2, 2))


@pytest.mark.parametrize("forward, words", [
    (lambda x: x.repeat(1, 1, 80_000, 1), "GB"), (lambda x: torch.nn.functional.interpolate(x, size=(60_000, 60_000)), "GB"),
    (lambda x: x.new_zeros(1 << 40).sum() + x, "GB"), (lambda x: torch.cat([x] * 2, 1), "not \\(1, classes\\)")])
def test_a_network_that_would_not_fit_into_memory_is_not_run(forward, words):
    network = torch.fx.symbolic_trace(type("Large", (nn.Module,), {"forward": lambda self, x: forward(x)})())
    network.meta.update(input_size=[3, 64, 64], static_batch=None)
    with pytest.raises(UserError, match=words):
        sizes.check_sizes(network)


def test_images_of_any_size_are_not_made(result):
    plan = json.loads((result / "plan.json").read_text())
    for size in ([3, 12000, 12000], [3, 0, 8], [3, -8, 8], [10**6, 8, 8]):
        for place in (plan, plan["data"], plan["network"]["meta"]):
            place["input_size"] = size
        (result / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(UserError, match="input_size"):
            artifacts.load(result)


# -- code -------------------------------------------------------------------------------------------------------------

EVIL = "from pathlib import Path\nPath('owned').touch()\nimport net\nbuild = net.build\n"


@pytest.fixture
def evil(here):
    """A working folder with a Python file that leaves a trace where it is run."""
    (here / "evil.py").write_text(EVIL)
    return here


@pytest.mark.parametrize("model", ["evil.py:build", "./evil.py:build", "evil.py"])
def test_a_result_names_no_code_to_run(evil, result, model, capsys):
    plan = json.loads((result / "plan.json").read_text())
    (result / "plan.json").write_text(json.dumps({**plan, "model": model}))
    for command in (["inspect", result], ["bench", result, "--seconds", "0.1", "--format", "eager", "--batch", "1"], ["report", result]):
        s2h(*command)
        assert not Path("owned").exists()
    assert "--trust" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("model", "evil.py:build"), ("teacher", "evil.py:build"), ("model", "hf-hub:evil/evil"), ("data", "hfds/evil"), ("log", "wandb")])
def test_settings_of_a_file_name_no_code_to_run(evil, name, value, capsys):
    settings = {"model": "test_vit", "data": "data", "flops": 0.5, "epochs": 1, "device": "cpu", name: value}
    Path("run").mkdir()
    Path("run/args.yaml").write_text(yaml.safe_dump(settings))
    for command in (["prune", "--config", "run/args.yaml"], ["prune", "--resume", "-o", "run"]):
        assert s2h(*command, "--dry-run") == 2
        error = capsys.readouterr().err
        assert "--trust" in error and value in error and error.count("\n") == 1 and not Path("owned").exists()


def test_code_that_the_command_line_names_or_trusts_is_run(evil, capsys):
    options = ["--data", "data", "--flops", "0.5", *PRUNE[6:]]
    assert s2h("prune", "evil.py:build", *options, "--dry-run") == 0 and Path("owned").exists()
    Path("owned").unlink()
    Path("mine.yaml").write_text(yaml.safe_dump({"model": "evil.py:build", "img_size": 16, "workers": 0, "batch_size": 16, "device": "cpu", "divisor": 2}))
    assert s2h("prune", "--config", "mine.yaml", *options, "--dry-run", "--trust") == 0


ODD = "import net, torch\nclass Odd(net.Net):\n    def forward(self, x):\n        return super().forward(x) + torch.special.bessel_j0(x).mean((1, 2, 3))[:, None]\n"


def test_an_operator_that_no_result_may_hold_is_met_before_training(here, capsys):
    (here / "odd.py").write_text(ODD)
    command = ["prune", "odd.py:Odd", *PRUNE[2:], "--dry-run"]
    assert s2h(*command) == 2
    error = capsys.readouterr().err
    assert "special_bessel_j0" in error and "--trust" in error and error.count("\n") == 1
    assert s2h(*command, "--trust") == 0
    network_json._accepted.clear()


def test_an_operator_that_is_on_no_list_is_called_when_it_is_trusted(result):
    plan = json.loads((result / "plan.json").read_text())
    node = next(node for node in plan["network"]["nodes"] if node["target"].endswith("relu"))
    node["target"] = "torch.ops.aten.special_bessel_j0.default"
    (result / "plan.json").write_text(json.dumps(plan))
    assert refused(lambda: artifacts.load(result)) and not refused(lambda: artifacts.load(result, trust=True))
