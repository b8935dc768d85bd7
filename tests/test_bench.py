"""Timing networks against each other: who takes part, what is said, and what is kept. How long anything takes is no test's business, but
that what waits longer takes longer."""

import json
import time

import pytest
import torch
from s2h_cli import artifacts, bench, latency
from s2h_cli.graph import capture
from s2h_cli.source import load_source
from toy import PRUNE, s2h


@pytest.fixture
def run(here):
    assert s2h(*PRUNE, "--epochs", "0", "-o", "run") == 0
    return here / "run"


def figures(capsys):
    return json.loads("{" + capsys.readouterr().out.split("{", 1)[1])


def test_calls_take_turns_and_the_slower_one_is_the_slower_one():
    order = []

    def call(name, seconds):
        return lambda: order.append(name) or time.sleep(seconds)

    found = latency.interleaved({"short": call("short", 0.002), "long": call("long", 0.02)}, seconds=0.2, threads=1)
    assert len(found["short"]) == len(found["long"]) >= 4
    short, long = map(latency.Timing.of, (found["short"], found["long"]))
    assert short.low <= short.median <= short.high and 0.002 <= short.median < 0.02 <= long.median
    blocks = [name for i, name in enumerate(order) if i == 0 or name != order[i - 1]]
    assert blocks.count("short") > len(found["short"]) / 2  # turn by turn, not one after the other


def test_a_run_is_timed_against_what_it_was_cut_from(run, capsys):
    assert s2h("bench", "run", "--format", "eager,torchscript,onnx", "--batch", "1,3", "--seconds", "0.1", "--json", "--device", "cpu", "--trust") == 0
    found = figures(capsys)
    assert {(row["format"], row["batch"], row["network"]) for row in found["rows"]} == {
        (format, batch, network) for format in ("eager", "torchscript", "onnx") for batch in (1, 3) for network in ("net.py:build, 16 px", "run")}
    (pair,) = found["pairs"]
    assert pair["macs"] == artifacts.read_plan(run)["macs"]["ratio"]
    assert set(bench.shares(pair, found["rows"])) == {(format, batch) for format in ("eager", "torchscript", "onnx") for batch in (1, 3)}
    assert set(pair["kinds"]) <= set(latency.KINDS) and all(seconds > 0 for seconds in pair["kinds"]["convolutions"])
    assert bench.read(run) == found  # which the report shows
    assert s2h("bench", "run", "--format", "eager", "--seconds", "0.1", "--trust") == 0
    out = capsys.readouterr().out
    assert "0.4" in out and "of the time of net.py:build" in out and max(map(len, out.splitlines())) <= 80


def test_a_file_is_timed_in_its_own_format_and_a_model_in_all(run, capsys):
    assert s2h("bench", "run/model.onnx", "run/model.pt2", "run/model.ts", "net.py:build", "--img-size", "16", "--format", "eager,torchscript,onnx",
               "--batch", "2", "--seconds", "0.1", "--json", "--trust") == 0
    found = figures(capsys)
    assert [(row["format"], row["network"]) for row in found["rows"]] == [
        ("eager", "run/model.pt2"), ("eager", "net.py:build"), ("torchscript", "run/model.ts"), ("torchscript", "net.py:build"),
        ("onnx", "run/model.onnx"), ("onnx", "net.py:build")]
    assert found["pairs"] == []


def test_networks_are_made_anew_but_those_that_a_compiler_makes(here, monkeypatch):
    made = []
    network = capture(torch.nn.Conv2d(3, 4, 3), (3, 8, 8)).network
    monkeypatch.setattr(latency, "PLACED_SECONDS", 0.01)
    for format in ("eager", "compile"):
        monkeypatch.setitem(latency.FORMATS, format, lambda subject, images, place, format=format: made.append(format) or (lambda: network(images)))
    latency.compare([latency.Subject(name, (3, 8, 8), network) for name in "ab"], ["eager", "compile"], [1], torch.device("cpu"), 1, seconds=0.2)
    assert made.count("eager") > 4 and made.count("compile") == 2


def test_what_fails_is_said_and_the_others_are_timed(run, capsys, monkeypatch):
    def fails(*args):
        raise RuntimeError("no such device\nat all")

    monkeypatch.setitem(latency.FORMATS, "onnx", fails)
    assert s2h("bench", "run", "--format", "eager,onnx", "--batch", "1", "--seconds", "0.1", "--trust") == 2
    said = capsys.readouterr()
    assert "run in onnx: RuntimeError: no such device" in said.err and "Traceback" not in said.err
    assert said.out.count("failed") == 2 and said.out.count("eager") >= 2


def test_a_batch_that_the_network_cannot_take_is_a_failure_of_that_network(here, capsys):
    assert s2h("bench", "net.py:fixed", "--img-size", "16", "--format", "eager", "--batch", "1,4", "--seconds", "0.1") == 2
    said = capsys.readouterr()
    assert "takes 1 image at a time" in said.err and said.out.count("failed") == 1


@pytest.mark.parametrize("args, word", [(["--format", "tflite"], "eager, compile"), (["--batch", "1,x"], "--batch"), (["--batch", "0"], "--batch")])
def test_options_that_cannot_be_meant(run, capsys, args, word):
    assert s2h("bench", "run", *args) == 2
    assert word in capsys.readouterr().err


def test_a_foreign_file_is_refused(here, capsys):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 3), torch.zeros(1, 3)), "foreign.ts")
    assert s2h("bench", "foreign.ts", "--trust") == 2
    assert "s2h did not write it" in capsys.readouterr().err


@pytest.mark.parametrize("model, kinds", [
    ("mobilenetv3_small_050", {"depthwise convolutions", "convolutions", "linear layers", "norms", "the rest, element by element"}),
    ("test_vit", {"convolutions", "linear layers", "attention and matrix products", "norms", "the rest, element by element"})])
def test_time_is_told_by_kind_of_operator(model, kinds):
    source = load_source(model, pretrained=False, img_size=64)
    network = capture(source.module, source.input_size).network
    found = latency.by_kind(network, 1, torch.device("cpu"), 1, rounds=1)
    assert set(found) == kinds


def rows_of(times):
    """Rows of a whole and a small network: {(format, batch): (before, after)} in seconds."""
    return [{"format": format, "batch": batch, "network": name, "timing": {"median": seconds}}
            for (format, batch), both in times.items() for name, seconds in zip(("whole", "small"), both)]


@pytest.mark.parametrize("times, kinds, width, words", [
    ({("eager", 1): (1.0, 0.3), ("eager", 32): (1.0, 0.33)}, {"convolutions": [1.0, 0.3]}, 16, []),
    ({("eager", 1): (1.0, 0.9), ("eager", 32): (1.0, 0.33)}, {"convolutions": [1.0, 0.3]}, 16, ["fixed cost of each of its 1 operators", "0.90"]),
    ({("eager", 32): (1.0, 0.6)}, {"convolutions": [1.0, 0.4], "norms": [0.5, 0.3]}, 16, ["memory", "norms 71%"]),
    ({("eager", 32): (1.0, 0.6)}, {"convolutions": [1.0, 0.6]}, 17, ["--divisor 16"]),
    ({("eager", 32): (1.0, 0.6)}, {"convolutions": [1.0, 0.6]}, 16, ["none of what is looked for"])])
def test_why_time_did_not_fall_with_the_macs(times, kinds, width, words):
    pair = {"before": "whole", "after": "small", "macs": 0.35, "kinds": kinds}
    small = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, width)))
    found = bench.reasons(pair, rows_of(times), small)
    assert bool(found) == bool(words)
    for word in words:
        assert any(word in reason for reason in found), found
