"""The real entry points on a GPU; skipped where there is none. (With S2H_TEST_GPU=cpu in the environment they run
on the CPU, and hold too.)

One run writes every format; the others none, since what is exported is on the CPU by then.
"""

import csv
import json
import os

import pytest
import torch
from s2h_cli import cli, exports, latency
from s2h_cli.graph import capture
from s2h_cli.plan import Plan, Space
from s2h_cli.rebuild import rebuild
from s2h_cli.source import load_source
from s2h_cli.train import loop
from toy import PRUNE, s2h

GPU = os.environ.get("S2H_TEST_GPU", "cuda")
pytestmark = pytest.mark.skipif(GPU == "cuda" and not torch.cuda.is_available(), reason="no GPU")

#: Images that keep the device busy for longer than a call takes.
MANY = 4096 if GPU == "cuda" else 64

ON_GPU = [*PRUNE[:-1], GPU, "--epochs", "2", "-o", "run"]


@pytest.fixture
def no_exports(monkeypatch):
    monkeypatch.setattr(exports, "EXPORTS", {})


def rows(folder):
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


def checked(here):
    """The results of a run whose accuracy on the CPU is that on the GPU: what was exported is right."""
    plan = json.loads((here / "run" / "plan.json").read_text())
    top1 = plan["results"]["top1"]
    assert plan["macs"]["ratio"] <= 0.4
    assert any(
        top1["exported"] == pytest.approx(top1[kind], abs=7) for kind in ("hard", "ema") if kind in top1
    )  # one of 16 images
    return plan["results"]


def test_a_run_on_a_gpu_ends_with_files_that_are_right_on_a_cpu(here):
    assert s2h(*ON_GPU) == 0
    assert set(checked(here)["files"]) == {"model.safetensors", "model.ts", "model.onnx", "model.pt2"}


@pytest.mark.parametrize(
    "options",
    [
        ["--amp", "--channels-last"],
        ["--amp", "--amp-dtype", "float16"],
        ["--compile"],
        ["--ema", "0.9", "--mixup", "0.2"],
        ["--amp", "--teacher", "start", "--weights", "net.pth"],
        ["--method", "stp"],
        ["--method", "epsd"],
    ],
    ids=" ".join,
)
def test_every_kind_of_run_works_on_a_gpu(here, no_exports, options):
    names = {}
    exec((here / "net.py").read_text(), names)
    torch.save(names["build"](2).state_dict(), here / "net.pth")
    assert s2h(*ON_GPU, *options) == 0
    checked(here)


def test_a_run_on_a_gpu_goes_on_where_it_stopped(here, no_exports):
    assert s2h(*ON_GPU) == 0
    widths = json.loads((here / "run" / "plan.json").read_text())["kept_indices"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "evaluate", lambda *args: 1 / 0)  # as the first epoch ends
        with pytest.raises(ZeroDivisionError):
            cli.main([*ON_GPU[:-1], "parts", "--checkpoint-every", "1"])
    assert s2h(*ON_GPU[:-1], "parts", "--resume") == 0
    assert [row["epoch"] for row in rows(here / "parts")] == ["1", "2"]
    resumed = json.loads((here / "parts" / "plan.json").read_text())["kept_indices"]
    assert {name: len(kept) for name, kept in resumed.items()} == {name: len(kept) for name, kept in widths.items()}


def test_gpu_and_cpu_take_the_same_first_steps(here, no_exports):
    found = {}
    for name, device in (("gpu", GPU), ("cpu", "cpu")):  # without dropout, whose random numbers are each device's own
        assert (
            s2h(
                "prune",
                "net.py:plain",
                *PRUNE[2:-1],
                device,
                "--epochs",
                "1",
                "-o",
                f"on-{name}",
                "--method",
                "uniform",
                "--opt",
                "sgd",
                "--lr",
                "0.01",
            )
            == 0
        )
        found[name] = float(rows(here / f"on-{name}")[0]["loss_task"])
    assert found["gpu"] == pytest.approx(found["cpu"], rel=1e-2)


@pytest.mark.parametrize("format", ["eager", "torchscript"])
def test_time_on_a_gpu_is_that_of_the_work_not_of_the_call(here, format):
    """A batch of very many images takes longer than one of few: the clock waits for the device."""
    source = load_source("net.py:build", num_classes=4, pretrained=False, img_size=64)
    network = capture(source.module, source.input_size).network
    subject = latency.Subject("net", source.input_size, network)
    found = {
        row["batch"]: row["timing"]["median"]
        for row in latency.compare([subject], [format], [8, MANY], torch.device(GPU), 1, 0.5)
    }
    assert found[MANY] > 2 * found[8]


def test_the_network_rebuilt_on_a_gpu_is_the_one_rebuilt_on_a_cpu(here):
    source = load_source("resnet18", num_classes=4, pretrained=False, img_size=32)
    network = capture(source.module, source.input_size).network
    space = Space(network)
    keep = Plan.from_widths(space, space.least, torch.rand(space.size).numpy())
    images = torch.randn(2, *source.input_size)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # which rounds to 10 bits
        expected = rebuild(network, keep).eval()(images)
        found = rebuild(network.to(GPU), keep).eval()(images.to(GPU)).cpu()
    assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())
