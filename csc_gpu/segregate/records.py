"""Sightings and verdicts as records of a run (checkpoint.py), and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.checkpoint import Record, fact
from csc_gpu.types import Array, Clusters, Reclassified, Segregation, Sighting, Transfer

DRAWN = ("plane", "reach")
CLUSTER_ARRAYS = ("of_row", "size", "labels", "density")
CHECK_ARRAYS = ("candidates", "controls", "predicted")


def of_sighting(sighting: Sighting, points: Array | None, backend: Backend) -> Record:
    """A snapshot as it was seen, and its features (N, D) if they are kept."""
    arrays = {"stray": sighting.stray} | ({} if points is None else {"features": points})
    arrays |= {name: getattr(sighting, name) for name in DRAWN if sighting.clusterings}
    for number, clusters in enumerate(sighting.clusterings):
        arrays |= {f"{name}.{number}": getattr(clusters, name) for name in CLUSTER_ARRAYS}
    facts = {
        "epoch": sighting.epoch,
        "min_samples": sighting.min_samples,
        "sampled": sighting.sampled,
        "radii": [[clusters.eps, clusters.scale] for clusters in sighting.clusterings],
    }
    return Record({k: _tensor(backend.to_numpy(array)) for k, array in arrays.items()}, facts)


def to_sighting(record: Record, backend: Backend) -> Sighting:
    """The snapshot that `of_sighting` put down, on the device again."""
    arrays = {name: backend.xp.asarray(t.numpy()) for name, t in record.tensors.items()}
    return Sighting(
        fact(record, "epoch", float),
        tuple(
            Clusters(**{n: arrays[f"{n}.{number}"] for n in CLUSTER_ARRAYS}, eps=eps, scale=scale)
            for number, (eps, scale) in enumerate(record.facts["radii"])
        ),
        fact(record, "min_samples", int),
        arrays["stray"],
        fact(record, "sampled", int),
        *(arrays.get(name) for name in DRAWN),
    )


def shared(told: Callable[[], Sighting], backend: Backend) -> Sighting:
    """The snapshot as rank 0 saw it, so that all ranks see the same."""
    if backend.ranks.world == 1:
        return told()
    return to_sighting(
        backend.ranks.from_first(lambda: of_sighting(told(), None, backend)), backend
    )


def of_verdict(verdict: Segregation) -> Record:
    """Who is suspect, why, and what was asked to find out."""
    table = {f"table.{name}": column for name, column in verdict.table.items()}
    arrays: dict[str, NDArray[Any]] = {}
    words: dict[str, list[str]] = {}  # columns of words: numbers, and the list that they count in
    for name, column in table.items():
        arrays[name] = column
        if column.dtype.kind not in "biuf":
            distinct, arrays[name] = np.unique(column, return_inverse=True)
            words[name] = distinct.tolist()
    arrays |= {"suspect": verdict.suspect, "score": verdict.score}
    for number, check in enumerate(verdict.checks):
        arrays |= {f"{name}.{number}": getattr(check, name) for name in CHECK_ARRAYS}
    facts = {
        "columns": list(table),
        "words": words,
        "notes": _json(verdict.notes),
        "checks": len(verdict.checks),
        "transfers": [asdict(transfer) for transfer in verdict.transfers],
        "clusters": [_json(line) for line in verdict.clusters],
    }
    return Record({name: _tensor(array) for name, array in arrays.items()}, facts)


def to_verdict(record: Record) -> Segregation:
    """The verdict that `of_verdict` put down."""
    arrays = {name: tensor.numpy() for name, tensor in record.tensors.items()}
    facts = record.facts
    columns = {name: arrays[name] for name in facts["columns"]}
    for name, distinct in facts["words"].items():
        columns[name] = np.array(distinct, np.str_)[columns[name]]
    return Segregation(
        suspect=arrays["suspect"],
        score=arrays["score"],
        table={name.removeprefix("table."): column for name, column in columns.items()},
        notes=fact(record, "notes", dict),
        checks=tuple(
            Reclassified(*(arrays[f"{name}.{number}"] for name in CHECK_ARRAYS))
            for number in range(facts["checks"])
        ),
        transfers=tuple(Transfer(**told) for told in facts["transfers"]),
        clusters=tuple(facts["clusters"]),
    )


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _json(value: Any) -> Any:
    """The same in JSON's own types."""
    if isinstance(value, dict):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_json(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
