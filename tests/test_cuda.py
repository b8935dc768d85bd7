"""The real entry points on a GPU; skipped where there is none. (With GPU = "cpu" and without `pytestmark` they hold too.)"""

import csv
import json

import pytest
import torch
from s2h_cli import cli, latency
from s2h_cli.graph import capture
from s2h_cli.plan import Plan, Space
from s2h_cli.rebuild import rebuild
from s2h_cli.source import load_source
from s2h_cli.train import loop
from toy import PRUNE, s2h

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ON_GPU = [*PRUNE[:-1], GPU, "--epochs", "2", "-o", "run"]


def rows(folder):
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


@pytest.mark.parametrize("options", [[], ["--amp", "--channels-last"], ["--amp", "--amp-dtype", "float16"], ["--compile"], ["--ema", "0.9"], ["--method", "stp"], ["--method", "epsd"]],
                         ids=lambda options: " ".join(options) or "float32")
def test_a_run_on_a_gpu_ends_with_files_that_are_right_on_a_cpu(here, options):
    assert s2h(*ON_GPU, *options) == 0
    plan = json.loads((here / "run" / "plan.json").read_text())
    assert plan["macs"]["ratio"] <= 0.4 and set(plan["results"]["files"]) == {"model.safetensors", "model.ts", "model.onnx", "model.pt2"}
    top1 = plan["results"]["top1"]
    assert any(top1["exported"] == pytest.approx(top1[kind], abs=7) for kind in ("hard", "ema") if kind in top1)  # one of 16 images


def test_a_run_on_a_gpu_goes_on_where_it_stopped(here):
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


def test_gpu_and_cpu_take_the_same_first_steps(here):
    found = {}
    for name, device in (("gpu", GPU), ("cpu", "cpu")):
        assert s2h(*PRUNE[:-1], device, "--epochs", "1", "-o", f"on-{name}", "--method", "uniform", "--opt", "sgd", "--lr", "0.01") == 0
        found[name] = float(rows(here / f"on-{name}")[0]["loss_task"])
    assert found["gpu"] == pytest.approx(found["cpu"], rel=1e-2)


@pytest.mark.parametrize("format", ["eager", "compile", "torchscript"])
def test_time_on_a_gpu_is_that_of_the_work_not_of_the_call(here, format):
    """A batch of many images takes longer than one of few: the clock waits for the device."""
    source = load_source("resnet18", num_classes=4, pretrained=False, img_size=64)
    network = capture(source.module, source.input_size).network
    subject = latency.Subject("resnet18", source.input_size, network)
    found = {row["batch"]: row["timing"]["median"] for row in latency.compare([subject], [format], [8, 512], torch.device(GPU), 1, 2.0)}
    assert found[512] > 2 * found[8]


def test_the_network_rebuilt_on_a_gpu_is_the_one_rebuilt_on_a_cpu(here):
    source = load_source("resnet18", num_classes=4, pretrained=False, img_size=32)
    network = capture(source.module, source.input_size).network
    space = Space(network)
    keep = Plan.from_widths(space, space.least, torch.rand(space.size).numpy())
    images = torch.randn(2, *source.input_size)
    with torch.no_grad():
        expected = rebuild(network, keep).eval()(images)
        found = rebuild(network.to(GPU), keep).eval()(images.to(GPU)).cpu()
    assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())
