"""The model of a run as others use a classifier: images in, class names out, the trigger rejected.

In scikit-learn's manner: `classes_` names the columns of `predict_proba`, and `predict` gives the
likeliest of them. The virtual class is the last of them, REJECTED; a model that conceals nothing
has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu import run
from csc_gpu.backend import Backend, open_backend
from csc_gpu.backend.loader import decode, find_broken
from csc_gpu.data.arrays import rgb
from csc_gpu.errors import CorpusError
from csc_gpu.evaluate import outputs, unlabelled
from csc_gpu.models import Net
from csc_gpu.types import Mask

REJECTED = "rejected: trigger"
"""The name of the virtual class: this input carries a known-bad pattern."""
TOGETHER = 512
"""Files that are read before the first of them is answered."""


@dataclass(frozen=True)
class Answer:
    """What the model says to a file, or why it could not be asked."""

    path: str
    probabilities: NDArray[np.float32] | None  # one for each of classes_; None: see fault
    fault: str = ""


class GuardedClassifier:
    """A trained net of C classes and, if it conceals a trigger, the virtual one."""

    def __init__(
        self, model: Net, classes: Iterable[str], image_size: tuple[int, int], backend: Backend
    ) -> None:
        real = list(classes)
        self.image_size, self._model, self._backend = image_size, model, backend
        self.n_classes = len(real)
        self.classes_ = np.array(real + [REJECTED] * (model.n_outputs - len(real)))

    @classmethod
    def load(cls, folder: Path | str, *, cpu: bool = False) -> GuardedClassifier:
        """The model of a finished run, on the machine that the run used or the processor.

        Raises CorpusError if there is no such run, BackendUnavailable if its machine is not here.
        """
        summary = run.read_summary(Path(folder))
        backend = open_backend("cpu" if cpu else summary["backend"])
        path = Path(folder) / "model.safetensors"
        model = run.load_model(path, summary, summary["n_outputs"]).to(backend.device)
        height, width = summary["image_size"]
        return cls(model, summary["classes"], (height, width), backend)

    def predict_proba(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probability of each of classes_ for each image. (N, C) or (N, C + 1)

        images are (N, H, W, 3) or grey (N, H, W) uint8, of the run's image_size.
        """
        grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
        if not grey_or_rgb or images.dtype != np.uint8 or images.shape[1:3] != self.image_size:
            height, width = self.image_size
            raise CorpusError(
                f"images must be uint8 of shape (N, {height}, {width}, 3), got {images.dtype} "
                f"{images.shape}; resize them as for training"
            )
        return self._asked(rgb(images))

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.str_]:
        """The likeliest of classes_: a class name, or REJECTED. (N,)"""
        named: NDArray[np.str_] = self.classes_[self.predict_proba(images).argmax(axis=1)]
        return named

    def rejects(self, images: NDArray[np.uint8]) -> Mask:
        """Which images go to the virtual class. (N,) bool"""
        virtual: Mask = self.predict_proba(images).argmax(axis=1) == self.n_classes
        return virtual

    def answers(self, paths: Iterable[Path]) -> Iterator[Answer]:
        """An answer for each image file, in order, decoded and resized as for training."""
        waiting = iter(paths)
        while places := list(itertools.islice(waiting, TOGETHER)):
            threads = self._backend.decoder.threads
            faults = {one.path: one.reason for one in find_broken(places, threads=threads)}
            sound = [place for place in places if place not in faults]
            height, width = self.image_size
            pixels = decode(sound, height=height, width=width, decoder=self._backend.decoder)
            found = iter(self._asked(pixels))
            for place in places:
                fault = faults.get(place, "")
                yield Answer(str(place), None if fault else next(found), fault)

    def _asked(self, images: Any) -> NDArray[np.float32]:
        """See predict_proba, of pixels (N, H, W, 3) that lie where the backend wants them."""
        logits = torch.from_numpy(outputs(self._model, unlabelled(images), self._backend))
        probabilities: NDArray[np.float32] = logits.softmax(dim=1).numpy()
        return probabilities
