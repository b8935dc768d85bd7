"""Faults from outside: full disks, short memory, two runs in one folder, and values that no option can take."""

import errno
import hashlib
import inspect
import os
import resource
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer

from s2h_cli import cli, exports, files, ranges, run
from s2h_cli.errors import is_out_of_memory
from s2h_cli.train import checkpoint, loop
from toy import PRUNE, s2h

COMMANDS = {command.name or command.callback.__name__: command.callback for command in cli.app.registered_commands}
#: Texts that hold numbers.
NUMBERS = {"flops", "latency", "divisor", "batch"}


def refusal(capsys, *args):
    """The one line of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert s2h(*args) == 2, args
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 2000, lines
    return lines[0]


@pytest.fixture
def finished(here, tmp_path_factory):
    """A finished run, made once and copied."""
    made = tmp_path_factory.getbasetemp() / "finished"
    if made.exists():
        shutil.copytree(made, here / "out")
    else:
        assert s2h(*PRUNE, "--epochs", "1", "-o", "out") == 0
        shutil.copytree(here / "out", made)
    return here / "out"


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def contents(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def limit():
    """Limits the size of files that this process writes, which is seen as a full disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_never_costs_a_file_that_was_there(finished, limit, monkeypatch, capsys):
    before, prepare = contents(finished), run.prepare
    for size in (0, 3000, 20000):
        def prepared(*args, **options):
            job = prepare(*args, **options)
            limit(size)  # now: the loader's shared memory is a file too
            return job

        monkeypatch.setattr(run, "prepare", prepared)
        for command in (["export", finished], ["report", finished], [*PRUNE, "--epochs", "2", "-o", "out", "--resume"],
                        [*PRUNE, "--epochs", "1", "-o", f"new{size}"]):
            if command[0] != "prune":
                limit(size)
            code = s2h(*command)
            limit(resource.RLIM_INFINITY)
            lines = capsys.readouterr().err.strip().splitlines()
            assert (code, len(lines)) == (2, 1) and "cannot write to" in lines[0] and files.ASIDE not in lines[0], (size, command, lines)
            assert not list(Path(".").rglob(".writing-*")) and not list(Path(".").rglob(files.LOCK)), (size, command)
            now = contents(finished)
            assert now.keys() >= before.keys()
            for name in ("model.safetensors", "model.onnx", "model.ts", "model.pt2", "plan.json", "checkpoints/last"):
                if now[Path(name)] != before[Path(name)]:  # then the new one is whole
                    _readable(finished / name)
    monkeypatch.undo()
    monkeypatch.chdir(finished.parent)
    assert s2h(*PRUNE, "--epochs", "2", "-o", "out", "--resume") == 0


def _readable(file):
    torch.load(file, weights_only=True) if file.name == "last" else run.accuracy_of(file, [], trust=True)


@pytest.mark.parametrize("name", ["epochs", *exports.EXPORTS])
def test_each_writer_says_that_the_disk_is_full(finished, limit, name):
    """Writers in C++ too, which end the process where their file fails in the middle."""
    network = run.artifacts.load(finished)
    target = finished / (exports.file_of(name) if name in exports.EXPORTS else "checkpoints/last")
    before = target.read_bytes()
    for share in (0, 0.3, 0.7):
        limit(int(share * len(before)))
        with pytest.raises(files.CannotWrite, match="cannot write to"):
            if name in exports.EXPORTS:
                exports.export(network, target, name)
            else:
                checkpoint.save(target, torch.load(target, weights_only=True))
        limit(resource.RLIM_INFINITY)
        assert target.read_bytes() == before and not list(finished.rglob(".writing-*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, number):
    (tmp_path / "a").write_text("old")
    with pytest.raises(files.CannotWrite, match=os.strerror(number)), files.writing(tmp_path) as aside:
        (aside / "a").write_text("new")
        raise OSError(number, os.strerror(number))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# ---------------------------------------------------------------------------------------------------------------------
# Short memory

SHORT = [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError("could not create a primitive"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"),
]


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_short_memory_is_one_line(here, monkeypatch, capsys, error):
    def short(*args, **options):
        raise error

    assert is_out_of_memory(error)
    with monkeypatch.context() as patch:
        patch.setattr(run, "prepare", short)
        assert "out of memory; try" in refusal(capsys, *PRUNE, "--epochs", "1", "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda config, job, folder, state, console: checkpoint.save(folder / "checkpoints" / "last", {}) or short())
        line = refusal(capsys, *PRUNE, "--epochs", "1", "-o", "out")
    assert "out of memory; try" in line and "last checkpoint is kept" in line and "--resume" in line
    if not isinstance(error, OSError):
        monkeypatch.setattr(loop, "enough_images", short)
        assert "try --batch-size" in refusal(capsys, *PRUNE, "--epochs", "1", "-o", "other")


def test_other_errors_are_not_taken_for_short_memory():
    for error in (RuntimeError("shape mismatch"), ValueError("memory_format"), OSError(errno.ENOENT, "No such file")):
        assert not is_out_of_memory(error)


# ---------------------------------------------------------------------------------------------------------------------
# One run a folder


def test_a_folder_in_use_is_left_alone(finished, capsys):
    before = contents(finished)
    program = f"from pathlib import Path; from s2h_cli.files import locked\nwith locked(Path({str(finished)!r})): print('has it', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        for command in ([*PRUNE, "--epochs", "2", "-o", "out", "--resume"], ["export", finished]):
            line = refusal(capsys, *command)
            assert f"in use by process {other.pid}" in line
        (finished / files.LOCK).rename(finished / "aside")
        assert contents(finished).keys() == before.keys() | {Path("aside")}
        (finished / "aside").rename(finished / files.LOCK)
        other.send_signal(signal.SIGKILL)
    assert (finished / files.LOCK).exists()  # a killed run leaves it, and keeps nobody out
    assert s2h(*PRUNE, "--epochs", "2", "-o", "out", "--resume") == 0 and not (finished / files.LOCK).exists()


def test_nobody_is_kept_out_where_nothing_can_be_locked(tmp_path, monkeypatch):
    import filelock

    def refuse(*args, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with files.locked(tmp_path):
        pass
    with files.locked(tmp_path / "none"):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Values of options


class Value(NamedTuple):
    """An option or argument that takes a value."""

    name: str
    flag: str | None  #: none of an argument
    numeric: bool
    required: bool

    def given(self, value):
        return [self.flag, value] if self.flag else [value]


def values_of(command):
    """What a command takes a value for."""
    for name, parameter in inspect.signature(COMMANDS[command], eval_str=True).parameters.items():
        if typing.get_origin(parameter.annotation) is not typing.Annotated:  # the context
            continue
        kind, info = typing.get_args(parameter.annotation)
        kinds = {kind, *typing.get_args(kind)}
        if bool in kinds:
            continue
        flag = None if isinstance(info, typer.models.ArgumentInfo) else (info.param_decls or [ranges.flag(name)])[-1]
        yield Value(name, flag, bool(kinds & {int, float}) or name in NUMBERS, parameter.default is parameter.empty)


def cases(numeric):
    """(command, what it needs besides, value) for all values of all commands."""
    for command in COMMANDS:
        taken = list(values_of(command))
        for value in taken:
            if value.numeric == numeric:
                needed = [word for other in taken if other.required and other is not value for word in other.given("net.py:build")]
                yield pytest.param(command, needed, value, id=f"{command} {value.name}")


@pytest.fixture
def unreached(monkeypatch):
    """Fails where a command begins to work."""
    def work(*args, **options):
        raise AssertionError("not refused")

    for name in ("prepare", "timed", "export", "evaluate", "inspection"):
        monkeypatch.setattr(run, name, work, raising=False)


@pytest.mark.parametrize("command, needed, value", [*cases(numeric=True)])
def test_numbers_out_of_range_are_refused(here, capsys, unreached, command, needed, value):
    assert value.name in ranges.RANGES or value.name in ("flops", "params", "latency")
    needed = {"prune": PRUNE[1:], "train": PRUNE[1:4]}.get(command, needed)
    zero = ["0"] if value.name not in ranges.RANGES or not ranges.RANGES[value.name].holds(0) else []
    for text in ("nan", "inf", "-1", "²", "1e999", "", "1" * 5000, "1" * 40, "1,nan", "8\0", *zero):
        assert value.flag.lstrip("-") in refusal(capsys, command, *needed, *value.given(text)), text


@pytest.mark.parametrize("command, needed, value", [*cases(numeric=False)])
def test_texts_that_cannot_be_meant_are_refused(here, capsys, command, needed, value):
    for text in ("a\0b", "a\nb", "\x1b[31m", "", "x" * 5000):
        refusal(capsys, command, *needed, *value.given(text))


@pytest.mark.parametrize("option", ["-o", "--config", "--weights", "--recipe", "--teacher", "--data", "--device", "--exclude", "--opt", "--aa"])
def test_long_names_are_one_line(here, capsys, option):
    for value in ("x" * 300, "ü" * 200, f"{'x' * 100}/" * 50):
        refusal(capsys, *PRUNE, option, value)


@pytest.mark.parametrize("command", ["inspect", "export", "report", "bench", "prune"])
def test_long_arguments_are_one_line(here, capsys, command):
    refusal(capsys, command, "y" * 300)


def test_where_nothing_can_be_made_nothing_is_loaded(here, capsys, unreached):
    (here / "file").write_text("")
    (here / "dead").symlink_to("nowhere")
    for place in ("file", "file/run", "dead", "dead/run", "/dev/null"):
        assert "cannot write to" in refusal(capsys, *PRUNE, "-o", place)


# ---------------------------------------------------------------------------------------------------------------------
# A light start


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["-h"], [], *[[name, "--help"] for name in COMMANDS], ["prune", "--epochs", "nan"],
                                  ["recipes"], ["nonsense"]], ids=" ".join)
def test_help_loads_no_torch(args):
    program = f"import sys\nfrom s2h_cli import cli\ntry: cli.main({args})\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.splitlines()[-1].split()
    assert "s2h_cli.cli" in loaded and not {"torch", "timm", "onnx", "numpy", "PIL"} & set(loaded)


def test_version(capsys):
    assert s2h("--version") == 0
    assert f"torch {torch.__version__.split('+')[0]}" in capsys.readouterr().out
