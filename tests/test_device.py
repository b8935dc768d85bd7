"""Training on a device that is not the CPU, pretended (see `pretend`): nothing mixes the two, and a step hardly
ever waits for the device.
"""

from contextlib import nullcontext

import pytest
import torch
from pretend import DEVICE, Machine, Pretended
from toy import PRUNE

from s2h_cli import cli, run
from s2h_cli.graph import tensors_of, to_device
from s2h_cli.train import loop

CAREFUL = [
    "--ema",
    "0.9",
    "--mixup",
    "0.2",
    "--clip-grad",
    "1",
    "--grad-accum-steps",
    "2",
    "--batch-size",
    "8",
    "--channels-last",
]
TAUGHT = ["--teacher", "start", "--weights", "net.pth"]


class Trained(BaseException):
    """Ends a command when the training is over: what follows computes on the CPU."""


@pytest.fixture
def trained(here, monkeypatch):
    """Trains with these options, and gives the small network."""

    def finish(config, budget, folder, ending, job, *_):
        raise Trained(to_device(job.method.parts[ending].result(), "cpu"))

    def train(*options):
        with pytest.raises(Trained) as end:
            cli.main([*PRUNE, *options, "-o", "run"])
        return end.value.args[0]

    monkeypatch.setattr(run, "finish", finish)
    return train


@pytest.fixture
def machine(monkeypatch):
    """A machine with such a device, which every command takes."""
    generator = torch.Generator
    monkeypatch.setattr(run, "pick_device", lambda name: DEVICE)
    monkeypatch.setattr(loop.Training, "autocast", lambda training: nullcontext())  # torch has none for it,
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())  # nor random numbers
    with Machine() as machine, torch.autograd.set_multithreading_enabled(False):
        yield machine


@pytest.mark.parametrize(
    "options",
    [[], CAREFUL, TAUGHT, ["--flops", "0.4,0.7"], *(["--method", name] for name in ("stp", "epsd", "random"))],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_run_on_a_device_never_mixes_it_with_the_cpu(here, trained, machine, options):
    names = {}
    exec((here / "net.py").read_text(), names)
    torch.save(names["build"](2).state_dict(), here / "net.pth")
    small = trained(*options, "--epochs", "2")
    assert not any(isinstance(tensor, Pretended) for tensor in tensors_of(small).values())
    assert small(torch.randn(2, 3, 16, 16)).isfinite().all()


def test_a_run_on_a_device_goes_on_where_it_stopped(here, trained, machine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "evaluate", lambda *args: 1 / 0)  # as the first epoch ends
        with pytest.raises(ZeroDivisionError):
            cli.main([*PRUNE, "--epochs", "2", "-o", "run", "--checkpoint-every", "1"])
    assert (here / "run" / "checkpoints" / "last").exists()
    trained("--epochs", "2", "--resume")


def test_a_step_waits_for_the_device_three_times_while_masks_move_and_never_after(trained, machine, monkeypatch):
    found, step = [], loop.Training.step

    def counted(training, *batch):
        alone, before = training.method.alone, machine.waits.total()
        step(training, *batch)
        found.append((alone, training.method.alone, machine.waits.total() - before))

    monkeypatch.setattr(loop.Training, "step", counted)
    trained("--epochs", "4")
    _, *found = found  # the formula of the costs goes there once
    moving, alone = ([waits for *stage, waits in found if stage == [after, after]] for after in (False, True))
    assert moving and alone
    assert max(moving) <= 3, machine.waits  # widths and ranks come from the device, kept channels go there
    assert max(alone) == 0, machine.waits


def test_no_gradient_asks_for_a_number(trained, monkeypatch):
    """Inside of torch a gradient may look at its numbers, as that of `prod` does; to a GPU that is a wait which
    no Python line shows.
    """
    found, forward_backward = [], loop.Training.forward_backward

    def watched(*args):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            terms = forward_backward(*args)
        found.append({event.key: event.count for event in profiler.key_averages()})
        return terms

    monkeypatch.setattr(loop.Training, "forward_backward", watched)
    trained("--epochs", "1")
    assert found and all(step["aten::convolution_backward"] for step in found)
    assert not any(step.get("aten::_local_scalar_dense") or step.get("aten::nonzero") for step in found)


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    with Machine() as machine:
        there = torch.ones(3).to(DEVICE)
        for wrong in (
            lambda: there + torch.ones(3),
            lambda: torch.index_select(there, 0, torch.tensor([1])),
            lambda: torch.ones(2, 3) @ there,
        ):
            with pytest.raises(AssertionError, match="mixes the device with CPU tensors"):
                wrong()
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()
        assert machine.waits.total() == 1  # `there`
        assert (there + torch.tensor(1.0)).sum().item() == 6 and machine.waits.total() == 2
