"""Functions called in a process of their own."""

import os
import signal

import pytest
import torch
from s2h_cli import fresh, latency, network_json
from s2h_cli.errors import UserError
from s2h_cli.graph import capture
from s2h_cli.source import load_source


def test_a_call_is_answered_by_another_process_with_as_many_threads():
    assert fresh.call(os.getpid) != os.getpid()
    assert fresh.call(torch.get_num_threads) == torch.get_num_threads()
    assert fresh.call(divmod, 7, 2) == (3, 1)


def test_what_the_user_did_wrong_is_said_as_here():
    with pytest.raises(UserError, match="names the layer 'Bogus'"):
        fresh.call(network_json.network_from_json, {"class": "Net", "meta": {"input_size": [3, 8, 8], "static_batch": None}, "modules": {"a": {"class": "Bogus"}}, "tensors": {}, "nodes": []}, {})


def test_a_process_that_breaks_off_is_one_line():
    with pytest.raises(UserError, match=r"broke off \(exit status -9\)"):
        fresh.call(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(UserError, match=r"broke off \(ZeroDivisionError: .*\)"):
        fresh.call(divmod, 1, 0)


def test_networks_go_there_as_they_are():
    source = load_source("resnet10t", num_classes=4, pretrained=False, img_size=32)
    subject = latency.Subject("it", (3, 32, 32), capture(source.module, source.input_size).network)
    (row,) = fresh.call(latency.compare, [subject], ["onnx"], [1], torch.device("cpu"), 1, 0.0)
    assert row["network"] == "it" and row["timing"]["median"] > 0
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(fresh.call(_logits, subject, images), subject.network.eval()(images))


def _logits(subject, images):
    with torch.inference_mode():
        return subject.network(images)
