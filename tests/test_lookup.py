"""Latency as a budget. The clock of these tests is a formula: what it says is known, and no test waits for a timing."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from s2h_cli import artifacts, bench, exports, fresh, latency, lookup, masks
from s2h_cli.budget import Budget
from s2h_cli.cost import CostModel, count_macs
from s2h_cli.graph import capture
from s2h_cli.masks import NEAR, fit_budget
from s2h_cli.plan import Space
from s2h_cli.source import load_source
from test_train import same_results
from toy import PRUNE, s2h

LATENCY = [*PRUNE[:4], *PRUNE[6:]]
#: Seconds: a fixed cost of each operator, and of each element that it writes.
FIXED, ELEMENT = 2e-5, 3e-8


def node_seconds(network, batch, *_):
    """What `latency.by_node` says where time is a formula."""
    found = {}

    class Shapes(torch.fx.Interpreter):
        def run_node(self, n):
            out = super().run_node(n)
            if n.op not in ("placeholder", "get_attr", "output"):
                found[n.name] = FIXED + ELEMENT * (out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with torch.no_grad():
        Shapes(network.eval()).run(torch.zeros(batch, *network.meta["input_size"]))
    return found


def always(seconds):
    return latency.Timing(seconds, seconds, seconds, blocks=7)


def here_and_now(function, *args):
    """`fresh.call` where what was patched holds."""
    return function(*args)


@pytest.fixture
def formula(monkeypatch):
    """Makes all times follow the formula, bent by a power that no table knows of."""
    bend = {"power": 1.0}

    def compare(subjects, formats, batches, *_):
        return [{"format": formats[0], "batch": batches[0], "network": subject.name,
                 "timing": asdict(always(sum(node_seconds(subject.network, batches[0]).values()) ** bend["power"]))} for subject in subjects]

    monkeypatch.setattr(latency, "by_node", node_seconds)
    monkeypatch.setattr(latency, "compare", compare)
    monkeypatch.setattr(fresh, "call", here_and_now)
    return bend


@pytest.fixture
def space(formula):
    source = load_source("resnet10t", num_classes=4, pretrained=False, img_size=32)
    network = capture(source.module, source.input_size).network
    made = Space(network, divisor=2)
    made.table = lookup.add_latency(network, made, lookup.Where("eager", 2, torch.device("cpu")))
    return made


def some_widths(space, seed):
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(group.candidates) for group in space.groups])


def test_the_model_finds_the_formula_behind_the_times(space):
    assert space.table.error < 5e-3
    for seed in range(5):
        widths = some_widths(space, 100 + seed)
        assert space.share("latency", widths) == pytest.approx(space.clock(widths, 0.5), rel=5e-3)
        real = torch.from_numpy(widths.astype(float)).requires_grad_()
        total = space.costs["latency"].differentiable(real)
        assert float(total.detach()) == pytest.approx(space.costs["latency"].total(widths), rel=1e-6)
        total.backward()
        assert (real.grad >= 0).all() and (real.grad > 0).any()


@pytest.mark.parametrize("power", [0.6, 1.0, 1.6])
@pytest.mark.parametrize("target", [0.4, 0.7])
def test_the_clock_has_the_last_word(space, formula, power, target):
    formula["power"] = power  # the table was measured before: now it is wrong
    value = [np.sort(np.random.default_rng(0).random(len(group.candidates)))[::-1] for group in space.groups]
    widths = fit_budget(space, value, Budget(latency=target))
    assert NEAR[0] <= space.clock(widths, target) / target <= NEAR[1]
    both = fit_budget(space, value, Budget(latency=target, flops=0.2))
    assert space.ratio(both) <= 0.2 and space.clock(both, target) / target <= NEAR[1]


@pytest.mark.parametrize("aim, readings", [(0.5, [lookup.ROUGH, lookup.READING]), (0.3, [lookup.ROUGH])])
def test_a_network_that_is_far_off_is_timed_roughly(monkeypatch, aim, readings):
    network, seen = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph()), []
    network.meta["input_size"] = (3, 8, 8)
    monkeypatch.setattr(fresh, "call", here_and_now)
    monkeypatch.setattr(lookup.Where, "times", lambda self, subjects, seconds: seen.append((subjects, seconds)) or {"whole": always(2.0), "small": always(1.0)})
    assert lookup.Where("eager", 1, torch.device("cpu")).share(network, network, aim) == 0.5
    assert [seconds for _, seconds in seen] == readings
    assert all(subjects is seen[0][0] for subjects, _ in seen)  # which are exported once


def test_coefficients_are_fitted_and_never_negative():
    rng = np.random.default_rng(0)
    a = rng.random((12, 4)) * [1, 1e6, 1e3, 1]
    truth = np.array([2.0, 1e-6, 0.0, 0.5])
    scale = np.array([1, 1e6, 1e3, 1])
    np.testing.assert_allclose(lookup._nonnegative(a, a @ truth) * scale, truth * scale, atol=1e-3)
    found = lookup._nonnegative(a, a @ [2.0, 1e-6, -2e-4, 0.5] + 0.2)
    assert (found >= 0).all() and found[2] == 0


def test_the_sum_over_operators_is_the_whole(space):
    cost = space.costs["latency"]
    assert isinstance(cost, CostModel) and cost.total(space.full) == cost.by_row(space.full).sum()
    assert cost.total(space.full) == pytest.approx(space.table.whole * 1e9, rel=1e-3)


def measured_share(folder):
    found = bench.read(folder)
    (share,) = bench.shares(found["pairs"][0], found["rows"]).values()
    return share


def test_a_run_meets_a_latency_and_goes_on_with_the_table_it_had(here, formula, monkeypatch, capsys):
    monkeypatch.setattr(exports, "EXPORTS", {})
    options = [*LATENCY, "--latency", "0.7", "--epochs", "3"]
    assert s2h(*options, "-o", "whole") == 0
    shown = capsys.readouterr().out
    assert "target 0.7 of it" in shown and "more than" not in shown
    assert NEAR[0] * 0.7 <= measured_share(here / "whole") <= 0.7
    assert s2h(*LATENCY, "--latency", "0.7", "--epochs", "3", "--checkpoint-every", "1", "-o", "parts") == 0
    measured = lookup.measure
    monkeypatch.setattr(lookup, "measure", lambda *args: pytest.fail("measured again") if args else measured)
    assert s2h(*LATENCY, "--latency", "0.7", "--epochs", "3", "-o", "parts", "--resume") == 0
    same_results(here, "whole", "parts", ("model.safetensors", "summary.csv"))


def test_a_latency_that_is_missed_is_said(here, formula, monkeypatch, capsys):
    monkeypatch.setattr(exports, "EXPORTS", {})
    monkeypatch.setattr(masks, "TRIES", 1)
    monkeypatch.setattr(lookup, "OVER", 0.01)
    formula["power"] = 0.5
    assert s2h(*LATENCY, "--latency", "0.7", "--epochs", "0", "-o", "run") == 0
    share = measured_share(here / "run")
    assert share > 0.7 * 1.01 and f"takes {share:.3f} of the whole network's time, more than the 0.7 that" in capsys.readouterr().out


def test_milliseconds_are_a_share_of_what_the_whole_network_takes(here, formula, monkeypatch, capsys):
    monkeypatch.setattr(exports, "EXPORTS", {})
    source = load_source("net.py:build", num_classes=2, img_size=16)
    whole = sum(node_seconds(capture(source.module, source.input_size).network, 1).values())
    assert s2h(*LATENCY, "--latency", f"{0.7 * whole * 1e3}ms", "--epochs", "0", "-o", "run") == 0
    assert NEAR[0] * 0.7 <= measured_share(here / "run") <= 0.7
    assert artifacts.read_plan(here / "run")["budget"] == {"latency": pytest.approx(0.7)}


@pytest.mark.parametrize("options, words", [
    (["--latency", "fast"], "milliseconds such as 4ms"), (["--latency", "4"], "such as 4ms"), (["--latency", "-1"], "no share"), (["--latency", "0.0001"], "smallest"), (["--latency", "1e6ms"], "whole network takes"),
    (["--latency", "0.5", "--latency-format", "tflite"], "choose from"), (["--latency", "0.5", "--method", "stp"], "--method stp")])
def test_a_latency_that_cannot_be_had_is_one_line(here, formula, capsys, options, words):
    assert s2h(*LATENCY, *options, "--epochs", "1") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], lines


@pytest.mark.parametrize("penalty, expected", [({}, 4), ({4: 0.1}, 8), ({4: 0.1, 8: 0.1}, 16), ({4: 0.02, 8: 0.02}, 4)])
def test_the_least_divisor_that_pays_is_taken(here, monkeypatch, capsys, penalty, expected):
    """Time is that of the MACs, and a share more at some divisors."""

    def times(self, subjects, seconds):
        macs = {subject.name: sum(count_macs(subject.network, (3, 16, 16)).values()) for subject in subjects}
        return {name: always(n * (1 + penalty.get(int(name) if name.isdigit() else 0, 0.0))) for name, n in macs.items()}

    monkeypatch.setattr(lookup.Where, "times", times)
    monkeypatch.setattr(exports, "EXPORTS", {})
    options = [word for word in PRUNE if word not in ("--divisor", "2")]
    assert s2h(*options, "--divisor", "auto", "--epochs", "0", "-o", "run") == 0
    assert f"divisor {expected}: time for the MACs" in capsys.readouterr().out
    assert f"divisor: {expected}" in (here / "run" / "args.yaml").read_text()  # a run that goes on has the same


def test_a_divisor_that_is_none(here, capsys):
    options = [word for word in PRUNE if word not in ("--divisor", "2")]
    assert s2h(*options, "--divisor", "eight") == 2 and "--divisor eight is no whole number; give one such as 8, or auto" in capsys.readouterr().err
    assert s2h(*options, "--divisor", "0") == 2 and "--divisor" in capsys.readouterr().err
