"""Files of torch.save, read without running what they ask for; the only module that loads pickles.

torch's weights-only unpickler builds tensors, numbers, text and containers. BackdoorBench adds
NumPy arrays and scalars, so these are let in: float64 and int64, which it writes, and nothing else.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from csc_gpu.errors import CorpusError


def _no_bytes() -> bytes:
    """What an empty array is made of; bytes itself would make as many as a file asks for."""
    return b""


_REBUILD, _SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
ALLOWED: list[Any] = [
    *((_REBUILD, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *((_no_bytes, f"{module}.bytes") for module in ("builtins", "__builtin__")),
    np.ndarray,
    np.dtype,
    type(np.dtype("float64")),
    type(np.dtype("int64")),
]
"""What a pickle may name beside torch's own, under NumPy 2's name and that of NumPy 1."""
_NAMED = re.compile(r"GLOBAL (\S+)|got <class '([^']+)'>|function <([^>]+)>")


def load(path: Path) -> Any:
    """What torch.save wrote there, on the processor; large tensors stay mapped to the file.

    Raises CorpusError for a file that is missing, damaged, or would run code.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise CorpusError(f"{path} is not a regular file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")  # torch's advice is not for who got a strange file
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except OSError as fault:
        raise CorpusError(f"cannot read {path}: {fault.strerror or fault}") from fault
    except UnpicklingError as fault:
        raise CorpusError(f"{path} is refused: {_reason(str(fault))}") from fault
    except MemoryError:
        raise
    except Exception as fault:  # a damaged stream ends in whatever its bytes provoke
        said = str(fault).split(". ")[0] or type(fault).__name__
        raise CorpusError(f"{path} is no file of torch.save, or is damaged: {said}") from fault


def save(value: Any, path: Path) -> None:
    """Write what `load` reads."""
    torch.save(value, path)


def _reason(said: str) -> str:
    """Why torch would not load it, without its advice to load it all the same."""
    found = _NAMED.search(said)
    name = next(filter(None, found.groups()), "") if found else ""
    if name.startswith("PIL."):
        return (
            "it holds pickled images, as BackdoorBench leaves them when it keeps a set in memory; "
            "run the attack with a folder to save to"
        )
    if name:
        return (
            f"it asks for {name}, and a pickle may run any code; only tensors, numbers, text, "
            "lists, dicts and float64 or int64 arrays are read"
        )
    told = said.rsplit("WeightsUnpickler error: ", 1)[-1].strip().split("\n")[0]
    return f"it is no plain torch.save ({told.split('. ')[0][:120]})"
