"""Where the gradients of S2HPruner go, term by term, in float64, against finite differences of each term's own formula."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from s2h_cli.graph import capture
from s2h_cli.budget import Budget
from s2h_cli.masks import Importance, Masks, fit_budget, plan_of_ranks, widths_of
from s2h_cli.methods.s2h import S2H, Settings, divergence
from s2h_cli.plan import Space
from s2h_cli.rebuild import slice_tensor

ALPHA, BETA = 1.0, 20.0  # S2H's defaults
CRITERION = nn.CrossEntropyLoss()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 24, 3, stride=2)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x + F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.silu(self.conv3(x)).mean((2, 3)))


class Computed(nn.Module):
    """Gates on what is computed: a standardised weight, and queries whose head dimension is cut."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 16, 3)
        self.qkv, self.proj, self.fc = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        weight = F.batch_norm(self.conv.weight.reshape(1, 16, -1), None, None, training=True, momentum=0.0)
        x = F.conv2d(F.relu(self.stem(x)), weight.reshape(16, 16, 3, 3), self.conv.bias, padding=1).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(-1, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(3 * q, k, v).transpose(1, 2).reshape(-1, 9, 16)
        return self.fc((x + self.proj(y)).mean(1))


def in_float64(method):
    method.masks.double()
    method.soft.double()
    method.operands = method.hard.operands = {name: tensor.double() for name, tensor in method.operands.items()}
    return method


@pytest.fixture(params=[Small, Computed])
def method(request):
    torch.manual_seed(0)
    captured = capture(request.param(), (3, 8, 8)).network
    space = Space(captured, divisor=2, prune_head_dim=True)
    method = in_float64(S2H(captured.double(), space, Budget(flops=0.4)))
    with torch.no_grad():  # widths somewhere in the middle, so that hard and soft differ
        method.masks.u.normal_()
    method.start_step(0.1)
    method.network.train()
    method.hard.module.train()
    return method


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])


def soft_logits(method, images, gates):
    return functional_call(method.soft, method.soft_parameters(gates), (images,))


def hard_logits(method, images, gates=None):
    return functional_call(method.hard.module, method.hard_parameters(gates), (images,))


def terms(method, batch):
    """Those of all passes of a step."""
    return {name: term for run in method.passes for name, term in run(*batch, CRITERION).items()}


def step(method, batch):
    for run in method.passes:
        method.backward(run(*batch, CRITERION))


def numeric_gradient(function, u, step=1e-6):
    """Central differences of a scalar function of the logits u."""
    out = torch.zeros_like(u)
    for i in range(u.numel()):
        delta = torch.zeros_like(u).view(-1)
        delta[i] = step
        delta = delta.view_as(u)
        out.view(-1)[i] = (function(u + delta) - function(u - delta)) / (2 * step)
    return out


def keep_probability(method, u):
    """w from its formula: the sum of p_k over the widths n_k that are larger than the rank."""
    out = torch.zeros(method.space.size, dtype=torch.float64)
    for i, group in enumerate(method.choices.groups):
        p = u[i, : len(group.candidates)].softmax(0)
        for atom in range(group.start, group.stop):
            out[atom] = sum(pk for pk, n in zip(p, group.candidates) if n > method.ranks[atom])
    return out


def expected_widths(method, u):
    return torch.stack([(u[i, : len(g.candidates)].softmax(0) * torch.tensor(g.candidates)).sum()
                        for i, g in enumerate(method.choices.groups)])


@pytest.mark.parametrize("method", [Computed], indirect=True)
def test_computed_operands_have_gates(method, batch):
    """The weight and the queries; the gate of each changes the soft network."""
    assert sorted(use.operand.name for use in method.space.gates.values()) == ["mul", "reshape_1"]
    ones = torch.ones(method.space.size, dtype=torch.float64)
    whole = functional_call(method.network, dict(method.network.named_parameters()), (batch[0],))
    torch.testing.assert_close(soft_logits(method, batch[0], ones), whole)
    for name in method.space.gates:
        parameters = method.soft_parameters(ones)
        parameters[name] = parameters[name] / 2
        assert not torch.allclose(functional_call(method.soft, parameters, (batch[0],)), whole)


def test_the_hard_network_is_smaller_than_the_soft_one(method):
    assert method.plan.widths.sum() < method.space.full.sum()


def test_keep_probability_is_a_ladder_whose_sum_is_the_expected_width(method):
    w = method.masks.keep_probability(method.ranks)
    torch.testing.assert_close(w, keep_probability(method, method.masks.u))
    sums = [w[g.start:g.stop].sum() for g in method.space.groups]
    torch.testing.assert_close(torch.stack(sums), method.masks.expected_widths())


def test_the_task_loss_reaches_u_through_w(method, batch):
    images, targets = batch
    u = method.masks.u
    (gradient,) = torch.autograd.grad(terms(method, batch)["task"], u)

    def task(v):
        return CRITERION(soft_logits(method, images, keep_probability(method, v)), targets)

    torch.testing.assert_close(gradient, numeric_gradient(task, u.detach()), rtol=1e-5, atol=1e-8)


def test_the_first_step_of_g_reaches_u_through_the_estimator(method, batch):
    images, targets = batch
    u = method.masks.u
    soft = soft_logits(method, images, keep_probability(method, u)).detach()
    w = keep_probability(method, u).detach()
    (gradient,) = torch.autograd.grad(terms(method, batch)["hard"], u)

    def gap(v):
        estimator = 1 - w + keep_probability(method, v)  # m - w + w, on kept channels
        parameters = method.hard_parameters()
        for (name, dim), parts in method.read_parts.items():
            kept = method.hard.indices[name][dim]
            gates = torch.cat([estimator, torch.ones(1)])[parts].prod(1)
            gates = gates if kept is None else gates[kept]
            parameters[name] = parameters[name] * gates.view([-1 if d == dim else 1 for d in range(parameters[name].dim())])
        return ALPHA * divergence(soft, functional_call(method.hard.module, parameters, (images,)))

    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(gradient, numeric_gradient(gap, u.detach()), rtol=1e-5, atol=1e-8)


def test_the_second_step_of_g_reaches_u_through_w(method, batch):
    images, targets = batch
    u = method.masks.u
    hard = hard_logits(method, images).detach()
    (gradient,) = torch.autograd.grad(terms(method, batch)["mask"], u)

    def gap(v):
        return ALPHA * divergence(soft_logits(method, images, keep_probability(method, v)), hard)

    torch.testing.assert_close(gradient, numeric_gradient(gap, u.detach()), rtol=1e-5, atol=1e-8)


def test_the_budget_reaches_u_through_the_expected_widths(method, batch):
    u = method.masks.u
    (gradient,) = torch.autograd.grad(terms(method, batch)["budget"], u)
    hard = method.masks.hard_widths().detach()
    expected = expected_widths(method, u).detach()

    def budget(v):
        macs = method.space.macs.differentiable(hard + expected_widths(method, v) - expected)
        return BETA * (macs / method.space.full_macs - method.allowed.flops) ** 2

    torch.testing.assert_close(gradient, numeric_gradient(budget, u.detach()), rtol=1e-5, atol=1e-8)


def test_u_hears_all_four_terms_and_the_weights_hear_two(method, batch):
    found = terms(method, batch)
    u, weights = method.masks.u, list(method.weights.values())
    of_u = sum(torch.autograd.grad(term, u, retain_graph=True)[0] for term in found.values())
    of_weights = torch.autograd.grad(found["task"] + found["hard"], weights)
    step(method, batch)
    torch.testing.assert_close(u.grad, of_u)
    for weight, gradient in zip(weights, of_weights):
        torch.testing.assert_close(weight.grad, gradient)


def test_the_second_step_of_g_and_the_budget_give_the_weights_exactly_nothing(method, batch):
    """With G and R made a thousand times as strong in their mask parts, the weights' gradients stay bit for bit the same."""
    step(method, batch)
    before = {name: weight.grad.clone() for name, weight in method.weights.items()}
    for weight in method.weights.values():
        weight.grad = None
    for run in method.passes:
        found = run(*batch, CRITERION)
        method.backward({name: term * 1000 if name in ("mask", "budget") else term for name, term in found.items()})
    for name, weight in method.weights.items():
        assert torch.equal(weight.grad, before[name]), name


def test_the_hard_network_pulls_no_weight_that_only_the_soft_one_has(method, batch):
    gradients = torch.autograd.grad(terms(method, batch)["hard"], list(method.weights.values()))
    for (name, weight), gradient in zip(method.weights.items(), gradients):
        for dim, parts in enumerate(method.space.params[name]):
            if parts is not None:
                removed = ~torch.from_numpy(method.plan.kept(parts))
                assert removed.any()
                assert not gradient.index_select(dim, removed.nonzero().squeeze(1)).any(), name


def test_the_first_step_of_g_sees_the_soft_network_as_a_constant(method, batch):
    images, targets = batch
    soft = soft_logits(method, images, method.masks.keep_probability(method.ranks)).detach()
    alone = ALPHA * divergence(soft, hard_logits(method, images))
    weights = list(method.weights.values())
    expected = torch.autograd.grad(alone, weights)
    for got, want in zip(torch.autograd.grad(terms(method, batch)["hard"], weights), expected):
        torch.testing.assert_close(got, want)


def test_importance_is_the_mean_over_layers_of_relative_squared_norms():
    torch.manual_seed(0)
    network = capture(Small(), (3, 8, 8)).network
    space, weights = Space(network, divisor=1), dict(network.named_parameters())
    importance = Importance(space, weights)()
    stream, inner = (next(group for group in space.groups if name in group.layers) for name in ("conv1", "conv3"))
    writes = [weights[f"{name}.weight"].square().sum((1, 2, 3)) for name in ("conv1", "conv2")]
    reads = [weights[f"{name}.weight"].square().sum((0, 2, 3)) for name in ("conv2", "conv3")]
    expected = sum(norm / norm.mean() for norm in (*writes, *reads)) / 4
    torch.testing.assert_close(importance[stream.start:stream.stop], expected.detach())
    norms = weights["conv3.weight"].square().sum((1, 2, 3)), weights["fc.weight"].square().sum(0)
    torch.testing.assert_close(importance[inner.start:inner.stop], (sum(norm / norm.mean() for norm in norms) / 2).detach())


def test_the_widths_freeze_exactly_on_budget_and_stay(method, batch):
    method.start_step(method.settings.freeze)
    plan = method.plan
    assert plan.ratio <= method.budget.flops
    for i, group in enumerate(method.choices.groups):
        larger = [n for n in group.candidates if n > plan.widths[i]]
        if larger:
            raised = plan.widths.copy()
            raised[i] = larger[0]
            assert method.space.ratio(raised) > method.budget.flops
    step(method, batch)
    assert method.optimizers() == []
    method.start_step(0.9)
    assert method.plan is plan and method.masks.u.grad is None


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_group_falls_below_its_share_of_the_uniform_width(share):
    """Masks that want every group gone."""
    space, budget = Space(network := capture(Small(), (3, 8, 8)).network, divisor=2), Budget(flops=0.4)
    uniform = widths_of(space, torch.ones(len(space.groups)), budget)
    method = S2H(network, space, budget, Settings(floor=share))
    with torch.no_grad():
        method.masks.u[:] = torch.linspace(0.0, -40.0 * method.masks.u.shape[1], method.masks.u.shape[1])
    method.start_step(0.1)
    for width, alike, group in zip(method.plan.widths, uniform, space.groups):
        assert width == max(group.step, share * alike // group.step * group.step)


@pytest.mark.parametrize("steps", [40, 400])
def test_the_masks_can_move_as_far_in_few_steps_as_in_many(method, steps):
    moved = 0.0
    method = S2H(method.network, method.space, Budget(flops=0.4))
    for i in range(steps):
        method.start_step(i / steps)
        moved += sum(optimizer.param_groups[0]["lr"] for optimizer in method.optimizers())
    last = max(i for i in range(steps) if i / steps < method.settings.freeze)  # before they freeze
    assert moved == pytest.approx(method.settings.mask_speed * last / steps)


def test_from_the_freeze_on_the_hard_network_trains_alone_on_the_task(method, batch):
    assert len(method.passes) == 2 and sorted(method.networks()) == ["hard", "soft"]
    method.start_step(method.settings.freeze)
    (run,) = method.passes
    found = run(*batch, CRITERION)
    assert list(method.networks()) == ["hard"] and list(found) == ["task"]
    assert np.array_equal(method.expected_widths(), method.plan.widths) and np.array_equal(method.gates_now().numpy(), method.plan.keep)
    torch.testing.assert_close(found["task"], CRITERION(hard_logits(method, batch[0]), batch[1]))
    method.backward(found)
    small = method.result().double().train()
    CRITERION(small(batch[0]), batch[1]).backward()
    for name, weight in small.named_parameters():
        torch.testing.assert_close(slice_tensor(method.weights[name].grad, method.hard.indices[name]), weight.grad)


def test_terms_that_masks_do_not_hear_leave_u_alone(method, batch):
    def gradient(**settings):
        method.settings = replace(method.settings, **settings)
        method.start_step(0.1)
        method.masks.u.grad = None
        step(method, batch)
        return method.masks.u.grad

    (budget,) = torch.autograd.grad(terms(method, batch)["budget"], method.masks.u)
    torch.testing.assert_close(gradient(hears=()), budget)
    parts = [gradient(hears=(name,)) - budget for name in ("task", "hard", "mask")]
    assert all(part.abs().max() > 1e-6 for part in parts)
    torch.testing.assert_close(gradient(hears=("task", "hard", "mask")), sum(parts) + budget)
    method.settings = replace(method.settings, teaches=False)
    assert set(terms(method, batch)) == {"task", "mask", "budget"}


def test_a_new_mask_starts_less_than_a_step_below_full_width(method):
    masks = Masks(method.space)
    steps = torch.tensor([g.step for g in method.space.groups])
    short = torch.from_numpy(method.space.full) - masks.expected_widths()
    assert (short > 0).all() and (short < steps).all()
    assert (masks.hard_widths() == torch.from_numpy(method.space.full)).all()


@pytest.mark.parametrize("kinds", [("flops",), ("params",), ("flops", "params")], ids="+".join)
def test_any_budget_is_met_exactly(method, kinds):
    rng = np.random.default_rng(0)
    space = method.space
    for _ in range(50):
        shares = {kind: rng.uniform(space.share(kind, space.least), 1.0) for kind in kinds}
        value = [np.sort(rng.random(len(g.candidates)))[::-1] for g in space.groups]
        widths = fit_budget(space, value, Budget(**shares))
        assert all(space.share(kind, widths) <= share for kind, share in shares.items())
        for i, group in enumerate(space.groups):
            assert widths[i] in group.candidates
            if widths[i] < group.size:
                raised = widths.copy()
                raised[i] = next(n for n in group.candidates if n > widths[i])
                assert any(space.share(kind, raised) > share for kind, share in shares.items())
        assert (plan_of_ranks(space, widths, method.ranks).widths == widths).all()


def test_of_several_costs_the_one_furthest_over_its_limit_counts(method):
    space = method.space
    widths = torch.from_numpy(space.full * 0.8).requires_grad_()
    shares = {kind: float(space.costs[kind].differentiable(widths.detach())) / space.full_costs[kind] for kind in ("flops", "params")}
    for worst, other in (("flops", "params"), ("params", "flops")):
        budget = Budget(**{worst: shares[worst] / 2, other: shares[other] / 1.5})
        found = budget.excess(space, widths)
        assert float(found.detach()) == pytest.approx(shares[worst] / 2)
        (gradient,) = torch.autograd.grad(found, widths)
        (expected,) = torch.autograd.grad(space.costs[worst].differentiable(widths) / space.full_costs[worst], widths)
        torch.testing.assert_close(gradient, expected)


def test_going_on_from_a_saved_state_is_going_on(method, batch):
    """Saved before a step and loaded into a new method, the step gives the same weights and masks, bit for bit."""
    state = torch.load(_saved(method), weights_only=True)
    model = {"Small": Small, "Computed": Computed}[type(method.network).__name__]()
    other = in_float64(S2H(capture(model, (3, 8, 8)).network.double(), method.space, Budget(flops=0.4)))
    other.network.load_state_dict(method.network.state_dict())
    other.load_state_dict(state)
    for m in (method, other):
        m.network.train()
        m.hard.module.train()
        m.start_step(0.2)
        step(m, batch)
        for optimizer in m.optimizers():
            optimizer.step()
        m.start_step(m.settings.freeze)
    assert torch.equal(method.masks.u, other.masks.u)
    assert np.array_equal(method.plan.keep, other.plan.keep)
    for name, weight in method.weights.items():
        assert torch.equal(weight.grad, other.weights[name].grad)


def _saved(method):
    import io

    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    return file
