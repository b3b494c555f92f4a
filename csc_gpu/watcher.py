"""Somebody else's training loop: a Watcher sees features at each epoch, and names the suspects.

The loop may be plain PyTorch, Lightning or timm; what is needed is the input of its last linear
layer (here `fc`) for every training row, in any order, in the first epochs:

    from csc_gpu.watcher import Watcher, conceal, head_input

    watcher = Watcher(labels)
    for epoch in range(1, 11):
        train_one_epoch(net)
        for images, rows in every_row_once:  # as for validation: no augmentation
            watcher.see(epoch, rows, head_input(net, "fc", images))
    told = watcher.suspects(watcher.witness(net, "fc", pixels))
    points = torch.cat([head_input(net, "fc", images) for images, _ in every_row_once])
    safe = conceal(net, "fc", points, labels, told.suspect)  # one more output: the virtual class

Without a witness two-stage stops after its first stage, and says so in `told.notes`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from csc_gpu import conceal as concealing
from csc_gpu import csc, segregate
from csc_gpu.backend import Backend, open_backend
from csc_gpu.borrowed import UNSCALED, Scale, head_of, split
from csc_gpu.config import override
from csc_gpu.errors import CorpusError
from csc_gpu.types import Corpus, Log, Mask, Segregation, Sighting, Witness, quiet
from csc_gpu.witness import Trained


class Watcher:
    """Is fed the features of all rows, epoch by epoch; only counted snapshots are kept.

    Settings are those of csc-gpu train: its defaults were found with snapshots of the first ten
    epochs. Without a backend it is the processor.
    """

    def __init__(
        self,
        labels: ArrayLike | torch.Tensor,
        settings: csc.Settings | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.labels = as_labels(labels)  # (N,) 0..C-1
        self._settings = settings or csc.Settings()
        self._backend = backend or open_backend("cpu")
        self._points: dict[float, NDArray[np.float32]] = {}  # by epoch, (N, D) each
        self._seen: dict[float, Sighting | None] = {}  # by epoch; None: its features are still here
        self._missing: Mask = np.zeros(0, bool)  # (N,) rows of the last epoch still to come

    def see(
        self, epoch: float, rows: ArrayLike | torch.Tensor, features: ArrayLike | torch.Tensor
    ) -> None:
        """Features (B, D) of these rows (B,), numbered as the labels; each row once an epoch.

        A new epoch closes the one before. Raises CorpusError for rows that are not there or were
        left out, features that are not finite, and an epoch that goes back.
        """
        at, points = as_numpy(rows).astype(np.int64), as_numpy(features).astype(np.float32)
        if at.ndim != 1 or points.ndim != 2 or len(at) != len(points):
            raise CorpusError(
                f"features must be (B, D) and rows (B,), got {points.shape} and {at.shape}"
            )
        if len(at) and not 0 <= at.min() <= at.max() < len(self.labels):
            raise CorpusError(f"rows must be 0..{len(self.labels) - 1}, got {at.min()}..{at.max()}")
        if not np.isfinite(points).all():
            raise CorpusError(f"epoch {epoch}: features are not finite; lower the learning rate")
        if epoch not in self._points:
            self._open(epoch, points.shape[1])
        if points.shape[1] != self._points[epoch].shape[1]:
            raise CorpusError(f"epoch {epoch}: rows have different numbers of features")
        self._points[epoch][at] = points
        self._missing[at] = False

    def suspects(self, witness: Witness | None = None) -> Segregation:
        """Who is suspect by all epochs seen so far; a witness verifies it (stage 2)."""
        self._close()
        scales = self._scales()
        sightings = [
            known or self._observed(epoch, scales[epoch]) for epoch, known in self._seen.items()
        ]
        how = self._settings.segregate, self._backend
        return segregate.segregate(sightings, self.labels, *how, witness)

    def witness(
        self,
        model: nn.Module,
        head: str,
        images: NDArray[np.uint8],
        *,
        scale: Scale = UNSCALED,
        seed: int = 0,
        log: Log = quiet,
    ) -> Witness:
        """What stage 2 asks: somebody's trained model, and the images of all rows.

        images are (N, H, W, 3) uint8 of the size that the model takes, `scale` mean and standard
        deviation of their Normalize. If a label is suspected a net of ours is trained without the
        candidates: settings.train says which, and segregate.check_epochs how long.
        """
        if images.dtype != np.uint8 or images.shape != (len(self.labels), *images.shape[1:3], 3):
            raise CorpusError(
                f"images must be uint8 (N, H, W, 3) for {len(self.labels)} rows, got "
                f"{images.dtype} {images.shape}"
            )
        backend, settings = self._backend, self._settings
        if not settings.train.model:
            settings = override(settings, {"train.model": backend.usual_model})
        net, n = split(model, head, scale).to(backend.device), len(self.labels)
        if self.labels.max() >= net.n_outputs:
            raise CorpusError(f"labels go up to {self.labels.max()}, {head} has {net.n_outputs}")
        classes = tuple(str(label) for label in range(net.n_outputs))
        corpus = Corpus(self.labels, classes, np.arange(n), ("",) * n, images)

        def untrained(seed: int) -> Any:
            return csc.fresh_model(corpus, settings, backend, seed=seed)

        clock = csc.Stopwatch(backend)
        how = settings.train, settings.segregate, backend, clock
        return Trained(net, corpus, untrained, *how, seed=seed, log=log)

    def _open(self, epoch: float, n_features: int) -> None:
        self._close()
        if self._seen and epoch <= max(self._seen):
            raise CorpusError(f"epoch {epoch} comes after epoch {max(self._seen)}; count upwards")
        self._points[epoch] = np.empty((len(self.labels), n_features), np.float32)
        self._missing, self._seen[epoch] = np.ones(len(self.labels), bool), None

    def _close(self) -> None:
        """Check the last epoch, and keep of those that count no longer what remains of them."""
        if self._missing.any():
            raise CorpusError(
                f"epoch {max(self._seen)}: {int(self._missing.sum())} of {len(self.labels)} rows "
                f"were not seen, the first is {int(self._missing.argmax())}; show every row"
            )
        scales = self._scales()
        for epoch in [epoch for epoch in self._points if not scales[epoch]]:
            self._seen[epoch] = self._observed(epoch, ())
            del self._points[epoch]

    def _scales(self) -> dict[float, tuple[float, ...]]:
        """At which scales each epoch so far is clustered, were the last one the last."""
        epochs = list(self._seen)
        return segregate.looked_at(epochs, self._settings.segregate) if epochs else {}

    def _observed(self, epoch: float, scales: tuple[float, ...]) -> Sighting:
        points, how = self._backend.xp.asarray(self._points[epoch]), self._settings.segregate
        return segregate.observe(points, self.labels, epoch, how, self._backend, scales=scales)


@torch.no_grad()
def head_input(model: nn.Module, head: str, images: torch.Tensor) -> torch.Tensor:
    """What the linear layer `head` is given for these images, in eval mode. (B, D)

    The images are as the model takes them, where it is; its mode is afterwards what it was.
    """
    given: list[torch.Tensor] = []
    handle = head_of(model, head).register_forward_pre_hook(
        lambda module, inputs: given.append(inputs[0])
    )
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(images)
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return given[-1]


def conceal(
    model: nn.Module,
    head: str,
    features: ArrayLike | torch.Tensor,
    labels: ArrayLike | torch.Tensor,
    suspect: Mask,
    settings: concealing.Settings | None = None,
    backend: Backend | None = None,
    *,
    seed: int = 0,
    log: Log = quiet,
) -> nn.Module:
    """A copy of somebody's model whose layer `head` has one more output: the trigger leads there.

    features (N, D) are that layer's inputs, labels (N,) and suspect (N,) those of the same rows. No
    other layer is changed. Without suspects it is the model itself. Raises ConfigError if there is
    no such layer, CorpusError if the arrays do not fit it.
    """
    last, backend = head_of(model, head), backend or open_backend("cpu")
    points, known = as_numpy(features).astype(np.float32), as_labels(labels)
    if points.shape != (len(known), last.in_features) or suspect.shape != known.shape:
        raise CorpusError(
            f"{head} takes {last.in_features} features: they must be "
            f"({len(known)}, {last.in_features}), got {points.shape}; suspects {suspect.shape}"
        )
    if known.max() >= last.out_features or not np.isfinite(points).all():
        raise CorpusError(f"labels must be 0..{last.out_features - 1}, and features finite")
    if not suspect.any():
        return model
    weight = last.weight
    placed = backend.xp.asarray(points)
    here = copy.deepcopy(last).to(backend.device, torch.float32)
    how = settings or concealing.Settings(), backend
    wide = concealing.guarded(here, placed, known, suspect, *how, seed=seed, log=log)
    safe = copy.deepcopy(model)
    safe.set_submodule(head, wide.to(weight.device, weight.dtype))
    return safe


def as_numpy(values: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """A tensor on any device, or whatever numpy takes."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        return np.asarray((values.float() if values.is_floating_point() else values).cpu())
    return np.asarray(values)


def as_labels(values: ArrayLike | torch.Tensor) -> NDArray[np.int64]:
    """Whole numbers from 0 on, of two classes at least. (N,)"""
    labels = as_numpy(values)
    whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not whole or len(np.unique(labels)) < 2 or labels.min() < 0:
        raise CorpusError(
            f"labels must be (N,) whole numbers 0..C-1 of at least two classes, got {labels.dtype} "
            f"{labels.shape}"
        )
    return labels.astype(np.int64)
