"""How fast this machine is at each stage: medians of repeated runs, with all it takes to read them.

Each function measures one stage through the same backend verbs that a run uses, on data drawn here
or given by the user, and returns lines for a table. Every run ends when the device has ended.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from csc_gpu import conceal as concealment
from csc_gpu import csc, data, run, sources
from csc_gpu import train as training
from csc_gpu.backend import Backend, Step, reader
from csc_gpu.backend import loader as files
from csc_gpu.backend.doctor import describe
from csc_gpu.backend.resident import to_float
from csc_gpu.config import override
from csc_gpu.defenses import DEFENSES
from csc_gpu.errors import CorpusError
from csc_gpu.models import new_model
from csc_gpu.segregate.clusters import least_neighbours
from csc_gpu.types import Array, Corpus, DefenderView

Line = dict[str, Any]
"""One line of a table: what was measured, how often, and the figures."""
ONE_EPOCH = {"train.epochs": 1, "train.min_steps": 0}
SPREAD = 40.0
"""Standard deviation of a drawn blob along its own dimensions, in lattice steps."""


@dataclass(frozen=True)
class Runs:
    """Wall seconds of equal runs."""

    seconds: tuple[float, ...]

    def line(self) -> Line:
        """n, median and spread."""
        return {
            "n": len(self.seconds),
            "median_s": statistics.median(self.seconds),
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
        }

    def rate(self, count: int) -> float:
        """Things a second, by the median."""
        return count / statistics.median(self.seconds)


def timed(work: Callable[[], object], backend: Backend, repeats: int, warm: int = 1) -> Runs:
    """Run it `warm` times for nothing, then `repeats` times by the clock."""
    seconds = []
    for number in range(warm + repeats):
        start = time.perf_counter()
        with backend.stage("bench"):
            work()
        if number >= warm:
            seconds.append(time.perf_counter() - start)
    return Runs(tuple(seconds))


def report(name: str, backend: Backend, lines: Sequence[Line]) -> Line:
    """The lines with the machine, versions, commit and date: what the JSON file holds."""
    return {
        "bench": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": run.commit(),
        "backend": backend.name,
        "threads": backend.decoder.threads,
        "machine": describe(),
        "lines": list(lines),
    }


def table(lines: Sequence[Line]) -> str:
    """The lines under one head, numbers with four digits."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    cells = [[_cell(line.get(name)) for name in names] for line in lines]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    rows = [names, *cells]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


# --- clustering ---------------------------------------------------------------------------------


def clustering(
    backend: Backend,
    *,
    rows: int,
    dims: int,
    repeats: int,
    features: Path | None = None,
    seed: int = 0,
) -> list[Line]:
    """DBSCAN on one snapshot's worth of rows: drawn on a lattice, or a file's."""
    points = drawn(rows, dims, seed) if features is None else given(features)
    rows, dims = points.shape
    min_samples = least_neighbours(rows, csc.Settings().segregate.suited(1))
    placed = backend.xp.asarray(points)
    eps = lattice_eps(placed, min_samples, backend, exact=features is None)
    found: list[Array] = []

    def cluster() -> None:
        found[:] = [backend.dbscan(placed, eps=eps, min_samples=min_samples)]

    runs = timed(cluster, backend, repeats)
    of_row = backend.to_numpy(found[0]).astype(np.int64)
    return [
        {
            "rows": rows,
            "dims": dims,
            "eps": eps,
            "min_samples": min_samples,
            **runs.line(),
            "pairs_per_s": runs.rate(rows * rows),
            "clusters": int(of_row.max()) + 1,
            "noise": int((of_row < 0).sum()),
        }
    ]


def drawn(n: int, d: int, seed: int) -> NDArray[np.float32]:
    """Ten blobs of 16 dimensions, a tight island of 2 % and 3 % noise, on the integer lattice.

    On a lattice squared distances are whole numbers, exact in float32, so that with a squared
    radius half way between two of them every correct DBSCAN gives the same answer. (n, d)
    """
    rng = np.random.default_rng(seed)
    inner = min(d, 16)
    blob = rng.choice(12, n, p=[0.095] * 10 + [0.02, 0.03])
    centre = rng.normal(0, 6 * SPREAD, (12, inner))
    spread = np.array([SPREAD] * 10 + [SPREAD / 8, 0])[blob, None]
    flat = centre[blob] + spread * rng.standard_normal((n, inner))
    noise = blob == 11
    flat[noise] = rng.uniform(-12 * SPREAD, 12 * SPREAD, (noise.sum(), inner))
    turned = np.linalg.qr(rng.standard_normal((d, inner)))[0].T  # (inner, d), rows orthonormal
    out: NDArray[np.float32] = np.rint(flat @ turned).astype(np.float32)
    return out


def given(features: Path) -> NDArray[np.float32]:
    """The last snapshot of a feature file. (N, D)"""
    return np.ascontiguousarray(run.load_snapshots(features).features[-1], dtype=np.float32)


def lattice_eps(points: Array, min_samples: int, backend: Backend, *, exact: bool) -> float:
    """The median k-distance of a thousand rows; on a lattice, half way between two distances."""
    asked = points[:: max(1, len(points) // 1000)]
    reach = backend.neighbors(points, min(min_samples, len(points)), asked)
    eps = float(backend.xp.quantile(reach, 0.5))
    return math.sqrt(math.floor(eps * eps) + 0.5) if exact else eps


# --- loader -------------------------------------------------------------------------------------


def loader(
    backend: Backend, *, source: str, size: int, batch: int, repeats: int, model: str
) -> list[Line]:
    """Images a second: from files by DALI and by torch's DataLoader, resident, and as trained on.

    `model` is the net whose training says what a loader must deliver.

    Raises CorpusError for a source without image files.
    """
    settings = data.Settings(size=size)
    opened = data.open_source(source, settings)
    if not opened.train.files:
        raise CorpusError(f"{source} holds arrays, not image files: there is nothing to decode")
    corpus = reader.read(
        opened, settings, decoder=backend.decoder, room=lambda: 0, may_stream=True
    ).train
    height, width = corpus.image_size
    about = {"images": len(corpus), "height": height, "width": width, "batch": batch}

    def through(some: Corpus) -> Callable[[], None]:
        def work() -> None:
            for _ in backend.batches(some, batch):
                pass

        return work

    def decode() -> Array:
        return files.decode(corpus.files, height=height, width=width, decoder=backend.decoder)

    read = replace(corpus, pixels=decode())
    measured = {
        "files, once": timed(decode, backend, repeats),
        "files, every epoch": timed(through(corpus), backend, repeats),
        "files, torch DataLoader": timed(_data_loader(corpus, batch, backend), backend, repeats),
        "resident": timed(through(read), backend, repeats),
        f"training {model}": timed(_training(read, batch, model, backend), backend, repeats),
    }
    return [
        {"loader": name, **about, **runs.line(), "images_per_s": runs.rate(len(corpus))}
        for name, runs in measured.items()
    ]


class _Files(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """What anyone would write: Pillow, one size, (3, H, W) float32."""

    def __init__(self, corpus: Corpus) -> None:
        self.files, self.labels = corpus.files, corpus.labels.tolist()
        self.height, self.width = corpus.image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with files.header(self.files[row]) as file, Image.open(file) as image:
            small = image.convert("RGB").resize(
                (self.width, self.height), Image.Resampling.BILINEAR
            )
        return to_float(torch.from_numpy(np.array(small))[None])[0], self.labels[row]


def _data_loader(corpus: Corpus, batch: int, backend: Backend) -> Callable[[], None]:
    read = torch.utils.data.DataLoader(
        _Files(corpus),
        batch,
        num_workers=backend.decoder.threads,
        worker_init_fn=_one_thread,
        persistent_workers=True,
        pin_memory=backend.device.type == "cuda",
    )

    def work() -> None:
        for images, labels in read:
            images.to(backend.device, non_blocking=True)
            labels.to(backend.device, non_blocking=True)

    return work


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _training(corpus: Corpus, batch: int, name: str, backend: Backend) -> Callable[[], None]:
    """One epoch on resident pixels: what a loader must deliver."""
    plan = override(csc.Settings(), {"train.model": name, "train.batch": batch}).train
    plan = replace(plan, epochs=1, min_steps=0)
    net = new_model(name, corpus.n_classes, corpus.image_size[0], seed=0).to(backend.device)

    def work() -> None:
        for _ in training.train(net, corpus, plan, backend, seed=0):
            pass

    return work


# --- concealment --------------------------------------------------------------------------------


class Eager:
    """A backend whose steps are not recorded."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def captured(self, step: Step) -> Step:
        """The step itself."""
        return step


def conceal(
    backend: Backend,
    *,
    rows: int,
    dims: int,
    classes: int,
    repeats: int,
    settings: concealment.Settings | None = None,
) -> list[Line]:
    """Fine-tuning the head, recorded and eager: steps a second, and how far the weights differ."""
    settings = settings or concealment.Settings()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes + 1, rows)
    centres = rng.normal(0, 1, (classes + 1, dims))
    points = rng.standard_normal((rows, dims)) + centres[labels]
    placed = backend.tensor(backend.xp.asarray(points.astype(np.float32)))
    steps = settings.epochs * math.ceil(rows / min(settings.batch, rows))
    heads: dict[str, torch.nn.Linear] = {}

    def tuned(name: str, machine: Any) -> Callable[[], None]:
        def work() -> None:
            heads[name] = torch.nn.Linear(dims, classes + 1, device=backend.device)
            with torch.no_grad():
                heads[name].weight.zero_()
                heads[name].bias.zero_()
            concealment.fine_tune(heads[name], placed, labels, settings, machine, seed=0)

        return work

    captured = timed(tuned("captured", backend), backend, repeats)
    eager = timed(tuned("eager", Eager(backend)), backend, repeats)
    one, other = heads["captured"].weight.double(), heads["eager"].weight.double()
    difference = float(((one - other).norm() / other.norm()).detach())
    about = {"rows": rows, "dims": dims, "outputs": classes + 1, "steps": steps}
    return [
        {"loop": name, **about, **runs.line(), "steps_per_s": runs.rate(steps)}
        | {
            "weights_differ_by": difference,
            "times_eager": runs.rate(1) / eager.rate(1),
        }
        for name, runs in (("captured", captured), ("eager", eager))
    ]


# --- training -----------------------------------------------------------------------------------


def train(backend: Backend, *, source: str, settings: csc.Settings, repeats: int) -> list[Line]:
    """Plain training and CSC on the same corpus and epochs: seconds by stage, and what CSC adds."""
    if not settings.train.model:
        settings = override(settings, {"train.model": backend.usual_model})
    corpus = sources.load(source, settings.data, backend=backend).train
    view = DefenderView(corpus)
    DEFENSES["csc"].run(view, override(settings, ONE_EPOCH), backend, seed=0)  # warms up all stages
    stages: dict[str, list[dict[str, float]]] = {"plain": [], "csc": []}
    for _ in range(repeats):
        for name, seconds in stages.items():  # by turns: neither has the warmer machine
            outcome = DEFENSES[name].run(view, settings, backend, seed=0)
            seconds.append(dict(outcome.seconds))
    plain = statistics.median(sum(seconds.values()) for seconds in stages["plain"])
    lines = []
    for name, measured in stages.items():
        total = Runs(tuple(sum(seconds.values()) for seconds in measured))
        without = statistics.median(sum(s.values()) - s.get("verify", 0.0) for s in measured)
        line: Line = {"defense": name, "rows": len(corpus), "model": settings.train.model}
        line |= {"epochs": training.budget(len(corpus), settings.train).epochs, **total.line()}
        for stage in ("train", "features", "cluster", "segregate", "verify", "conceal"):
            line[f"{stage}_s"] = statistics.median(s.get(stage, 0.0) for s in measured)
        line["added"] = (total.line()["median_s"] - plain) / plain
        line["added_without_verify"] = (without - plain) / plain
        lines.append(line)
    return lines
