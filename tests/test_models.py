"""`s2h models`: what is packaged of the measurements."""

import pytest

from s2h_cli import zoo
from s2h_cli.cli import main
from s2h_cli.errors import UserError


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["models", *args])
    return stop.value.code, capsys.readouterr()


def test_every_measured_model_has_its_figures():
    rows = zoo.load()["models"]
    assert len(rows) > 250
    for name, row in rows.items():
        if "macs" in row:
            assert row["groups"] > 0 and 0 < row["min_ratio"] < 1 and 0 <= row["frozen"] <= row["min_ratio"] + 1e-9, name
        else:
            assert row.get("refused") or row.get("died"), name


def test_a_glob_lists_all_models_of_that_name(capsys):
    code, printed = run(capsys, "resnet1*t")
    assert code == 0 and "resnet10t" in printed.out and "resnet14t" in printed.out and "not measured" in printed.out


def test_measured_models_show_what_is_known(capsys):
    name = next(name for name, row in zoo.load()["models"].items() if "macs" in row)
    code, printed = run(capsys, name)
    assert code == 0 and name in printed.out and "1 of 1 measured" in printed.out


def test_nothing_matches():
    with pytest.raises(UserError, match="no model matches"):
        zoo.known("resnet-50")
