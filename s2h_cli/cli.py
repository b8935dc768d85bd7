"""The command line: parses and prints; no logic."""

from __future__ import annotations

import importlib.metadata
import inspect as inspect_module
import json
import logging
import os
import re
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from . import CONVENTION, __version__, ranges, stopping, streams
from .budget import KINDS
from .config import Config, configure
from .files import locked
from .errors import MORE_MEMORY, UserError, is_out_of_memory
from .shown import printable

# What is imported here is imported for `s2h --help` too: nothing that takes long, such as torch.

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Compress your own vision model in one training run.\n\n"
                       "Example: s2h prune resnet18 --data digits --flops 0.35 --no-pretrained")

MODEL = typer.Argument(metavar="MODEL", help="A timm name (resnet50), torchvision:resnet50, your own path/to/file.py:build, a callable "
                       "that returns an nn.Module, the folder of a run, or hf://user/name, a run on the hub.", show_default=False)
DATA = typer.Option(help="A folder with train/ and val/, a folder of class folders, 'digits', or a timm data set such as torch/cifar100.",
                    show_default=False)

#: What typer returns after Ctrl-C.
INTERRUPTED = 130
#: Words of an error message that are longer, in characters, are shortened.
LONGEST_WORD = 1000
STOPPED = "stopped before there was anything to keep; run the command again"
SKIP = typer.Option("--skip-bad-images", help="Leave unreadable images out.")
TRUST = typer.Option("--trust", help="Run code that a result or an exported file names or holds: only for files of people you trust.")


def setting(text: str, *names: str, default: Any = None, **options: Any) -> Any:
    """An option whose value, where it is not given, a recipe or the defaults of `config` say."""
    return typer.Option(*names, help=text + (f" [default: {default}]" if default is not None else ""), show_default=False, **options)


class Command(typer.core.TyperCommand):
    """A command whose values are checked by the table of ranges before it runs."""

    def invoke(self, ctx: typer.Context) -> Any:
        names = {param.name: param.opts[-1] if param.param_type_name == "option" else (param.metavar or param.name.upper()) for param in self.params}
        ranges.check(ctx.params, names)
        return super().invoke(ctx)


def show_version(asked: bool) -> None:
    """Prints the versions that a report of a fault needs."""
    if not asked:
        return
    found = {"s2h": __version__}
    for package in ("torch", "timm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    raise typer.Exit


@app.callback()
def start(version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the versions of s2h, torch and timm.")] = False) -> None:
    pass


@app.command(cls=Command, epilog="Example: s2h prune resnet50 --data ./imagenet --flops 0.35")
def prune(
    ctx: typer.Context,
    model: Annotated[Optional[str], MODEL] = None,
    data: Annotated[Optional[str], DATA] = None,
    flops: Annotated[Optional[str], setting(f"Share of the whole network's MACs that remains, at the training resolution: {CONVENTION}. Several, such as "
                                            "0.15,0.35, give a result each from one run.")] = None,
    params: Annotated[Optional[float], setting("Share of the parameters that remains; with --flops, both hold.")] = None,
    latency: Annotated[Optional[str], setting("Share of the measured latency that remains, or milliseconds: 0.5, 4ms.")] = None,
    latency_format: Annotated[Optional[str], setting("eager, torchscript, onnx, openvino, or compile, which takes long: what --latency is measured in.", default=Config.latency_format)] = None,
    latency_batch: Annotated[Optional[int], setting("Images in a batch that --latency is measured with.", min=1, default=Config.latency_batch)] = None,
    method: Annotated[Optional[str], setting("s2h, stp, epsd, dmp (masks alone); or a control: dense (cuts nothing: a network to start from), uniform, random, magnitude.",
                                             default=Config.method)] = None,
    output: Annotated[Optional[str], setting("Result folder. [default: runs/MODEL-fSHARE, numbered]", "-o", "--output")] = None,
    recipe: Annotated[Optional[str], setting("Settings by name, or from a .yaml file; options given here go before. See s2h recipes.")] = None,
    config: Annotated[Optional[Path], setting("Settings of an earlier run: its args.yaml.", metavar="FILE")] = None,
    pretrained: Annotated[Optional[bool], setting("Start from the name's published weights, where it has any.", "--pretrained/--no-pretrained", default="pretrained")] = None,
    weights: Annotated[Optional[str], setting("Start from this .safetensors or .pth file.")] = None,
    teacher: Annotated[Optional[str], setting("Learn from this network too: a file of trained weights of MODEL, a model with trained weights, a run, start or none. "
                                                  "[default: start, the network that the run starts from, if it knows the classes]")] = None,
    epochs: Annotated[Optional[int], setting("0: no training, one cut by weight importance. [default: 100; digits: 20]", min=0)] = None,
    batch_size: Annotated[Optional[int], setting("Images per step, over all processes.", min=1, default=Config.batch_size)] = None,
    grad_accum_steps: Annotated[Optional[int], setting("Steps whose gradients one update adds up.", min=1, default=Config.grad_accum_steps)] = None,
    lr: Annotated[Optional[float], setting("Peak learning rate. [default: 0.001, times the root of batch size / 64]")] = None,
    opt: Annotated[Optional[str], setting("Any optimizer of timm.", default=Config.opt)] = None,
    weight_decay: Annotated[Optional[float], setting("Weight decay, not of biases and norms.", default=Config.weight_decay)] = None,
    momentum: Annotated[Optional[float], setting("Momentum of sgd and its like.", default=Config.momentum)] = None,
    layer_decay: Annotated[Optional[float], setting("Factor of the learning rate from one layer to the one below.")] = None,
    clip_grad: Annotated[Optional[float], setting("Largest norm of the gradient.")] = None,
    sched: Annotated[Optional[str], setting("cosine, tanh, poly, step or multistep.", default=Config.sched)] = None,
    warmup_epochs: Annotated[Optional[int], setting("Epochs over which the learning rate rises. [default: a twentieth]", min=0)] = None,
    min_lr: Annotated[Optional[float], setting("Learning rate at the end. [default: a hundredth of --lr]")] = None,
    smoothing: Annotated[Optional[float], setting("Label smoothing.", default=Config.smoothing)] = None,
    mixup: Annotated[Optional[float], setting("Mixup's alpha.", default=Config.mixup)] = None,
    cutmix: Annotated[Optional[float], setting("Cutmix's alpha.", default=Config.cutmix)] = None,
    aa: Annotated[Optional[str], setting("Augmentation policy of timm, such as rand-m9-mstd0.5-inc1.")] = None,
    color_jitter: Annotated[Optional[float], setting("Colour jitter. [default: 0.4; up to 64 px: none]")] = None,
    reprob: Annotated[Optional[float], setting("Probability of random erasing.", default=Config.reprob)] = None,
    crop_min: Annotated[Optional[float], setting("Least share of the image that a random crop keeps. [default: 0.08; up to 64 px: 0.6]")] = None,
    hflip: Annotated[Optional[float], setting("Probability that an image is mirrored. [default: 0.5; digits and MNIST: 0]")] = None,
    drop: Annotated[Optional[float], setting("Dropout rate, of timm's models.")] = None,
    drop_path: Annotated[Optional[float], setting("Rate of stochastic depth, of timm's models.")] = None,
    ema: Annotated[Optional[float], setting("Decay of a moving average of the weights, such as 0.9998; exported where it is better.")] = None,
    img_size: Annotated[Optional[int], setting("Side of the input in pixels. [default: the model's own; digits: 32]", min=1)] = None,
    divisor: Annotated[Optional[str], setting("Widths are multiples of this many channels; less in narrow groups. auto: of as many as pay on this device.",
                                              default=Config.divisor)] = None,
    exclude: Annotated[Optional[list[str]], setting("Leave layers of this name whole; repeatable.", metavar="GLOB")] = None,
    prune_head_dim: Annotated[Optional[bool], setting("Also cut inside attention heads: the channels of q, k and v.", "--prune-head-dim")] = None,
    val_fraction: Annotated[Optional[float], setting("Share of a single image folder to validate on.", default=Config.val_fraction)] = None,
    skip_bad_images: Annotated[Optional[bool], setting("Leave unreadable images out, and count them.", "--skip-bad-images")] = None,
    seed: Annotated[Optional[int], setting("Decides everything random.", default=Config.seed)] = None,
    workers: Annotated[Optional[int], setting("Processes that load images, for each that trains.", min=0, default=Config.workers)] = None,
    device: Annotated[Optional[str], setting("cpu, cuda, cuda:1; auto takes a GPU where there is one.", default=Config.device)] = None,
    amp: Annotated[Optional[bool], setting("Train in mixed precision.", "--amp/--no-amp")] = None,
    amp_dtype: Annotated[Optional[str], setting("bfloat16 or float16.", default=Config.amp_dtype)] = None,
    channels_last: Annotated[Optional[bool], setting("Keep images with their channels last: faster convolutions on GPUs.", "--channels-last/--no-channels-last")] = None,
    compile: Annotated[Optional[bool], setting("Run the network through torch.compile once its widths stand still.", "--compile/--no-compile")] = None,
    sync_bn: Annotated[Optional[bool], setting("Batch norm over the images of all GPUs, not each GPU's own.", "--sync-bn/--no-sync-bn")] = None,
    checkpoint_every: Annotated[Optional[int], setting("Steps between two checkpoints. [default: one an epoch]", min=1)] = None,
    log: Annotated[Optional[str], setting("wandb: send the curves there, beside TensorBoard.")] = None,
    trust: Annotated[bool, TRUST] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the result folder, with the settings it was started with.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, check the budget, do one step, write nothing.")] = False,
) -> None:
    """Train MODEL on DATA and write a small dense network that costs the share --flops of its MACs."""
    run_job(**ctx.params)


def train(ctx: typer.Context, **settings: Any) -> None:
    """Train MODEL on DATA and cut nothing: to fine-tune the folder of a run, or to get a network to start from and to learn from."""
    run_job(**ctx.params, method="dense")


#: The options of `prune`, but for those that say what is cut.
train.__signature__ = inspect_module.signature(prune, eval_str=True)
train.__signature__ = train.__signature__.replace(parameters=[option for name, option in train.__signature__.parameters.items()
                                                              if name not in (*KINDS, "latency_format", "latency_batch", "method", "divisor", "exclude", "prune_head_dim")])
train.__annotations__ = {name: option.annotation for name, option in train.__signature__.parameters.items()}
app.command(cls=Command, epilog="Example: s2h train runs/resnet18-f0.35 --data ./other")(train)


def run_job(recipe: str | None, config: Path | None, resume: bool, dry_run: bool, trust: bool, **options: Any) -> None:
    """A training, and what is shown of it. `options`: settings by name; None or empty where they are not given."""
    settings = {option.name for option in fields(Config)}
    given = {name: value for name, value in options.items() if name in settings and value not in (None, [], ())}
    if resume and config is None and "output" in given and (earlier := Path(given["output"]) / "args.yaml").is_file():
        config, recipe = earlier, None  # so that nothing need be said again
    configured = configure(given, recipe, config, trust)

    from . import run
    from .report import tables

    console = tables.console(quiet=distributed_rank() > 0)
    results = run.prune(configured, console, resume=resume, dry_run=dry_run, trust=trust)
    for result in results:
        tables.show(tables.closing(result))
    if any(result["failed"] for result in results):
        fail("; ".join(text for result in results for text in result["failed"]))
    if results:
        folder, *others = (result["folder"] for result in results)
        compare = f"\n  s2h report {' '.join(map(str, [folder, *others]))}" if others else ""
        console.print(f"Next:\n  s2h inspect {folder}\n  s2h export {folder} --format onnx{compare}", soft_wrap=True)


@app.command(cls=Command, epilog="Example: s2h inspect resnet50")
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL | RUN", help="A model as for prune, or the folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    img_size: Annotated[Optional[int], typer.Option(min=1, help="Side of the input in pixels.")] = None,
    divisor: Annotated[int, typer.Option(min=1, help="As for prune.")] = 8,
    exclude: Annotated[Optional[list[str]], typer.Option(metavar="GLOB", help="As for prune.")] = None,
    prune_head_dim: Annotated[bool, typer.Option("--prune-head-dim", help="As for prune.")] = False,
) -> None:
    """Show what can be pruned in MODEL and what cannot, and why; or what RUN kept of each layer."""
    from . import run
    from .report import facts, tables

    found = run.inspect(model, img_size=img_size, divisor=divisor, exclude=tuple(exclude or ()), prune_head_dim=prune_head_dim)
    if as_json:
        print(json.dumps(facts.public(found), indent=1))
    else:
        tables.show(tables.inspection(found))


@app.command(cls=Command, epilog="Example: s2h export runs/resnet18-f0.35 --format onnx")
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    format: Annotated[str, typer.Option(help="torchscript, onnx, pt2 or all.")] = "all",
    opset: Annotated[Optional[int], typer.Option(min=1, help="Opset of ONNX. [default: the exporter's]", show_default=False)] = None,
    batch: Annotated[Optional[int], typer.Option(min=1, help="Fix the number of images. [default: any]", show_default=False)] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Weights and arithmetic in float16; images and logits stay float32.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to int8, calibrated on training images of --data; ONNX alone.")] = False,
    data: Annotated[Optional[str], typer.Option(help="Measure the accuracy of each file on the validation images of this data.", show_default=False)] = None,
    skip_bad_images: Annotated[bool, SKIP] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 4,
) -> None:
    """Write the network of RUN in other formats, load each back and compare."""
    from . import run
    from .report import tables

    with locked(run.home_of(folder)):
        found, failed = run.export(folder, format, opset=opset, batch=batch, half=fp16, int8=int8, spec=data, skip_bad_images=skip_bad_images, workers=workers)
    if found:
        tables.show(tables.exported(folder, found))
    if failed:
        fail("; ".join(failed))


@app.command(cls=Command, epilog="Example: s2h push runs/resnet18-f0.35 me/resnet18-small")
def push(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
) -> None:
    """Push the result of RUN to the Hugging Face hub; `hf://USER/NAME` loads it from there."""
    from . import hub

    address, notes = hub.push(folder, repo, private)
    for note in notes:
        print(f"note: {printable(note)}")
    print(printable(address))


@app.command(cls=Command, epilog="Example: s2h models 'convnext*'")
def models(
    glob: Annotated[Optional[str], typer.Argument(metavar="[GLOB]", help="Names of timm and torchvision to list. [default: those measured]")] = None,
) -> None:
    """List models and what was measured of them: cost, what is frozen, how small they can get."""
    from . import zoo
    from .report import tables

    tables.show(tables.models(zoo.known(glob), zoo.load()["versions"]))


@app.command("recipes", cls=Command, epilog="Example: s2h recipes vit > mine.yaml")
def recipes(name: Annotated[Optional[str], typer.Argument(metavar="[NAME]", help="The recipe to print.")] = None) -> None:
    """List the recipes of training, or print one to copy and edit."""
    from . import config

    found = config.recipes()
    if name is None:
        for name, text in found.items():
            print(f"{name:10} {text.splitlines()[0].lstrip('# ')}")
    elif name in found:
        print(found[name], end="")
    else:
        fail(f"no recipe '{name}'; there are {', '.join(found)}")


@app.command(cls=Command, epilog="Example: s2h report runs/resnet18-f0.35")
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
    output: Annotated[Optional[Path], typer.Option("-o", "--output", metavar="FILE", help="The page. [default: report.html in RUN; of several runs here]",
                                                   show_default=False)] = None,
) -> None:
    """Write a page that shows what happened in RUN, or how several runs compare: one file, for any browser."""
    from .report import page

    several = Path(page.FILE) if len(folders) > 1 else None
    print(printable(page.write_report(*folders, file=output or several)))


@app.command(cls=Command, epilog="Example: s2h bench runs/resnet18-f0.35")
def bench(
    items: Annotated[list[str], typer.Argument(metavar="RUN | MODEL | FILE", help="Folders of runs, each timed against what it was cut from; models as for "
                                               "prune; files model.onnx, model.ts or model.pt2.")],
    format: Annotated[Optional[str], typer.Option(help="eager, compile, torchscript, onnx or openvino; several with commas. [default: all that "
                                                  "are installed]", show_default=False)] = None,
    batch: Annotated[str, typer.Option(metavar="N[,N]", help="Images in a batch.")] = "1,32",
    img_size: Annotated[Optional[int], typer.Option(min=1, help="Side of the input in pixels, of a MODEL.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")] = "auto",
    threads: Annotated[Optional[int], typer.Option(min=1, help="Threads on a CPU. [default: torch's, one a core]", show_default=False)] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to time each format at each batch.")] = 2.0,
    trust: Annotated[bool, TRUST] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure how long results and models take on this machine, in turn, so that noise hits all alike."""
    batches = sorted({ranges.whole_number(number, "batch") for number in batch.split(",")})

    from . import latency, run
    from .report import tables

    formats = format.split(",") if format else latency.installed()
    with tables.console(stderr=True).status("loading") as status:
        found = run.timed(items, formats=formats, batches=batches, img_size=img_size, device=device, threads=threads, seconds=seconds, trust=trust,
                            told=lambda what: status.update(f"timing {what}"))
    failed = [f"{row['network']} in {row['format']}: {row['failed']}" for row in found["rows"] if "failed" in row] + found.pop("not_kept")
    for note in found.pop("notes"):
        print(f"note: {printable(note)}", file=sys.stderr)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        tables.show(tables.latencies(found))
    if failed:
        fail("; ".join(dict.fromkeys(failed)))


@app.command("eval", cls=Command, epilog="Example: s2h eval runs/resnet18-f0.35/model.onnx --data digits")
def evaluate(
    artifact: Annotated[str, typer.Argument(metavar="RUN | FILE", help="The folder of a run, or its model.onnx, model.ts or model.pt2.")],
    data: Annotated[str, DATA],
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 4,
    val_fraction: Annotated[Optional[float], setting("As for prune. [default: that of the run]")] = None,
    skip_bad_images: Annotated[bool, SKIP] = False,
    trust: Annotated[bool, TRUST] = False,
) -> None:
    """Measure the top-1 accuracy of a result on the validation images of DATA."""
    from . import run

    accuracy, images = run.evaluate(artifact, data, batch_size=batch_size, workers=workers, val_fraction=val_fraction, skip_bad_images=skip_bad_images,
                                    trust=trust)
    print(f"{printable(artifact)}  top-1 {accuracy:.2f} % of {images} images")


def main(args: list[str] | None = None) -> None:
    """Runs the command line; an error that a user can mend ends in one line and exit code 2."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with streams.steady() as out:
        with stopping.listening():
            try:
                code = run_command((sys.argv[1:] if args is None else args) or ["--help"])
            except SystemExit as end:
                code = end.code
        out.flush()
        if not code and out.error is not None and not isinstance(out.error, BrokenPipeError):
            code = print_error(f"cannot write the output ({out.error.strerror}); what was asked for is done")
    raise SystemExit(code)


def run_command(args: list[str]) -> int:
    """The exit code of a command. Raises SystemExit after an error that was shown."""
    try:
        code = app(args=args, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code or 0
    except UserError as error:
        fail(str(error))
    except PermissionError as error:
        fail(f"no permission to read or write '{error.filename}'; ask for it, or choose another folder")
    except (KeyboardInterrupt, typer.Abort):
        fail(STOPPED)
    except Exception as error:
        if stopping.asked():  # what a signal broke off elsewhere
            fail(STOPPED)
        if is_out_of_memory(error):
            fail(MORE_MEMORY)
        if isinstance(error, OSError):
            place = f" '{error.filename}'" if error.filename else ""
            fail(f"cannot read or write{place} ({error.strerror or error}); check the name, the disk and your rights")
        if not hasattr(error, "format_message"):  # what typer finds wrong with the arguments
            from .distributed import lost_another

            if lost_another(error):  # which says itself what is wrong
                raise SystemExit(1) from None
            raise
        names = {command.name or command.callback.__name__ for command in app.registered_commands}
        command = f"s2h {args[0]}" if args[0] in names else "s2h"
        fail(f"{error.format_message().rstrip('.')}; see {command} --help")


def fail(message: str) -> NoReturn:
    if distributed_rank() > 0:
        if stopping.asked():
            raise SystemExit(2)
        time.sleep(2)  # what fails in every process the first one says; torchrun ends the others with it
    raise SystemExit(print_error(message)) from None


def print_error(message: str) -> int:
    """Shows an error in one line; returns the exit code."""
    brief = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:50]}…", " ".join(message.split()))
    print(f"error: {printable(brief)}", file=sys.stderr)
    return 2


def distributed_rank() -> int:
    return int(os.environ.get("RANK", 0))
