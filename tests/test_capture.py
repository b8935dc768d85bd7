"""Capture of models as people write them: what must come through unchanged, and what is refused in one line."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import captured, error_of_cutting, images, random_plan, randomise
from torch import nn

from s2h_cli.errors import UserError
from s2h_cli.graph import capture
from s2h_cli.plan import Space

SIZE = (3, 8, 8)


class Net(nn.Module):
    """Two convolutions, something in the middle, a head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def middle(self, x):
        return x

    def forward(self, x):
        return self.fc(self.middle(self.b(F.relu(self.a(x)))).mean((2, 3)))


def net(middle, **layers):
    """A `Net` whose middle is `middle(net, x)`, with more layers."""
    model = type("Net", (Net,), {"middle": middle})()
    for name, layer in layers.items():
        setattr(model, name, layer)
    return model


def without_autocast(model, x):
    with torch.autocast("cuda", enabled=False):
        return model.c(x.float()) + x


def detached(model, x):
    with torch.no_grad():
        scale = model.c(x)
    return x * scale.sigmoid()


def in_place(model, x):
    x = x * 1
    x += 1
    x.mul_(2).clamp_(max=3)
    return x


def made_in_forward(model, x):
    grid = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    return x * grid + torch.zeros(x.shape[0], 16, 1, 1)


def nobias_norm():
    norm = nn.GroupNorm(4, 16)
    norm.bias = None
    return norm


def conv():
    return nn.Conv2d(16, 16, 1)


MODELS = {
    "autocast_off": lambda: net(without_autocast, c=conv()),
    "no_grad": lambda: net(detached, c=conv()),
    "in_place": lambda: net(in_place),
    "made_in_forward": lambda: net(made_in_forward),
    "norm_without_bias": lambda: net(lambda m, x: m.n(x), n=nobias_norm()),
    "weight_norm": lambda: net(lambda m, x: m.c(x), c=nn.utils.parametrizations.weight_norm(conv())),
    "checkpointed": lambda: net(lambda m, x: torch.utils.checkpoint.checkpoint(m.c, x, use_reentrant=False), c=conv()),
    "hooked": lambda: hooked(),
    "sequential": lambda: nn.Sequential(nn.Conv2d(3, 37, 3), nn.ReLU(), nn.Conv2d(37, 41, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(41, 5)),
}


def hooked():
    model = Net()
    model.b.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_model_and_can_be_cut(name):
    model = randomise(MODELS[name]())
    result = capture(copy.deepcopy(model), SIZE)
    network, x = result.network, images(result.network)
    torch.testing.assert_close(network(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert error_of_cutting(network, random_plan(Space(network)), masked=True) < 1e-5
    assert result.static_batch is None
    assert result.notes == []


def test_what_has_no_gradient_in_the_model_has_none_in_the_graph():
    model = randomise(net(detached, c=conv()))
    network = capture(copy.deepcopy(model), SIZE).network
    for module in (network, model.eval()):
        module(images(network)).square().sum().backward()
    assert network.c.weight.grad is None and model.c.weight.grad is None
    torch.testing.assert_close(network.b.weight.grad, model.b.weight.grad)


class Rounded(torch.autograd.Function):
    """Rounds, and lets the gradient through."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_backward_of_ones_own_is_told():
    assert capture(net(lambda m, x: Rounded.apply(x)), SIZE).notes == [
        "captured by their forward, whose gradient replaces the backward they define: Rounded"]


def test_a_fixed_batch_is_told():
    result = capture(net(lambda m, x: x.reshape(1, 16, 8, 8)), SIZE)
    assert result.static_batch == 1 and "batches of 1 only" in result.notes[0]


def test_a_parameter_of_two_names_is_cut_once():
    model = Net()
    model.c = conv()
    model.d = model.c  # one module, two names
    model.middle = lambda x: model.d(F.relu(model.c(x)))
    network = captured(model, SIZE).network
    assert len([name for name, _ in network.named_parameters(remove_duplicate=False) if name.endswith("weight")]) == 4
    assert error_of_cutting(network, random_plan(Space(network))) < 1e-5


def test_an_lstm_runs_in_the_mode_that_gpus_can_train():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.fc = nn.Conv2d(3, 16, 3), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.r(self.a(x).flatten(2).transpose(1, 2))[0].mean(1))

    network = captured(Recurrent(), SIZE).network
    (node,) = (node for node in network.graph.nodes if node.meta.get("op") == "lstm")
    assert node.args[6] is True


@pytest.mark.parametrize("width", [37, 74, 37 * 41])
def test_no_width_is_taken_for_the_batch(width):
    """The stand-in for the batch is a prime; a layer as wide as one, or as a multiple, moves it."""
    network = captured(nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 36, 5)), SIZE).network
    space = Space(network)
    assert width % network.meta["batch"]
    assert space.full_macs == width * 27 * 36 + width * 36 * 5


def data_dependent_branch(model, x):
    if x.sum() > 0:
        return x
    return -x


def autocast_on(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.c(x).float()


REFUSED = {
    "a_branch": (lambda: net(data_dependent_branch), r"test_capture.py line \d+, 'if x.sum\(\) > 0:'.*docs/any-model.md"),
    "numpy": (lambda: net(lambda m, x: x * float(x.detach().numpy().mean())), r"test_capture.py line \d+.*numpy"),
    "cond": (lambda: net(lambda m, x: torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t + 1, (x,))), "construct 'cond'"),
    "a_shape_from_the_image": (lambda: net(lambda m, x: x + (x > 0).nonzero().shape[0]), "shape of nonzero.*depends on what is in the image"),
    "autocast": (lambda: net(autocast_on, c=conv()), "autocast"),
    "torchscript": (lambda: net(lambda m, x: m.s(x), s=torch.jit.script(nn.ReLU())), "s is TorchScript"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name):
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        capture(make(), SIZE)
    assert "\n" not in str(caught.value)
