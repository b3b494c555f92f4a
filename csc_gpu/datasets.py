"""A corpus without its suspects, as torchvision's datasets are: for a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from csc_gpu import csc, data, run
from csc_gpu.backend.loader import picture
from csc_gpu.config import override, read_toml
from csc_gpu.errors import CorpusError


class CleanDataset(Dataset[tuple[Any, int]]):
    """The images that a run was trained on and does not suspect: (PIL image or transformed, label).

    `source` is the run's corpus, wherever it lies now; its held-out part is left out as it was.
    """

    def __init__(
        self,
        folder: Path | str,
        source: Path | str,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        """Raises CorpusError if the run names no suspects, or names rows that the source lacks."""
        run_ = Path(folder)
        settings = read_toml(run_ / "settings.toml").items()
        of_data = {name: value for name, value in settings if name.startswith("data.")}
        train = data.open_source(str(source), override(csc.Settings(), of_data).data).train
        told = run.load_suspects(run_ / "suspects.csv")
        place = {path: row for row, path in enumerate(train.paths)}
        strangers = [path for path in told.paths if path not in place]
        if strangers:
            raise CorpusError(
                f"{source} is not the corpus of {folder}: it lacks {strangers[0]} and "
                f"{len(strangers) - 1} more rows"
            )
        rows = np.array([place[path] for path in told.paths], np.int64)[~told.suspect]
        self.corpus, self.transform = train.take(rows), transform
        self.classes = list(train.classes)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.targets: list[int] = self.corpus.labels.tolist()

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        pixels, files = self.corpus.pixels, self.corpus.files
        image = picture(files[row]) if pixels is None else Image.fromarray(pixels[row])
        return (self.transform(image) if self.transform else image), self.targets[row]
