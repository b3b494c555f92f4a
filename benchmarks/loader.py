"""Images a second from files, over the loader's settings.

    python -m benchmarks.loader FOLDER --size 224 --budget 300

Every setting is bench.loader on a backend of its own: files once, files every epoch, torch's
DataLoader, resident pixels, and what training takes. Settings that differ least from the usual
ones come first, so that a budget cuts off the rarest combinations.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import click

from benchmarks import results_file
from benchmarks.command import Command, require_gpu
from csc_gpu import bench
from csc_gpu.backend import Backend, Settings, open_backend, usable_cores

HW_LOADS = (0.65, 0.75, 0.9)
PREFETCH = (2, 3, 4)


def settings_grid(
    threads: Sequence[int], hw_loads: Sequence[float], prefetch: Sequence[int]
) -> list[Settings]:
    """Every combination; the first of each kind is the usual value, and those come first."""
    usual = threads[0], hw_loads[0], prefetch[0]

    def unusual(chosen: tuple[int, float, int]) -> int:
        return sum(one != other for one, other in zip(chosen, usual, strict=True))

    chosen = sorted(itertools.product(threads, hw_loads, prefetch), key=unusual)
    return [
        Settings(decode_threads=count, hw_decoder_load=load, prefetch=ahead)
        for count, load, ahead in chosen
    ]


def usual_threads() -> tuple[int, ...]:
    """All cores of this process, three quarters of them, and half."""
    cores = usable_cores()
    return tuple(dict.fromkeys(max(1, count) for count in (cores, cores * 3 // 4, cores // 2)))


def measure(
    name: str, settings: Settings, source: str, *, size: int, batch: int, repeats: int, model: str
) -> tuple[list[bench.Line], Backend]:
    """The lines of one setting, and the backend they were measured on."""
    backend = open_backend(name, 0, settings)
    lines = bench.loader(
        backend,
        source=source,
        size=size,
        batch=batch,
        repeats=repeats,
        model=model or backend.usual_model,
    )
    about: bench.Line = {"threads": settings.decode_threads, "prefetch": settings.prefetch}
    if name == "gpu":
        about["hw_load"] = settings.hw_decoder_load
    return [about | line for line in lines], backend


@click.command(cls=Command)
@click.argument("source")
@click.option("--cpu", is_flag=True, help="Decode on the processor.")
@click.option("--threads", multiple=True, type=click.IntRange(1), help="Decoder threads; repeat.")
@click.option("--hw-load", "hw_loads", multiple=True, type=float, default=HW_LOADS)
@click.option("--prefetch", multiple=True, type=click.IntRange(1), default=PREFETCH)
@click.option("--size", default=0, help="Image side in pixels; 0 keeps the usual one.")
@click.option("--batch", default=128, show_default=True, type=click.IntRange(4))
@click.option("--model", default="", help="Whose training the loaders are compared with.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--budget", default=300.0, show_default=True, help="Seconds for all settings.")
def main(
    source: str,
    cpu: bool,
    threads: tuple[int, ...],
    hw_loads: tuple[float, ...],
    prefetch: tuple[int, ...],
    budget: float,
    **how: Any,
) -> None:
    """Images a second from the image files of SOURCE, over the loader's settings."""
    if not cpu:
        require_gpu()
    # the processor has no decoding unit to share with
    every = settings_grid(threads or usual_threads(), hw_loads[:1] if cpu else hw_loads, prefetch)
    end, longest = time.perf_counter() + budget, 0.0
    lines: list[bench.Line] = []
    for number, settings in enumerate(every):
        start = time.perf_counter()
        if number and start + longest > end:
            click.echo(f"{len(every) - number} of {len(every)} settings left out: budget spent")
            break
        found, backend = measure("cpu" if cpu else "gpu", settings, source, **how)
        lines += found
        longest = max(longest, time.perf_counter() - start)
    results_file.publish(bench.report("loader", backend, lines))


if __name__ == "__main__":
    main()
