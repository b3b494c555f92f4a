"""backdoor-toolbox and Fight-Poison-With-Poison: one directory holds the whole training set.

    imgs              float tensor (N, 3, H, W), 0..1; older sets: data/<row>.png
    labels            int64 tensor (N,), already poisoned
    poison_indices    list of the rows that teach the backdoor; cover_indices likewise, if any
    identity_grid, noise_grid    (1, H, W, 2), WaNet's

It stores no original labels, no class names and no triggered test images. A clean data set in the
same order tells the first two; the last are stamped anew, WaNet's with the stored grids.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.attacks import ATTACKS, Stamp, wanet
from csc_gpu.config import override
from csc_gpu.errors import CorpusError
from csc_gpu.foreign import torch_files
from csc_gpu.foreign.base import read_images
from csc_gpu.foreign.found import (
    Found,
    classes_of,
    labels_of,
    mask_of,
    plain_array,
    refuse_mislabelled,
    require_apart,
    require_images,
    require_rows,
    true_labels,
)
from csc_gpu.types import AnswerKey, Log, Split, quiet

GRIDS = ("identity_grid", "noise_grid")
NAMES = frozenset({"imgs", "labels", "poison_indices", "cover_indices", *GRIDS})
TOGETHER = 1024
"""Images that are quantised in one go."""
OVERSHOOT = 0.05
"""So far beyond 0..1 an image may be by interpolation; more, and it is normalised."""
Floats = NDArray[np.float32]


def read(folder: Path, clean: Split | None, log: Log = quiet) -> Found:
    """A poisoned_train_set directory. Raises CorpusError for files that do not fit together."""
    _require_whole(folder)
    given = torch_files.load(folder / "labels")
    classes = classes_of(given, clean, f"{folder / 'labels'}")
    labels = labels_of(given, len(classes), f"{folder / 'labels'}")
    n_rows = len(labels)
    if clean is not None:
        require_rows(clean, n_rows, f"{folder}")
    is_poison = _rows(folder / "poison_indices", n_rows)
    covers = folder / "cover_indices"
    is_cover = _rows(covers, n_rows) if covers.exists() else np.zeros(n_rows, bool)
    require_apart(is_poison, is_cover, f"{folder}")
    images = _images(folder, n_rows, log)
    require_images(images, clean, f"{folder}")
    grids = _stored_grids(folder)
    return Found(
        images=images,
        labels=labels,
        is_poison=is_poison,
        is_cover=is_cover,
        orig_labels=true_labels(labels, is_poison, clean, f"{folder}"),
        classes=classes,
        clean=clean,
        stamps={"wanet": _along(**grids)} if grids else {},
        notes={"grids": {name: _noted(grid) for name, grid in grids.items()}} if grids else {},
    )


def write(folder: Path, split: Split, key: AnswerKey, out: Path) -> None:
    """The same files into an empty directory; the grids for WaNet, covers if there are any."""
    del out
    refuse_mislabelled(key, "backdoor-toolbox")
    pixels = torch.from_numpy(split.train.images).permute(0, 3, 1, 2)
    torch_files.save(pixels.contiguous().float().div_(255), folder / "imgs")
    torch_files.save(torch.from_numpy(key.given_labels), folder / "labels")
    torch_files.save(np.flatnonzero(key.is_poison).tolist(), folder / "poison_indices")
    if key.is_cover.any():
        torch_files.save(np.flatnonzero(key.is_cover).tolist(), folder / "cover_indices")
    for name, grid in _grids(key.recipe, *split.train.image_size).items():
        torch_files.save(torch.from_numpy(grid), folder / name)


# --- images ---------------------------------------------------------------------------------------


def _require_whole(folder: Path) -> None:
    """Raises CorpusError for the ImageNet layout, data/<original class>/<file> of the poison alone.

    It has no `labels`, and no file says which label its rows are given.
    """
    data = folder / "data"
    if not (folder / "imgs").exists() and data.is_dir() and any(map(Path.is_dir, data.iterdir())):
        raise CorpusError(
            f"{data} holds folders: the ImageNet layout, which stores the poison alone and not "
            "its new label, is not read; lay it over the clean images yourself and import npy"
        )


def _images(folder: Path, n_rows: int, log: Log) -> NDArray[np.uint8]:
    if (folder / "imgs").exists():
        return _quantised(torch_files.load(folder / "imgs"), n_rows, f"{folder / 'imgs'}")
    if (folder / "data").is_dir():
        return read_images(_numbered(folder / "data", n_rows), log)
    raise CorpusError(f"{folder} holds neither imgs nor data/: it is no set of backdoor-toolbox")


def _quantised(images: Any, n_rows: int, what: str) -> NDArray[np.uint8]:
    """Floats (N, 3, H, W) as the nearest grey levels. (N, H, W, 3)"""
    found = _floats(images, what, "a tensor of floats (N, 3, H, W)")
    n, channels, height, width = found.shape
    if channels != 3 or not height * width:
        raise CorpusError(f"{what} must be (N, 3, H, W), but is {found.shape}")
    if n != n_rows:
        raise CorpusError(f"{what} holds {n} images, but labels {n_rows}")
    out = np.empty((n, height, width, 3), np.uint8)
    for start in range(0, n, TOGETHER):
        with np.errstate(over="ignore"):  # infinite is not 0..1 either
            part = found[start : start + TOGETHER].astype(np.float32)
        low, high = float(part.min()), float(part.max())
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # NaN is neither
            raise CorpusError(f"{what} must be 0..1, not normalised, but holds {low:g}..{high:g}")
        levels = np.rint(part.clip(0, 1) * np.float32(255))  # unclipped, 256 would be 0
        out[start : start + TOGETHER] = levels.transpose(0, 2, 3, 1)
    return out


def _numbered(folder: Path, n_rows: int) -> list[Path]:
    """0.png, 1.png, ... by number, not by name."""
    present = {path.name for path in folder.glob("*.png")}
    wanted = [f"{row}.png" for row in range(n_rows)]
    missing = [name for name in wanted if name not in present]
    if missing:
        raise CorpusError(f"{folder} lacks {missing[0]}, one of {len(missing)} rows without image")
    more = sorted(name for name in present - set(wanted) if name.removesuffix(".png").isdecimal())
    if more:
        raise CorpusError(f"{folder} holds {more[0]}, but there are labels for 0..{n_rows - 1}")
    return [folder / name for name in wanted]


def _floats(value: Any, what: str, wanted: str) -> NDArray[Any]:
    """A tensor of floats with four dimensions, mapped to the file still: read it part by part."""
    found = plain_array(value if isinstance(value, torch.Tensor) else None, what, wanted)
    if found.dtype.kind != "f" or found.ndim != 4:
        raise CorpusError(f"{what} must be {wanted}")
    return found


# --- rows and grids -------------------------------------------------------------------------------


def _rows(path: Path, n_rows: int) -> NDArray[np.bool_]:
    return mask_of(torch_files.load(path), n_rows, f"{path}")


def _stored_grids(folder: Path) -> dict[str, Floats]:
    """WaNet's grids; {} for other attacks."""
    grids = {name: _grid(folder / name) for name in GRIDS if (folder / name).exists()}
    if len(grids) == 1:
        (missing,) = set(GRIDS) - set(grids)
        raise CorpusError(f"{folder} lacks {missing}: WaNet's trigger is made of two grids")
    return grids


def _grid(path: Path) -> Floats:
    wanted = "a tensor of finite floats (1, H, W, 2)"
    grid = _floats(torch_files.load(path), f"{path}", wanted)
    if grid.shape[::3] != (1, 2):
        raise CorpusError(f"{path} must be {wanted}")
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(grid, np.float32)
    if not np.isfinite(found).all():
        raise CorpusError(f"{path} must be {wanted}")
    return found


def _along(identity_grid: Floats, noise_grid: Floats) -> Stamp:
    """WaNet's stamp along stored grids; how strong, and how enlarged, its settings say."""

    def stamp(
        images: NDArray[np.uint8], settings: wanet.Settings, rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        del rng
        for name, grid in zip(GRIDS, (identity_grid, noise_grid), strict=True):
            if grid.shape != (1, *images.shape[1:3], 2):
                raise CorpusError(f"{name} is {grid.shape}, but images are {images.shape[1:3]}")
        sides = np.array(images.shape[2:0:-1], np.float32)
        grid = identity_grid + settings.s * noise_grid / sides
        return wanet.bent(images, (grid * settings.grid_rescale).clip(-1, 1).astype(np.float32))

    return stamp


def _noted(grid: Floats) -> dict[str, Any]:
    """A grid in JSON, bit by bit."""
    little = grid.astype("<f4").tobytes()
    return {"shape": list(grid.shape), "float32": base64.b64encode(little).decode()}


def _grids(recipe: Mapping[str, Any], height: int, width: int) -> dict[str, Floats]:
    """WaNet's grids, as an import noted them or as our own attack draws them; {} for others."""
    noted = recipe.get("source", {}).get("grids", {})
    if noted:
        return {
            name: np.frombuffer(base64.b64decode(one["float32"]), "<f4")
            .reshape(one["shape"])
            .astype(np.float32)
            for name, one in noted.items()
        }
    if recipe.get("attack") != "wanet":
        return {}
    settings = override(ATTACKS["wanet"].settings(), dict(recipe["settings"]))
    grids = wanet.identity_grid(height, width), wanet.noise_grid(height, width, settings)
    return dict(zip(GRIDS, grids, strict=True))
