"""Results on the Hugging Face hub: `hf://user/name` in place of a run folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from . import artifacts
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


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Pushes the result of a run to a repository `user/name`, which is made if need be; returns its address.

    Raises:
        UserError: the folder holds no result, or the hub refuses.
    """
    artifacts.read_plan(folder)
    huggingface_hub = _client()
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=PUSHED, commit_message=f"Result of s2h: {folder.name}")
    except Exception as error:
        raise UserError(f"cannot push to '{repo}' ({why(error)}); give USER/NAME, and log in with: hf auth login") from error
    return str(address)
