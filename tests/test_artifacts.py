"""Artifacts: what is written comes back the same, and what is not ours is refused."""

import copy
import json
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import fx, nn

from helpers import captured, random_plan, verify
from s2h_cli import artifacts, data, exports, network_json, run
from s2h_cli.errors import UserError
from s2h_cli.graph import capture
from s2h_cli.plan import Plan, Space
from s2h_cli.program import Program
from s2h_cli.rebuild import rebuild
from s2h_cli.source import load_source
from toy import PRUNE, s2h

SIZE = (3, 32, 32)
META = {"classes": ["cat", "dog"], "mean": [0.5]}


def small_of(model: nn.Module, size=SIZE) -> fx.GraphModule:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network = capture(model, size).network
    space = Space(network)
    widths = np.maximum(space.least, (space.full * 0.5).astype(int))
    return rebuild(network, Plan.from_widths(space, widths, np.random.default_rng(0).random(space.size)))


class Tiny(nn.Module):
    """A free batch, a buffer, a tensor operator with dtype, infinity and a layer inside a layer's name."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.norm = nn.GroupNorm(4, 32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)
        self.register_buffer("shift", torch.randn(32, 1, 1))
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.conv(x + self.shift.to(torch.float32)).relu()
        x = x.clamp(-float("inf"), float("inf"))[:, :, ::2]
        return self.head(x.flatten(2).mean(-1))


MODELS = {
    "tiny": lambda: Tiny(),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2, drop_path_rate=0.1),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1), drop_path_rate=0.1),
}


@pytest.fixture(scope="module")
def smalls():
    return {name: small_of(make()) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def tiny(smalls):
    return smalls["tiny"]


@pytest.fixture()
def folder(tmp_path, tiny):
    artifacts.save(tmp_path, tiny, {"ratio": 0.5})
    return tmp_path


def edit(folder, change):
    plan = json.loads((folder / "plan.json").read_text())
    change(plan["network"])
    (folder / "plan.json").write_text(json.dumps(plan))


def of(network_json, op):
    return next(node for node in network_json["nodes"] if node["op"] == op)


# -- the network as data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_for_bit(smalls, name, tmp_path):
    small = smalls[name]
    artifacts.save(tmp_path, small, {})
    loaded = artifacts.load(tmp_path)
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
    assert network_json.network_to_json(loaded) == network_json.network_to_json(small)
    assert list(loaded.state_dict()) == list(small.state_dict())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in small.parameters()]
    assert {k: str(v) for k, v in loaded.named_modules() if k} == {k: str(v) for k, v in small.named_modules() if k}
    assert loaded.meta["input_size"] == list(SIZE) and loaded.meta["static_batch"] is None
    assert not any(module.training for module in loaded.modules())
    twin = copy.deepcopy(loaded).train()
    assert str(twin) and twin(x).requires_grad
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]


def test_values_survive_json():
    graph = fx.Graph()
    node = graph.placeholder("x")
    values = [None, True, 1, 0.1, float("inf"), float("-inf"), "sum", node, (1, (node,)), [node, None], slice(None, node, 2),
              torch.bfloat16, torch.strided, torch.channels_last, torch.device("cpu")]
    text = json.dumps(network_json._encode(values), allow_nan=False)
    assert network_json._decode(json.loads(text), {"x": node}) == values
    assert np.isnan(network_json._decode(network_json._encode(float("nan")), {}))


def test_tied_and_non_persistent_tensors(tmp_path, tiny):
    small = copy.deepcopy(tiny)
    small.conv.bias = small.stem.bias
    small._non_persistent_buffers_set.add("shift")
    artifacts.save(tmp_path, small, {})
    loaded = artifacts.load(tmp_path)
    assert loaded.conv.bias is loaded.stem.bias
    assert "shift" not in loaded.state_dict() and torch.equal(loaded.shift, small.shift)


def test_plan_keeps_its_keys_and_says_versions(folder):
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["ratio"] == 0.5 and plan["versions"]["torch"] == torch.__version__ and plan["versions"]["timm"] == timm.__version__


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["os.system", "operator.attrgetter", "torch.load", "builtins.eval", "torch.ops.load_library.x.y",
                                    "torch.ops.aten.from_file.default", "torch.ops.aten.relu",
                                    "torch.ops.aten.__init__.__globals__"])
def test_functions_off_the_list_are_refused(folder, target):
    edit(folder, lambda n: of(n, "call_function").update(target=target))
    with pytest.raises(UserError, match="does not know"):
        artifacts.load(folder)


@pytest.mark.parametrize("change", [
    lambda n: n["modules"]["conv"].update({"class": "LSTM"}),
    lambda n: n["modules"]["conv"].update({"class": "__init__"}),
    lambda n: of(n, "call_function").update(op="call_method", target="__reduce__"),
    lambda n: of(n, "call_module").update(target="conv.forward.__globals__.clear"),
    lambda n: of(n, "get_attr").update(target="conv.forward.__globals__"),
    lambda n: of(n, "placeholder").update(target="x=print('owned')"),
    lambda n: of(n, "placeholder").update(name="x; print('owned')"),
    lambda n: of(n, "call_function").update(kwargs={"a=print('owned'), b": 1}),
    lambda n: of(n, "call_function").update(args=[{"torch": "load"}]),
    lambda n: of(n, "call_function").update(args=[{"node": "nowhere"}]),
    lambda n: of(n, "call_function").update(args=[{"exec": "print()"}]),
    lambda n: n["modules"].update({'a"); print("owned': {"class": "Module"}}),
    lambda n: n.update({"class": "X: pass\nprint('owned')"}),
    lambda n: n.update(nodes=None),
    lambda n: n.pop("meta"),
    lambda n: n["tensors"].pop("conv.bias"),
    lambda n: n["modules"]["conv"].update(out_channels=7),
    lambda n: n["modules"]["head"].update(bias=False),
    lambda n: n["tensors"]["conv.bias"].update(kind="buffer"),
])
def test_damaged_plan_is_a_user_error(folder, change, capsys):
    edit(folder, change)
    with pytest.raises(UserError) as caught:
        artifacts.load(folder)
    assert "\n" not in str(caught.value) and "owned" not in capsys.readouterr().out


def test_missing_and_broken_files(folder, tmp_path, tiny):
    with pytest.raises(UserError, match="no such folder"):
        artifacts.load(tmp_path / "nowhere")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(UserError, match="cannot be read"):
        artifacts.load(folder)
    artifacts.save(tmp_path / "other", small_of(MODELS["mobilenetv3"]()), {})
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not match"):
        artifacts.load(folder)
    for text, message in (("{", "not JSON"), ("[]", "holds no network"), ('{"network": {}}', "network.class: field required")):
        (folder / "plan.json").write_text(text)
        with pytest.raises(UserError, match=message):
            artifacts.load(folder)
    (folder / "plan.json").unlink()
    with pytest.raises(UserError, match=r"no plan\.json"):
        artifacts.load(folder)


def test_a_network_that_cannot_be_held_is_refused_when_saved(tmp_path, tiny):
    small = copy.deepcopy(tiny)
    small.conv = nn.ConvTranspose2d(32, 32, 3)
    with pytest.raises(UserError, match="ConvTranspose2d"):
        artifacts.save(tmp_path, small, {})
    assert not list(tmp_path.iterdir())


BLOCKED = """
import json, sys
sys.modules.update(dict.fromkeys(("timm", "fvcore", "onnx", "onnxruntime")))  # importing them fails
import s2h_cli
assert "torch" not in sys.modules
tiny = s2h_cli.load(sys.argv[1])
assert "torchvision" not in sys.modules  # only stochastic depth needs it
vit = s2h_cli.load(sys.argv[2])
import torch
print(json.dumps([network(torch.ones(1, 3, 32, 32)).tolist() for network in (tiny, vit)]))
"""


def test_loads_without_timm(smalls, tmp_path):
    names = ("tiny", "vit")
    for name in names:
        artifacts.save(tmp_path / name, smalls[name], {})
    command = [sys.executable, "-c", BLOCKED, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        for logits, name in zip(json.loads(done.stdout), names):
            torch.testing.assert_close(torch.tensor(logits), smalls[name](torch.ones(1, *SIZE)))


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "vit"])
def test_exports_run_at_any_batch_and_are_quiet(smalls, tmp_path, name, capfd):
    small = smalls[name]
    small.train()
    artifacts.save(tmp_path, small, {})
    before = {k: v.clone() for k, v in small.state_dict().items()}
    for format in exports.EXPORTS:
        file = exports.export(small, tmp_path, format, META)
        assert file == tmp_path / exports.EXPORTS[format].file and exports.read_metadata(file) == META
    assert small.training and all(torch.equal(before[k], v) for k, v in small.state_dict().items())
    small.eval()
    differences = verify(small, tmp_path, SIZE)
    assert set(differences) == {"model.safetensors", "model.ts", "model.onnx", "model.pt2"}
    assert differences["model.safetensors"] == 0 and max(differences.values()) < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*differences, "plan.json"])
    assert capfd.readouterr() == ("", "")
    assert exports.run_artifact(tmp_path / "model.onnx")(torch.zeros(7, *SIZE)).shape == (7, 5)


class SizedByBatch(nn.Module):
    """Makes a tensor of the batch's size by a call that tracing would freeze."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 16, 3, 4), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x):
        mask = torch.ones(x.shape[0], 1, 1, 1, device=x.device)
        return self.head((self.conv(self.stem(x).relu()) * mask).relu().mean((2, 3)))


def test_torchscript_keeps_sizes_that_depend_on_the_batch(tmp_path):
    small = small_of(SizedByBatch())
    assert any("aten.ones" in str(node.target) for node in small.graph.nodes)
    artifacts.save(tmp_path, small, {})
    exports.export(artifacts.load(tmp_path), tmp_path, "torchscript")
    assert verify(small, tmp_path, SIZE)["model.ts"] < 1e-6


def test_onnx_names(tiny, tmp_path):
    import onnx

    model = onnx.load(str(exports.export(tiny, tmp_path / "net.onnx", "onnx")))
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.shape.dim[0].dim_param == logits.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert exports.read_metadata(tmp_path / "net.onnx") == {}


def test_fixed_batch(tiny, tmp_path):
    small = copy.deepcopy(tiny)
    small.meta["static_batch"] = 3
    artifacts.save(tmp_path, small, {})
    for format in exports.EXPORTS:
        exports.export(small, tmp_path, format)
    assert len(verify(small, tmp_path, SIZE)) == 4
    with pytest.raises(Exception):
        exports.run_artifact(tmp_path / "model.onnx")(torch.zeros(2, *SIZE))


@pytest.mark.parametrize("format", exports.EXPORTS)
def test_verify_names_a_wrong_artifact(tiny, tmp_path, format):
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.head.weight[0, 0] += 0.1
    file = exports.export(other, tmp_path, format)
    with pytest.raises(UserError, match=file.name):
        verify(tiny, tmp_path, SIZE)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=file.name):
        verify(tiny, tmp_path, SIZE)


def test_verify_sees_changed_weights_and_nan(folder, tiny):
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.head.bias[0] = float("nan")
    with pytest.raises(UserError, match="model.safetensors"):
        verify(other, folder, SIZE)


def written(small, folder):
    """Writes a network in every format; the differences that `verify` finds."""
    artifacts.save(folder, small, {})
    for format in exports.EXPORTS:
        exports.export(small, folder, format)
    return verify(small, folder, SIZE)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)


def test_computed_weights_are_folded(tmp_path):
    """The standardised weight is a constant of the exports; the run folder keeps what it is computed from."""
    class Standardised(ConvNet):
        def forward(self, x):
            weight = nn.functional.batch_norm(self.conv.weight.reshape(1, 8, -1), None, None, training=True, momentum=0.0)
            return self.head(nn.functional.conv2d(x, weight.reshape(8, 3, 3, 3), self.conv.bias).mean((2, 3)))

    small = captured(Standardised(), SIZE).network
    assert max(written(small, tmp_path).values()) < 1e-5
    assert "batch_norm" in str(small.graph)
    assert "batch_norm" not in str(torch.export.load(tmp_path / "model.pt2").graph)
    assert "BatchNorm" not in str([node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node])


def test_a_bias_changed_in_place_is_folded_as_changed(tmp_path):
    """As in torchvision's Swin V2, whose keys have no bias."""
    class Changed(ConvNet):
        def forward(self, x):
            bias = self.conv.bias.clone()
            bias[2:4].zero_()
            return self.head(nn.functional.conv2d(x, self.conv.weight, bias).relu().mean((2, 3)))

    small = captured(Changed(), SIZE).network
    before = small.conv.bias.detach().clone()
    assert max(written(small, tmp_path).values()) < 1e-5
    assert torch.equal(small.conv.bias, before) and before[2:4].abs().min() > 0


def test_a_padded_max_pool_is_right_in_onnx(tmp_path):
    """ONNX Runtime fuses a zero padding into the pool, as if it were minus infinity; all values here are negative."""
    class Padded(ConvNet):
        def forward(self, x):
            x = nn.functional.pad(-self.conv(x).abs() - 1, (1, 1, 1, 1))
            return self.head(nn.functional.max_pool2d(x, 3, 2).amax((2, 3)))

    small = captured(Padded(), SIZE).network
    exports.export(small, tmp_path, "onnx")
    artifacts.save(tmp_path, small, {})
    assert verify(small, tmp_path, SIZE)["model.onnx"] < 1e-5


def test_failing_exporter_is_named_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    def fail(*args):
        args[1].write_text("half")
        raise RuntimeError("first\nsecond")

    monkeypatch.setitem(exports.EXPORTS, "pt2", exports.EXPORTS["pt2"]._replace(write=fail))
    with pytest.raises(UserError, match=r"export to pt2 failed: RuntimeError: first$"):
        exports.export(tiny, tmp_path, "pt2")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="choose from torchscript"):
        exports.export(tiny, tmp_path, "caffe")


def test_run_artifact_refuses(tmp_path):
    (tmp_path / "a.pth").touch()
    for name, message in (("a.pth", "not an artifact"), ("a.onnx", "no such file")):
        with pytest.raises(UserError, match=message):
            exports.run_artifact(tmp_path / name)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["sample_inputs/model.pt", "weights/weight_0"])
def test_pickles_in_a_pt2_file_do_not_run(tiny, tmp_path, where):
    file = exports.export(tiny, tmp_path, "pt2")
    trap, evil = tmp_path / "sprung", tmp_path / "evil.pt2"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(evil, "w") as target:
        for entry in source.namelist():
            content = source.read(entry)
            if entry.endswith(where):
                torch.save(Trap(str(trap)), tmp_path / "trap")
                content = (tmp_path / "trap").read_bytes()
            if "weights" in where:
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            target.writestr(entry, content)
    with pytest.raises(UserError, match="pickled data" if "weights" in where else "evil.pt2"):
        exports.run_artifact(evil, trust=True)
    assert not trap.exists()


@pytest.mark.parametrize("name, size", [("resnet10t", 32), ("mobilenetv3_small_050", 64), ("test_vit", 160), ("test_convnext", 64),
                                        ("swin_tiny_patch4_window7_224", 224)])
def test_what_was_pruned_can_be_pruned_again(tmp_path, name, size):
    """A network that is loaded back and captured anew has the groups and the cost of the plan that it was cut by."""
    source = load_source(name, num_classes=4, pretrained=False, img_size=size)
    network = capture(source.module, source.input_size).network
    space = Space(network)
    plan = random_plan(space, share=0.5)
    artifacts.save(tmp_path, rebuild(network, plan), {})
    again = Space(capture(artifacts.load(tmp_path), source.input_size).network, divisor=1)
    assert again.full_macs == space.macs.total(plan.widths)
    assert sorted(group.size for group in again.groups) == sorted(int(n) for n in plan.widths if n > 1)  # one head is no choice


@pytest.fixture
def result(here, monkeypatch):
    """A run folder of a network that knows its classes."""
    with monkeypatch.context() as patch:
        patch.setattr(exports, "EXPORTS", {"onnx": exports.EXPORTS["onnx"]})
        assert s2h(*PRUNE, "--epochs", "4", "-o", "run") == 0
    return here / "run"


def exported(capsys, *options):
    """What `s2h export` says of each file that it wrote: {name: top-1 or None}; the network's own top-1 comes first where there is data."""
    capsys.readouterr()
    assert s2h("export", "run", "--workers", "0", *options) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("model")]
    if "--data" in options:
        own = rows.pop(0)
        assert own[0] == "model.safetensors" and float(own[-1]) == pytest.approx(artifacts.read_plan("run")["results"]["top1"]["exported"], abs=0.005)
    return {name: float(more[2]) if more[2:] else None for name, *more in rows}


def test_a_result_in_float16_is_half_as_large_and_right(result, capsys):
    found = exported(capsys, "--fp16", "--data", "data")
    plan = artifacts.read_plan(result)
    assert set(found) == {"model-fp16.onnx", "model-fp16.ts", "model-fp16.pt2"}
    for name, top1 in found.items():
        kept = plan["results"]["files"][name]
        for page in ("README.md", "report.html"):  # which say what is there now
            assert name in (result / page).read_text()
        assert abs(top1 - plan["results"]["top1"]["hard"]) <= 100 / 16 and 0 < kept["difference"] < exports.HALF_TOLERANCE  # one of 16 images
        assert kept["top1"] == pytest.approx(top1, abs=0.005)
    model = onnx.load(str(result / "model-fp16.onnx"))
    assert {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer} <= {"FLOAT16", "INT64"}
    assert [onnx.TensorProto.DataType.Name(x.type.tensor_type.elem_type) for x in (*model.graph.input, *model.graph.output)] == ["FLOAT", "FLOAT"]
    assert "model.onnx" in plan["results"]["files"]  # what was known of other files stays


def test_a_result_in_int8_is_calibrated_and_measured(result, capsys):
    found = exported(capsys, "--int8", "--format", "onnx", "--data", "data")
    assert set(found) == {"model-int8.onnx"} and abs(found["model-int8.onnx"] - artifacts.read_plan(result)["results"]["top1"]["hard"]) <= 200 / 16
    model = onnx.load(str(result / "model-int8.onnx"))
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    assert exports.read_metadata(result / "model-int8.onnx")["classes"] == ["dark", "light"]
    kernels = [t for t in model.graph.initializer if len(t.dims) == 4]
    assert kernels and all(t.data_type == onnx.TensorProto.INT8 for t in kernels)


def test_opset_and_batch_are_those_asked_for(result, capsys):
    found = exported(capsys, "--format", "onnx", "--opset", "19", "--batch", "3", "--data", "data")  # 16 images: the last batch lacks two
    model = onnx.load(str(result / "model-b3.onnx"))
    assert model.opset_import[0].version == 19 and model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert found["model-b3.onnx"] == pytest.approx(artifacts.read_plan(result)["results"]["top1"]["hard"], abs=0.005)
    assert s2h("eval", "run/model-b3.onnx", "--data", "data", "--workers", "0") == 0
    assert s2h("bench", "run/model-b3.onnx", "--format", "onnx", "--batch", "3", "--seconds", "0.1") == 0
    capsys.readouterr()
    assert s2h("bench", "run/model-b3.onnx", "--format", "onnx", "--batch", "1", "--seconds", "0.1") == 2
    assert "takes 3 images at a time: --batch 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "convnext"])
def test_an_opset_below_the_exporters_is_right_or_refused(smalls, tmp_path, name):
    file = exports.export(Program(smalls[name], opset=17), tmp_path, "onnx", META)
    assert onnx.load(str(file)).opset_import[0].version == 17 and exports.read_metadata(file) == META
    assert exports.check(smalls[name], {"file": file}, SIZE)[0]["file"] < exports.TOLERANCE
    with pytest.raises(UserError, match="opset 5.*from 18 on"):
        exports.export(Program(smalls[name], opset=5), tmp_path, "onnx", META)


@pytest.mark.parametrize("name", ["tiny", "convnext", "test_vit"])
def test_float16_reaches_every_dtype_in_the_graph(smalls, tmp_path, name):
    if name == "test_vit":  # at another size than its own, positions are resampled in float32
        source = load_source("test_vit", pretrained=False, num_classes=5, img_size=64)
        small, size = small_of(source.module, source.input_size), source.input_size
    else:
        small, size = smalls[name], SIZE
    files, failed = exports.export_all(Program(small, half=True), tmp_path, exports.EXPORTS, META, "fp16")
    found, wrong = exports.check(small, files, size, tolerance=exports.HALF_TOLERANCE)
    assert not failed and not wrong and len(found) == 3


class Rounds(nn.Sequential):
    """Two classes, and a large number that takes the last places of float32 with it."""

    def __init__(self, large):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        self.large = large

    def forward(self, x):
        return super().forward(x) + self.large - self.large


@pytest.mark.parametrize("large, passes", [(0.0, False), (1e3, True)])
def test_what_float32_does_to_the_network_itself_is_no_fault_of_a_file(monkeypatch, large, passes):
    torch.manual_seed(0)
    network = capture(Rounds(large), SIZE).network
    off = 5 * exports.TOLERANCE if large else 1.1 * exports.TOLERANCE
    monkeypatch.setattr(exports, "run_artifact", lambda path, trust: lambda images: (logits := network(images)) + off * logits.abs().max())
    with torch.no_grad():
        found, wrong = exports.check(network, {"file": "file"}, SIZE)
    assert (list(found), list(wrong)) == ((["file"], []) if passes else ([], ["file"]))


def test_a_fixed_batch_and_a_wrong_file_take_the_place_of_nothing(result, capsys, monkeypatch):
    before = (result / "model.onnx").read_bytes()
    assert set(exported(capsys, "--format", "onnx", "--int8", "--batch", "5", "--data", "data")) == {"model-int8-b5.onnx"}
    assert s2h("eval", "run/model-int8-b5.onnx", "--data", "data", "--workers", "0") == 0
    monkeypatch.setitem(exports.EXPORTS, "onnx", exports.EXPORTS["onnx"]._replace(run=lambda file: lambda images: torch.zeros(len(images), 2)))
    assert s2h("export", "run", "--format", "onnx") == 2
    assert (result / "model.onnx").read_bytes() == before and not list(result.glob("*/model*"))


def test_a_result_is_measured_on_the_images_that_its_run_left_out(here):
    options = [*PRUNE[:3], "data/train", *PRUNE[4:]]
    assert s2h(*options, "--epochs", "0", "--val-fraction", "0.4", "--seed", "7", "-o", "run") == 0
    theirs, _ = run.checked_data("data/train", artifacts.read_plan(here / "run")["data"], "run")
    ours, other = data.open_splits("data/train", val_fraction=0.4), data.open_splits("data/train")
    assert theirs.val.source == ours.val.source != other.val.source
    again, _ = run.checked_data("data/train", exports.read_metadata(here / "run" / "model.onnx"), "run", val_fraction=0.2)
    assert set(again.val.source) < set(ours.val.source)


def test_a_file_that_is_wrong_goes_and_does_not_cost_the_others(result, capsys, monkeypatch):
    monkeypatch.setitem(exports.EXPORTS, "torchscript", exports.EXPORTS["torchscript"]._replace(run=lambda file: lambda images: torch.zeros(len(images), 2)))
    capsys.readouterr()
    assert s2h("export", "run") == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "error: model.ts: its logits differ" in err
    assert "model.pt2" in out and {f.name for f in result.glob("model.*")} == {"model.safetensors", "model.onnx", "model.pt2"}
    assert set(artifacts.read_plan(result)["results"]["files"]) == {"model.safetensors", "model.onnx", "model.pt2"}


@pytest.mark.parametrize("options, words", [(["--int8"], "--data"), (["--int8", "--data", "data", "--format", "pt2"], "--format onnx"),
                                            (["--format", "tflite"], "choose from"), (["--format", "onnx", "--opset", "3"], "opset"), (["--data", "nowhere"], "nowhere")])
def test_exports_that_cannot_be_are_one_line(result, capsys, options, words):
    capsys.readouterr()
    assert s2h("export", "run", "--workers", "0", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], lines
