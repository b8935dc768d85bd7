"""The command line: parses and prints; no logic."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn, Optional

import typer

from . import CONVENTION
from .errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Compress your own vision model in one training run.\n\n"
                       "Example: s2h prune resnet18 --data digits --flops 0.35 --no-pretrained")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A timm name (resnet50), torchvision:resnet50, or your own "
                                      "path/to/file.py:build, a callable that returns an nn.Module.")]
Data = Annotated[str, typer.Option(help="A folder with train/ and val/, a folder of class folders, 'digits', or a timm data set "
                                   "such as torch/cifar100.")]


@app.command(epilog="Example: s2h prune resnet50 --data ./imagenet --flops 0.35")
def prune(
    model: Model,
    data: Data,
    flops: Annotated[float, typer.Option(help=f"Share of the whole network's MACs that remains, at the training resolution: {CONVENTION}.")],
    output: Annotated[Optional[str], typer.Option("-o", "--output", help="Result folder. [default: runs/MODEL-fSHARE, numbered]")] = None,
    pretrained: Annotated[bool, typer.Option(help="Start from the name's published weights, where it has any.")] = True,
    weights: Annotated[Optional[str], typer.Option(help="Start from this .safetensors or .pth file.")] = None,
    epochs: Annotated[Optional[int], typer.Option(min=0, help="0: no training, one cut by weight importance. [default: 100; digits: 20]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    lr: Annotated[Optional[float], typer.Option(help="Peak learning rate. [default: 0.001 from scratch, 0.0002 from trained weights, "
                                                "times the root of batch size / 64]")] = None,
    opt: Annotated[str, typer.Option(help="Any optimizer of timm.")] = "adamw",
    sched: Annotated[str, typer.Option(help="cosine, tanh, poly, step or multistep.")] = "cosine",
    img_size: Annotated[Optional[int], typer.Option(min=1, help="Side of the input in pixels. [default: the model's own; digits: 32]")] = None,
    divisor: Annotated[int, typer.Option(min=1, help="Widths are multiples of this many channels; less in narrow groups.")] = 8,
    exclude: Annotated[Optional[list[str]], typer.Option(metavar="GLOB", help="Leave layers of this name whole; repeatable.")] = None,
    prune_head_dim: Annotated[bool, typer.Option("--prune-head-dim", help="Also cut inside attention heads: the channels of q, k and v.")] = False,
    val_fraction: Annotated[float, typer.Option(help="Share of a single image folder to validate on.")] = 0.1,
    skip_bad_images: Annotated[bool, typer.Option("--skip-bad-images", help="Leave unreadable images out, and count them.")] = False,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")] = "auto",
    amp: Annotated[bool, typer.Option("--amp", help="Train in bfloat16 autocast.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the result folder, with the settings it was started with.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, check the budget, do one step, write nothing.")] = False,
) -> None:
    """Train MODEL on DATA and write a small dense network that costs the share --flops of its MACs."""
    from . import run
    from .report import tables

    config = run.Config(model=model, data=data, flops=flops, output=output, pretrained=pretrained, weights=weights, epochs=epochs,
                        batch_size=batch_size, lr=lr, opt=opt, sched=sched, img_size=img_size, divisor=divisor,
                        exclude=list(exclude or []), prune_head_dim=prune_head_dim, val_fraction=val_fraction, skip_bad_images=skip_bad_images, seed=seed,
                        workers=workers, device=device, amp=amp)
    console = tables.console()
    result = run.prune(config, console, resume=resume, dry_run=dry_run)
    if result:
        console.print(tables.closing(result))
        if result["failed"]:
            fail("; ".join(result["failed"]))
        console.print(f"Next:\n  s2h inspect {result['folder']}\n  s2h export {result['folder']} --format onnx", soft_wrap=True)


@app.command(epilog="Example: s2h inspect resnet50")
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
        tables.console().print(tables.inspection(found))


@app.command(epilog="Example: s2h export runs/resnet18-f0.35 --format onnx")
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    format: Annotated[str, typer.Option(help="torchscript, onnx, pt2 or all.")] = "all",
) -> None:
    """Write the network of RUN in other formats, load each back and compare."""
    from . import run

    for name, difference in run.export(folder, format).items():
        print(f"{folder / name}  largest relative difference {difference:.1e}")


@app.command(epilog="Example: s2h models 'convnext*'")
def models(
    glob: Annotated[Optional[str], typer.Argument(metavar="[GLOB]", help="Names of timm and torchvision to list. [default: those measured]")] = None,
) -> None:
    """List models and what was measured of them: cost, what is frozen, how small they can get."""
    from . import zoo
    from .report import tables

    tables.console().print(tables.models(zoo.known(glob), zoo.load()["versions"]))


@app.command("eval", epilog="Example: s2h eval runs/resnet18-f0.35/model.onnx --data digits")
def evaluate(
    artifact: Annotated[Path, typer.Argument(metavar="RUN | FILE", help="The folder of a run, or its model.onnx, model.ts or model.pt2.")],
    data: Data,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 4,
    val_fraction: Annotated[float, typer.Option(help="As for prune.")] = 0.1,
    seed: Annotated[int, typer.Option(help="As for prune: decides which images of a single folder are validated on.")] = 0,
) -> None:
    """Measure the top-1 accuracy of a result on the validation images of DATA."""
    from . import run

    accuracy, images = run.evaluate(artifact, data, batch_size=batch_size, workers=workers, val_fraction=val_fraction, seed=seed)
    print(f"{artifact}  top-1 {accuracy:.2f} % of {images} images")


def main(args: list[str] | None = None) -> None:
    """Runs the command line; an error that a user can mend ends in one line and exit code 2."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    args = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        code = app(args=args, standalone_mode=False)
    except UserError as error:
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        fail("stopped before there was anything to keep; run the command again")
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer finds wrong with the arguments
            raise
        command = f"s2h {args[0]}" if args[0] in ("prune", "inspect", "export", "models", "eval") else "s2h"
        fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    raise SystemExit(code or 0)


def fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None
