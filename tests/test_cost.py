"""The cost formula: exact at integer widths, differentiable between them."""

import numpy as np
import pytest
import timm
import torch
from helpers import captured

from s2h_cli.cost import CostModel, Count
from s2h_cli.plan import Space

MODELS = {"resnet18": ((3, 32, 32), {}), "densenet121": ((3, 32, 32), {}), "convnext_atto": ((3, 32, 32), {}),
          "vit_tiny_patch16_224": ((3, 32, 32), {"img_size": 32}), "regnety_002": ((3, 32, 32), {})}


@pytest.fixture(scope="module", params=MODELS)
def space(request) -> Space:
    size, options = MODELS[request.param]
    return Space(captured(timm.create_model(request.param, num_classes=10, **options), size).network)


def random_widths(space: Space, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.array([generator.integers(1, group.size + 1) for group in space.groups])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("table", ["macs", "parameters"])
def test_differentiable_is_exact_at_integers(space, table, seed):
    model, widths = getattr(space, table), random_widths(space, seed)
    assert model.differentiable(torch.tensor(widths, dtype=torch.float64)).item() == pytest.approx(model.total(widths), abs=0.5)


def test_total_is_the_sum_of_rows(space):
    widths = random_widths(space, 0)
    assert space.macs.by_row(widths).sum() == space.macs.total(widths)


def test_rows_are_the_layers(space):
    assert len(space.macs.by_row(space.full)) == len(space.layers)


def test_gradient_is_the_finite_difference(space):
    widths = torch.tensor(random_widths(space, 1) * 0.7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(space.macs.differentiable(widths), widths)
    for i in range(0, len(widths), max(1, len(widths) // 10)):
        step = torch.zeros_like(widths)
        step[i] = 1e-3
        with torch.no_grad():
            difference = (space.macs.differentiable(widths + step) - space.macs.differentiable(widths - step)) / 2e-3
        assert gradient[i].item() == pytest.approx(difference.item(), rel=1e-5)


def test_a_narrower_group_costs_less(space):
    for i in range(len(space.groups)):
        widths = space.full.copy()
        widths[i] = space.least[i]
        assert space.groups[i].size == space.least[i] or space.macs.total(widths) < space.full_macs


def test_float32_widths_give_float64_cost(space):
    assert space.macs.differentiable(torch.tensor(space.full, dtype=torch.float32)).dtype == torch.float64


def test_least_ratio_is_the_smallest(space):
    assert space.min_ratio == pytest.approx(space.ratio(space.least)) and space.min_ratio < 1


@pytest.mark.parametrize("seed", range(20))
def test_against_plain_arithmetic(seed):
    """Rows of products of counts, counts sums of products of widths, written out in Python."""
    generator = np.random.default_rng(seed)
    groups = int(generator.integers(1, 5))
    counts = [Count(tuple((float(generator.integers(1, 4)), tuple(generator.integers(0, groups, generator.integers(0, 3)).tolist()))
                          for _ in range(generator.integers(1, 4)))) for _ in range(4)]
    rows = [[(float(generator.integers(1, 9)), [counts[k] for k in generator.integers(0, 4, generator.integers(0, 4))])
             for _ in range(generator.integers(1, 3))] for _ in range(3)]
    widths = generator.integers(1, 9, groups)

    def value(count: Count) -> float:
        return sum(c * np.prod([widths[g] for g in factors]) for c, factors in count.terms)

    expected = [sum(constant * np.prod([value(c) for c in row_counts]) for constant, row_counts in row) for row in rows]
    model = CostModel.build(groups, rows)
    assert model.by_row(widths).tolist() == expected
    assert model.differentiable(torch.tensor(widths, dtype=torch.float64)).item() == sum(expected)
