"""Finds the images of a data folder: which folders are splits, which are classes, and which files are left out."""

from __future__ import annotations

import hashlib
import os
import re
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .errors import UserError, why

#: What folders of each split are called, the usual name first. Case, separators, digits and FILLERS do not count.
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development", "eval", "evaluation", "holdout"),
    "test": ("test", "testing", "tst"),
}
KINDS = {name: kind for kind, names in SPLIT_NAMES.items() for name in names}
#: Words that say no more than that a folder holds data: "training_set", "TestData", "train_images".
FILLERS = frozenset("set sets data dataset datasets image images img imgs pic pics picture pictures photo photos file "
                    "files sample samples split splits folder dir subset part seg".split())
#: Files and folders that systems and programs leave behind, beside all names that begin with a dot.
SYSTEM_NAMES = frozenset(("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin",
                          "system volume information", "lost+found", "__pycache__"))
#: Formats that Pillow lists, but that hold films or need another program.
NO_PICTURES = frozenset(("EPS", "WMF", "MPEG", "FLI", "HDF5", "GRIB", "BUFR"))
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".xlsx", ".yaml", ".yml")
WRAPPINGS = 4  # folders around the real one that are looked through
HASH_SECONDS = 15  # how long identical files are looked for
TAIL = 4096  # bytes at the end of a file that are compared first
SHOWN_NAMES = 5

#: Why files are left out.
NO_IMAGES, HIDDEN, OUTSIDE, NO_FILES, AGAIN, LEAK = (
    "files that are no images", "hidden or system files and folders", "images outside the class folders",
    "links to nothing and other things that are no files", "links to files and folders that are read elsewhere",
    "validation files that are links to training files")


class Layout(NamedTuple):
    """Where the class folders of each split are. `val` is None where the images have to be split."""

    train: Path
    val: Path | None
    notes: list[str]


@dataclass
class Scan:
    """The images of some folders of class folders.

    Attributes:
        classes: For each folder the paths of the images by class name, in order; class names are in Unicode NFC.
        left_out: The paths of the files that were left out, by reason.
        notes: What else the user should know.
    """

    classes: list[dict[str, list[str]]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)


def nfc(name: str) -> str:
    """A class name in the one form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def listed(names: Iterable[str]) -> str:
    """Names in order, separated by commas; of many the first few."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return (", ".join(names[:SHOWN_NAMES]) or "none") + more


@lru_cache
def image_endings() -> frozenset[str]:
    """Endings, such as ``.png``, of the still pictures that Pillow can open by itself."""
    return frozenset(ending for ending, format in Image.registered_extensions().items()
                     if format in Image.OPEN and format not in NO_PICTURES)


def split_kind(name: str) -> str | None:
    """"train", "val" or "test" where a folder's name says no more than that."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name))
    word = "".join(word.casefold() for word in words if word.casefold() not in FILLERS)
    stems = [word, *(cut(filler) for filler in FILLERS for cut in (word.removesuffix, word.removeprefix))]
    return next((KINDS[stem] for stem in stems if stem in KINDS), None)


def find_layout(spec: str) -> Layout:
    """Finds out what a folder holds: splits or classes, perhaps in a folder inside it.

    Raises:
        UserError: It is no folder, cannot be read, or lacks a split.
    """
    given = Path(spec).expanduser()
    if not os.path.isdir(given) or not spec.strip():
        raise _no_folder(spec, given)
    root = _unwrapped(given, None)
    notes = [f"the images are in '{root}'"] if root != given else []
    folders = _subfolders(root)
    kinds = {folder: split_kind(folder.name) for folder in folders}
    if not folders or not (all(kinds.values()) or any(kind and _holds_folders(f) for f, kind in kinds.items())):
        if folders and all(_holds_splits(folder) for folder in folders):
            raise UserError(f"the class folders of '{root}' hold split folders, such as '{_subfolders(folders[0])[0]}'; "
                            "put the class folders into train/ and val/ instead")
        return Layout(root, None, notes)

    found = {kind: [folder for folder in folders if kinds[folder] == kind] for kind in SPLIT_NAMES}
    names = listed(f"{folder.name}/" for folder in folders if kinds[folder])
    held_out = "val" if found["val"] else "test"
    if not found["train"]:
        raise UserError(f"'{root}' has {names} but no train/; add it, or rename the folder with the training images")
    if not found[held_out]:
        raise UserError(f"'{root}' has {names} but no val/; add it, or give '{found['train'][0]}' to have it split")
    for kind in ("train", held_out):
        if len(found[kind]) > 1:
            several = listed(f"{folder.name}/" for folder in found[kind])
            raise UserError(f"'{root}' has several {kind} folders: {several}; keep one, and move the others elsewhere")
    (train,), (val,) = found["train"], found[held_out]
    train, val = _unwrapped(train, "train"), _unwrapped(val, held_out)
    if others := [folder.name for folder in folders if not kinds[folder]]:
        notes.append(f"'{root}' has other folders that are not used: {listed(others)}")
    if held_out == "test":
        notes.append(f"'{root}' has no val/, so validation uses '{val}': a result chosen by its accuracy was chosen on "
                     "test images")
    elif found["test"]:
        notes.append(f"validation uses '{val}'; {listed(f'{f.name}/' for f in found['test'])} is not used")
    return Layout(train, val, notes)


def _no_folder(spec: str, path: Path) -> UserError:
    ending = path.suffix.lower()
    if not os.path.lexists(path):
        return UserError(f"no data folder '{spec}'; give an image folder, 'digits' or a data set like torch/cifar10")
    if ending in ARCHIVES:
        return UserError(f"'{spec}' is an archive; unpack it and give the folder")
    if ending in TABLES:
        return UserError(f"'{spec}' is a file, and lists of images are not read; put the images of each class into a "
                         "folder of its own")
    return UserError(f"'{spec}' is no folder; give a folder with train/ and val/, or with one folder of images for each "
                     "class")


def _entries(folder: Path | str) -> list[os.DirEntry]:
    """What is in a folder, by name.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder '{folder}' ({why(error)}); check its permissions") from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _subfolders(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _entries(folder) if not _hidden(entry.name) and _is_folder(entry)]


def _holds_images(folder: Path) -> bool:
    """Whether images are directly in the folder."""
    return any(_ending(entry.name) in image_endings() and not _hidden(entry.name) and _is_file(entry)
               for entry in _entries(folder))


def _holds_folders(folder: Path) -> bool:
    """Whether a folder has folders and no images of its own, as that of a split has."""
    return bool(_subfolders(folder)) and not _holds_images(folder)


def _holds_splits(folder: Path) -> bool:
    """Whether all folders in a folder have names of splits."""
    inside = _subfolders(folder)
    return bool(inside) and all(split_kind(part.name) for part in inside)


def _unwrapped(folder: Path, kind: str | None) -> Path:
    """Looks through folders that hold only one folder of folders, as archives unpack.

    Args:
        folder: Where to begin.
        kind: The split that the folder is of, if any.
    """
    for _ in range(WRAPPINGS):
        inside = _subfolders(folder)
        if (len(inside) != 1 or split_kind(inside[0].name) not in (None, kind) or _holds_images(folder)
                or not _holds_folders(inside[0])):
            break
        (folder,) = inside
    return folder


def scan(roots: list[Path]) -> Scan:
    """Finds the images of folders of class folders, each file once.

    Links to files and folders that are read elsewhere are left out.

    Args:
        roots: Folders of class folders: first that of the training images.

    Raises:
        UserError: A folder cannot be read.
    """
    found = Scan()
    entered = {_identity(folder) for root in roots for folder in (root, *root.resolve().parents)}
    images = []  # (is a link, which root, class, path, identity)
    folders = []
    for number, root in enumerate(roots):
        found.classes.append({})
        for entry in _entries(root):
            path, name = entry.path, nfc(entry.name)
            if _hidden(entry.name):
                found.left_out[HIDDEN].append(path)
            elif not _is_folder(entry):
                reason = NO_FILES if not _is_file(entry) else OUTSIDE if _ending(path) in image_endings() else NO_IMAGES
                found.left_out[reason].append(path)
            else:
                if name in found.classes[number]:
                    found.notes.append(f"two folders of '{root}' spell '{name}' with other bytes: they are one class")
                found.classes[number][name] = []
                if _enter(path, entered):
                    folders.append((False, number, name, path))
                else:
                    found.left_out[AGAIN].append(path)
    linked = []  # folders behind links are read last, so that a file counts where it lies
    while folders or linked:
        link, number, name, folder = (folders or linked).pop()
        if link and not _enter(folder, entered):
            found.left_out[AGAIN].append(folder)
            continue
        device = _identity(folder)[0]
        for entry in _entries(folder):
            if _hidden(entry.name):
                found.left_out[HIDDEN].append(entry.path)
            elif _is_folder(entry):
                if link or entry.is_symlink():
                    linked.append((True, number, name, entry.path))
                elif _enter(entry.path, entered):
                    folders.append((False, number, name, entry.path))
            elif not _is_file(entry):
                found.left_out[NO_FILES].append(entry.path)
            elif _ending(entry.name) not in image_endings():
                found.left_out[NO_IMAGES].append(entry.path)
            else:
                identity = _identity(entry.path) if entry.is_symlink() else (device, entry.inode())
                images.append((link or entry.is_symlink(), number, name, entry.path, identity))
    owner = {}
    for link, number, name, path, identity in sorted(images, key=lambda image: (image[0], image[1], image[3])):
        other, read = owner.setdefault(identity, (number, path))
        if read == path or not os.path.samefile(read, path):  # some file systems give numbers twice
            found.classes[number][name].append(path)
        else:
            found.left_out[LEAK if other < number else AGAIN].append(path)
    for classes in found.classes:
        for paths in classes.values():
            paths.sort()
    return found


def _identity(path: Path | str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read '{path}' ({why(error)}); check its permissions") from error
    return stat.st_dev, stat.st_ino


def _enter(folder: str, entered: set[tuple[int, int]]) -> bool:
    """Notes that a folder is read; False where it was before."""
    identity = _identity(folder)
    new = identity not in entered
    entered.add(identity)
    return new


def describe_left_out(left_out: dict[str, list[str]]) -> str:
    """What was left out, by reason, in one line; empty where nothing was."""
    parts = []
    for reason, paths in left_out.items():
        paths = sorted(paths)
        endings = f" ({count_endings(paths)})" if reason == NO_IMAGES else ""
        parts.append(f"{len(paths)} {reason}{endings}, such as '{paths[0]}'")
    return "; ".join(parts)


def count_endings(paths: Iterable[str]) -> str:
    """How many files have each ending: ``3 .heic, 1 .txt``."""
    counts = Counter(_ending(path) or "without an ending" for path in paths).most_common()
    more = f" and {len(counts) - SHOWN_NAMES} other endings" if len(counts) > SHOWN_NAMES else ""
    return ", ".join(f"{count} {ending}" for ending, count in counts[:SHOWN_NAMES]) + more


class Twins(NamedTuple):
    """Pairs (of `val`, of `train`) of identical files, and whether all files were compared within the time."""

    pairs: list[tuple[str, str]]
    complete: bool


def identical(train: list[str], val: list[str], seconds: float = HASH_SECONDS) -> Twins:
    """Finds the files of `val` whose content a file of `train` has too.

    Only files of equal size are opened, and only those of an equal end are read whole.
    """
    deadline = time.monotonic() + seconds
    complete = True
    for key in (os.path.getsize, _tail, _digest):
        keyed = []
        for paths in (val, train):
            keyed.append({})
            for path in paths:
                if time.monotonic() > deadline:
                    complete = False
                    break
                try:
                    keyed[-1][path] = key(path)
                except OSError:  # the loader names it
                    pass
        shared = set(keyed[0].values()) & set(keyed[1].values())
        val, train = ([path for path, found in part.items() if found in shared] for part in keyed)
    where = {found: path for path, found in keyed[1].items()}
    return Twins([(path, where[keyed[0][path]]) for path in val], complete)


def _tail(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL))
        return hashlib.sha256(file.read()).digest()


def _digest(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()
