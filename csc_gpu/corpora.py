"""The commands that make corpora: load, stamp or convert, save, and the text to print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from csc_gpu import answers, attacks, csc, data, foreign, run, sources
from csc_gpu import pack as packing
from csc_gpu.backend import Backend
from csc_gpu.config import override
from csc_gpu.errors import OutputError
from csc_gpu.progress import Console
from csc_gpu.types import AnswerKey

AS_FLOATS = 5
"""Most bytes that an export writes for one of ours: a float, and once more as PNG."""
SAME_ROWS = 0.75
"""Of stamped images fewer nearer to their clean image than to another: it is not theirs. (By chance
half are.)"""


# --- poison -------------------------------------------------------------------------------------


def poison(
    source: str,
    out: Path,
    plan: attacks.Plan,
    settings: Any,
    *,
    size: int,
    skip_broken: bool,
    force: bool,
    preview: Path | None,
    machine: Callable[[], Backend],
) -> str:
    """Poison a source and write it with its key; what was done, in a few lines.

    Only an attack that learns its trigger asks for the machine.
    """
    run.check_free(out, run.POISONED, force=force)
    run.check_apart(source, out)
    if preview is not None and (preview.suffix.lower() != ".png" or preview.is_dir()):
        raise OutputError(f"--preview draws a PNG: {preview} must be a file that ends in .png")
    if preview is not None and not preview.parent.is_dir():
        raise OutputError(f"cannot write {preview}: there is no folder {preview.parent}; make it")
    backend = machine() if attacks.ATTACKS[plan.attack].learns(settings) else None
    with Console() as log:
        split = sources.load(source, data.Settings(size=size), skip_broken=skip_broken, log=log)
        trigger = attacks.ready(split, plan, settings, backend, log)
        poisoned, key = attacks.poison(split, trigger)
        if preview is not None:
            with run.writing(preview):
                Image.fromarray(attacks.preview(split.train, trigger)).save(preview)
        with run.fresh_directory(out, run.POISONED, force=force) as folder:
            answers.save_poisoned(folder, poisoned, key, log)
    counts = key.recipe["counts"]
    covers = f"{counts['covers']} covers, " if counts["covers"] else ""
    sheet = f"preview: {preview}\n" if preview else ""
    return (
        f"{counts['poison']} of {counts['rows']} rows poisoned with {plan.attack}, {covers}"
        f"target {key.recipe['target_name']!r} (class {key.recipe['target']})\n{sheet}"
        f"corpus: {out}\nanswer key: {out / 'key.npz'}"
    )


# --- sets of other tools ------------------------------------------------------------------------


def import_corpus(
    source: Path,
    out: Path,
    layout: str,
    clean: str,
    plan: attacks.Plan,
    settings: Any,
    *,
    force: bool,
) -> str:
    """Write another tool's poisoned set as `poison` would; what it is, in a few lines.

    The plan's attack stamps the clean test images, where the set stores none with its trigger.
    """
    found_in = foreign.named(layout)
    run.check_free(out, run.POISONED, force=force)
    for place in filter(None, (str(source), clean)):
        run.check_apart(place, out)
    origin = {"format": layout, "path": str(source.absolute()), "clean": clean or None}
    with Console() as log:
        base = foreign.read_clean(clean, log) if clean else None
        found = foreign.stamped(found_in.read(source, base, log), plan, settings)
        split, key = foreign.adopt(found, plan, settings, origin)
        with run.fresh_directory(out, run.POISONED, force=force) as folder:
            answers.save_poisoned(folder, split, key, log)
    return f"{imported(key)}\ncorpus: {out}\nanswer key: {out / 'key.npz'}"


def imported(key: AnswerKey) -> str:
    """What an imported set holds, and what it cannot be asked."""
    counts, source = key.recipe["counts"], key.recipe["source"]
    covers = f", {counts['covers']} covers" if counts["covers"] else ""
    lines = [f"{counts['poison']} of {counts['rows']} rows are poison{covers}"]
    if counts["poison"]:
        lines[0] += f", labelled {key.recipe['target_name']!r}"
    if source.get("flagged_maybe_covers"):
        lines.append(
            f"{source['flagged_maybe_covers']} of these may be covers: their label was kept"
        )
    off = source.get("trigger_off")
    if off and off["stamped"] >= off["clean"]:
        lines.append(
            "warning: stamped so, clean rows are no nearer to the set's poison "
            f"({off['stamped']:.1f} grey levels off, {off['clean']:.1f} without): another trigger?"
        )
    if min(source.get("own_row_nearer", {}).values(), default=1.0) < SAME_ROWS:
        lines.append(
            "warning: the stored images are hardly nearer to the images of --clean that they "
            "replace than to others: another order, or other pixels?"
        )
    if not len(key.test):
        lines.append("no test images (--clean): score will tell detection alone")
    elif not len(key.triggered):
        stored = ", with the set's own grids for wanet" if "grids" in source else ""
        lines.append(f"no triggered test images: --attack makes some{stored}")
    return "\n".join(lines)


def export_corpus(source: Path, out: Path, layout: str, *, force: bool) -> str:
    """Write a corpus of `poison` in another tool's layout; where it is, in a few lines."""
    written_as = foreign.named(layout)
    kind = run.Kind("export-corpus", written_as.names | {foreign.BASE})
    run.check_free(out, kind, force=force)
    run.check_apart(str(source), out)
    with Console() as log:
        key = answers.load_key(source / "key.npz")
        split = sources.load(str(source), data.Settings(), log=log)
        foreign.require_writable(source, split, key)
        with run.fresh_directory(out, kind, force=force) as folder:
            run.check_room(folder, AS_FLOATS * (split.train.images.nbytes + key.test.nbytes))
            written_as.write(folder, split, key, out.resolve())
            foreign.write_base(folder / foreign.BASE, split, key)
    base = f"clean data set in its order (stamped rows black): {out / foreign.BASE}"
    return "\n".join(filter(None, (f"{layout}: {out}", base, written_as.lacks)))


# --- pack ---------------------------------------------------------------------------------------


def pack(
    source: str,
    out: Path,
    changes: Mapping[str, Any],
    *,
    shard_bytes: int,
    skip_broken: bool,
    force: bool,
) -> str:
    """Write a source as tar shards with a manifest, and read them back; what was packed."""
    settings: csc.Settings = override(csc.Settings(), dict(changes))
    run.check_free(out, run.PACKED, force=force)
    run.check_apart(source, out)
    with Console() as log:
        split = data.open_source(source, settings.data, log)
        if split.train.files:
            split = sources.sound(source, split, skip_broken=skip_broken, log=log)
        n_bytes = packing.encoded_bytes(split.train) + packing.encoded_bytes(split.test)
        with run.fresh_directory(out, run.PACKED, force=force) as folder:
            run.check_room(folder, n_bytes)
            n_shards = packing.write(folder, split, shard_bytes, log)
    left_out = f", {len(split.broken)} broken ones left out" if split.broken else ""
    return (
        f"{len(split.train)} images to train on and {len(split.test)} to test in {n_shards} "
        f"shards, read back and found the same{left_out}\ncorpus: {out}"
    )
