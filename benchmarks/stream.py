"""An epoch of small JPEGs in tar shards, streamed by the backend and by DALI alone.

    python -m benchmarks.stream --work FOLDER --images 200000

Makes the shards if they are not there. Counts the rows that each epoch gives, in a drawn order, and
notes the largest resident set before DALI's own reader runs beside it, in shard order, with the
same decoder at the same size. One JSON line.
"""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.command import Command
from benchmarks.results_file import RESULTS
from csc_gpu import data
from csc_gpu.backend import Backend, open_backend
from csc_gpu.backend.doctor import describe
from csc_gpu.data.tar import members
from csc_gpu.run import commit
from csc_gpu.types import Corpus

SIDE, CLASSES, DISTINCT = 64, 10, 2000
A_SHARD = 20_000
"""Images in a shard."""


def make(folder: Path, n: int) -> None:
    """n JPEGs, a comment telling each from all others, in WebDataset shards."""
    rng, distinct = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        distinct.append(file.getvalue())
    for part, count in (("train", n), ("test", CLASSES)):
        (folder / part).mkdir(parents=True)
        for start in range(0, count, A_SHARD):
            path = folder / part / f"{start // A_SHARD:06d}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
                for row in range(start, min(start + A_SHARD, count)):
                    whole, comment = distinct[row % DISTINCT], b"\xff\xfe\x00\x0a%08d" % row
                    content = whole[:2] + comment + whole[2:]
                    for name, some in (("jpg", content), ("cls", b"%d" % (row % CLASSES))):
                        member = tarfile.TarInfo(f"{row:08d}.{name}")
                        member.size = len(some)
                        shard.addfile(member, io.BytesIO(some))


def streamed(corpus: Corpus, backend: Backend, batch: int, seed: int) -> tuple[float, int, int]:
    """Images a second in one epoch; rows that were missed, and rows seen more than once."""
    seen = np.zeros(len(corpus), np.int64)
    start = time.perf_counter()
    order = np.random.default_rng(seed).permutation(len(corpus))
    for given in backend.batches(corpus, batch, order=order):
        np.add.at(seen, given.rows.numpy(), 1)
    rate = len(corpus) / (time.perf_counter() - start)
    return rate, int((seen == 0).sum()), int((seen > 1).sum())


def dali_alone(folder: Path, n: int, threads: int, batch: int) -> float:
    """Images a second by DALI's own WebDataset reader, decoder and resize."""
    from nvidia import dali

    shards = sorted((folder / "train").glob("*.tar"))
    indices = [_index(shard) for shard in shards]
    pipeline = dali.Pipeline(
        batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2
    )
    with pipeline:
        encoded, label = dali.fn.readers.webdataset(
            paths=[str(shard) for shard in shards],
            index_paths=[str(index) for index in indices],
            ext=["jpg", "cls"],
            dont_use_mmap=True,
        )
        images = dali.fn.decoders.image(encoded, device="cpu", output_type=dali.types.RGB)
        pipeline.set_outputs(dali.fn.resize(images, resize_x=SIDE, resize_y=SIDE), label)
    pipeline.build()
    start = time.perf_counter()
    for _ in range(n // batch):
        pipeline.run()
    return n // batch * batch / (time.perf_counter() - start)


def _index(shard: Path) -> Path:
    """What DALI's wds2idx would write."""
    path = shard.with_suffix(".idx")
    if not path.exists():
        found = list(members(shard))
        lines = [
            f"jpg {image.start} {image.size} {image.name} "
            f"cls {label.start} {label.size} {label.name}\n"
            for image, label in zip(found[::2], found[1::2], strict=True)
        ]
        path.write_text(f"v1.2 {len(lines)}\n{''.join(lines)}")
    return path


@click.command(cls=Command)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where shards lie.")
@click.option("--images", default=200_000, show_default=True, type=click.IntRange(CLASSES))
@click.option("--batch", default=128, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(1))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "stream.jsonl")
def main(work: Path, images: int, batch: int, threads: int, repeats: int, out: Path) -> None:
    """Stream, and compare."""
    folder = work / f"stream-{images}"
    if not folder.exists():
        make(folder, images)
    start = time.perf_counter()
    split = data.open_source(str(folder), data.Settings(size=SIDE))
    opening = time.perf_counter() - start
    backend = open_backend("cpu", threads)
    corpus = replace(split.train, read_at=(SIDE, SIDE), file_bytes=3 * SIDE * SIDE)
    ours, alone, missed, twice, peak = [], [], 0, 0, 0
    for seed in range(repeats):
        rate, none, more = streamed(corpus, backend, batch, seed)
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ours.append(rate)
        missed, twice = missed + none, twice + more
        alone.append(dali_alone(folder, images, threads, batch))
    line: dict[str, Any] = {
        "images": images, "side": SIDE, "batch": batch, "threads": threads,
        "missed": missed, "seen_twice": twice, "peak_rss_bytes": peak,
        "open_s": round(opening, 2), "images_per_s": [round(rate) for rate in ours],
        "dali_alone_images_per_s": [round(rate) for rate in alone],
        "ratio": round(median(a / b for a, b in zip(ours, alone, strict=True)), 3),
        "load": os.getloadavg(), "machine": describe(), "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
