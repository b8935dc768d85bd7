"""The cores of STP, EPSD and the controls, on cases small enough to work out by hand."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from s2h_cli.graph import capture
from s2h_cli.budget import Budget
from s2h_cli.masks import widths_of
from s2h_cli.methods import METHODS
from s2h_cli.methods.cut import at_random, by_magnitude, uniform
from s2h_cli.methods.epsd import EPSD, class_wise, plan_of_scores
from s2h_cli.methods.s2h import S2H
from s2h_cli.methods.several import Several
from s2h_cli.methods.stp import STP
from s2h_cli.plan import Plan, Space
from test_method import CRITERION, Small


@pytest.fixture
def network():
    torch.manual_seed(0)
    return capture(Small(), (3, 8, 8)).network


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(16) % 5


def on_budget(space, plan, target):
    return plan.ratio <= target and all(
        space.ratio(np.where(np.arange(len(plan.widths)) == i, group.candidates[group.candidates.index(plan.widths[i]) + 1], plan.widths)) > target
        for i, group in enumerate(space.groups) if plan.widths[i] < group.size)


@pytest.mark.parametrize("choose", [uniform, at_random, by_magnitude])
def test_every_choice_of_widths_is_on_budget(network, choose):
    space = Space(network, divisor=2)
    assert on_budget(space, choose(space, Budget(flops=0.4), np.random.default_rng(0).random(space.size)), 0.4)


def test_uniform_keeps_the_same_share_of_the_most_important(network):
    space = Space(network, divisor=1)
    importance = np.random.default_rng(0).random(space.size)
    plan = uniform(space, Budget(flops=0.4), importance)
    share = max(s for s in np.arange(0.05, 1, 0.01) if space.ratio(np.maximum(1, np.floor(s * space.full))) <= 0.4)
    assert (plan.widths >= np.floor(share * space.full)).all()  # what is left of the budget goes to groups that still fit
    for group, width in zip(space.groups, plan.widths):
        mine, kept = importance[group.start:group.stop], plan.keep[group.start:group.stop]
        assert kept.sum() == width and (kept.all() or mine[kept].min() > mine[~kept].max())


def test_what_is_cut_gets_no_gradient_and_what_stays_that_of_the_small_network(network, batch):
    method = METHODS["uniform"](network, Space(network, divisor=2), Budget(flops=0.4))
    method.start_step(0.0)
    (run,) = method.passes
    method.network.train(), method.hard.module.train()
    method.backward(run(batch[0].float(), batch[1], CRITERION))
    small = method.result().train()
    CRITERION(small(batch[0].float()), batch[1]).backward()
    for name, weight in small.named_parameters():
        whole = network.get_parameter(name).grad
        for dim, index in enumerate(method.hard.indices.get(name, [])):
            if index is not None:
                rest = np.setdiff1d(np.arange(whole.shape[dim]), index)
                assert not whole.index_select(dim, torch.from_numpy(rest)).any()
                whole = whole.index_select(dim, index)
        torch.testing.assert_close(whole, weight.grad)


def test_class_wise_distillation_by_hand():
    """Of classes 0 1 0 0: the images of class 0 learn each from the one before, in a circle; that of class 1 from itself, which is nothing."""
    z = torch.tensor([[2.0, 0.0], [1.0, 5.0], [0.0, 0.0], [4.0, 1.0]], requires_grad=True)
    p = (z.detach() / 4).softmax(1)
    by_hand = sum((p[theirs] * (p[theirs] / p[mine]).log()).sum() for mine, theirs in ((0, 3), (2, 0), (3, 2))) * 16 / 4
    loss = class_wise(z, torch.tensor([0, 1, 0, 0]), 4.0)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    gradient = torch.stack([p[0] - p[3], torch.zeros(2), p[2] - p[0], p[3] - p[2]]) * 4 / 4  # T^2 (p - p') / T, the mean of four
    torch.testing.assert_close(z.grad, gradient)
    shares = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    torch.testing.assert_close(class_wise(z, shares, 4.0), loss)


def test_the_meta_gradient_of_epsd_is_that_of_finite_differences(network, batch, monkeypatch):
    """With a distillation term that has no constant side, as finite differences see none."""
    monkeypatch.setattr("s2h_cli.methods.epsd.class_wise", lambda logits, targets, temperature: (logits / temperature).square().mean())
    network.double().train()
    method = EPSD(network, Space(network, divisor=2), Budget(flops=0.4))
    method.gated.double()
    method.operands = {name: tensor.double() for name, tensor in method.operands.items()}
    method.scores = method.scores.double()
    score = method.score(*batch)
    ones, step = torch.ones_like(score), 1e-5

    def loss(atom, delta):
        gates = ones.clone()
        gates[atom] += delta
        return method.looking_ahead(gates, *batch).detach()

    for atom in range(0, method.space.size, 5):
        numeric = (loss(atom, step) - loss(atom, -step)) / (2 * step)
        torch.testing.assert_close(score[atom], numeric.abs(), rtol=1e-4, atol=1e-8)
    assert score.count_nonzero() > method.space.size / 2


def test_epsd_keeps_the_highest_scores_of_its_first_steps(network, batch):
    space = Space(network, divisor=2)
    scores = np.random.default_rng(0).random(space.size)
    plan = plan_of_scores(space, Budget(flops=0.4), scores)
    assert on_budget(space, plan, 0.4)
    for group in space.groups:
        kept = plan.keep[group.start:group.stop]
        assert kept.all() or scores[group.start:group.stop][kept].min() > scores[group.start:group.stop][~kept].max()


@pytest.mark.parametrize("images", [7, 9, 10, 13, 16])
def test_the_parts_that_epsd_looks_ahead_over_have_two_images_at_least(network, batch, images, monkeypatch):
    seen = []
    method = EPSD(network, Space(network, divisor=2), Budget(flops=0.4))
    monkeypatch.setattr("s2h_cli.methods.epsd.class_wise", lambda logits, y, t: seen.append(len(y)) or class_wise(logits, y, t))
    method.score(batch[0][:images].float(), batch[1][:images])
    assert sum(seen) == images and min(seen) >= 2 and len(seen) == min(method.settings.inner_steps + 1, images // 2)


def test_stp_scores_whose_turn_it_is_by_its_divergence_and_trains_it_alone(network, batch):
    method = STP(network, Space(network, divisor=2), Budget(flops=0.4))
    images = batch[0].float()
    torch.manual_seed(1)  # with which the challenger is another
    method.network.train(), method.hard.module.train(), method.whole.module.train()
    found = []
    for turn in (0, 1):
        method.start_step(0.1)
        inner = method.challenger if turn else method.hard
        method.whole_terms(images, batch[1], CRITERION)
        with torch.no_grad():
            p, q = method.logits.log_softmax(1), inner.run(inner.parameters(), images).log_softmax(1)
        found.append((p.exp() * (p - q)).sum(1).mean())
        network.zero_grad()
        method.hard_terms(images, batch[1], CRITERION)["hard"].backward()
        kept = inner.indices["conv2.weight"][0]
        touched = method.weights["conv2.weight"].grad.flatten(1).any(1).nonzero().flatten()
        assert set(touched.tolist()) <= set(kept.tolist()) and len(kept) < 16
    assert method.choices["hard"] is not method.choices["challenger"] and found[0] != found[1]
    torch.testing.assert_close(method.scores, torch.stack(found))


def test_several_budgets_take_turns(network, batch):
    """In a step one part's masks and hard network move, and none of the others'."""
    space = Space(network, divisor=2)
    method = Several(S2H, network, space, [Budget(flops=share) for share in (0.2, 0.4, 0.6)])
    parts = list(method.parts.values())
    for step in range(6):
        before = [part.masks.u.clone() for part in parts]
        method.start_step(0.01 * (step + 1))
        for optimizer in method.optimizers():
            optimizer.zero_grad()
        for run in method.passes:
            method.backward(run(batch[0].float(), batch[1], CRITERION))
        for optimizer in method.optimizers():
            optimizer.step()
        assert [not torch.equal(u, part.masks.u) for u, part in zip(before, parts)] == [i == step % 3 for i in range(3)]


def test_stp_keeps_the_subnetwork_of_the_lower_divergence(network):
    method = STP(network, Space(network, divisor=2), Budget(flops=0.4))
    for wins in (False, True):
        method.steps = 0 if not wins else 2 * method.settings.turns
        method.start_step(0.1)
        challenger, best = method.choices["challenger"], method.choices["hard"]
        method.scores[:] = torch.tensor([2.0, 1.0]) if wins else torch.tensor([1.0, 2.0])
        method.steps = 2 * method.settings.turns
        method.start_step(0.1)
        assert method.choices["hard"] is (challenger if wins else best) and not method.scores.any()
    best = method.choices["hard"]
    method.start_step(0.5)
    assert (method.plan.widths == best.widths.numpy()).all() and method.plan.ratio <= 0.4


def test_subnetworks_of_stp_are_on_budget_and_the_larger_one_between_it_and_its_double(network):
    space = Space(network, divisor=2)
    method = STP(network, space, Budget(flops=0.3))
    for step in range(0, 60, 2 * method.settings.turns):
        method.steps = step
        method.start_step(0.1)
        for name in ("hard", "challenger"):
            assert on_budget(space, Plan.from_widths(space, method.choices[name].widths.numpy(), np.arange(space.size)), 0.3)
        assert space.ratio(method.choices["larger"].widths.numpy()) <= 0.6


@pytest.fixture
def deep():
    torch.manual_seed(0)
    return capture(timm.create_model("resnet10t", channels=(16, 16, 24, 24), layers=(3, 2, 1, 1), stem_width=8, num_classes=5), (3, 32, 32)).network


def test_subnetworks_of_stp_have_depths_that_fill_the_budget(deep, batch):
    space = Space(deep, divisor=2)
    method = STP(deep, space, Budget(flops=0.5))
    assert method.full.tolist() == [3, 1]
    seen = set()
    images = torch.randn(8, 3, 32, 32)
    for step in range(0, 40 * method.settings.turns, 2 * method.settings.turns):
        method.steps = step
        method.start_step(0.1)
        for inner in (method.hard, method.larger):
            seen.add(inner.plan.space.dropped)
            assert inner.run(inner.parameters(), images).shape == (8, 5)
        assert method.hard.plan.ratio <= 0.5 and method.hard.plan.space.ratio(space.full) >= 0.5
    assert len(seen) >= 3


def test_stp_without_blocks_goes_on_from_its_state(deep):
    method = STP(deep, Space(deep, divisor=2), Budget(flops=0.3))
    torch.manual_seed(1)
    for step in range(0, 400, method.settings.turns):
        method.steps = step
        method.scores[:] = torch.rand(2)
        method.start_step(0.1)
        if method.hard.plan.space.dropped:
            break
    state = copy.deepcopy(method.state_dict())
    other = STP(deep, Space(deep, divisor=2), Budget(flops=0.3))
    other.load_state_dict(state)
    assert method.hard.plan.space.dropped and other.hard.plan.space.dropped == method.hard.plan.space.dropped
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(other.networks()["hard"].eval()(images), method.networks()["hard"].eval()(images), rtol=0, atol=0)
    torch.testing.assert_close(other.result()(images), method.networks()["hard"].eval()(images))


def test_widths_are_in_proportion_to_the_shares(network):
    space = Space(network, divisor=1)
    shares = torch.linspace(0.5, 1, len(space.groups))
    widths = widths_of(space, shares, Budget(flops=0.1)) / space.full
    assert np.abs(widths / widths.max() - shares.numpy()).max() < 0.2


def test_networks_that_are_not_evaluated_train_too(network, batch):
    """Batch norm uses the batch's statistics in the larger subnetwork of STP, and where EPSD scores."""
    for kind, inner in ((STP, lambda method: method.larger.module), (EPSD, lambda method: method.gated)):
        method = kind(network.eval(), Space(network, divisor=2), Budget(flops=0.4))
        method.start_step(0.0)
        for run in method.passes:
            run(batch[0].float(), batch[1], CRITERION)
        assert inner(method).training and all(module.training for module in inner(method).modules() if isinstance(module, nn.BatchNorm2d))


def test_the_whole_network_of_stp_is_no_one_s_pupil(network, batch):
    method = STP(network, Space(network, divisor=2), Budget(flops=0.4))
    method.start_step(0.0)
    method.whole.module.train(), method.hard.module.train()
    found = {name: term for run in method.passes for name, term in run(batch[0].float(), batch[1], CRITERION).items()}
    assert sorted(found) == ["hard", "larger", "task"]
    out = network.get_parameter("fc.bias")
    logits = method.whole.run(method.weights, batch[0].float())
    hard = method.hard.run(method.hard.parameters(), batch[0].float())
    # d KL(whole || hard) / d bias through the hard network alone: softmax(hard) - softmax(whole).
    (gradient,) = torch.autograd.grad(found["hard"], out)
    torch.testing.assert_close(gradient, (hard.softmax(1) - logits.softmax(1)).mean(0))


def test_networks_train_by_the_task_alone_in_dense(network, batch):
    method = METHODS["dense"](network, Space(network, divisor=2), Budget(flops=1.0))
    method.start_step(0.0)
    assert method.plan.keep.all()
    (run,) = method.passes
    torch.testing.assert_close(run(batch[0].float(), batch[1], CRITERION)["task"],
                               nn.CrossEntropyLoss()(method.hard.run(dict(network.named_parameters()), batch[0].float()), batch[1]))
