"""Results on the Hugging Face hub: `hf://user/name` in place of a run folder."""

from __future__ import annotations

import fnmatch
import glob
import os
from pathlib import Path
from types import ModuleType

from . import artifacts
from .config import of_result
from .errors import UserError, why

HUB = "hf://"
#: What of a run folder is pushed: all but checkpoints and TensorBoard's files.
PUSHED = ["README.md", "plan.json", "model.*", "model-*", "infer_*.py", "report.html", "args.yaml", "*.csv", "bench.json"]


def local(spec: str | os.PathLike) -> Path:
    """The folder of a result: the path itself, or for `hf://user/name` or `hf://user/name@revision` a download of what `load` reads.

    Raises:
        UserError: there is no such repository, or it cannot be reached.
    """
    if not str(spec).startswith(HUB):
        return Path(spec)
    huggingface_hub = _client()
    repo, _, revision = str(spec).removeprefix(HUB).partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=[artifacts.PLAN, artifacts.WEIGHTS]))
    except Exception as error:  # the hub's client raises errors of its own, of requests and of files
        raise UserError(f"{spec}: cannot be downloaded ({why(error)}); check the name, the network, and for a private one: hf auth login") from error


def _client() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the hub needs a package that is not installed: pip install huggingface_hub") from error
    return huggingface_hub


def push(folder: Path, repo: str, private: bool = False) -> tuple[str, list[str]]:
    """Pushes the result of a run to a repository `user/name`, which is made if need be: regular files of the folder itself, and no link.

    Returns:
        The address, and notes on what was left out and on what the files tell of this machine.

    Raises:
        UserError: the folder holds no result, or the hub refuses.
    """
    artifacts.read_plan(folder)
    files, left_out = pushable(folder)
    if lacks := {artifacts.PLAN, artifacts.WEIGHTS} - set(files):
        raise UserError(f"{folder / min(lacks)} is a link, and push follows none; copy the folder with: cp -rL")
    notes = [f"left out, because only regular files are pushed and no links: {', '.join(left_out)}"] if left_out else []
    if paths := own_paths(folder):
        notes.append(f"args.yaml, README.md and report.html show paths of this machine: {', '.join(paths)}; for others' eyes train with relative ones")
    huggingface_hub = _client()
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[glob.escape(name) for name in files], commit_message=f"Result of s2h: {folder.name}")
    except Exception as error:
        raise UserError(f"cannot push to '{repo}' ({why(error)}); give USER/NAME, and log in with: hf auth login") from error
    return str(address), notes


def pushable(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the files that are pushed, and of those that are not because they are links or no regular files."""
    found = sorted(path for path in folder.resolve().iterdir() if any(fnmatch.fnmatch(path.name, pattern) for pattern in PUSHED))
    regular = [path for path in found if path.is_file() and not path.is_symlink()]
    return [path.name for path in regular], [path.name for path in found if path not in regular]


def own_paths(folder: Path) -> list[str]:
    """The absolute paths in the settings of a result's run."""
    _, config = of_result(folder)
    named = (config.model, config.data, config.weights, config.teacher, config.output) if config else ()
    return sorted({path for path in named if path and os.path.isabs(os.path.expanduser(path))})
