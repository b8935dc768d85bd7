"""The real entry point, on small models and images: what a run writes, and what a user's mistakes end in."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import s2h_cli
from s2h_cli import exports, latency, run
from s2h_cli.config import Config
from s2h_cli.errors import UserError
from s2h_cli.files import ASIDE, writing
from s2h_cli.report import curves
from s2h_cli.source import load_source
from toy import PRUNE, s2h


def error_of(capsys, *args):
    """The one line of a command that must fail with exit code 2."""
    assert s2h(*args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_a_run_writes_all_it_promises(here, capsys):
    assert s2h(*PRUNE, "--epochs", "4") == 0
    out = capsys.readouterr().out
    run = here / "runs" / "net-f0.4"
    assert sorted(p.name for p in run.iterdir()) == [
        "README.md", "args.yaml", "bench.json", "checkpoints", "gates.csv", "infer_onnx.py", "infer_pt2.py", "infer_torchscript.py", "model.onnx",
        "model.pt2", "model.safetensors", "model.ts", "plan.json", "report.html", "summary.csv", "tensorboard", "widths.csv"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["last"]
    rows = list(csv.DictReader((run / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["ratio"]) <= 0.4
    assert yaml.safe_load((run / "args.yaml").read_text())["flops"] == 0.4
    for word in ("soft", "hard", "exported", "MACs", "parameters", "model.onnx", "s2h inspect"):
        assert word in out
    network = s2h_cli.load(run)
    assert network(torch.zeros(3, 3, 16, 16)).shape == (3, 2)
    assert network.get_submodule("stem").weight.shape[0] < 16

    capsys.readouterr()
    for artifact in (run, run / "model.onnx", run / "model.ts", run / "model.pt2"):
        assert s2h("eval", artifact, "--data", "data", "--workers", "0", "--trust") == 0
    shares = {line.split("top-1")[1] for line in capsys.readouterr().out.strip().splitlines()}
    assert shares == {f" {float(rows[-1]['top1_hard']):.2f} % of 16 images"}

    (run / "model.ts").unlink()
    assert s2h("export", run, "--format", "torchscript") == 0
    assert (run / "model.ts").exists()

    capsys.readouterr()
    assert s2h("inspect", run, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["macs"]["ratio"] == pytest.approx(float(rows[-1]["ratio"]), rel=1e-5) and facts["macs"]["target"] == 0.4


def test_inspect_prints_exactly_the_promised_keys(here, capsys):
    assert s2h("inspect", "net.py:build", "--img-size", "16", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["model", "input_size", "macs", "params", "layers", "groups", "frozen"]
    assert list(facts["macs"]) == ["full", "pruned", "ratio", "target", "min_ratio"]
    assert list(facts["params"]) == ["full", "pruned", "ratio"]
    assert {tuple(x) for x in facts["layers"]} == {("name", "kind", "in", "out", "macs")}
    assert {tuple(x) for x in facts["groups"]} == {("name", "size", "kept", "layers")}
    assert {tuple(x) for x in facts["frozen"]} == {("layers", "reason", "channels")}
    assert facts["macs"]["full"] == facts["macs"]["pruned"] == sum(layer["macs"][1] for layer in facts["layers"])
    assert facts["macs"]["target"] is None and facts["macs"]["ratio"] == 1
    assert {"layers": ["head"], "reason": "the network's output", "channels": 10} in facts["frozen"]
    stream = next(g for g in facts["groups"] if g["name"] == "stem")
    assert stream["kept"] == stream["size"] == 16 and stream["layers"] == ["stem", "body.6"]


def test_a_model_of_one_batch_size_can_be_looked_at_but_not_trained(here, capsys):
    assert s2h("inspect", "net.py:fixed", "--img-size", "16") == 0
    assert "note: its graph takes batches of 1 only" in " ".join(capsys.readouterr().out.split())
    assert s2h("prune", "net.py:fixed", "--img-size", "16", "--data", "data", "--flops", "0.5", "-o", "run") == 2
    assert "cannot be trained" in capsys.readouterr().err


def test_no_epochs_cuts_by_importance(here):
    assert s2h(*PRUNE, "--epochs", "0", "-o", "out") == 0
    assert json.loads((here / "out" / "plan.json").read_text())["macs"]["ratio"] <= 0.4
    assert (here / "out" / "model.onnx").exists()


def test_a_dry_run_writes_nothing(here, capsys):
    before = sorted(here.rglob("*"))
    assert s2h(*PRUNE, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert [p for p in sorted(here.rglob("*")) if "__pycache__" not in p.parts] == before


def test_excluded_layers_stay_whole(here):
    assert s2h(*PRUNE, "--flops", "0.7", "--epochs", "0", "-o", "out", "--exclude", "body.0") == 0
    network = s2h_cli.load(here / "out")
    assert network.get_submodule("body.0").weight.shape == (32, 16, 3, 3)
    assert network.get_submodule("body.4").weight.shape[0] < 24


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_the_checkpoint_and_says_how_to_go_on(here, number):
    command = [sys.executable, "-m", "s2h_cli", *PRUNE, "--epochs", "500", "-o", "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=dict(os.environ),
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # a shell's background job ignores it
    deadline = time.time() + 120
    while not (here / "out" / "checkpoints" / "last").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: stopped") and "--resume" in err and len(err.strip().splitlines()) == 1
    assert (here / "out" / "checkpoints" / "last").exists()
    assert not list((here / "out").rglob(".writing*"))


@pytest.mark.parametrize("change, words", [
    (["--flops", "1.5"], ["--flops 1.5", "between 0 and 1"]),
    (["--flops", "0"], ["--flops 0", "between 0 and 1"]),
    (["--flops", "0.001"], ["--flops 0.001", "smallest reachable"]),
    (["--flops", "half"], ["--flops"]),
    (["--data", "nowhere"], ["nowhere"]),
    (["--opt", "adamm"], ["adamm", "adam"]),
    (["--sched", "sawtooth"], ["sawtooth", "cosine"]),
    (["--device", "cuda:99"], ["cuda:99", "cpu"]),
    (["--device", "abacus"], ["abacus", "cpu"]),
    (["--exclude", "tail*"], ["tail*", "inspect"]),
    (["-o", "data"], ["'data' exists", "--resume"]),
    (["-o", "net.py/out"], ["net.py"]),
    (["--resume"], ["nothing to resume"]),
    (["--resume", "-o", "data"], ["nothing to resume", "args.yaml"]),
    (["--weights", "gone.pth"], ["gone.pth"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--opt", "adahessian"], ["adahessian", "adamw"]),
    (["--lr", "1e30", "--epochs", "3", "-o", "nan"], ["epoch", "--lr"]),
])
def test_a_mistake_ends_in_one_line_and_nothing_half_written(here, capsys, change, words):
    before = sorted(p for p in here.rglob("*"))
    line = error_of(capsys, *PRUNE, *change)
    for word in words:
        assert word in line
    left = [p for p in sorted(here.rglob("*")) if p not in before and "__pycache__" not in p.parts]
    assert all(p.is_relative_to(here / "nan") for p in left)  # a run that had begun keeps its folder


@pytest.mark.parametrize("model, words", [
    ("net.py:missing", ["missing", "build"]),
    ("net.py:nothing", ["nothing", "Module"]),
    ("gone.py:build", ["gone.py"]),
    ("resnet19", ["resnet18"]),
    ("net.py:blank", ["no channel", "output"]),
    ("net.py:naughty", ["nan"]),
])
def test_a_model_that_cannot_be_pruned_says_why(here, capsys, model, words):
    line = error_of(capsys, "prune", model, *PRUNE[2:], "--no-pretrained", "--epochs", "2")
    for word in words:
        assert word in line


def test_a_run_that_turns_nan_keeps_its_last_good_checkpoint(here, monkeypatch, capsys):
    from s2h_cli.methods.s2h import S2H

    terms, steps = S2H.soft_terms, []

    def poisoned(self, images, targets, criterion):
        steps.append(1)
        out = terms(self, images, targets, criterion)
        return {**out, "task": out["task"] * (float("nan") if len(steps) == 5 else 1)}  # step 2 of epoch 2

    monkeypatch.setattr(S2H, "soft_terms", poisoned)
    line = error_of(capsys, *PRUNE, "--epochs", "6", "-o", "out")
    assert "epoch 2, by step 2 of 3" in line
    assert len(torch.load(here / "out" / "checkpoints" / "last", weights_only=True)["rows"]) == 1


def test_stopped_in_its_first_epoch_a_run_starts_over(here, monkeypatch, capsys):
    from s2h_cli.methods.s2h import S2H

    terms = S2H.soft_terms

    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(S2H, "soft_terms", interrupted)
    line = error_of(capsys, *PRUNE, "--epochs", "2", "-o", "out")
    assert "no epoch was finished" in line and "--resume" in line
    monkeypatch.setattr(S2H, "soft_terms", terms)
    assert s2h("prune", "-o", "out", "--resume", "--recipe", "cifar", "--trust") == 0  # the folder knows the rest
    assert len((here / "out" / "summary.csv").read_text().splitlines()) == 3


def test_a_schedule_of_one_step_still_ends_on_budget(here):
    assert s2h(*PRUNE, "--epochs", "1", "--batch-size", "64", "-o", "out") == 0
    assert json.loads((here / "out" / "plan.json").read_text())["macs"]["ratio"] <= 0.4


def test_a_truncated_image_is_named_or_left_out(here, capsys):
    image = here / "data" / "train" / "dark" / "3.png"
    image.write_bytes(image.read_bytes()[:100])
    assert str(image.relative_to(here)) in error_of(capsys, *PRUNE, "--epochs", "1", "-o", "out")
    assert s2h(*PRUNE, "--epochs", "1", "-o", "skipping", "--skip-bad-images") == 0
    assert "1 unreadable images were left out" in capsys.readouterr().out


def test_a_format_that_fails_does_not_cost_the_others(here, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no such operator")

    monkeypatch.setitem(exports.EXPORTS, "onnx", exports.EXPORTS["onnx"]._replace(write=broken))
    assert "onnx failed: " in error_of(capsys, *PRUNE, "--epochs", "0", "-o", "out")
    assert (here / "out" / "model.pt2").exists() and not (here / "out" / "model.onnx").exists()


def test_a_result_that_cannot_be_timed_is_whole_all_the_same(here, monkeypatch, capsys):
    def broken(*args):
        raise MemoryError("no room")

    monkeypatch.setitem(latency.FORMATS, "eager", broken)
    line = error_of(capsys, *PRUNE, "--epochs", "0", "-o", "out")
    assert line.count("cannot be measured") == 2 and "out of memory" in line
    assert {"README.md", "report.html", "model.onnx"} <= {path.name for path in (here / "out").iterdir()}


def test_another_run_is_not_resumed(here, capsys):
    assert s2h(*PRUNE, "--epochs", "1", "-o", "out") == 0
    line = error_of(capsys, *PRUNE, "--flops", "0.6", "-o", "out", "--resume")
    assert "started with flops 0.4, not 0.6" in line


@pytest.mark.parametrize("method", ["s2h", "stp", "epsd", "magnitude"])
@pytest.mark.parametrize("budget", [{"params": 0.3}, {"flops": 0.5, "params": 0.35}], ids=["params", "both"])
def test_parameters_are_a_budget_too(here, monkeypatch, method, budget):
    monkeypatch.setattr(exports, "EXPORTS", {})
    plain = PRUNE[:4] + PRUNE[6:]
    options = [str(word) for kind, share in budget.items() for word in (f"--{kind}", share)]
    assert s2h(*plain, *options, "--method", method, "--epochs", "2") == 0
    folder = here / "runs" / ("net-" + "-".join(f"{kind[0]}{share}" for kind, share in budget.items()))
    plan = json.loads((folder / "plan.json").read_text())
    small = s2h_cli.load(folder)
    whole = sum(p.numel() for p in load_source("net.py:build", num_classes=2, img_size=16).module.parameters())
    assert sum(p.numel() for p in small.parameters()) == plan["params"]["pruned"] <= budget["params"] * whole
    assert plan["macs"]["ratio"] <= budget.get("flops", 1.0)
    with open(folder / "summary.csv") as file:
        assert float(list(csv.DictReader(file))[-1]["ratio_params"]) == pytest.approx(plan["params"]["ratio"], rel=1e-5)
    assert s2h("inspect", folder) == 0


def test_a_share_of_the_parameters_that_cannot_be_reached(here, capsys):
    plain = PRUNE[:4] + PRUNE[6:]
    assert "smallest reachable share is" in error_of(capsys, *plain, "--params", "0.001")
    assert "between 0 and 1" in error_of(capsys, *plain, "--params", "30")
    assert "--flops 0.35" in error_of(capsys, *plain)


def test_a_result_is_pruned_again_and_trained_on_other_data(here, capsys, monkeypatch):
    monkeypatch.setattr(exports, "EXPORTS", {})
    assert s2h(*PRUNE, "--epochs", "3") == 0
    first = json.loads((here / "runs" / "net-f0.4" / "plan.json").read_text())
    again = ["prune", "runs/net-f0.4/", *PRUNE[2:4], "--flops", "0.5", *PRUNE[8:], "--epochs", "2"]
    assert s2h(*again) == 0
    assert "learns from it too" in capsys.readouterr().out  # the result of the first run knows the classes
    second = json.loads((here / "runs" / "net-f0.4-f0.5" / "plan.json").read_text())
    assert second["macs"]["full"] == first["macs"]["pruned"] and second["macs"]["ratio"] <= 0.5
    assert second["data"] == first["data"]  # size and preprocessing are those of the first

    for split in ("train", "val"):
        (here / "other" / split).mkdir(parents=True)
        for name in ("one", "two", "three"):
            shutil.copytree(here / "data" / split / "dark", here / "other" / split / name)
    assert s2h("train", "runs/net-f0.4", "--data", "other", "--epochs", "2", "--workers", "0", "--batch-size", "16", "-o", "tuned") == 0
    tuned = json.loads((here / "tuned" / "plan.json").read_text())
    assert "the head is new and untrained" in capsys.readouterr().out
    assert tuned["data"]["classes"] == ["one", "three", "two"] and tuned["macs"]["ratio"] == 1.0
    assert s2h_cli.load("tuned")(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert s2h("train", "runs/net-f0.4", "--data", "other", "--epochs", "2", "-o", "tuned", "--resume") == 0


def test_a_result_gets_a_new_head_for_as_many_other_classes(here, capsys):
    assert s2h(*PRUNE, "--epochs", "0", "-o", "out") == 0
    train = ["train", "out", "--epochs", "1", "--workers", "0", "--dry-run", "--data"]
    assert s2h(*train, "data") == 0 and "the head is new" not in capsys.readouterr().out
    for split in ("train", "val"):
        (here / "data" / split / "dark").rename(here / "data" / split / "black")
    assert s2h(*train, "data") == 0 and "the head is new and untrained" in capsys.readouterr().out
    assert s2h(*train, "data", "--weights", "out/model.safetensors") == 0 and "the head is new" not in capsys.readouterr().out


def test_a_plan_without_its_facts_is_one_line(here, capsys):
    assert s2h(*PRUNE, "--epochs", "0", "-o", "out") == 0
    plan = json.loads((here / "out" / "plan.json").read_text())
    (here / "out" / "plan.json").write_text(json.dumps({"network": plan["network"]}))
    assert "it lacks model" in error_of(capsys, "inspect", "out")


def test_a_folder_called_like_a_model_is_not_taken_for_it(here, capsys):
    (here / "resnet10t").mkdir()
    assert s2h("inspect", "resnet10t", "--img-size", "32") == 0
    assert "no plan.json" in error_of(capsys, "inspect", "./resnet10t")


def test_runs_are_numbered(here):
    for _ in range(2):
        assert s2h(*PRUNE, "--epochs", "0") == 0
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["net-f0.4", "net-f0.4-2"]
    shutil.rmtree(here / "runs" / "net-f0.4")
    assert s2h(*PRUNE, "--epochs", "0") == 0
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["net-f0.4", "net-f0.4-2"]


def test_a_full_disk_keeps_the_last_checkpoint(here, monkeypatch, capsys):
    from s2h_cli.train import checkpoint

    real = torch.save

    def full(state, path):
        if len(state["rows"]) == 2:
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    line = error_of(capsys, *PRUNE, "--epochs", "3", "-o", "out")
    assert "No space left" in line
    monkeypatch.setattr(checkpoint.torch, "save", real)
    assert len(torch.load(here / "out" / "checkpoints" / "last", weights_only=True)["rows"]) == 1
    assert not list((here / "out").rglob(".writing*"))


def test_a_curve_that_cannot_be_written_is_one_line(here, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves.SummaryWriter, "add_scalar", full)
    assert "No space left" in error_of(capsys, *PRUNE, "--epochs", "1", "-o", "out")


def test_a_login_that_is_missing_is_one_line(here, monkeypatch, capsys):
    def refuse(**options):
        raise RuntimeError("No API key configured")

    monkeypatch.setattr(run, "check_log", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    assert "wandb login" in error_of(capsys, *PRUNE, "--epochs", "1", "-o", "out", "--log", "wandb")


def test_a_compiler_that_does_not_work_is_said_before_the_training(here, monkeypatch, capsys):
    def broken(call):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert "--compile does not work here (RuntimeError: no C++ compiler)" in error_of(capsys, *PRUNE, "--epochs", "1", "-o", "out", "--compile")
    assert not (here / "out").exists()


def test_a_folder_that_is_a_dead_link_is_one_line(here, capsys):
    (here / "out").symlink_to(here / "gone")
    assert "cannot write to 'out'" in error_of(capsys, *PRUNE, "--epochs", "0", "-o", "out")


def test_one_image_a_batch_is_one_line(here, capsys):
    (here / "net.py").write_text((here / "net.py").read_text().replace("stride=2", "stride=32"))
    assert "1 image a step" in error_of(capsys, *PRUNE, "--epochs", "0", "--batch-size", "1", "-o", "out")


def test_a_file_that_may_not_be_read_is_one_line(monkeypatch, capsys):
    def denied(*args, **options):
        raise PermissionError(13, "Permission denied", "/root/run")

    monkeypatch.setattr(run, "inspect", denied)
    assert "no permission to read or write '/root/run'" in error_of(capsys, "inspect", "resnet18")


def test_processes_that_torchrun_did_not_start_are_refused(here):
    done = subprocess.run([sys.executable, "-m", "s2h_cli", *PRUNE, "--epochs", "1"], env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert done.returncode == 2 and "start the job with torchrun" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_foreign_classes_are_not_evaluated(here, capsys):
    assert s2h(*PRUNE, "--epochs", "0", "-o", "out") == 0
    for split in ("train", "val"):
        (here / "data" / split / "dark").rename(here / "data" / split / "black")
    assert "black" in error_of(capsys, "eval", "out", "--data", "data", "--workers", "0")


@pytest.mark.parametrize("command", ["prune", "inspect", "export", "eval"])
def test_help_ends_in_an_example(capsys, command):
    assert s2h(command, "--help") == 0
    assert f"Example: s2h {command}" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["stp", "epsd", "dmp", "dense", "uniform", "random", "magnitude"])
def test_every_method_trains_through_the_same_command(here, method):
    budget = ["--flops", "0.4"] if method != "dense" else []
    assert s2h(*(a for a in PRUNE if a not in ("--flops", "0.4")), *budget, "--method", method, "--epochs", "3", "-o", "out") == 0
    macs = json.loads((here / "out" / "plan.json").read_text())["macs"]
    assert macs["ratio"] == 1 if method == "dense" else 0.2 < macs["ratio"] <= 0.4
    ratios = [float(row["ratio"]) for row in csv.DictReader(open(here / "out" / "summary.csv"))]
    assert ratios[-1] == pytest.approx(macs["ratio"], rel=1e-5) and (ratios[0] > 0.4) == (method in ("dense", "magnitude", "epsd"))


def test_a_dense_run_is_where_a_pruning_run_starts(here):
    """Its weights load by --weights, and its folder teaches."""
    assert s2h(*(a for a in PRUNE if a not in ("--flops", "0.4")), "--method", "dense", "--epochs", "2", "-o", "dense") == 0
    for method in ("s2h", "epsd"):
        assert s2h(*PRUNE, "--weights", "dense/model.safetensors", "--teacher", "dense", "--epochs", "1", "--method", method, "-o", method) == 0
    assert s2h("prune", "--config", "s2h/args.yaml", "--method", "dense", "--epochs", "1", "-o", "again", "--trust") == 0


@pytest.mark.parametrize("options, words", [
    (["--method", "best"], ["--method best", "s2h", "uniform"]),
    (["--method", "dense"], ["cuts nothing", "--flops 0.4"]),
    (["--method", "random", "--epochs", "0"], ["--epochs 0 trains nothing", "--method random"]),
    (["--method", "uniform", "--flops", "0.2,0.4"], ["several budgets", "--method s2h"]),
])
def test_a_method_that_cannot_be_meant(here, capsys, options, words):
    line = error_of(capsys, *PRUNE, "--epochs", "1", *options)
    for word in words:
        assert word in line


def test_two_runs_at_once_do_not_take_the_same_folder(here):
    config = Config(model="net.py:build", data="data", flops=0.4)
    made = [run.made_folder(config) for _ in range(2)]
    assert made == [Path("runs/net-f0.4"), Path("runs/net-f0.4-2")]
    config.output = "runs/net-f0.4"
    with pytest.raises(UserError, match="exists and is kept"):
        run.made_folder(config)


def test_what_another_process_is_writing_stays_and_what_a_dead_one_left_goes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (1, dead.pid, os.getpid()):
        (tmp_path / f"{ASIDE}{process}").mkdir()
        (tmp_path / f"{ASIDE}{process}" / "half").write_text("half")
    with writing(tmp_path) as aside:
        (aside / "file").write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"file", f"{ASIDE}1"}


def test_what_is_no_artifact_is_said_before_it_is_opened(here, capsys):
    assert s2h(*PRUNE, "--epochs", "0", "-o", "run") == 0
    capsys.readouterr()
    for item, words in (("nosuch", "no such file or run"), ("run/model.safetensors", "give the run's folder"), ("run/plan.json", "give the run's folder")):
        assert words in error_of(capsys, "eval", item, "--data", "data")
    (here / "broken.onnx").write_text("not a model")
    assert "export it again" in error_of(capsys, "eval", "broken.onnx", "--data", "data")


def test_a_package_that_is_missing_is_named(here, capsys, monkeypatch):
    assert s2h(*PRUNE, "--epochs", "0", "-o", "run") == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for command in (("push", "run", "me/small"), ("inspect", "hf://me/small"), ("eval", "hf://me/small", "--data", "data")):
        assert "pip install huggingface_hub" in error_of(capsys, *command)
    monkeypatch.setattr(latency.importlib.util, "find_spec", lambda name: None)
    assert "pip install openvino" in error_of(capsys, "bench", "run", "--format", "eager,openvino")


def test_ctrl_c_is_one_line_in_every_command(here, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "compare", interrupted)
    assert "stopped" in error_of(capsys, "bench", "net.py:build", "--img-size", "16")


def test_training_on_says_nothing_of_a_budget(here, capsys):
    assert s2h("train", *PRUNE[1:4], *PRUNE[6:12], "--device", "cpu", "--epochs", "1") == 0
    shown = capsys.readouterr().out
    assert "runs/net-f1" in shown and "smallest reachable" not in shown
    card = (here / "runs" / "net-f1" / "README.md").read_text()
    assert "nothing was cut" in card and "of its MACs" not in card and "random ones" not in card
    assert s2h(*PRUNE, "--no-pretrained", "--epochs", "0", "-o", "random") == 0
    assert "come from random ones" in (here / "random" / "README.md").read_text()
