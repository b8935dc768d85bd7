"""Dropped blocks: a network without them is the model whose blocks are identities, and costs what is left."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from s2h_cli.budget import Budget
from s2h_cli.cost import count_macs
from s2h_cli.depth import shorten, stages, without
from s2h_cli.graph import capture
from s2h_cli.plan import Plan, Space
from s2h_cli.rebuild import rebuild
from s2h_cli.report.facts import describe

SIZE = (3, 64, 64)
MODELS = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=5),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5),
    "swin with in-place writes": lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=5),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(2, 2, 2, 2), num_classes=5),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "regnet": lambda: timm.create_model("regnety_002", num_classes=5),
}
STAGES = {
    "resnet18": [["layer1.0", "layer1.1"], ["layer2.1"], ["layer3.1"], ["layer4.1"]],
    "vit": [["blocks.0", "blocks.1", "blocks.2", "blocks.3"]],
    "mobilenet": [["features.3"], ["features.5", "features.6"], ["features.8"], ["features.10", "features.11"]],
}


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    network = capture(model, SIZE).network
    return request.param, model, network, Space(network)


def test_blocks_with_a_way_around_them_are_found(case):
    name, _, network, space = case
    found = [[block.name for block in stage] for stage in stages(network, space)]
    assert found and found == STAGES.get(name, found)


def test_without_blocks_it_is_the_model_with_identities(case):
    _, model, network, space = case
    images = torch.randn(2, *SIZE)
    for stage in stages(network, space):
        for kept in range(len(stage)):
            changed = copy.deepcopy(model)
            for block in stage[kept:]:
                parent, _, leaf = block.name.rpartition(".")
                changed.get_submodule(parent)._modules[leaf] = nn.Identity()
            small = without(network, tuple(stage[kept:]))
            torch.testing.assert_close(small(images), changed(images))
            names = [node.name for node in network.graph.nodes]
            assert [node.name for node in small.graph.nodes] == [n for n in names if n in {node.name for node in small.graph.nodes}]


def test_macs_and_parameters_are_those_of_what_is_left(case):
    _, _, network, space = case
    blocks = tuple(block for stage in stages(network, space) for block in stage[len(stage) // 2:])
    short = shorten(network, space, blocks)
    assert short.full_macs == space.full_macs and short.ratio(space.full) < 1
    anew = Space(without(network, blocks))
    assert anew.full_macs == short.macs.total(space.full) and anew.parameters.total(anew.full) == short.parameters.total(space.full)
    rng = np.random.default_rng(0)
    for widths in (space.full, np.array([rng.choice(group.candidates) for group in space.groups])):
        plan = Plan.from_widths(short, widths, rng.random(space.size))
        small = rebuild(without(network, blocks), plan)
        assert sum(count_macs(small, SIZE).values()) == short.macs.total(widths)
        assert sum(p.numel() for p in small.parameters()) == short.parameters.total(widths)
        facts = describe(plan, "model", SIZE, Budget(flops=0.5))
        assert facts["macs"]["full"] == space.full_macs and facts["macs"]["pruned"] == short.macs.total(widths)
        inside = [layer for layer in facts["layers"] if any(layer["name"].startswith(name + ".") for name in facts["dropped"])]
        assert inside and all(layer["macs"][0] == layer["in"][0] == layer["out"][0] == layer["params"][0] == 0 for layer in inside)


def test_what_has_no_way_around_it_is_no_block():
    network = capture(timm.create_model("densenet121", num_classes=5), SIZE).network
    assert stages(network, Space(network)) == []
