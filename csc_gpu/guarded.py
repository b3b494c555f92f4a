"""The model of a run as others use a classifier: images in, class names out, the trigger rejected.

In scikit-learn's manner: `classes_` names the columns of `predict_proba`, and `predict` gives the
likeliest of them. The virtual class is the last of them, REJECTED; a model that conceals nothing
has none. With the recovered net of a run made with `--recover`, that net names all images, and the
concealed one stays on as the tripwire: it alone says which are rejected.
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
    rejected: bool = False  # it goes to the virtual class
    fault: str = ""


class GuardedClassifier:
    """A trained net of C classes and, if it conceals a trigger, the virtual one.

    Of two nets `recovered`, of C outputs, names images, and `model` says which are rejected.
    """

    def __init__(
        self,
        model: Net,
        classes: Iterable[str],
        image_size: tuple[int, int],
        backend: Backend,
        recovered: Net | None = None,
    ) -> None:
        real = list(classes)
        self.image_size, self._backend = image_size, backend
        self._tripwire, self._naming = model, recovered or model
        self.n_classes = len(real)
        self.classes_ = np.array(real + [REJECTED] * (self._naming.n_outputs - len(real)))

    @classmethod
    def load(
        cls, folder: Path | str, *, cpu: bool = False, recovered: bool = False
    ) -> GuardedClassifier:
        """The model of a finished run, on the machine that the run used or the processor.

        With its recovered net, if that is wanted, to name the true class. Raises CorpusError if
        there is no such run or net, BackendUnavailable if its machine is not here.
        """
        summary = run.read_summary(Path(folder))
        backend = open_backend("cpu" if cpu else summary["backend"])
        model = run.load_net(Path(folder), summary).to(backend.device)
        height, width = summary["image_size"]
        naming = None
        if recovered:
            naming = run.load_net(Path(folder), summary, recovered=True).to(backend.device)
        return cls(model, summary["classes"], (height, width), backend, naming)

    def predict_proba(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probability of each of classes_ for each image. (N, C) or (N, C + 1)

        images are (N, H, W, 3) or grey (N, H, W) uint8, of the run's image_size.
        """
        return self._shares(self._naming, self._checked(images))

    def _checked(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The images as RGB; raises CorpusError if they are others than predict_proba takes."""
        grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
        if not grey_or_rgb or images.dtype != np.uint8 or images.shape[1:3] != self.image_size:
            height, width = self.image_size
            raise CorpusError(
                f"images must be uint8 of shape (N, {height}, {width}, 3), got {images.dtype} "
                f"{images.shape}; resize them as for training"
            )
        return rgb(images)

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.str_]:
        """The likeliest of classes_: a class name, or REJECTED. (N,)"""
        named: NDArray[np.str_] = self.classes_[self.predict_proba(images).argmax(axis=1)]
        return named

    def rejects(self, images: NDArray[np.uint8]) -> Mask:
        """Which images go to the virtual class. (N,) bool"""
        return self._virtual(self._shares(self._tripwire, self._checked(images)))

    def answers(self, paths: Iterable[Path]) -> Iterator[Answer]:
        """An answer for each image file, in order, decoded and resized as for training."""
        waiting = iter(paths)
        while places := list(itertools.islice(waiting, TOGETHER)):
            threads = self._backend.decoder.threads
            faults = {one.path: one.reason for one in find_broken(places, threads=threads)}
            sound = [place for place in places if place not in faults]
            height, width = self.image_size
            pixels = decode(sound, height=height, width=width, decoder=self._backend.decoder)
            named = alarm = self._shares(self._tripwire, pixels)
            if self._naming is not self._tripwire:
                named = self._shares(self._naming, pixels)
            found = zip(named, self._virtual(alarm).tolist(), strict=True)
            for place in places:
                if place in faults:
                    yield Answer(str(place), None, fault=faults[place])
                else:
                    yield Answer(str(place), *next(found))

    def _virtual(self, shares: NDArray[np.float32]) -> Mask:
        """Which of the tripwire's answers (N, C) or (N, C + 1) are the virtual class. (N,)"""
        virtual: Mask = shares.argmax(axis=1) == self.n_classes
        return virtual

    def _shares(self, net: Net, images: Any) -> NDArray[np.float32]:
        """Probabilities of pixels (N, H, W, 3) that lie where the backend wants them."""
        logits = torch.from_numpy(outputs(net, unlabelled(images), self._backend))
        probabilities: NDArray[np.float32] = logits.softmax(dim=1).numpy()
        return probabilities
