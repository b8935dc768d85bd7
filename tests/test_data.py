import io
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset

from s2h_cli import data, folders
from s2h_cli.config import Recipe
from s2h_cli.data import bad_images, make_loader, open_splits
from s2h_cli.errors import UserError
from s2h_cli.folders import identical, split_kind
from s2h_cli.pixels import decode

PREPROCESSING = dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=0.875)


def paint(folder, **counts):
    """Writes images of one grey value each, which names the image, into class folders."""
    value = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (12, 10), (value,) * 3).save(folder / name / f"{number}.png")
            value += 3
    return folder


def loader(dataset, *, size=8, channels=3, train=False, batch_size=4, workers=0, flip=True, **more):
    options = PREPROCESSING | {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    return make_loader(
        dataset, input_size=(channels, size, size), train=train, batch_size=batch_size, workers=workers, flip=flip,
        **options, **more,
    )  # fmt: skip


def refusal(action, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        action(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def paths(dataset):
    return [path for path, _ in dataset.source]


def test_train_and_val_folders(tmp_path):
    paint(tmp_path / "train", b=3, a=2)
    paint(tmp_path / "validation", a=1, b=2)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    splits = open_splits(str(tmp_path))
    assert (len(splits.train), len(splits.val), splits.class_names, splits.flip) == (5, 3, ["a", "b"], True)
    assert len(splits.notes) == 1 and "notes.txt" in splits.notes[0]
    paint(tmp_path / "test", a=1, b=1)
    assert "test/ is not used" in open_splits(str(tmp_path)).notes[-1]


def test_single_folder_is_split_by_class_and_always_alike(tmp_path):
    paint(tmp_path, cat=20, dog=10, emu=2)
    splits = open_splits(str(tmp_path), val_fraction=0.2)
    assert Counter(target for _, target in splits.val.source) == {0: 4, 1: 2, 2: 1}
    assert set(paths(splits.train)).isdisjoint(paths(splits.val)) and len(splits.train) + len(splits.val) == 32
    assert "25 images to train on, 7 to validate on" in splits.notes[0]
    assert paths(open_splits(str(tmp_path), val_fraction=0.2).val) == paths(splits.val)
    assert set(paths(open_splits(str(tmp_path), val_fraction=0.4).train)) < set(paths(splits.train))
    images = sorted(p for p in tmp_path.rglob("*.png"))
    assert sorted(map(str, images)) == sorted(paths(splits.train) + paths(splits.val))


def test_folder_errors(tmp_path):
    missing = str(tmp_path / "missing")
    assert missing in refusal(open_splits, missing)
    assert "0 and 1" in refusal(open_splits, "digits", val_fraction=1.0)
    assert "no images" in refusal(open_splits, str(tmp_path))
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "x.png")
    assert "folder of its own" in refusal(open_splits, str(tmp_path / "flat"))
    one = paint(tmp_path / "one", only=3)
    message = refusal(open_splits, str(one))
    assert str(one) in message and "'only'" in message
    (one / "void").mkdir()
    assert "void" in refusal(open_splits, str(one))
    assert "class single" in refusal(open_splits, str(paint(tmp_path / "few", a=3, single=1)))


def test_split_folder_errors(tmp_path):
    paint(tmp_path / "train", a=1, b=1, c=1)
    assert "no val/" in refusal(open_splits, str(tmp_path))
    paint(tmp_path / "val", a=1, b=1, d=1)
    message = refusal(open_splits, str(tmp_path))
    assert "first has c," in message and "second d;" in message and str(tmp_path / "val") in message
    (tmp_path / "flat" / "train").mkdir(parents=True)
    paint(tmp_path / "flat" / "val", a=1, b=1)
    assert "no images" in refusal(open_splits, str(tmp_path / "flat"))


def test_digits(monkeypatch):
    splits = open_splits("digits")
    assert (len(splits.train) + len(splits.val), splits.flip) == (1797, False)
    assert splits.class_names == [str(digit) for digit in range(10)]
    shares = Counter(target for _, target in splits.val.source)
    assert all(33 <= shares[digit] <= 38 for digit in range(10))
    for _ in range(2):  # an image can be read more than once
        images, targets = next(iter(loader(splits.val, batch_size=16)))
    assert images.shape == (16, 3, 8, 8) and images.min() == -1 and images.max() == 1
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal(open_splits, "digits")


@pytest.fixture
def grey_values(tmp_path):
    """A set whose images are told apart by their one value."""
    return open_splits(str(paint(tmp_path / "grey", a=11, b=11))).train


def epoch(batches, number=0, skip=0):
    batches.set_epoch(number, skip)
    return list(batches)


def values(batches):
    return sorted(round(image[0, 0, 0].item() * 127.5 + 127.5) for images, _ in batches for image in images)


def test_evaluation_gives_each_image_once_in_order(grey_values):
    before = torch.get_rng_state()
    batches = list(loader(grey_values, batch_size=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(targets) for _, targets in batches] == [8, 8, 4]
    images, targets = batches[0]
    assert images.dtype == torch.float32 and targets.dtype == torch.int64 and images.shape[1:] == (3, 8, 8)
    assert torch.cat([targets for _, targets in batches]).tolist() == [target for _, target in grey_values.source]
    assert len(set(values(batches))) == 20


def test_training_leaves_out_the_incomplete_batch(grey_values):
    assert [len(targets) for _, targets in loader(grey_values, train=True, batch_size=8)] == [8, 8]
    assert [len(targets) for _, targets in loader(grey_values, train=True, batch_size=50)] == [20]


def same(left, right):
    return all(torch.equal(a, b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two))


AUGMENTED = Recipe(aa="rand-m9-mstd0.5-inc1", reprob=0.5)


@pytest.mark.parametrize("size, recipe", [(8, Recipe()), (80, Recipe()), (80, AUGMENTED)])
def test_epochs_repeat_whatever_was_drawn_before_and_whatever_the_workers(grey_values, size, recipe):
    batches = loader(grey_values, train=True, size=size, recipe=recipe)
    epochs = [epoch(batches, number) for number in range(3)]
    assert not same(epochs[0], epochs[1])
    fresh = loader(grey_values, train=True, size=size, workers=2, recipe=recipe)  # as after a resume, and with other workers
    assert same(epoch(fresh, 2), epochs[2]) and same(epoch(fresh, 1), epochs[1])
    assert not same(epoch(loader(grey_values, train=True, size=size, seed=1, recipe=recipe), 1), epochs[1])

    batches.set_epoch(2)
    disturbed = []
    for batch in batches:
        disturbed.append(batch)
        torch.rand(7), random.random(), np.random.rand()  # as a training step would
    assert same(disturbed, epochs[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_in_its_middle(grey_values, workers):
    batches = loader(grey_values, train=True, workers=workers)
    whole = epoch(batches, 3)
    assert same(epoch(batches, 3, skip=2), whole[2:]) and batches.position == len(batches) == 5
    assert epoch(batches, 3, skip=5) == []


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch_of_training_and_the_whole_of_evaluation(grey_values, world):
    alone = epoch(loader(grey_values, train=True, batch_size=6), 1)
    shares = [epoch(loader(grey_values, train=True, batch_size=6, rank=rank, world=world), 1) for rank in range(world)]
    for i, (images, targets) in enumerate(alone):
        together = [torch.stack([shares[k % world][i][part][k // world] for k in range(6)]) for part in (0, 1)]
        assert torch.equal(together[0], images) and torch.equal(together[1], targets)
    counted = [values(loader(grey_values, rank=rank, world=world)) for rank in range(world)]
    assert sorted(sum(counted, [])) == values(loader(grey_values))


def test_a_worker_that_dies_names_its_image(grey_values):
    """In a process of its own, since torch reports the death wherever the program is."""
    victim = grey_values.source[7][0]
    program = f"""
import os, signal, time
from s2h_cli import data, folders
from s2h_cli.errors import UserError
real = data.decode
def dies(image, mode):
    if image.filename == {victim!r}:
        time.sleep(1)  # until the images before are handed over: that cut short can take the interpreter with it
        os.kill(os.getpid(), signal.SIGKILL)
    return real(image, mode)
data.decode = dies
images = data.open_splits({str(grey_values.origin)!r}).train
loader = data.make_loader(images, input_size=(3, 8, 8), train=False, batch_size=1, workers=1, flip=True, **{PREPROCESSING!r})
try:
    with data.naming_images(loader):
        list(loader)
except UserError as error:
    print(error)
"""
    message = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert victim in message and "--workers" in message


def test_loaders_of_one_set_do_not_disturb_each_other(grey_values):
    evaluation = loader(grey_values)
    loader(grey_values, train=True)
    assert len(set(values(evaluation))) == 20


def test_flip(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, 4:] = 255
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / name)
    dataset = open_splits(str(tmp_path)).train

    def mirrored(flip, **recipe):
        batches = loader(dataset, train=True, flip=flip, recipe=Recipe(**recipe))
        images = torch.cat([images for _ in range(20) for images, _ in batches])
        return (images[..., 0] > images[..., -1]).any().item()

    assert mirrored(True) and not mirrored(False)
    assert mirrored(False, hflip=0.9) and not mirrored(True, hflip=0.0)


def test_images_become_what_the_model_takes(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / name / "deep.png")
        rgb = Image.fromarray((ramp / 257).astype(np.uint8)).convert("RGB")
        for mode in ("L", "P", "CMYK", "RGBA", "1", "LA"):
            rgb.convert(mode).save(tmp_path / name / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    dataset = open_splits(str(tmp_path)).val
    assert len(dataset) == 14
    for channels in (1, 3):
        images = torch.cat([images for images, _ in loader(dataset, channels=channels)])
        assert images.shape == (14, channels, 8, 8)
        depth = images[[path.endswith("deep.png") for path in paths(dataset)]]
        assert abs(depth.mean()) < 0.02  # a 16-bit ramp is scaled, not clipped
    assert "4 channels" in refusal(loader, dataset, channels=4)


@pytest.fixture
def damaged(tmp_path):
    paint(tmp_path / "train", a=6, b=6)
    paint(tmp_path / "val", a=2, b=2)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    truncated, text = tmp_path / "train" / "a" / "3.png", tmp_path / "train" / "b" / "4.png"
    truncated.write_bytes(content[: len(content) // 2])
    text.write_text("<html>not found</html>")
    return tmp_path, {str(truncated), str(text)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [False, True])
def test_unreadable_image_is_named(damaged, workers, train):
    folder, bad = damaged
    message = refusal(list, loader(open_splits(str(folder)).train, train=train, workers=workers))
    assert any(path in message for path in bad) and "--skip-bad-images" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_told(damaged, workers):
    folder, bad = damaged
    splits = open_splits(str(folder), skip_bad_images=True)
    for _ in range(2):
        batches = list(loader(splits.train, workers=workers))
        assert len(values(batches)) == len(set(values(batches))) == 10  # none stands in for a bad one
        assert set(bad_images(splits.train)) == bad and len(bad_images(splits.train)) == 2
    assert len(list(loader(splits.train, batch_size=1, workers=workers))) == 10
    assert bad_images(splits.val) == []


def test_set_without_any_readable_image(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.jpg").write_text("nothing")
    splits = open_splits(str(tmp_path), skip_bad_images=True)
    assert str(tmp_path) in refusal(list, loader(splits.train))


def test_timm_data_sets(tmp_path, monkeypatch):
    paint(tmp_path / "train", a=3, b=3)
    paint(tmp_path / "test", a=1, b=1)
    (tmp_path / "train" / "a" / "1.png").write_text("nothing")

    def create(name, *, root, split, download):
        if split == "validation":
            raise ValueError('Unknown split "validation"')
        return ImageDataset(str(tmp_path / split))

    monkeypatch.setattr(data, "create_dataset", create)
    splits = open_splits("hfds/me/pictures")
    assert (len(splits.train), len(splits.val), splits.class_names, splits.flip) == (6, 2, ["a", "b"], True)
    assert [targets.tolist() for _, targets in loader(splits.val)] == [[0, 1]]
    assert "hfds/me/pictures train image 1" in refusal(list, loader(splits.train))
    splits = open_splits("hfds/me/pictures", skip_bad_images=True)
    assert len(values(loader(splits.train, workers=1))) == 5
    assert bad_images(splits.train) == ["hfds/me/pictures train image 1"]
    assert not open_splits("hfds/me/mnist").flip


def test_torchvision_data_set(tmp_path, monkeypatch):
    class Pictures(list):
        classes = ["a", "b"]

    picture = Image.new("L", (28, 28), 255)
    monkeypatch.setattr(data, "create_dataset", lambda *args, **options: Pictures([(picture, 0), (picture, 1)]))
    splits = open_splits("torch/mnist")
    assert (splits.class_names, splits.flip) == (["a", "b"], False)
    assert next(iter(loader(splits.train)))[0].shape == (2, 3, 8, 8)
    monkeypatch.setattr(Pictures, "classes", None)
    assert "torch/mnist" in refusal(open_splits, "torch/mnist")


def test_timm_data_set_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert "torch/cifar1000" in refusal(open_splits, "torch/cifar1000")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "hfds/me/none" in refusal(open_splits, "hfds/me/none")
    assert "stream" in refusal(open_splits, "wds/me/none")


def test_some_images_are_of_all_classes_and_always_the_same(here):
    images = data.open_splits("data").train
    chosen = data.some(images, 12)
    assert len(chosen) == 12 and {target for _, target in chosen.source} == {0, 1}
    assert chosen.source == data.some(images, 12).source and set(chosen.source) <= set(images.source)
    assert len(data.some(images, 1000)) == len(images)


# ---------------------------------------------------------------------------------------------------------------------
# Folders as people have them


@pytest.mark.parametrize("name, kind", [
    *[(name, "train") for name in ("train", "Train", "TRAINING", "training_set", "TrainSet", "train-data", "trainset", "dataset_train", "train2017")],
    *[(name, "val") for name in ("val", "Valid", "validation", "val_set", "dev", "Eval", "hold-out-set", "ValData", "validation images")],
    *[(name, "test") for name in ("test", "Testing", "test_set", "testdata", "TEST_IMAGES")],
    *[(name, None) for name in ("cat", "train station", "bullet_train", "contest", "testa", "valley", "set", "data", "1", "devil", "trainer")],
])
def test_split_names(name, kind):
    assert split_kind(name) == kind


@pytest.mark.parametrize("folders, train, val", [
    (["Train", "Val"], "Train", "Val"), (["training_set", "test_set"], "training_set", "test_set"), (["train", "valid", "test"], "train", "valid"),
    (["train", "TEST", "dev"], "train", "dev"), (["x/x/train", "x/x/val"], "x/x/train", "x/x/val"),
    (["train/train", "val/val"], "train/train", "val/val"), (["train", "val", "extra"], "train", "val"),
])
def test_splits_are_found_by_name(tmp_path, folders, train, val):
    for folder in folders:
        paint(tmp_path / folder, a=2, b=2)
    splits = open_splits(f"{tmp_path}/")
    for images, folder in ((splits.train, train), (splits.val, val)):
        assert {os.path.dirname(path) for path in paths(images)} == {str(tmp_path / folder / name) for name in "ab"}
    if len(folders) > 2 or val == "test_set":
        assert splits.notes


@pytest.mark.parametrize("folders, words", [
    (["train"], "no val/"), (["test", "val"], "no train/"), (["train", "training", "val"], "several train"), (["train", "val", "Validation"], "several val"),
    (["train", "test", "test_set"], "several test"), (["a/train", "a/val", "b/train", "b/val"], "class folders"), (["test"], "no train/"), (["extra", "train"], "no val/"),
])
def test_what_lacks_a_split_is_never_read_as_classes(tmp_path, folders, words):
    for folder in folders:
        paint(tmp_path / folder, a=2, b=2)
    assert words in refusal(open_splits, str(tmp_path))


def test_split_folders_without_class_folders_are_no_classes(tmp_path):
    paint(tmp_path, train=3, test=3)
    assert "6 images outside the class folders" in refusal(open_splits, str(tmp_path))


def test_a_class_may_be_called_like_a_split(tmp_path):
    assert open_splits(str(paint(tmp_path, bus=3, train=3, test=3))).class_names == ["bus", "test", "train"]


def test_hidden_and_system_files_are_left_out_and_counted(tmp_path):
    paint(tmp_path, a=3, b=3)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "a/.ipynb_checkpoints", "a/__pycache__"):
        shutil.copytree(tmp_path / "b", tmp_path / name)
    for name in ("._0.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "a" / name).write_bytes(b"0")
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ["a", "b"] and len(splits.train) + len(splits.val) == 6
    assert "10 hidden" in splits.notes[0]


def test_links_and_what_is_no_file(tmp_path):
    paint(tmp_path / "train", a=3, b=3)
    paint(tmp_path / "val", a=2, b=2)
    for link, to in (("train/a/up", ".."), ("train/a/root", "../.."), ("train/a/far", "/"), ("train/a/own", "own"), ("train/a/other.png", "../b/0.png"),
                     ("train/a/gone.png", "nowhere"), ("val/a/leak.png", "../../train/a/0.png"), ("val/a/folder", "../../train/b")):
        (tmp_path / link).symlink_to(to)
    os.mkfifo(tmp_path / "train" / "b" / "pipe.png")
    (tmp_path / "val" / "b" / "folder.png").mkdir()
    splits = open_splits(str(tmp_path))
    assert Counter(target for _, target in splits.train.source) == {0: 3, 1: 3} and Counter(target for _, target in splits.val.source) == {0: 2, 1: 2}
    note = splits.notes[0]
    assert "5 links to files and folders" in note and "3 links to nothing" in note and "1 validation files that are links to training" in note


def test_images_behind_links_are_read(tmp_path):
    paint(tmp_path / "pool", a=4, b=4, c=1)
    root = tmp_path / "data"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "pool" / "a")
    (root / "b").mkdir()
    (root / "b" / "inner").symlink_to(tmp_path / "pool" / "b")
    (root / "b" / "one.png").symlink_to(tmp_path / "pool" / "c" / "0.png")
    splits = open_splits(str(root))
    assert len(splits.train) + len(splits.val) == 9


def test_class_names_are_compared_in_one_form(tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        paint(tmp_path / split, **{unicodedata.normalize(form, name): 2 for name in ("café", "naïve")})
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ["café", "naïve"] and Counter(target for _, target in splits.val.source) == {0: 2, 1: 2}


def test_a_class_that_val_lacks_is_a_note(tmp_path):
    paint(tmp_path / "train", a=2, b=2, c=2)
    paint(tmp_path / "val", a=1, c=1)
    (tmp_path / "val" / "b").mkdir()
    splits = open_splits(str(tmp_path))
    assert [target for _, target in splits.val.source] == [0, 2] and "class b" in splits.notes[-1]
    assert data.class_sizes(splits.train) == (2, 2)


@pytest.mark.parametrize("ending", ["webp", "bmp", "tif", "gif", "TIFF", "ppm", "jpeg"])
def test_what_pillow_opens_is_an_image(tmp_path, ending):
    for name in "ab":
        (tmp_path / name).mkdir()
        for value in (0, 255):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / name / f"{value}.{ending}")
    assert [round(v) for v in values(loader(open_splits(str(tmp_path), val_fraction=0.5).train))] in ([0, 0], [0, 255], [255, 255])


def test_a_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.heic", "a/2.heic", "a/x.pdf"):
        (tmp_path / name).write_bytes(b"0")
    message = refusal(open_splits, str(tmp_path))
    assert "2 .heic" in message and "1 .pdf" in message


def test_identical_files_in_both_splits_are_counted(tmp_path):
    paint(tmp_path / "train", a=3, b=3)
    paint(tmp_path / "val", a=1, b=1)  # 0.png of a is black in both, that of b has another grey
    shutil.copy(tmp_path / "train" / "b" / "2.png", tmp_path / "val" / "b" / "copy.png")
    (note,) = data.shared_images(open_splits(str(tmp_path)))
    twins = identical(*(sorted(map(str, (tmp_path / split).rglob("*.png"))) for split in ("train", "val")))
    assert {os.path.relpath(path, tmp_path) for path, _ in twins.pairs} == {"val/a/0.png", "val/b/0.png", "val/b/copy.png"} and twins.complete
    assert note.startswith("3 validation images")
    assert not identical(*[paths(part) for part in (open_splits(str(tmp_path)).train,) * 2], seconds=-1).complete


@pytest.mark.parametrize("name, words", [("x.zip", "unpack"), ("x.csv", "folder of its own"), ("x.png", "no folder"), ("x.tar.gz", "unpack")])
def test_a_file_as_data(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"0")
    assert words in refusal(open_splits, str(tmp_path / name))


def test_data_may_be_in_the_home_folder_and_unreadable(tmp_path, monkeypatch):
    paint(tmp_path / "mine", a=2, b=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_splits("~/mine").train) == 2

    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders.os, "scandir", refuse)
    assert "permission" in refusal(open_splits, str(tmp_path / "mine"))


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_upright(turn):
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x112] = turn
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    assert decode(Image.open(file), "L").size == ((4, 3) if turn < 5 else (3, 4))
    assert np.array_equal(decode(Image.open(file), "L"), ImageOps.exif_transpose(Image.open(file)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16L", "I;16B"])
def test_every_mode_of_pillow_has_8_bit_pixels(mode):
    for channels, target in ((1, "L"), (3, "RGB")):
        image = decode(Image.new(mode, (5, 4), 1 if mode in ("1", "F") else None), target)
        assert (image.mode, image.size) == (target, (5, 4))


@pytest.mark.parametrize("kind, top", [(np.float32, 1), (np.float32, 255), (np.float32, 65535), (np.int32, 255), (np.int32, 65535), (np.uint16, 65535)])
def test_deep_grey_is_scaled(kind, top):
    ramp = np.linspace(0, top, 20).astype(kind).reshape(4, 5)
    expected = (ramp.astype(float) / top * 255)
    assert abs(np.asarray(decode(Image.fromarray(ramp), "L")).astype(float) - expected).max() <= 1
