"""A captured network computes what the model computes, in evaluation and in training, or the user is told before anything trains."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from torch import nn

from s2h_cli import faithful, graph
from s2h_cli.errors import UserError
from s2h_cli.graph import capture
from s2h_cli.logits import PickLogits, find_logits, is_head
from s2h_cli.training_only import Drop, drops_of

SIZE = (3, 8, 8)


class Net(nn.Module):
    """A stem, what is given in the middle, a head."""

    def __init__(self, middle, width=8):
        super().__init__()
        self.stem, self.norm, self.middle = nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), middle
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.middle(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Own(nn.Module):
    """A layer from a function of the layer and x."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def conv(**options):
    return nn.Conv2d(8, 8, 3, padding=1, **options)


def layers_of(network, kind):
    return [(node, module) for node in network.graph.nodes if node.op == "call_module" and isinstance(module := network.get_submodule(node.target), kind)]


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic depth and dropout, by what they do


def per_image(self, x):
    return x * torch.empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.p) / (1 - self.p) if self.training else x


def floor_of_uniform(self, x):
    if not self.training:
        return x
    return x.div(1 - self.rate) * (1 - self.rate + torch.rand(len(x), *[1] * (x.ndim - 1))).floor()


def whole_batch(self, x):
    if not self.training:
        return x
    return x / self.keep if random.random() < self.keep else torch.zeros_like(x)


def per_element(self, x):
    return F.dropout(x, self.p, self.training)


def per_channel(self, x):
    return F.dropout2d(x, self.p, self.training)


@pytest.mark.parametrize("function, rate, unit", [
    (per_image, {"p": 0.3}, "row"), (per_image, {"p": 0.001}, "row"), (floor_of_uniform, {"rate": 0.3}, "row"), (whole_batch, {"keep": 0.7}, "batch"),
    (per_element, {"p": 0.3}, "element"), (per_channel, {"p": 0.3}, "channel"),
])
def test_a_module_that_drops_is_found_by_what_it_does(function, rate, unit):
    (p,) = rate.values()
    expected = 1 - p if "keep" in rate else p
    found = drops_of(Net(Own(function, **rate)).eval(), torch.randn(2, *SIZE))
    assert found == {"middle": Drop(pytest.approx(expected, abs=1e-12), unit)}
    network = capture(Net(Own(function, **rate)), SIZE).network
    (node, layer), = layers_of(network, faithful._dropouts())
    assert node.target.startswith("middle") and layer.p == pytest.approx(expected, abs=1e-12)
    assert getattr(layer, "mode", unit) == unit


@pytest.mark.parametrize("layer", [
    Own(lambda self, x: x.clamp(min=0)), Own(lambda self, x: x), nn.Identity(), Own(lambda self, x: x * 2),
    Own(lambda self, x: x + torch.randn_like(x) if self.training else x), Own(per_image, p=0.0),
], ids=["relu", "identity", "Identity", "double", "noise", "rate 0"])
def test_no_other_module_is_taken_for_one(layer):
    assert drops_of(Net(layer).eval(), torch.randn(2, *SIZE)) == {}


class DropPath(nn.Module):
    """Wraps the block that it drops; only its name is that of timm's."""

    def __init__(self, block, drop_prob):
        super().__init__()
        self.block, self.drop_prob = block, drop_prob

    def forward(self, x):
        if self.training and torch.rand(()) < self.drop_prob:
            return x
        return x + self.block(x)


def test_a_wrapper_keeps_the_block_that_it_wraps():
    model = randomise(Net(DropPath(conv(), 0.4)))
    result = capture(copy.deepcopy(model), SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(result.network(x), model.eval()(x))
    assert "middle.block.weight" in dict(result.network.named_parameters())
    assert result.notes == ["random in training, which is not captured, so that s2h trains without it: middle"]


@pytest.mark.parametrize("function", [
    lambda self, x: x + 0.1 * torch.randn_like(x) if self.training else x,
    lambda self, x: F.alpha_dropout(x, 0.2, self.training),
    lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if self.training else 0.0),
    lambda self, x: F.rrelu(x - 1, training=self.training),
], ids=["noise", "alpha dropout", "attention", "rrelu"])
def test_what_is_random_and_not_captured_is_said(function):
    (note,) = capture(Net(Own(function)), SIZE).notes
    assert note == "random in training, which is not captured, so that s2h trains without it: middle"


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, momentum=0.3)])
def test_a_batch_norm_trains_as_the_model_trains_it(norm):
    model = Net(nn.Sequential(conv(), norm))
    network = capture(copy.deepcopy(model), SIZE).network
    x = torch.randn(4, *SIZE)
    for _ in range(2):
        torch.testing.assert_close(network.train()(x), model.train()(x))
    torch.testing.assert_close(network.eval()(x), model.eval()(x))


def test_a_batch_norm_that_is_called_twice_is_one_module_that_trains():
    model = Net(Own(lambda self, x: self.n(self.c(self.n(x))), n=nn.BatchNorm2d(8), c=conv()))
    network = capture(copy.deepcopy(model), SIZE).network
    assert [node.target for node, _ in layers_of(network, nn.BatchNorm2d)] == ["norm", "middle.n", "middle.n"]
    x = torch.randn(4, *SIZE)
    torch.testing.assert_close(network.train()(x), model.train()(x))
    torch.testing.assert_close(network.middle.n.running_var, model.middle.n.running_var)


class Frozen(nn.Sequential):
    def train(self, mode=True):
        return super().train(False)


def test_a_batch_norm_that_its_owner_keeps_in_eval_mode_keeps_its_statistics():
    model = randomise(Net(Frozen(conv(), nn.BatchNorm2d(8))))
    result = capture(copy.deepcopy(model), SIZE)
    before = result.network.get_buffer("middle.1.running_mean").clone()
    x = torch.randn(4, *SIZE)
    torch.testing.assert_close(result.network.train()(x), model.train()(x))
    torch.testing.assert_close(result.network.get_buffer("middle.1.running_mean"), before)
    assert any("middle.1 is a batch norm that does not follow its batch" in note for note in result.notes)


def test_a_batch_norm_written_by_its_owner_trains():
    def norm(self, x):
        return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)

    layer = Own(norm, gamma=nn.Parameter(torch.ones(8)), beta=nn.Parameter(torch.zeros(8)))
    layer.register_buffer("mean", torch.zeros(8)), layer.register_buffer("var", torch.ones(8))
    model = Net(layer)
    network = capture(copy.deepcopy(model), SIZE).network
    x = torch.randn(4, *SIZE)
    torch.testing.assert_close(network.train()(x), model.train()(x))
    assert isinstance(network.middle, nn.BatchNorm2d)


# ---------------------------------------------------------------------------------------------------------------------
# The check


def in_training(extra):
    return lambda: Net(Own(lambda self, x: x + extra(self, x) if self.training else x, c=conv()))


@pytest.mark.parametrize("make", [in_training(lambda self, x: self.c(x)), in_training(lambda self, x: 0.1)], ids=["a layer", "a constant"])
def test_a_branch_that_training_alone_takes_is_refused(make):
    with pytest.raises(UserError, match="in training mode the model computes something else.*'middle"):
        capture(make(), SIZE)


def test_auxiliary_outputs_of_training_are_no_difference_and_are_named_in_full():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aux_head = Net(conv()), nn.Linear(8, 5)

        def forward(self, x):
            y = self.body(x)
            return (y, self.aux_head(self.body.stem(x).mean((2, 3)))) if self.training else y

    wrapped = nn.Sequential(Auxiliary())
    assert capture(wrapped, SIZE).notes == ["not used in evaluation, left out: 0.aux_head"]


def test_a_cache_of_evaluation_does_not_freeze_what_it_was_computed_from():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.kept = nn.Parameter(torch.zeros(8, 1, 1)), {}

        def train(self, mode=True):
            self.kept = {}
            return super().train(mode)

        def forward(self, x):
            if self.training:
                return x + self.bias * 2
            if "bias" not in self.kept:
                self.kept["bias"] = self.bias * 2
            return x + self.kept["bias"]

    model = Net(Cached()).eval()
    model(torch.randn(1, *SIZE))
    assert "middle.bias" in dict(capture(model, SIZE).network.named_parameters())


def test_what_changes_with_each_batch_is_said():
    model = Net(nn.utils.parametrizations.spectral_norm(conv()))
    (note,) = capture(model, SIZE).notes
    assert note.startswith("changes in training with each batch, and stays as it is here: middle.parametrizations.weight.0._u")


def test_a_model_of_shared_modules_is_left_as_it_was():
    shared = conv()
    model = Net(nn.Sequential(shared, nn.ReLU(), shared))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    capture(model, SIZE)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1]), name


def replaced(network, kind, module, which=0):
    node, _ = layers_of(network, kind)[which]
    network.set_submodule(node.target, module(network.get_submodule(node.target)))


def attribute(name, value):
    def change(module):
        setattr(module, name, value)
        return module

    return change


def skip(network):
    node, _ = layers_of(network, nn.Conv2d)[1]
    node.replace_all_uses_with(node.args[0])
    network.graph.erase_node(node)
    network.recompile()


def other_function(name, function):
    def change(network):
        next(node for node in network.graph.nodes if node.meta.get("op") == name).target = function
        network.recompile()

    return change


def shifted(network):
    network.get_submodule("middle.0").bias = nn.Parameter(network.get_submodule("middle.0").bias.detach() + 1e-4 * torch.arange(8))


#: Ways to get a capture wrong, and the layer where it shows.
WRONG = {
    "a layer left out": (skip, "middle.0"),
    "another bias": (shifted, "middle.0"),
    "another stride": (lambda network: replaced(network, nn.Conv2d, attribute("stride", (1, 1))), "stem"),
    "another padding": (lambda network: replaced(network, nn.Conv2d, attribute("padding_mode", "circular")), "stem|middle.0|norm"),
    "another eps": (lambda network: replaced(network, nn.BatchNorm2d, attribute("eps", 1e-6)), "norm"),
    "another activation": (other_function("relu", F.gelu), "middle.0"),
    "a norm of layers": (lambda network: replaced(network, nn.LayerNorm, attribute("eps", 1e-4)), "middle.2"),
    "a softmax over another axis": (other_function("softmax", lambda x, dim: x.softmax(2)), "middle"),
    "another order of channels": (lambda network: replaced(network, nn.Linear, lambda m: nn.Sequential(m, Own(lambda self, x: x.flip(1)))), "fc"),
    "dropout that scales": (lambda network: replaced(network, nn.Dropout, lambda m: Own(lambda self, x: x * 0.5)), "fc"),
    "a norm that does not train": (lambda network: replaced(network, nn.BatchNorm2d, lambda m: Frozen(m)), "norm"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_capture_is_refused_and_the_layer_named(name, monkeypatch):
    change, layer = WRONG[name]
    build = graph._Canonical.build

    def wrong(self):
        network = build(self)
        change(network)
        return network.eval()

    middle = nn.Sequential(conv(), Own(lambda self, x: x.softmax(1)), Own(lambda self, x: self.n(x), n=nn.LayerNorm((4, 4))), nn.Dropout(0.5))
    capture(Net(middle), SIZE)
    monkeypatch.setattr(graph._Canonical, "build", wrong)
    with pytest.raises(UserError, match=rf"first at '({layer})") as caught:
        capture(Net(middle), SIZE)
    assert "\n" not in str(caught.value)


def test_a_wrong_layer_behind_a_zero_is_seen(monkeypatch):
    """A residual branch that starts at zero does not hide what is wrong in it."""
    scaled = Own(lambda self, x: x + self.scale * self.c(x), scale=nn.Parameter(torch.zeros(8, 1, 1)), c=conv())
    build = graph._Canonical.build
    monkeypatch.setattr(graph._Canonical, "build", lambda self: (network := build(self), replaced(network, nn.Conv2d, attribute("padding_mode", "circular"), 1))[0])
    with pytest.raises(UserError, match="middle"):
        capture(Net(scaled), SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Logits and heads


Y = torch.randn(2, 5)


@pytest.mark.parametrize("output, path", [
    ({"logits": Y, "features": Y * 2}, ("logits",)), ((Y.softmax(1), Y), (1,)), ([Y], (0,)), ({"out": Y, "aux": Y + 1}, ("out",)),
    ({"a": {"b": (Y, None, torch.zeros(2, 3, 4))}}, ("a", "b", 0)), ((Y, Y + 1), None), ({"x": torch.zeros(2, 3, 4)}, None), ((), None),
])
def test_the_logits_are_found_among_outputs(output, path):
    assert find_logits(output) == path
    if path:
        assert torch.equal(PickLogits(path)(None, None, output), Y)


@pytest.mark.parametrize("behind, head", [
    (nn.Identity(), True), (nn.Softmax(1), True), (nn.LogSoftmax(1), True), (nn.ReLU(), False), (nn.Hardswish(), False), (nn.Sigmoid(), False),
    (nn.Tanh(), False), (Own(lambda self, x: x * 3), True),
])
def test_a_head_has_no_activation_behind_it(behind, head):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), behind).eval()
    assert is_head(model, "3", torch.zeros(1, *SIZE)) == head


def test_a_convolution_before_the_pooling_can_be_the_head():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert is_head(model, "0", torch.zeros(1, *SIZE))
