"""Real architectures: the small network is the full one without the removed channels, and costs what the plan says.

Seventeen models one fact at a time, exports too; then fifty more through the columns of `benchmarks/zoo.py`, exports left out:
together more than a quarter of that zoo, at small resolutions.
"""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
import zoo
from helpers import (captured, error_of_cutting, exact_groups, fvcore_macs, hard_output, images, parameter_count, planned_macs,
                     random_plan, verify)
from torch import fx, nn

from s2h_cli import artifacts, exports
from s2h_cli.plan import Plan, Space
from s2h_cli.program import Program
from s2h_cli.rebuild import rebuild, skeleton

TIMM = {
    "resnet18": {}, "resnet50": {}, "resnext50_32x4d": {}, "regnety_002": {}, "densenet121": {}, "mobilenetv3_small_050": {},
    "efficientnet_b0": {}, "convnext_atto": {}, "res2net50_26w_4s": {}, "vit_tiny_patch16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 56},
}
TORCHVISION = {
    "resnet50": {}, "vgg11_bn": {}, "shufflenet_v2_x1_0": {}, "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False}, "vit_b_16": {"image_size": 32},
}
SIZES = {"inception_v3": 75, "vit_b_16": 32, "swin_tiny_patch4_window7_224": 56}
NAMES = [*(f"timm/{name}" for name in TIMM), *(f"torchvision/{name}" for name in TORCHVISION)]


class Case(NamedTuple):
    model: nn.Module
    network: fx.GraphModule
    space: Space
    exact: list[bool]
    plan: Plan
    other: Plan
    small: fx.GraphModule


@pytest.fixture(scope="module", params=NAMES)
def case(request) -> Case:
    library, name = request.param.split("/")
    if library == "timm":
        model = timm.create_model(name, num_classes=10, **TIMM[name])
    else:
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **TORCHVISION[name])
    size = SIZES.get(name, 64)
    network = captured(model, (3, size, size)).network
    space = Space(network)
    plan = random_plan(space, 1)
    return Case(model, network, space, exact_groups(network, space), plan, random_plan(space, 2), rebuild(network, plan))


def test_graph_is_the_model(case):
    x = images(case.network)
    # With gradients on: without, torch.nn.MultiheadAttention takes a fused path of its own that rounds otherwise.
    assert torch.equal(case.network(x), case.model.eval()(x))


def test_cutting_is_zeroing_where_no_norm_is_cut(case):
    plan = random_plan(case.space, 3, only=case.exact)
    assert error_of_cutting(case.network, plan) < 1e-5


def test_cutting_is_zeroing_with_masked_norms(case):
    assert error_of_cutting(case.network, case.plan, masked=True) < 1e-5


def test_macs_of_the_small_network(case):
    assert planned_macs(case.space, case.plan.widths) == fvcore_macs(case.small, case.network.meta["input_size"])


def test_macs_of_the_full_network(case):
    assert planned_macs(case.space, case.space.full) == fvcore_macs(case.model, case.network.meta["input_size"])


def test_layers_sum_to_the_total(case):
    assert case.space.macs.by_row(case.plan.widths).sum() == case.space.macs.total(case.plan.widths)


def test_parameters_of_the_small_network(case):
    assert case.space.parameters.total(case.plan.widths) == parameter_count(case.small)


def test_parameters_of_each_tensor(case):
    sizes = {name: p.numel() for name, p in case.small.named_parameters()}
    assert dict(zip(case.space.parameter_names, case.space.parameters.by_row(case.plan.widths).tolist())) == sizes


def test_parameters_of_the_full_network(case):
    assert case.space.parameters.total(case.space.full) == parameter_count(case.network)


def test_hard_network_is_the_rebuilt_one(case):
    x = images(case.network)
    assert torch.equal(hard_output(case.network, skeleton(case.network), case.plan, x), case.small(x))


def test_resizing_there_and_back(case):
    x, small = images(case.network), skeleton(case.network)
    other = hard_output(case.network, small, case.other, x)
    assert torch.equal(hard_output(case.network, small, case.plan, x), case.small(x))
    assert torch.equal(hard_output(case.network, small, case.other, x), other)


def test_nothing_removed_changes_nothing(case):
    x = images(case.network)
    whole = Plan(case.space, np.ones(case.space.size, bool))
    with torch.no_grad():
        assert torch.equal(rebuild(case.network, whole)(x), case.network(x))


def test_batch_of_one_agrees_with_a_batch_of_three(case):
    x = images(case.network)
    with torch.no_grad():
        torch.testing.assert_close(case.small(x[:1]), case.small(x)[:1], rtol=1e-4, atol=1e-4)


def test_training_gives_finite_gradients(case):
    small = rebuild(case.network, case.plan).train()
    small(images(case.network)).square().mean().backward()
    assert [name for name, p in small.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_every_operator_is_known(case):
    assert case.space.unknown == {}


def test_plan_survives_its_data(case):
    kept = case.plan.by_group()
    assert [group.start + i for group in case.space.groups for i in kept[group.name]] == np.flatnonzero(case.plan.keep).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What can be cut


def space_of(model: nn.Module, size: int = 64) -> Space:
    return Space(captured(model, (3, size, size)).network)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_streams_are_groups(name):
    space = space_of(timm.create_model(name, num_classes=10))
    assert sum(len(group.layers) >= 3 for group in space.groups) == 4


@pytest.fixture(scope="module")
def vit() -> tuple[fx.GraphModule, Space]:
    network = captured(timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64), (3, 64, 64)).network
    return network, Space(network)


def test_vit_stream_mlp_and_heads(vit):
    sizes = [group.size for group in vit[1].groups]
    assert (sizes.count(192), sizes.count(768), sizes.count(3)) == (1, 12, 12)


def test_vit_mlp_and_heads_are_exact(vit):
    exact = exact_groups(*vit)
    assert [group.size for group, e in zip(vit[1].groups, exact) if not e] == [192]


def test_a_vit_head_stands_for_its_query_key_and_value_channels(vit):
    assert {group.channels for group in vit[1].groups if group.size == 3} == {3 * 64}


def test_swin_heads_and_mlps_are_exact():
    network = captured(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, img_size=56), (3, 56, 56)).network
    space = Space(network)
    exact = {group.size for group, e in zip(space.groups, exact_groups(network, space)) if e}
    assert exact >= {3, 6, 12, 24, 384, 768, 1536, 3072}


def test_resnext_cuts_whole_groups():
    space = space_of(timm.create_model("resnext50_32x4d", num_classes=10))
    assert {group.channels for group in space.groups if group.size == 32} >= {4, 8, 16, 32}


def test_all_but_the_output_of_resnet18_is_free():
    space = space_of(timm.create_model("resnet18", num_classes=10))
    assert [(frozen.layers, frozen.reason) for frozen in space.frozen] == [(("fc",), "the network's output")]


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "shufflenet_v2_x1_0"])
def test_training_mode_is_the_models(name):
    """Batch statistics are used and moved as the original does."""
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    network = captured(model, (3, 64, 64)).network
    model, network = copy.deepcopy(model).train(), copy.deepcopy(network).train()
    x = images(network)
    assert torch.equal(network(x), model(x))
    moved = dict(model.named_buffers())
    assert all(torch.equal(b, moved[n]) for n, b in network.named_buffers() if not n.endswith("num_batches_tracked"))


def test_artifacts_are_the_small_network(case, tmp_path):
    """Reloaded from disk bit for bit; TorchScript, ONNX and pt2 to 1e-5 relative, at batch sizes 1 and 5."""
    artifacts.save(tmp_path, case.small, {})
    reloaded = artifacts.load(tmp_path)
    for batch in (1, 5):
        x = images(case.network, batch)
        assert torch.equal(reloaded(x), case.small(x))
    program = Program(case.small)
    for name in exports.EXPORTS:
        exports.export(program, tmp_path, name)
    differences = verify(case.small, tmp_path, case.network.meta["input_size"])
    assert set(differences) == {"model.safetensors", "model.ts", "model.onnx", "model.pt2"}
    assert max(differences.values()) < 1e-5, differences


# ---------------------------------------------------------------------------------------------------------------------
# The rest of the quarter

MORE = """botnet26t_256 cait_xxs24_224 convit_tiny convmixer_768_32 convnextv2_atto cpubone_nano cs3darknet_focus_s csatv2
    cspnext_tiny davit_tiny dla46x_c dpn48b edgenext_xx_small efficientvim_m1 efficientvit_b0 efficientvit_m0 fasternet_t0
    fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmlp_ti16_224 hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
    inception_next_atto legacy_seresnet18 levit_128s lowformer_b0 mambaout_femto maxxvit_rmlp_nano_rw_256 mobilevit_xxs
    mvitv2_tiny nest_tiny pit_ti_224 poolformerv2_s12 pvt_v2_b0 repghostnet_050 resnest14d resnetv2_18 resnetv2_50d_frn
    rexnet_100 selecsls42 skresnet18 starnet_s050 swiftformer_xs swinv2_tiny_window8_256 tnt_s_patch16_224 tresnet_m
    twins_svt_small""".split()


@pytest.mark.parametrize("name", MORE)
def test_every_column(name):
    row = zoo.examine(name, 64, formats=False)
    assert row.get("refused") is None and row["failed"] == {}
