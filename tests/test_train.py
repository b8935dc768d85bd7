"""The engine: one more session, one more process or one more slice of a batch changes nothing but the time."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import PRUNE, s2h

from s2h_cli import cli, data, exports, run
from s2h_cli.config import Recipe
from s2h_cli.source import load_source
from s2h_cli.teacher import Teacher
from s2h_cli.train import checkpoint, loop
from s2h_cli.train.recipe import make_scheduler

RESULTS = ("model.safetensors", "plan.json", "summary.csv", "widths.csv")
PLAIN = ["prune", "net.py:plain", *PRUNE[2:]]
DEEP = ["prune", "net.py:deep", *PRUNE[2:]]
CAREFUL = ["--ema", "0.9", "--mixup", "0.2", "--aa", "rand-m5", "--clip-grad", "1", "--grad-accum-steps", "2", "--batch-size", "8"]


@pytest.fixture(autouse=True)
def no_exports(monkeypatch):
    """Runs in this process write no formats, which take longer than the training; those in processes of their own do."""
    monkeypatch.setattr(exports, "EXPORTS", {})


def same_results(here, one, other, files=RESULTS):
    for name in files:
        assert (here / one / name).read_bytes() == (here / other / name).read_bytes(), name


def weights(here, folder):
    """All that was trained: weights and masks of the last checkpoint, and what was kept."""
    state = checkpoint.load(here / folder / "checkpoints" / "last")
    masks = state["method"].get("masks", {})  # S2H's
    return {**state["network"], **masks}, state["method"]["hard"]["keep"]


def meant(name, tensor):
    """Of the logits of widths, which move some twenty units in a run, their probabilities; a weight itself."""
    return tensor.softmax(1) if name == "u" else tensor


class Killed(BaseException):
    """Ends a run on the spot, as kill -9 would: nothing catches it."""


@pytest.mark.parametrize("options", [[], CAREFUL, *(["--method", name] for name in ("stp", "epsd", "dmp", "magnitude"))],
                         ids=["plain", "all at once", "stp", "epsd", "dmp", "magnitude"])
def test_a_run_stopped_at_any_checkpoint_and_resumed_is_the_run_that_never_stopped(here, monkeypatch, options):
    options = [*options, "--epochs", "3", "--checkpoint-every", "2"]
    real, calls, stop = checkpoint.save, [], 10**9

    def save(path, state):
        real(path, state)
        calls.append(path)
        if len(calls) == stop:
            raise Killed

    monkeypatch.setattr(run.checkpoint, "save", save)
    assert s2h(*PRUNE, *options, "-o", "whole") == 0
    for stop in range(1, len(calls) + 1):
        calls.clear()
        with pytest.raises(Killed):
            cli.main([*PRUNE, *options, "-o", f"parts{stop}"])
        assert s2h(*PRUNE, *options, "-o", f"parts{stop}", "--resume") == 0
        same_results(here, "whole", f"parts{stop}")
    assert stop > 3


def test_kill_9_at_any_moment_loses_nothing(here):
    """Killed again and again at random moments, exports included, and resumed, a run ends as the undisturbed one."""
    command = [sys.executable, "-m", "s2h_cli", *PRUNE, "--epochs", "6", "--checkpoint-every", "1"]
    assert subprocess.run([*command, "-o", "whole"], capture_output=True).returncode == 0
    chance, kills, code = random.Random(0), 0, None
    while code != 0:
        resume = ["--resume"] if (here / "parts" / "args.yaml").exists() else []
        process = subprocess.Popen([*command, "-o", "parts", *resume], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        started, moment = time.time(), chance.uniform(0.5, 3.0) if kills < 3 else 300
        # Moments are counted from when the run has something to lose.
        while process.poll() is None and not (here / "parts" / "checkpoints" / "last").exists() and time.time() - started < 120:
            time.sleep(0.05)
        try:
            code = process.wait(moment)
            assert code == 0, process.stderr.read()
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        last = here / "parts" / "checkpoints" / "last"
        assert not last.exists() or checkpoint.load(last)
    assert kills
    same_results(here, "whole", "parts")


def test_gradients_added_up_over_parts_of_a_batch_are_those_of_the_whole(here):
    for name, options in {"whole": ["--batch-size", "16"], "parts": ["--batch-size", "4", "--grad-accum-steps", "4"]}.items():
        assert s2h(*PLAIN, *options, "--epochs", "2", "--opt", "sgd", "--lr", "0.01", "-o", name) == 0
    (whole, kept), (parts, kept_by_parts) = weights(here, "whole"), weights(here, "parts")
    assert torch.equal(kept, kept_by_parts)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-6 if name == "u" else 0, atol=1e-6)


def test_gradients_of_a_batch_that_has_no_neighbour_to_be_added_to_count_alone(here, monkeypatch):
    """Two batches make an update; of the second pair no image of one batch can be read."""
    updates, real = [], loop.Training.update

    def update(self, number):
        updates.append((number, len(added)))
        added.clear()
        return real(self, number)

    added, forward_backward = [], loop.Training.forward_backward
    monkeypatch.setattr(loop.Training, "update", update)
    monkeypatch.setattr(loop.Training, "forward_backward", lambda self, *args: added.append(1) or forward_backward(self, *args))
    for missing in (3, 4, 6):
        updates.clear()
        loader = data.make_loader
        monkeypatch.setattr(run.data, "make_loader", lambda images, train, **options: _Without(loader(images, train=train, **options), missing if train else 0))
        assert s2h(*PRUNE, "--epochs", "1", "--batch-size", "8", "--grad-accum-steps", "2", "-o", f"without{missing}") == 0
        monkeypatch.setattr(run.data, "make_loader", loader)
        assert updates == [(i, 1 if i == (missing - 1) // 2 else 2) for i in range(3)]


class _Without:
    """A loader one of whose batches cannot be read."""

    def __init__(self, loader, missing):
        self.loader, self.missing = loader, missing

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if self.loader.position != self.missing:
                yield batch


def torchrun(processes, *args, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "s2h_cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.mark.parametrize("processes, options", [
    (2, PLAIN), (4, PLAIN), (2, [*PLAIN, "--method", "magnitude"]),
    (2, [*DEEP, "--method", "stp", "--seed", "3"]), (2, [*DEEP, "--method", "stp", "--seed", "0"]),
], ids=["2", "4", "magnitude", "stp: the larger subnetwork lacks a block", "stp: the best one does"])
def test_more_processes_train_the_same_network(here, processes, options):
    options = [*options, "--epochs", "7", "--opt", "sgd", "--lr", "0.01"]  # 21 steps
    assert s2h(*options, "-o", "alone") == 0
    done = torchrun(processes, *options, "-o", "together")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 7/7") == 1  # only the first process speaks
    (alone, kept), (together, kept_together) = weights(here, "alone"), weights(here, "together")
    assert torch.equal(kept, kept_together)
    for name, weight in alone.items():
        torch.testing.assert_close(*(meant(name, tensor) for tensor in (together[name], weight)), rtol=0, atol=1e-6)
    plans = [json.loads((here / name / "plan.json").read_text()) for name in ("alone", "together")]
    assert plans[0]["kept_indices"] == plans[1]["kept_indices"]


def test_batch_norm_over_all_processes(here, monkeypatch):
    """In a process alone it is batch norm, and what is exported is plain; several need GPUs."""
    for name, option in (("own", "--no-sync-bn"), ("all", "--sync-bn")):
        assert s2h(*PRUNE, "--epochs", "2", option, "-o", name) == 0
    same_results(here, "own", "all")
    done = torchrun(2, *PRUNE, "--epochs", "2", "--sync-bn", "-o", "two")
    assert done.returncode and "--sync-bn needs GPUs" in done.stderr


def test_a_process_that_fails_ends_the_job_in_one_line(here):
    bad = sorted((here / "data" / "train" / "light").iterdir())[5]
    bad.write_bytes(b"no image")
    done = torchrun(2, *PRUNE, "--epochs", "2", "-o", "out")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and str(bad.relative_to(here)) in lines[0]
    assert "Traceback" not in done.stderr.partition("ChildFailedError")[0].rpartition("error:")[0]


def test_a_job_that_torchrun_starts_again_leaves_the_runs_of_others_alone(here):
    assert s2h(*PRUNE, "--epochs", "1", "-o", "old") == 0
    before = {path: path.stat().st_mtime_ns for path in (here / "old").rglob("*")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "1", "-m", "s2h_cli",
               *PRUNE, "--epochs", "4", "-o", "old"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode and done.stderr.count("exists and is kept") == 2
    assert {path: path.stat().st_mtime_ns for path in (here / "old").rglob("*")} == before


def test_a_job_that_torchrun_starts_again_goes_on(here):
    """The first start dies after two epochs; the second goes on with them."""
    (here / "net.py").write_text((here / "net.py").read_text() + """
import os
from s2h_cli.train import checkpoint
real = checkpoint.save
def save(path, state):
    real(path, state)
    if len(state["rows"]) == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
checkpoint.save = save
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "s2h_cli",
               *PRUNE, "--epochs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"epoch {i}/4") for i in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [p.name for p in (here / "runs").iterdir()] == ["net-f0.4"]


def test_averaged_weights_are_exported_where_they_are_better(here, monkeypatch):
    """The hard network's accuracy is said to be the worse one; the result then holds the averaged weights."""
    real = loop.Training.evaluate
    monkeypatch.setattr(loop.Training, "evaluate", lambda *args: {**real(*args), "top1_ema": 100.0, "top1_hard": 10.0})
    assert s2h(*PLAIN, "--epochs", "3", "--ema", "0.9", "-o", "out") == 0
    state = checkpoint.load(here / "out" / "checkpoints" / "last")
    small = load_file(here / "out" / "model.safetensors")
    kept = {shape for shape in small["stem.weight"].flatten(1).sum(1).tolist()}
    averaged = state["ema"]["stem.weight"].flatten(1).sum(1).tolist()
    own = state["network"]["stem.weight"].flatten(1).sum(1).tolist()
    assert kept <= set(averaged) and not kept <= set(own)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains(here, dtype):
    assert s2h(*PRUNE, "--epochs", "15", "--amp", "--amp-dtype", dtype, "--channels-last", "-o", "out") == 0
    assert run.evaluate(here / "out", "data", batch_size=16, workers=0, val_fraction=0.1)[0] > 80


def test_networks_are_compiled_once_their_widths_stand_still(here, monkeypatch):
    """With a compiler that changes nothing, the run is the same; and one that goes on compiles again."""
    compiled = []

    def compile(function):
        compiled.append(function)
        return real(function, backend="eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(run, "check_compiler", lambda device: None)
    assert s2h(*PLAIN, "--epochs", "3", "-o", "plain") == 0 and not compiled
    assert s2h(*PLAIN, "--epochs", "3", "--compile", "-o", "fast") == 0 and len(compiled) == 1  # the hard one: the soft one does not outlive the freeze
    for name, weight in weights(here, "plain")[0].items():
        torch.testing.assert_close(weights(here, "fast")[0][name], weight, rtol=0, atol=1e-6)


def test_a_teacher_is_learnt_from(here, capsys):
    assert s2h(*PRUNE, "--epochs", "4", "-o", "first") == 0
    for teacher in ("first", "trained.pth"):
        torch.save(checkpoint.load(here / "first" / "checkpoints" / "last")["network"], here / "trained.pth")
        assert s2h(*PRUNE, "--epochs", "1", "--teacher", teacher, "-o", f"by-{teacher}") == 0
    assert s2h(*PRUNE, "--epochs", "1", "-o", "alone") == 0
    assert not torch.equal(weights(here, "by-first")[0]["stem.weight"], weights(here, "alone")[0]["stem.weight"])
    for teacher, word in (("net.py:wide", "3 classes"), ("nowhere.pth", "nowhere.pth"), ("resnett", "no model 'resnett'")):
        assert s2h(*PRUNE, "--teacher", teacher, "--dry-run") == 2
        assert word in capsys.readouterr().err


def test_a_trained_network_teaches_what_comes_of_it(here, monkeypatch, capsys):
    """Its own start is its teacher, also when it was killed and goes on; unless it is told not to, or knows no better than chance."""
    assert s2h(*PRUNE[:3], *PRUNE[5:], "--method", "dense", "--data", "data", "--epochs", "6", "-o", "dense") == 0
    start = ["--weights", "dense/model.safetensors", "--epochs", "2"]
    assert "--teacher none" not in capsys.readouterr().err
    uniform = ["--method", "uniform"]  # whose constants are the same whoever teaches
    for name, options in (("by-start", []), ("by-name", ["--teacher", "start"]), ("alone", ["--teacher", "none"]), ("by-run", ["--teacher", "dense"])):
        assert s2h(*PRUNE, *start, *options, *uniform, "-o", name) == 0
    real = checkpoint.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run.checkpoint, "save", lambda path, state: real(path, state) or _kill())
        cli.main([*PRUNE, *start, *uniform, "-o", "killed"])
    assert s2h(*PRUNE, *start, *uniform, "-o", "killed", "--resume") == 0
    same_results(here, "by-start", "killed")
    by_start, by_name, alone, by_run = (load_file(here / name / "model.safetensors") for name in ("by-start", "by-name", "alone", "by-run"))
    assert all(torch.equal(by_start[name], by_name[name]) for name in by_start)
    assert not torch.equal(by_start["stem.weight"], alone["stem.weight"])
    torch.testing.assert_close(by_start["stem.weight"], by_run["stem.weight"])
    for options in (["--no-pretrained"], ["--method", "dense"]):
        args = [a for a in PRUNE if "dense" not in options or a not in ("--flops", "0.4")]
        assert s2h(*args, *(start if "dense" in options else start[2:]), *options, "-o", options[-1] + "-alone") == 0
        assert "teacher: null" in (here / (options[-1] + "-alone") / "args.yaml").read_text()


def _kill():
    raise Killed


def test_from_a_network_that_teaches_too_the_search_is_shorter(here):
    assert s2h(*PRUNE[:3], *PRUNE[5:], "--method", "dense", "--data", "data", "--epochs", "6", "-o", "dense") == 0
    soft = {}
    for teacher in ("start", "none"):
        assert s2h(*PRUNE, "--weights", "dense/model.safetensors", "--epochs", "8", "--teacher", teacher, "-o", teacher) == 0
        with open(here / teacher / "summary.csv") as file:
            soft[teacher] = [bool(row.get("top1_soft")) for row in csv.DictReader(file)]
    assert soft == {"start": 8 * [False], "none": 2 * [True] + 6 * [False]}


@pytest.mark.parametrize("options, ago", [((), 18), (("--method", "magnitude"), 24)])
def test_the_optimizer_forgets_the_gradients_of_the_search(here, options, ago):
    """24 steps, of which s2h searches in the first quarter."""
    assert s2h(*PRUNE, "--epochs", "8", "-o", "run", *options) == 0
    (file,) = (here / "run" / "checkpoints").iterdir()
    assert {int(state["step"]) for state in checkpoint.load(file)["optimizer"]["state"].values()} == {ago}


def test_an_optimizer_that_counts_elsewhere_forgets_too(here):
    assert s2h(*PRUNE, "--epochs", "8", "-o", "run", "--opt", "lamb") == 0
    assert {int(group["step"]) for group in checkpoint.load(here / "run" / "checkpoints" / "last")["optimizer"]["param_groups"]} == {18}


def test_the_rate_that_is_shown_is_that_of_the_last_layer():
    network = timm.create_model("test_vit", num_classes=3)
    method = type("Plain", (), {"network": network})()
    training = loop.Training(method, Recipe(epochs=1, lr=0.5, layer_decay=0.5, warmup_epochs=0), 1, 3)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    assert max(rates) < 0.51 and min(rates) < 0.1 and training.lr == pytest.approx(0.5)


@pytest.mark.parametrize("sched, falls", [("step", [4, 8]), ("multistep", [6, 9])])
def test_schedules_of_steps_fall_within_the_run(sched, falls):
    weights = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(weights.parameters(), lr=1.0)
    scheduler = make_scheduler(optimizer, Recipe(epochs=12, lr=1.0, sched=sched, warmup_epochs=0), updates=5)
    rates = []
    for update in range(60):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert [round(i / 5) for i in range(1, 60) if rates[i] != rates[i - 1]] == falls


def test_a_start_without_trained_weights_teaches_no_one(here, capsys):
    assert s2h(*PRUNE[:1], "resnet10t", *PRUNE[2:], "--no-pretrained", "--teacher", "start", "--dry-run") == 2
    assert "no trained weights" in capsys.readouterr().err


def test_a_teacher_of_another_size_is_refused_in_one_line(here, capsys):
    (here / "net.py").write_text((here / "net.py").read_text() + """
class Sized(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.places = nn.Parameter(torch.zeros(16, 8, 8))

    def forward(self, x):
        return self.head((self.stem(x) + self.places).mean((2, 3)))

def sized(num_classes=10):
    return Sized(num_classes)
""")
    assert s2h(*PRUNE[:1], "net.py:sized", *PRUNE[2:], "--epochs", "1", "-o", "sized") == 0
    assert s2h(*PRUNE, "--img-size", "20", "--teacher", "sized", "--dry-run") == 2
    assert "cannot take images of 3x20x20" in capsys.readouterr().err


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_a_teacher_is_half_of_the_loss(mixup):
    """0.5 CE + 0.5 KL(teacher || network), on the images as they are mixed."""
    torch.manual_seed(0)
    network, seen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)), []
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    class Plain:
        """A method of one network."""

        passes = [lambda images, targets, criterion: {"task": criterion(network(images), targets)}]

        def backward(self, terms):
            sum(terms.values()).backward()

    method = Plain()
    method.network = network
    training = loop.Training(method, Recipe(epochs=1, lr=0.1, mixup=mixup, batch_size=4), 1, 3, teacher)
    images, targets = torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    random.seed(0), np.random.seed(0)
    found = training.forward_backward(images.clone(), targets)["task"]
    (mixed,) = seen
    assert (len(mixed), torch.equal(mixed[0], images[0])) == ((4, False) if mixup else (5, True))  # the fifth has no partner
    if not mixup:
        log_p, log_q = teacher(images).log_softmax(1), network(images).log_softmax(1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
        torch.testing.assert_close(found, (0.5 * -log_q[torch.arange(5), targets].mean() + 0.5 * kl).detach())


def test_a_term_is_averaged_over_the_steps_that_had_it(here):
    """Two epochs of three steps: masks move in the first two steps of all six."""
    assert s2h(*PRUNE, "--epochs", "2", "-o", "out") == 0
    with open(here / "out" / "summary.csv") as file:
        first, second = csv.DictReader(file)
    events = EventAccumulator(str(here / "out" / "tensorboard"))
    events.Reload()
    mask = [e.value for e in events.Scalars("loss/mask")]
    assert len(mask) == 3 and mask[1] == mask[2] == pytest.approx(float(first["loss_mask"]), rel=1e-4) and not second["loss_mask"]


def test_a_teacher_sees_images_as_it_was_trained_on_them(here):
    pupil = load_source("net.py:build", img_size=16)
    pixels = torch.rand(4, 3, 16, 16)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    seen = Teacher(torch.nn.Identity(), mean, std, pupil)(normalised(pupil.mean, pupil.std))
    torch.testing.assert_close(seen, normalised(mean, std))


def test_curves_are_drawn_and_go_on_where_they_stopped(here):
    assert s2h(*PRUNE, "--epochs", "4", "-o", "out") == 0
    events = EventAccumulator(str(here / "out" / "tensorboard"))
    events.Reload()
    assert {"top1/soft", "top1/hard", "train/lr"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("top1/hard")] == [3, 6, 9, 12]
    assert events.Tags()["images"] and events.Tags()["histograms"]
    table = Path(here / "out" / "widths.csv").read_text().splitlines()
    groups = json.loads((here / "out" / "plan.json").read_text())["groups"]
    assert table[0].split(",")[1:] == [g["name"] for g in groups] and len(table) == 5
    assert [float(x) for x in table[-1].split(",")[1:]] == pytest.approx([g["kept"] / g["size"] for g in groups], abs=1e-4)


def test_several_budgets_from_one_run(here, capsys, monkeypatch):
    """Each result is within its budget and of its own channels, the network they were cut from is one, and resuming leaves no trace."""
    several = [*PRUNE, "--flops", "0.2,0.4,0.6", "--epochs", "4", "--ema", "0.9"]
    assert s2h(*several, "-o", "whole") == 0
    plans = {name: json.loads((here / "whole" / f"f{name}" / "plan.json").read_text()) for name in ("0.2", "0.4", "0.6")}
    for name, plan in plans.items():
        assert plan["macs"]["ratio"] <= float(name)
        assert (here / "whole" / f"f{name}" / "model.safetensors").exists() and (here / "whole" / f"f{name}" / "widths.csv").exists()
    assert plans["0.2"]["macs"]["pruned"] < plans["0.4"]["macs"]["pruned"] < plans["0.6"]["macs"]["pruned"]
    header, *rows = (here / "whole" / "summary.csv").read_text().splitlines()
    assert {"ratio_0.2", "top1_hard_0.4", "top1_ema_0.6"} <= set(header.split(",")) and len(rows) == 4

    real = checkpoint.save

    def stops(path, state):
        real(path, state)
        if len(state["rows"]) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.checkpoint, "save", stops)
    assert s2h(*several, "-o", "parts") == 2
    assert "--flops 0.2,0.4,0.6" in capsys.readouterr().err
    monkeypatch.setattr(run.checkpoint, "save", real)
    assert s2h(*several, "-o", "parts", "--resume") == 0
    for name in plans:
        same_results(here, f"whole/f{name}", f"parts/f{name}", [file for file in RESULTS if file != "summary.csv"])
    assert s2h("inspect", "whole/f0.4") == 0
    assert s2h("inspect", "whole") == 2 and "whole/f0.2" in capsys.readouterr().err
    assert s2h(*PRUNE, "--flops", "0.2,0.2") == 2 and "twice" in capsys.readouterr().err
    assert s2h(*PRUNE, "--flops", "0.2,2") == 2 and "--flops 2 " in capsys.readouterr().err
