import argparse
import collections
import datetime
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from s2h_cli import source as source_file
from s2h_cli.errors import UserError
from s2h_cli.source import load_source

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, classes)
    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))

def build():
    return Net()

def fitted(num_classes=2):
    return Net(num_classes)

def squeeze():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def headless():
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def grey():
    net = nn.Sequential(nn.Conv2d(1, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.default_cfg = {"input_size": (1, 20, 30), "mean": (0.25,), "std": (0.5,)}
    return net

def fixed():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))
    net.default_cfg = {"input_size": (3, 8, 8)}
    return net

def pair():
    class Pair(Net):
        def forward(self, x):
            return x, x
    return Pair()

def broken():
    raise ValueError("first line" + chr(10) + "second line")

def number():
    return 3
"""


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "mynet.py"
    path.write_text(NET)
    return path


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_source(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def outputs(source) -> int:
    assert not source.module.training
    assert {p.dtype for p in source.module.parameters()} == {torch.float32}
    with torch.no_grad():
        return source.module(torch.randn(2, *source.input_size)).shape[1]


def test_timm_model():
    source = load_source("resnet10t.c3_in1k", num_classes=4, pretrained=False)
    cfg = timm.get_pretrained_cfg("resnet10t.c3_in1k")
    assert (source.name, source.spec) == ("resnet10t.c3_in1k", "resnet10t.c3_in1k")
    assert source.input_size == cfg.input_size and source.mean == cfg.mean and source.std == cfg.std
    assert source.interpolation == cfg.interpolation and source.crop_pct == cfg.crop_pct
    assert outputs(source) == 4 and not source.pretrained
    assert outputs(load_source("resnet10t", pretrained=False, img_size=32)) == 1000


def test_timm_model_of_fixed_size_takes_img_size():
    source = load_source("vit_tiny_patch16_224", num_classes=3, pretrained=False, img_size=64)
    assert source.input_size == (3, 64, 64) and source.module.pos_embed.shape[1] == 17
    assert outputs(source) == 3
    message = refusal("swin_tiny_patch4_window7_224", pretrained=False, img_size=3)
    assert "swin_tiny_patch4_window7_224" in message and "--img-size" in message


def test_name_without_weights_starts_from_random_and_says_so():
    source = load_source("seresnet18", num_classes=2, img_size=64)
    assert not source.pretrained and outputs(source) == 2
    assert source.notes == ["timm has no weights for 'seresnet18': it starts from random weights"]


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "googlenet"])
def test_torchvision_head_is_replaced(name):
    source = load_source(f"torchvision:{name}", num_classes=6, pretrained=False, img_size=96)
    assert source.name == name and outputs(source) == 6
    assert source.mean == (0.485, 0.456, 0.406) and source.interpolation == "bilinear"
    # All of it is untrained, not only the head.
    assert source.notes == (["used in training only, dropped: aux1, aux2"] if name == "googlenet" else [])
    assert not any(key.startswith("aux") for key in source.module.state_dict())


def test_torchvision_sizes():
    source = load_source("torchvision:mobilenet_v3_small", pretrained=False)
    assert source.input_size == (3, 224, 224) and source.crop_pct == 224 / 256
    source = load_source("torchvision:inception_v3", pretrained=False)
    assert source.input_size == (3, 299, 299) and source.module.AuxLogits is None
    assert outputs(load_source("torchvision:vit_b_16", pretrained=False, num_classes=3, img_size=32)) == 3
    assert "--img-size" in refusal("torchvision:vit_b_16", pretrained=False, img_size=33)


@pytest.mark.parametrize(
    "spec, near",
    [
        ("resnt50", "resnet50, torchvision:resnet50"),
        ("googlenet", "torchvision:googlenet"),
        ("torchvision:resnet51", "torchvision:resnet50"),
        ("resnet50.nothing", "resnet50.a1_in1k"),
        ("???", "torchvision:NAME"),
    ],
)
def test_unknown_names_get_suggestions(spec, near):
    message = refusal(spec)
    assert spec in message and near in message


def test_own_model(net):
    source = load_source(f"{net}:build")
    assert (source.name, source.input_size, outputs(source), source.notes) == ("mynet", (3, 224, 224), 7, [])
    assert not source.pretrained
    assert outputs(load_source(f"{net}:build", num_classes=7, img_size=16)) == 7
    assert outputs(load_source(f"{net}:fitted", num_classes=9)) == 9
    source = load_source(f"{net}:build", num_classes=9)
    assert outputs(source) == 9 and source.notes == ["the head is new and untrained: 9 classes in place of 7"]
    assert outputs(load_source(f"{net}:squeeze", num_classes=9)) == 9
    grey = load_source(f"{net}:grey")
    assert (grey.input_size, grey.mean, grey.std) == ((1, 20, 30), (0.25,), (0.5,))


def test_own_model_can_import_its_neighbours(tmp_path):
    (tmp_path / "s2h_test_neighbour.py").write_text(NET)
    (tmp_path / "outer.py").write_text("from s2h_test_neighbour import build")
    assert outputs(load_source(f"{tmp_path / 'outer.py'}:build")) == 7


def test_own_model_errors(net, tmp_path):
    assert "nowhere.py" in refusal("nowhere.py:build")
    message = refusal(f"{net}:bild")
    assert "'bild'" in message and "build, fitted, squeeze" in message
    assert "build, fitted" in refusal(str(net))
    message = refusal(f"{net}:broken")
    assert "ValueError: first line" in message and "second" not in message
    assert f"line {NET[: NET.index('raise')].count(chr(10)) + 1}" in message
    assert "returned a int" in refusal(f"{net}:number")
    assert "gives a tuple" in refusal(f"{net}:pair")
    assert "7 outputs" in refusal(f"{net}:headless", num_classes=9)
    assert "16x16" in refusal(f"{net}:fixed", img_size=16)
    bad = tmp_path / "bad.py"
    for text, cause in [("x = (", "SyntaxError"), ("import not_there", "ModuleNotFoundError"), ("exit(1)", "SystemExit")]:
        bad.write_text(text)
        message = refusal(f"{bad}:build")
        assert "bad.py" in message and cause in message


@pytest.mark.parametrize("form", ["plain.pth", "plain.safetensors", "state_dict.pt", "model.bin", "model_ema.pth"])
def test_weights_are_loaded(net, tmp_path, form):
    state = {key: torch.randn_like(value) for key, value in load_source(f"{net}:build").module.state_dict().items()}
    path = tmp_path / form
    wrapped = {f"module.{key}": value for key, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(wrapped, path)
    else:
        torch.save(wrapped if path.stem == "plain" else {path.stem: wrapped, "epoch": 3}, path)
    source = load_source(f"{net}:build", weights=path)
    assert all(torch.equal(value, state[key]) for key, value in source.module.state_dict().items())
    assert source.pretrained and len(source.notes) == (path.stem != "plain") and all(path.stem in note for note in source.notes)


LIGHTNING = {"epoch": 3, "global_step": 7, "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}]}


@pytest.mark.parametrize("wrap, note", [
    *[(lambda state, key=key: {key: state, "epoch": 3, "args": argparse.Namespace(lr=1)}, f"'{key}'")
      for key in ("model_state_dict", "state_dict", "model", "model_ema", "ema", "net", "network", "weights", "params", "anything")],
    (lambda state: {"checkpoint": {"model": state}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "'checkpoint.model'"),
    (lambda state: LIGHTNING | {"state_dict": renamed(state, "model.") | {"loss.weight": torch.ones(2)}}, "loss.weight"),
    (lambda state: renamed(state, "module._orig_mod."), None),
    (lambda state: renamed(state, "_orig_mod.module."), None),
    (lambda state: renamed(state, "my.own.net."), None),
    (lambda state: {"n_averaged": torch.tensor(3)} | renamed(state, "module."), None),
    (lambda state: {key.replace("conv.", "conv._orig_mod."): value for key, value in state.items()}, None),
    (lambda state: state | {"epoch": 3}, None),
    (lambda state: {"model": state, "best": np.float64(0.9), "random": np.random.get_state(), "at": datetime.datetime.now(),
                    "file": Path("x"), "code": Runs("file.ran"), "whole": torch.nn.Linear(2, 2)}, "'model'"),
    (lambda state: {"model": {key: value + 1 for key, value in state.items()}, "state_dict_ema": state}, "'state_dict_ema'"),
    (lambda state: {"model": state, "ema": {"decay": torch.ones(()), "conv.weight": state["conv.weight"]}}, "'model'"),
    *[(lambda state, kind=kind: {key: value.to(kind) for key, value in state.items()}, None) for kind in (torch.float16, torch.bfloat16, torch.float64)],
])
def test_weights_are_found_in_files_of_all_kinds(net, tmp_path, monkeypatch, wrap, note):
    monkeypatch.chdir(tmp_path)
    state = {key: torch.randn_like(value).half().bfloat16().float() for key, value in load_source(f"{net}:build").module.state_dict().items()}
    torch.save(wrap(state), tmp_path / "file.ckpt")
    source = load_source(f"{net}:build", weights=tmp_path / "file.ckpt")
    assert {p.dtype for p in source.module.parameters()} == {torch.float32}
    for key, value in source.module.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-4)
    assert (note in " ".join(source.notes)) if note else source.notes == []
    assert not Path("file.ran").exists()


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return shutil.copy, (__file__, self.file)


def renamed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("change, words", [
    (lambda state: state | {"conv.bias": state["conv.bias"] * float("nan")}, "'conv.bias' that are not finite"),
    (lambda state: state | {"conv.bias": (state["conv.bias"] + 1).double() * 1e300}, "not finite"),
    (lambda state: state | {"conv.weight": state["conv.weight"].to(torch.int8)}, "torch.int8"),
    (lambda state: {"model": torch.nn.Linear(2, 2)}, "state_dict()"),
    (lambda state: torch.nn.Linear(2, 2), "state_dict()"),
    (lambda state: collections.defaultdict(dict, model=state), "state_dict()"),
])
def test_weights_that_cannot_be_used_are_one_line(net, tmp_path, change, words):
    torch.save(change(load_source(f"{net}:build").module.state_dict()), tmp_path / "file.pth")
    assert words in refusal(f"{net}:build", weights=tmp_path / "file.pth")


def test_files_of_sharded_weights_are_one_line(net, tmp_path):
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}")
        assert "several" in refusal(f"{net}:build", weights=tmp_path / name)


def test_weights_win_over_the_download_and_a_head_of_other_size_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(source_file, "_download", None)
    for spec, create in [
        ("resnet10t", lambda: timm.create_model("resnet10t", num_classes=5)),
        ("torchvision:googlenet", lambda: torchvision.models.googlenet(init_weights=False, num_classes=5)),
    ]:
        state = create().state_dict()
        path = tmp_path / "weights.pth"
        torch.save(state, path)
        source = load_source(spec, num_classes=3, weights=path, img_size=64)
        assert source.pretrained and outputs(source) == 3
        assert "the head is new and untrained: 3 classes in place of 5" in source.notes
        own = source.module.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in own.items() if not key.startswith("fc."))
        assert not torch.equal(own["fc.weight"], state["fc.weight"][:3])
    assert len(source.notes) == 2 and "aux1, aux2" in source.notes[0]
    assert load_source(spec, num_classes=5, weights=path, img_size=64).notes == source.notes[:1]  # the head fits


def test_weights_of_another_image_size_are_resampled(tmp_path):
    large = load_source("vit_tiny_patch16_224", num_classes=5, pretrained=False, img_size=64).module.state_dict()
    torch.save(large, tmp_path / "weights.pth")
    small = load_source("vit_tiny_patch16_224", num_classes=5, weights=tmp_path / "weights.pth", img_size=32)
    expected = timm.layers.resample_abs_pos_embed(large["pos_embed"], new_size=[2, 2], num_prefix_tokens=1)
    torch.testing.assert_close(small.module.pos_embed, expected)
    assert all(torch.equal(value, large[key]) for key, value in small.module.state_dict().items() if key != "pos_embed")


def test_published_weights_of_torchvision_are_resampled(monkeypatch):
    weights = torchvision.models.ViT_B_16_Weights.DEFAULT
    published = torchvision.models.vit_b_16(image_size=weights.transforms().crop_size[0]).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **options: dict(published))
    monkeypatch.setattr(source_file, "_answers", lambda url: True)
    source = load_source("torchvision:vit_b_16", img_size=32)
    assert source.input_size == (3, 32, 32) and source.pretrained
    assert torch.equal(source.module.heads.head.weight, published["heads.head.weight"])
    assert source.module.encoder.pos_embedding.shape == (1, 5, 768)


def test_wrappers_are_taken_off(tmp_path):
    (tmp_path / "wrapped.py").write_text("import torch\nfrom torch import nn\n"
                                         "def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
                                         "def parallel(): return nn.DataParallel(net())\n"
                                         "def compiled(): return torch.compile(net())\n")
    for name in ("parallel", "compiled"):
        assert type(load_source(f"{tmp_path / 'wrapped.py'}:{name}").module) is torch.nn.Sequential


def test_weights_errors(net, tmp_path):
    spec, path = f"{net}:build", tmp_path / "weights.pth"
    assert "weights.pth" in refusal(spec, weights=path)
    for content in (b"nonsense", b""):
        path.write_bytes(content)
        assert "weights.pth" in refusal(spec, weights=path)
    torch.save(torch.nn.Linear(2, 2), path)  # needs unpickling
    assert "state_dict()" in refusal(spec, weights=path)
    torch.save({"epoch": 3}, path)
    assert "no state dict" in refusal(spec, weights=path)
    (tmp_path / "bad.safetensors").write_bytes(b"12345678nonsense")
    assert "bad.safetensors" in refusal(spec, weights=tmp_path / "bad.safetensors")

    state = load_source(spec).module.state_dict()
    extra = {f"extra{i}": torch.zeros(1) for i in range(5)}
    torch.save({key: value for key, value in state.items() if key != "conv.bias"} | extra, path)
    message = refusal(spec, weights=path)
    assert "1 missing (conv.bias)" in message and "5 unexpected (extra0, extra1, extra2, ...)" in message
    torch.save(state | {"conv.bias": torch.zeros(9)}, path)
    assert "conv.bias (9,) for (5,)" in refusal(spec, num_classes=7, weights=path)
    torch.save(state | {"head.weight": torch.zeros(3, 5), "head.bias": torch.zeros(3)}, path)
    assert "head.weight (3, 5) for (7, 5)" in refusal(spec, weights=path)  # nobody asked for another head


@pytest.mark.parametrize("spec", ["resnet10t", "torchvision:resnet18", "legacy_seresnet18"])
@pytest.mark.parametrize("hanging", [False, True])
def test_download_that_fails_ends_soon_and_names_the_ways_out(spec, hanging, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        time.sleep(60 if hanging else 0)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(source_file, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    start = time.monotonic()
    message = refusal(spec)
    assert time.monotonic() - start < 5
    assert spec in message and "could not be downloaded" in message and "no answer from https://" in message
    assert "--no-pretrained" in message and "--weights" in message


def test_cached_weights_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(source_file, "_answers", lambda url: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    cached = tmp_path / "checkpoints" / Path(url).name
    cached.parent.mkdir()
    state = torchvision.models.squeezenet1_1().state_dict()
    torch.save(state, cached)
    source = load_source("torchvision:squeezenet1_1", num_classes=4, img_size=64)
    assert source.pretrained and outputs(source) == 4
    assert source.notes == ["the head is new and untrained: 4 classes in place of 1000"]
    assert torch.equal(source.module.features[0].weight, state["features.0.weight"])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--timm--resnet10t.c3_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    state = timm.create_model("resnet10t").state_dict()
    save_file(state, repository / "snapshots" / ("a" * 40) / "model.safetensors")
    source = load_source("resnet10t", num_classes=4, img_size=64)
    assert source.pretrained and torch.equal(source.module.conv1[0].weight, state["conv1.0.weight"])
    assert source.notes == ["the head is new and untrained: 4 classes in place of 1000"]
