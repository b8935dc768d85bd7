"""Where the rules, the cost formulas or the rebuilding fail on a call, what enters it stays whole, and the operator is named."""

import pytest
import torch
from helpers import captured, error_of_cutting, fvcore_macs, planned_macs, random_plan
from torch import nn
from torch.nn import functional as F

from s2h_cli import cost, rebuild, rules
from s2h_cli.plan import Space

SIZE = (3, 8, 8)


class Net(nn.Module):
    """A branch of five convolutions between a stem and a head."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 16, 16, 1) for i in range(5))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        a, b, c, d, e = self.convs
        y = a(x)
        z = c(F.softplus(b(y)))
        return self.fc(d(y + e(z.flatten(2).unflatten(2, (4, 16)).unsqueeze(1).flatten(1, 2))[..., :8].repeat(1, 1, 2, 1)).mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return captured(Net(), SIZE).network


def raises(*args):
    raise IndexError("no such axis")


def joins_and_raises(call):
    """Records nonsense before it fails."""
    x = call.args[0]
    call.labels.join(x.dims[1], x.dims[1][::-1])
    call.labels.freeze(call.labels.merge([x.dims[1], x.dims[1]], [16, 16]), "nonsense")
    rules._read(call, x, 0)
    rules._write(call, x._replace(weight=True), 0)
    return call.labels.split(call.labels.fresh(7), [2, 3])


BROKEN = {
    "rule": (rules.RULES, "softplus", raises),
    "rule_that_recorded_facts": (rules.RULES, "softplus", joins_and_raises),
    "labels_of_another_length": (rules.RULES, "softplus", lambda call: (None, call.args[0].dims[1][:5], None, None)),
    "labels_of_another_rank": (rules.RULES, "softplus", lambda call: call.args[0].dims[:2]),
    "no_labels": (rules.RULES, "softplus", lambda call: None),
    "cost": (cost.FORMULAS, "softplus", raises),
    "rebuilding_fails": (rebuild.CALLS, "softplus", raises),
    "rebuilding_gives_another_shape": (rebuild.CALLS, "slice", lambda node, sizes: {3: 5}),
    "rebuilding_gives_nonsense": (rebuild.CALLS, "softplus", lambda node, sizes: {0: "x"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_enters_a_failing_call_stays_whole_and_the_rest_is_cut(network, monkeypatch, name):
    table, op, broken = BROKEN[name]
    whole = Space(network)
    assert whole.unknown == {} and whole.size == 4 * 16
    monkeypatch.setitem(table, op, broken)
    space = Space(network)
    assert list(space.unknown) == [op]
    stuck = [layer for frozen in space.frozen if frozen.reason == f"no rule for operator {op}" for layer in frozen.layers]
    assert stuck == {"softplus": ["convs.1"], "slice": ["convs.0", "convs.4"]}[op]
    free = {layer for group in space.groups for layer in group.layers}
    assert free == {f"convs.{i}" for i in range(5)} - set(stuck)
    plan = random_plan(space)
    assert error_of_cutting(network, plan) < 1e-5
    assert planned_macs(space, plan.widths) == fvcore_macs(rebuild.rebuild(network, plan), SIZE)


def test_the_layers_own_sizes_are_tried_too(network, monkeypatch):
    monkeypatch.setitem(rebuild.MODULES, (nn.Conv1d, nn.Conv2d, nn.Conv3d), raises)
    with pytest.raises(rules.UserError, match="no channel of this model can be pruned.*no rule for operator conv2d"):
        Space(network)


def test_sizes_that_are_computed_from_the_batch_hold_no_channels():
    """`expand` gets batch * 16 from the graph, which nobody rewrites."""
    class Repeats(Net):
        def forward(self, x):
            y = self.convs[1](self.convs[0](x)).flatten(0, 1).unsqueeze(0)
            return self.fc(self.convs[2](y.expand(2, 16 * x.shape[0], 8, 8)[0].reshape(-1, 16, 8, 8)).mean((2, 3)))

    network = captured(Repeats(), SIZE).network
    space = Space(network)
    assert error_of_cutting(network, random_plan(space)) < 1e-5
