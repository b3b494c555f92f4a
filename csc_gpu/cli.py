"""The command line: every command loads, makes one library call, saves and prints.

Heavy imports happen inside the commands, so that --help and wrong usage answer at once.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from csc_gpu.errors import ConfigError, CscError, Interrupted, Terminated
from csc_gpu.harmless import printable


class Failure(click.ClickException):
    """One line on stderr."""

    exit_code = 2


class Stopped(Failure):
    """After Ctrl-C, as shells have it."""

    exit_code = 130


class Ended(Failure):
    """After SIGTERM, likewise."""

    exit_code = 143


class Commands(click.Group):
    """Turns what a user can mend into one line and exit status 2; other exceptions are our bugs."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CscError as fault:
            kind = Stopped if isinstance(fault, Interrupted) else Failure
            kind = Ended if isinstance(fault, Terminated) else kind
            raise kind(printable(" ".join(str(fault).split()))) from fault
        except KeyboardInterrupt:
            raise Stopped("interrupted; nothing had been written") from None
        except Exception as fault:
            if not _is_out_of_memory(fault):
                raise
            told = " ".join(str(fault).split())[:160] or type(fault).__name__
            raise Failure(
                f"the memory did not suffice ({told}); lower train.batch or data.size, or end "
                "other programs; csc-gpu plan says what takes most"
            ) from fault


def _is_out_of_memory(fault: Exception) -> bool:
    from csc_gpu.backend.workspace import is_out_of_memory

    return is_out_of_memory(fault)


def in_bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A size like 24GB, 80GiB or 512MB, as bytes; None if none was given."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) ?([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    size = 0
    if found:
        power = " KMGT".index(found[2].upper() or " ")
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if not size:
        raise click.BadParameter(f"{value!r} is no size; write 24GB, 80GiB or 512MB")
    return size


COUNT = click.IntRange(0, 2**31 - 1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="csc-gpu")
def cli() -> None:
    """Find backdoor poison in an image corpus, and train a model that ignores the trigger.

    \b
    csc-gpu train CORPUS --out run/ --cpu     the suspects, a clean model and the evidence
    csc-gpu poison CORPUS OUT --attack ...    a poisoned corpus with an answer key, to try it on
    csc-gpu score run/ --key OUT/key.npz      how well it went
    """


def machine(command: Callable[..., Any]) -> Callable[..., Any]:
    """--cpu and --threads, handed on as an opened backend."""

    @functools.wraps(command)
    def opened(machine: Callable[[], Any], **rest: Any) -> Any:
        return command(backend=machine(), **rest)

    return machine_if_needed(opened)


def machine_if_needed(command: Callable[..., Any]) -> Callable[..., Any]:
    """--cpu and --threads, handed on as a function that opens the backend."""

    @click.option("--cpu", is_flag=True, help="Run on the processor (NumPy, scikit-learn).")
    @click.option("--threads", default=0, type=COUNT, help="Processor threads; 0 takes every core.")
    @functools.wraps(command)
    def prepared(cpu: bool, threads: int, **rest: Any) -> Any:
        # Small steps wait for each other all the time; spinning threads doubled the CPU time of the
        # demo on two busy cores. Read once, when torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from csc_gpu import csc
        from csc_gpu.backend import open_backend
        from csc_gpu.config import override

        given = rest.get("changes", {})
        ours = {name: value for name, value in given.items() if name.startswith("gpu.")}
        settings = override(csc.Settings(), ours).gpu
        name = "cpu" if cpu else "gpu"
        return command(machine=lambda: open_backend(name, threads, settings), **rest)

    return prepared


def changes(command: Callable[..., Any]) -> Callable[..., Any]:
    """--config and --set, handed on as one mapping of dotted names to values."""

    @click.option(
        "--config", type=click.Path(path_type=Path), help="Settings as TOML (csc-gpu settings)."
    )
    @click.option(
        "--set", "changed", multiple=True, metavar="NAME=VALUE", help="Change one setting; repeat."
    )
    @functools.wraps(command)
    def merged(config: Path | None, changed: tuple[str, ...], **rest: Any) -> Any:
        from csc_gpu.config import parse_change, read_toml

        given = read_toml(config) if config else {}
        return command(changes=given | dict(map(parse_change, changed)), **rest)

    return merged


def clustered(command: Callable[..., Any]) -> Callable[..., Any]:
    """--cluster and --scheduler, handed on as changed settings."""

    @click.option("--cluster", metavar="local|dask", help="Where to cluster; dask: on many GPUs.")
    @click.option("--scheduler", metavar="ADDRESS", help="Of Dask, tcp://HOST:8786.")
    @functools.wraps(command)
    def chosen(
        cluster: str | None, scheduler: str | None, changes: dict[str, Any], **rest: Any
    ) -> Any:
        asked = {"gpu.cluster": cluster, "gpu.scheduler": scheduler}
        asked = {name: value for name, value in asked.items() if value is not None}
        return command(changes=changes | asked, **rest)

    return chosen


skip_broken = click.option(
    "--skip-broken", is_flag=True, help="Leave out images that do not decode, and list them."
)
force = click.option("--force", is_flag=True, help="Replace an earlier result.")
fail_on_poison = click.option(
    "--fail-on-poison", is_flag=True, help="Exit with status 3 if a row is suspect, all written."
)


def fail_if_poisoned(out: Path) -> None:
    """Exit with status 3 if a finished run or verdict names a suspect: for pipelines of data."""
    from csc_gpu.run import read_summary

    if read_summary(out, ("suspects",))["suspects"]:
        raise click.exceptions.Exit(POISONED)


POISONED = 3
"""The exit status of --fail-on-poison."""


@cli.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--attack", required=True, help="By name: csc-gpu attacks lists them.")
@click.option("--rate", type=float, help="Share of all training rows to poison.")
@click.option("--rate-of-target", type=float, help="Share of the target class's rows instead.")
@click.option(
    "--target",
    default="0",
    show_default=True,
    help="Class name or index; a,b,...: several, a trigger each; all: each class to the next.",
)
@click.option(
    "--label-noise", default=0.0, help="Share of the unpoisoned rows that get a false label."
)
@click.option(
    "--seed", default=0, type=COUNT, show_default=True, help="Which rows, and their order."
)
@click.option("--trigger", default="", help="A picture, for attacks with the setting picture.")
@click.option("--mask", default="", help="A picture that is not black where the trigger lies.")
@click.option(
    "--preview",
    type=click.Path(path_type=Path),
    help="Draw samples as a .png: clean, poison, the difference, triggered, covers.",
)
@click.option("--size", default=0, type=COUNT, help="Image side in pixels; 0 keeps the usual one.")
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="A setting of the attack."
)
@skip_broken
@force
@machine_if_needed
def poison(
    source: str,
    out: Path,
    options: tuple[str, ...],
    trigger: str,
    mask: str,
    size: int,
    skip_broken: bool,
    force: bool,
    preview: Path | None,
    machine: Callable[[], Any],
    **plan: Any,
) -> None:
    """Poison SOURCE and write it to OUT with an answer key.

    Only attacks that learn their trigger need a machine: a GPU, or --cpu.

    SOURCE is an image folder (train/<class>/*, test/<class>/*, or <class>/* alone), an .npz with
    x_train, y_train, x_test, y_test, a CSV manifest path,label[,split], or the word digits.
    """
    from csc_gpu import attacks, corpora

    wanted = attacks.Plan(**plan)
    settings = attacks.settings_of(wanted.attack, options, trigger, mask)
    told = corpora.poison(
        source,
        out,
        wanted,
        settings,
        size=size,
        skip_broken=skip_broken,
        force=force,
        preview=preview,
        machine=machine,
    )
    click.echo(told)


@cli.command(name="import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--from", "layout", required=True, help="backdoor-toolbox, backdoorbench or npy: its layout."
)
@click.option(
    "--clean",
    default="",
    help="What the attack started from, with a test part, in the order of the set.",
)
@click.option(
    "--attack", default="none", help="Stamp the test images so, if the set stores none stamped."
)
@click.option("--trigger", default="", help="A picture, for attacks with the setting picture.")
@click.option("--mask", default="", help="A picture that is not black where the trigger lies.")
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="A setting of the attack."
)
@click.option("--seed", default=0, type=COUNT, show_default=True, help="The new order of the rows.")
@force
def import_(
    attack: str, trigger: str, mask: str, options: tuple[str, ...], seed: int, **what: Any
) -> None:
    """Read another tool's poisoned set, SOURCE, and write it to OUT as csc-gpu poison would.

    SOURCE is a poisoned_train_set directory of backdoor-toolbox (or Fight-Poison-With-Poison), a
    record directory of BackdoorBench, or a folder or .npz with images, labels, is_poison and, if
    it has them, test images as they are and triggered (export-corpus --to npy writes one). No code
    in it is run. --clean is a corpus as for csc-gpu train; it gives the original labels and
    the test images, and BackdoorBench, which stores stamped images alone, cannot do without it.
    """
    from csc_gpu import attacks, corpora

    if attack == "none" and (trigger or mask or options):
        raise ConfigError("--trigger, --mask and --option are an attack's; name it with --attack")
    any_rate = 0.5  # the set has its own, and its target
    plan = attacks.Plan(attack=attack, target="0", rate=any_rate, seed=seed)
    settings = attacks.settings_of(attack, options, trigger, mask)
    click.echo(corpora.import_corpus(plan=plan, settings=settings, **what))


@cli.command(name="export-corpus")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to", "layout", required=True, help="backdoor-toolbox, backdoorbench or npy: the layout."
)
@force
def export_corpus(**what: Any) -> None:
    """Write SOURCE, a corpus that csc-gpu poison or import made, to OUT for other tools.

    OUT/clean is the data set to lay it over, in its order and with the true labels, and the --clean
    of an import; the clean image of a stamped row is not known any more, so that row is black.

    npy holds all there is. backdoor-toolbox has no place for triggered test images. BackdoorBench's
    load_attack_result cannot read an export, for it builds the clean set by name: lay its data
    class prepro_cls_DatasetBD_v2, with set_state, over OUT/clean.
    """
    from csc_gpu import corpora

    click.echo(corpora.export_corpus(**what))


@cli.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--shard-size",
    "shard_bytes",
    default="1GB",
    show_default=True,
    callback=in_bytes,
    help="About what a shard takes.",
)
@skip_broken
@force
@changes
def pack(source: str, out: Path, changes: dict[str, Any], **how: Any) -> None:
    """Write SOURCE to OUT as tar shards (WebDataset) with a manifest, and read them back.

    OUT is a SOURCE like any other, opened without looking for files, and gives the same run. Images
    keep their bytes; arrays become PNGs. Where SOURCE holds nothing out, --set data.holdout does.
    """
    from csc_gpu import corpora

    click.echo(corpora.pack(source, out, changes, **how))


@cli.command()
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run directory.")
@click.option(
    "--defense", default="csc", show_default=True, help="By name: csc-gpu defenses lists them."
)
@click.option(
    "--reserve", default="", help="Clean images, for defenses that need some; a SOURCE, all of it."
)
@click.option(
    "--seed", default=0, type=COUNT, show_default=True, help="Of weights, order and augmentation."
)
@click.option("--model", default="", help="resnet8, resnet18, timm:NAME or torchvision:NAME.")
@click.option(
    "--init", type=click.Path(path_type=Path), help="Weights to start from, a .safetensors file."
)
@click.option("--flip", is_flag=True, help="Mirror images at random while training.")
@click.option("--save-features", is_flag=True, help="Keep features.npz, for segregate.")
@click.option(
    "--recover",
    is_flag=True,
    help="Also train a net without the suspects, which names the true class: one training more.",
)
@click.option("--quiet", is_flag=True, help="Nothing on stderr; log.jsonl tells how far it is.")
@click.option(
    "--tensorboard", is_flag=True, help="Curves and cluster tables in the run's tensorboard/."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with an interrupted run at --out; a finished one stays, unless --force is given.",
)
@fail_on_poison
@click.option(
    "--report/--no-report", "page", default=True, help="Write the page run/report.html at the end."
)
@skip_broken
@click.option(
    "--max-bad",
    type=COUNT,
    help="Do not decode all images beforehand: leave out up to so many that prove broken.",
)
@force
@changes
@clustered
@machine
def train(
    source: str,
    out: Path,
    changes: dict[str, Any],
    model: str,
    init: Path | None,
    flip: bool,
    save_features: bool,
    recover: bool,
    fail_on_poison: bool,
    **how: Any,
) -> None:
    """Train on a possibly poisoned SOURCE: suspects, a clean model, evidence.

    SOURCE is an image folder, an .npz, a CSV manifest or the word digits (see csc-gpu poison), or a
    folder of shards: WebDataset tars (KEY.jpg or .png, KEY.cls or .json), TFRecords, or csc-gpu
    pack's.
    Nothing but images and class names is read: an answer key beside them is not opened.
    """
    from csc_gpu import pipeline

    if fail_on_poison and how["defense"] == "plain":
        raise ConfigError("plain training looks for no poison; leave --fail-on-poison out")
    if model:
        changes |= {"train.model": model}
    if init:
        changes |= {"train.init": str(init.absolute())}
    if flip:
        changes |= {"train.flip": True}
    if save_features:
        changes |= {"watch.keep": True}
    if recover:
        changes |= {"recover.on": True}
    told = pipeline.train(source, out, changes, **how)
    if told:  # ranks after the first have nothing to say
        click.echo(told)
        if fail_on_poison:
            fail_if_poisoned(out)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), help="The key.npz that poison wrote."
)
@click.option("--cpu", is_flag=True, help="Use the processor, whatever the run used.")
def score(run: Path, key: Path, cpu: bool) -> None:
    """Compare a RUN with the answer key: before, after, detection; writes score.json."""
    from csc_gpu import scoring

    click.echo(scoring.score(run, key, cpu=cpu))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--recovered", is_flag=True, help="Also name what is rejected, by the net of train --recover."
)
@click.option("--jsonl", is_flag=True, help="A JSON object a line, with all probabilities.")
@click.option("--cpu", is_flag=True, help="Use the processor, whatever the run used.")
def predict(run: Path, images: tuple[str, ...], **how: bool) -> None:
    """Say what the model of RUN sees in IMAGES: label and probability, or rejected: trigger.

    IMAGES are files, folders (all images below them), or - for paths on stdin, one a line. Every
    image gets its line, in order; one that cannot be read gets `error: ` and the reason, and the
    exit status is then 2. With --recovered every image gets its true class from the net that has
    learnt from no suspect, and `rejected: trigger` comes last where the model of RUN says so.
    """
    from csc_gpu import serving

    named: Iterable[str] = images
    if images == ("-",):
        named = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
    for line in serving.predict(run, filter(None, named), **how):
        click.echo(line)


@cli.command(name="export-model")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "layout", required=True, help="safetensors, onnx or torchscript.")
@click.option(
    "--recovered", is_flag=True, help="The net of train --recover, without a virtual class."
)
@force
def export_model(**what: Any) -> None:
    """Write the model of RUN to the file OUT for other tools, checked to give equal outputs.

    onnx and torchscript take uint8 images (B, H, W, 3) and give probabilities, the last that of the
    virtual class. safetensors holds the weights; its metadata say how images are normalised.
    """
    from csc_gpu import serving

    click.echo(serving.export_model(**what))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--projection",
    default="pca",
    show_default=True,
    type=click.Choice(["pca", "umap"]),
    help="How features become two dimensions; umap needs features.npz and umap-learn.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Of rows: the folder for tables and plots; default: ROWS without its .jsonl.",
)
def report(run: Path, projection: str, out: Path | None) -> None:
    """Write RUN/report.html, one page with pictures, and its plots in RUN/plots.

    The verdict, suspects beside other images of their label, features, clusters, curves, settings.
    The images are read again from where they were; the page itself needs nothing but itself.

    Of the rows of csc-gpu matrix, RUN.jsonl, it makes tables and plots: Markdown, CSV and a page.
    """
    if run.is_file():
        from csc_gpu import comparison

        for path in comparison.write(run, out or run.with_suffix("")):
            click.echo(str(path))
        return
    if out:
        raise ConfigError("--out is for the rows of a matrix; the page of a run lies in the run")
    from csc_gpu import pipeline

    click.echo(pipeline.look(run, projection))


def reviewed(command: Callable[..., Any]) -> Callable[..., Any]:
    """--keep, --drop and --review: what people say of the rows of a run"""
    file = click.Path(path_type=Path)
    for option in (
        click.option("--review", type=file, help="What csc-gpu review has saved."),
        click.option("--drop", type=file, help="Rows that are poison, whatever the run says."),
        click.option("--keep", type=file, help="Rows that are fine: a path or number a line."),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("source", metavar="CORPUS")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "kind",
    default="manifest",
    show_default=True,
    type=click.Choice(["manifest", "folder", "shards"]),
    help="A CSV of the files; class folders of hard links; or tar shards.",
)
@click.option("--copy", is_flag=True, help="With --as folder: copies instead of hard links.")
@reviewed
@click.option("--shard-size", "shard_bytes", default="1GB", show_default=True, callback=in_bytes)
@force
def clean(**what: Any) -> None:
    """Write CORPUS, on which RUN was trained, to OUT without the suspects.

    CORPUS is only read. Hard links are the same files under another name: who edits one, edits
    both. OUT/recipe.json and OUT/removed.csv tell what was left out, and on whose word.
    """
    from csc_gpu import pipeline

    click.echo(pipeline.clean(**what))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="0 takes a free one.")
def review(run: Path, port: int) -> None:
    """Go through the suspects of RUN in a browser, and say who is poison and who is fine.

    The page is for this machine alone: its address holds a secret. It saves RUN/review.csv, which
    csc-gpu clean --review and csc-gpu conceal --review take.
    """
    from csc_gpu.review import Session

    session = Session(run, port)
    click.echo(f"open {session.url}   (Ctrl-C ends)")
    click.echo(session.serve())


@cli.command(name="conceal")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new run.")
@reviewed
@force
@machine
def conceal_(**what: Any) -> None:
    """Fine-tune the head of RUN's undefended net anew, with the suspects as people reviewed them.

    The corpus is read from where it was. RUN stays as it is; OUT is a run like any other.
    """
    from csc_gpu import pipeline

    click.echo(pipeline.conceal_again(**what))


@cli.command()
@click.argument("features", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Verdict directory.")
@fail_on_poison
@click.option(
    "--defense", default="csc", show_default=True, help="Another that can judge features alone."
)
@force
@changes
@clustered
@machine
def segregate(features: Path, out: Path, fail_on_poison: bool, **how: Any) -> None:
    """Find suspects in a FEATURES file: a run's features.npz, or any matrix with labels.

    The .npz holds features, (N, D) or (S, N, D) for S snapshots, and labels, (N,). They may come
    from images, text, audio or tables. Without a record of verification the two-stage rule stops
    after its first stage, and says so. Another defense than csc judges the last snapshot.
    """
    from csc_gpu import pipeline

    click.echo(pipeline.segregate(features, out, **how))
    if fail_on_poison:
        fail_if_poisoned(out)


@cli.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Rows, one JSON line a cell."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where trained nets are kept for later defenses; default: OUT.work.",
)
@click.option("--retry", is_flag=True, help="Run cells again that failed.")
@machine
def matrix(plan: Path, out: Path, work: Path | None, retry: bool, backend: Any) -> None:
    """Run every defense of PLAN against every attack, data set, rate and seed.

    PLAN is TOML: data, attacks, defenses, rates, rates_of_target, targets, seeds, reserve, and the
    tables [settings], [defense.NAME] and [attack.NAME]. plain, oracle and random are rows of every
    table, named in the plan or not. Called again it goes on where it stopped. A cell that fails is
    a row with its error, and while one stands the exit status is 1 in the end.
    """
    from csc_gpu import comparison

    for row in comparison.run_plan(plan, out, work, retry=retry, backend=backend):
        click.echo(comparison.said(row))
    if failed := comparison.failed(plan, out, backend):
        click.echo(f"{failed} cells failed; with --retry they are run again", err=True)
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("source", required=False)
@click.option(
    "--gpu-memory",
    metavar="SIZE",
    callback=in_bytes,
    help="What the device has: 24GB.",
)
@click.option("--cpu", is_flag=True, help="Plan for this processor and what memory it has free.")
@click.option("--rows", type=click.IntRange(1), help="Without SOURCE: images to train on.")
@click.option("--side", type=click.IntRange(4), default=224, show_default=True, help="In pixels.")
@click.option("--classes", type=click.IntRange(2), default=1000, show_default=True)
@changes
def plan(
    source: str | None,
    gpu_memory: int | None,
    cpu: bool,
    rows: int | None,
    side: int,
    classes: int,
    changes: dict[str, Any],
) -> None:
    """Print what a run would take of a machine's memory, stage by stage, and whether it fits.

    SOURCE is a corpus as for csc-gpu train, or give --rows, --side and --classes. No GPU is needed.
    """
    if (source is None) == (rows is None):
        raise click.UsageError("give a SOURCE, or --rows (with --side and --classes)")
    if cpu == (gpu_memory is not None):
        raise click.UsageError("give --gpu-memory SIZE, or --cpu")
    from csc_gpu import pipeline

    click.echo(pipeline.plan(source, (rows or 0, side, classes), changes, gpu_memory))


@cli.group()
def bench() -> None:
    """Measure this machine: clustering, loader, conceal or train"""


def measured(command: Callable[..., Any]) -> Callable[..., Any]:
    """--repeats, --json and settings, and what a bench does with its lines."""

    @click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
    @click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures here.")
    @changes
    @machine
    @functools.wraps(command)
    def reported(file: Path | None, backend: Any, changes: dict[str, Any], **rest: Any) -> None:
        from csc_gpu import bench, run
        from csc_gpu.config import override
        from csc_gpu.csc import Settings

        lines = command(backend=backend, settings=override(Settings(), changes), **rest)
        click.echo(bench.table(lines))
        if file is not None:
            with run.writing(file):
                document = bench.report(command.__name__.rstrip("_"), backend, lines)
                run.write_text(file, json.dumps(document, indent=1) + "\n")

    return reported


ROWS = click.option("--rows", default=10_000, show_default=True, type=click.IntRange(8))


@bench.command()
@ROWS
@click.option("--dims", default=16, show_default=True, type=click.IntRange(1))
@click.option("--features", type=click.Path(path_type=Path), help="A feature file instead (.npz).")
@measured
def clustering(settings: Any, **how: Any) -> Any:
    """DBSCAN on drawn features (ROWS, DIMS), or on the last snapshot of a file"""
    from csc_gpu import bench

    del settings  # the backend has those that matter
    return bench.clustering(**how)


@bench.command()
@click.argument("source")
@measured
def loader(settings: Any, backend: Any, **how: Any) -> Any:
    """Images a second from SOURCE: DALI, torch's DataLoader, resident, and what training takes

    data.size, train.batch and train.model (--set) say at which size, how many, and for which net.
    """
    from csc_gpu import bench

    model = settings.train.model or backend.usual_model
    size, batch = settings.data.size, settings.train.batch
    return bench.loader(backend, size=size, batch=batch, model=model, **how)


@bench.command()
@ROWS
@click.option("--dims", default=512, show_default=True, type=click.IntRange(1))
@click.option("--classes", default=10, show_default=True, type=click.IntRange(2))
@measured
def conceal(settings: Any, **how: Any) -> Any:
    """Fine-tuning the head on (ROWS, DIMS): recorded as a CUDA graph, and eager"""
    from csc_gpu import bench

    return bench.conceal(settings=settings.conceal, **how)


@bench.command(name="train")
@click.argument("source", default="digits")
@measured
def train_(**how: Any) -> Any:
    """Plain training and CSC on SOURCE: seconds by stage, and what CSC adds"""
    from csc_gpu import bench

    return bench.train(**how)


@cli.command()
def attacks() -> None:
    """List the attacks, one a line"""
    from csc_gpu.attacks import ATTACKS

    for name, attack in ATTACKS.items():
        head = f"{name:16s} {attack.family:10s} {attack.label_policy:12s} {attack.summary}"
        click.echo(f"{head} ({attack.source}){'; ' if attack.defaults else ''}{attack.defaults}")


@cli.command()
def defenses() -> None:
    """List the defenses, one a line, and what they need"""
    from csc_gpu.defenses import DEFENSES

    for name, entry in DEFENSES.items():
        click.echo(f"{name:14s} {entry.needed:14s} {entry.summary}")


@cli.command()
def settings() -> None:
    """Print every setting with its meaning and default, as TOML for --config"""
    from csc_gpu.config import explained
    from csc_gpu.csc import Settings

    click.echo(explained(Settings()), nl=False)


@cli.command()
def doctor() -> None:
    """Say which backends, devices and versions are here"""
    from csc_gpu.backend.doctor import advice, describe

    for name, state in {**advice(), **describe()}.items():
        click.echo(f"{name:14s} {state}")
