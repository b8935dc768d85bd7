"""Settings: recipes, earlier runs and the command line, one over the other."""

import dataclasses
import shlex

import pytest
import typer.testing
import yaml

from s2h_cli import cli, config, distributed
from s2h_cli.config import Config, Recipe, configure
from s2h_cli.errors import UserError
from s2h_cli.run import check_settings
from s2h_cli.train.recipe import check

GIVEN = {"model": "resnet18", "data": "digits", "flops": 0.35}


def refusal(*args, **options):
    with pytest.raises(UserError) as caught:
        configure(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", config.recipes())
def test_every_recipe_can_be_used(name):
    settings = configure(GIVEN | {"seed": 3}, name)
    check(settings)
    assert settings.seed == 3 and settings.epochs == yaml.safe_load(config.recipes()[name])["epochs"]


def test_what_is_given_goes_before_an_earlier_run_or_a_recipe(tmp_path):
    earlier = configure(GIVEN | {"epochs": 7, "lr": 0.5, "output": "there"}, "vit")
    config.write(earlier, tmp_path)
    settings = configure({"lr": 0.25}, file=tmp_path / "args.yaml")
    assert settings == dataclasses.replace(earlier, lr=0.25, output=None)
    assert configure(GIVEN, "cifar").opt == "sgd" and configure(GIVEN).opt == Recipe.opt
    assert "--recipe cifar would change nothing" in refusal(GIVEN, "cifar", tmp_path / "args.yaml")


def test_a_recipe_of_ones_own(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 3\nlr: 1e-3\nclip_grad: 1\n")
    settings = configure(GIVEN, str(mine))
    assert (settings.epochs, settings.lr, settings.clip_grad) == (3, 0.001, 1.0)


@pytest.mark.parametrize("text, words", [
    ("epoch: 3", ["mine.yaml", "epoch", "epochs"]),
    ("epochs: many", ["epochs", "'many'", "int"]),
    ("epochs: 2.5", ["epochs", "2.5"]),
    ("amp: 1", ["amp", "bool"]),
    ("model: resnet18", ["model"]),
    ("- 1", ["mine.yaml", "setting: value"]),
    ("a: [", ["mine.yaml"]),
])
def test_a_recipe_with_a_mistake_says_where(tmp_path, text, words):
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    message = refusal(GIVEN, str(mine))
    assert all(word in message for word in words), message


def test_what_is_missing_is_said():
    assert "no recipe 'imagnet'" in refusal(GIVEN, "imagnet") and "imagenet" in refusal(GIVEN, "imagnet")
    assert "gone.yaml" in refusal(GIVEN, "gone.yaml")
    assert "--flops" in refusal({"model": "resnet18", "data": "digits"})


@pytest.mark.parametrize("change, word", [
    ({"lr": -1.0}, "--lr -1"), ({"mixup": 0.2, "batch_size": 5}, "a multiple of 2"), ({"mixup": -0.2}, "--mixup"), ({"ema": 1.5}, "--ema 1.5"),
    ({"aa": "rnd-m9"}, "--aa rnd-m9"), ({"amp_dtype": "int8"}, "bfloat16"), ({"clip_grad": 0.0}, "--clip-grad 0"),
    ({"smoothing": float("nan")}, "--smoothing nan"), ({"min_lr": -1.0}, "--min-lr -1"), ({"color_jitter": -1.0}, "--color-jitter -1"), ({"aa": "rand-m5", "color_jitter": 0.2}, "takes the place of --color-jitter"),
    ({"opt": "sgd", "momentum": 0.0}, "--opt sgd with --momentum 0 does not work"),
])
def test_settings_without_a_meaning_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        check(configure(GIVEN | change))


def test_pairs_are_those_of_each_process(monkeypatch):
    check(configure(GIVEN | {"mixup": 0.2, "batch_size": 6}))
    monkeypatch.setattr(distributed, "WORLD", 2)
    with pytest.raises(UserError, match="a multiple of 4"):
        check(configure(GIVEN | {"mixup": 0.2, "batch_size": 6}))


def test_every_augmentation_of_timm_passes():
    for policy in ("rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "3a", "original"):
        check(configure(GIVEN | {"aa": policy}))


def test_budgets_of_a_file_are_those_of_the_command_line(tmp_path):
    for budgets, meant in (([0.35], 0.35), ([0.15, 0.35], [0.15, 0.35]), ([0.1234567, 0.5], [0.1234567, 0.5])):
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(GIVEN | {"flops": budgets}))
        assert configure({}, file=tmp_path / "args.yaml").flops == meant
    for budgets, word in (([], "no share"), ([0.2, 0.2], "twice")):
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(GIVEN | {"flops": budgets}))
        assert word in refusal({}, file=tmp_path / "args.yaml")


@pytest.mark.parametrize("change", [{"epochs": -1}, {"workers": -3}, {"warmup_epochs": -2}, {"divisor": 0}, {"checkpoint_every": 0}])
def test_numbers_of_a_file_below_the_least_are_refused(change):
    (name, value), = change.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value} is out of range"):
        check_settings(configure(GIVEN | change))


@pytest.mark.parametrize("budget", ["0.35", "0.15,0.35", "0.3333333"])
def test_every_setting_is_an_option_and_the_command_of_a_run_gives_its_settings(monkeypatch, budget):
    asked = configure(GIVEN | {"flops": budget, "mixup": 0.2, "exclude": ["a*", "b"], "pretrained": False, "amp": True, "ema": 0.99, "checkpoint_every": 5})
    seen = {}
    monkeypatch.setattr("s2h_cli.run.prune", lambda settings, *_, **__: seen.update(settings=settings) or [])
    result = typer.testing.CliRunner().invoke(cli.app, shlex.split(asked.command())[1:])
    assert result.exit_code == 0, result.output
    assert seen["settings"] == asked
    options = {p.name for p in typer.main.get_command(cli.app).commands["prune"].params}
    assert {field.name for field in dataclasses.fields(Config)} <= options
