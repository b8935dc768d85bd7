"""What people without s2h get: scripts that see what the network was trained on, and a model card."""

import fnmatch
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import s2h_cli
import torch
from PIL import Image
from s2h_cli import artifacts, data, exports
from toy import PRUNE, s2h

#: Runs a script as a user would who has neither s2h nor timm nor torchvision.
ALONE = """
import runpy, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("s2h_cli", "timm", "torchvision", "fvcore"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


WIDE = """

def landscape(num_classes=10):
    network = build(num_classes)
    network.default_cfg = {"input_size": (3, 16, 48), "crop_pct": 0.9}
    return network
"""


@pytest.fixture
def run(here):
    """A run on images of several sizes, larger than its input."""
    rng = np.random.default_rng(0)
    for i, size in enumerate([(90, 80), (80, 133), (200, 101), (97, 97), (64, 300)]):
        for name in ("dark", "light"):
            Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(here / "data" / "val" / name / f"odd{i}.png")
    assert s2h(*PRUNE[:6], "--img-size", "80", "--workers", "0", "--batch-size", "16", "--divisor", "2", "--device", "cpu", "--epochs", "0", "-o", "run") == 0
    return here / "run"


def validation(folder):
    """The validation images as s2h sees them (N, C, H, W), and their paths."""
    splits = data.open_splits("data")
    plan = artifacts.read_plan(folder)
    about = {key: value for key, value in plan["data"].items() if key not in ("classes", "split")}
    loader = data.make_loader(splits.val, train=False, batch_size=4, workers=0, flip=False, **about)
    images = torch.cat([batch for batch, _ in loader])
    return images, [str(splits.val.source[i][0]) for i in range(len(splits.val))], plan


def test_scripts_say_what_the_network_says_where_neither_s2h_nor_timm_is(run):
    images, paths, plan = validation(run)
    with torch.no_grad():
        best = artifacts.load(run)(images).argmax(1)
    expected = [f"{path} {plan['data']['classes'][i]}" for path, i in zip(paths, best)]
    assert len(set(best.tolist())) > 1
    for format in exports.EXPORTS:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", "import sys; sys.argv = sys.argv[1:]\n" + ALONE, run / f"infer_{format}.py", *paths],
                              capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines() == expected, done.stderr


def fed_by_script(run, paths, monkeypatch):
    """What the network of infer_onnx.py gets of images, (N, C, H, W)."""
    fed = []

    class Session(onnxruntime.InferenceSession):
        def run(self, outputs, feed):
            fed.append(torch.from_numpy(feed["images"]))
            return super().run(outputs, feed)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(sys, "argv", ["infer_onnx.py", *paths])
    runpy.run_path(str(run / "infer_onnx.py"), run_name="__main__")
    return torch.cat(fed)


def test_scripts_prepare_images_as_s2h_does(run, monkeypatch):
    images, paths, _ = validation(run)
    torch.testing.assert_close(fed_by_script(run, paths, monkeypatch), images, rtol=0, atol=1e-5)


def test_a_script_without_images_says_how_it_is_used(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infer_onnx.py"])
    with pytest.raises(SystemExit, match="python infer_onnx.py IMAGE"):
        runpy.run_path(str(run / "infer_onnx.py"), run_name="__main__")


def test_scripts_see_what_s2h_sees_of_wide_inputs_and_all_kinds_of_images(here, monkeypatch):
    (here / "wide.py").write_text((here / "net.py").read_text() + WIDE)
    rng = np.random.default_rng(0)
    for i, size in enumerate([(90, 80), (80, 400), (20, 30)]):
        deep = rng.integers(0, 65536, size)
        Image.fromarray(deep.astype(np.uint16)).save(here / "data" / "val" / "dark" / f"grey{i}.png")
        Image.fromarray((deep / 65535).astype(np.float32)).save(here / "data" / "val" / "dark" / f"float{i}.tif")
        rgb, exif = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB"), Image.Exif()
        exif[0x112] = (3, 6, 8)[i]  # turned, as phones store them
        rgb.save(here / "data" / "val" / "light" / f"turned{i}.jpg", exif=exif)
        rgb.quantize(8).save(here / "data" / "val" / "light" / f"palette{i}.png", transparency=bytes([0, 128, 255]))
        rgb.convert("CMYK").save(here / "data" / "val" / "light" / f"cmyk{i}.jpg")
        rgb.save(here / "data" / "val" / "light" / f"moving{i}.gif", save_all=True, append_images=[Image.new("RGB", rgb.size)])
    assert s2h("prune", "wide.py:landscape", *PRUNE[2:6], "--workers", "0", "--divisor", "2", "--device", "cpu", "--epochs", "0", "-o", "run") == 0
    images, paths, plan = validation(here / "run")
    assert plan["input_size"] == [3, 16, 48]
    torch.testing.assert_close(fed_by_script(here / "run", paths, monkeypatch), images, rtol=0, atol=1e-5)


def test_the_card_has_the_figures_and_names_files_that_are_there(run):
    plan, text = artifacts.read_plan(run), (run / "README.md").read_text()
    for figure in (f"{plan['macs']['pruned']:,}", f"{plan['macs']['full']:,}", f"{plan['params']['pruned']:,}", f"{plan['results']['top1']['exported']:.2f}", "dark, light"):
        assert figure in text
    for name in re.findall(r"python (infer_\w+\.py)", text) + re.findall(r"`(\w+\.(?:json|html))`", text):
        assert (run / name).is_file(), name
    assert text.startswith("---\nlibrary_name: s2h\n") and "s2h prune net.py:build" in text


@pytest.fixture
def hub(here, monkeypatch):
    """A hub that is a folder."""
    root = here / "hub"

    class Api:
        def create_repo(self, repo, private, exist_ok):
            if "/" not in repo:
                raise ValueError("Repo id must be in the form 'user/name'")
            (root / repo).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            for file in folder_path.iterdir():
                if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                    shutil.copy(file, root / repo_id)

    def snapshot_download(repo, revision, allow_patterns):
        if revision or not (root / repo).is_dir():
            raise FileNotFoundError(f"no {repo} at {revision}")
        target = Path(tempfile.mkdtemp(dir=here))
        for name in allow_patterns:
            shutil.copy(root / repo / name, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def test_a_result_goes_to_the_hub_and_comes_back(run, hub, capsys):
    assert s2h("push", "run", "me/small") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/small"
    pushed = {file.name for file in (hub / "me" / "small").iterdir()}
    assert {"README.md", "plan.json", "model.safetensors", "model.onnx", "infer_onnx.py", "report.html"} <= pushed and "checkpoints" not in pushed
    images = validation(run)[0]
    with torch.no_grad():
        assert torch.equal(s2h_cli.load("hf://me/small")(images), s2h_cli.load("run")(images))
    assert s2h("inspect", "hf://me/small") == 0
    assert s2h("train", "hf://me/small", *PRUNE[2:4], "--img-size", "80", "--epochs", "1", "--workers", "0", "--dry-run") == 0


def test_what_the_hub_refuses_is_one_line(run, hub, capsys):
    for args, words in ((("push", "run", "small"), "hf auth login"), (("push", "data", "me/small"), "plan.json"), (("inspect", "hf://me/none@v2"), "cannot be downloaded")):
        assert s2h(*args) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and words in lines[0], lines
