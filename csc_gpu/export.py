"""The concealed model as one file for other tools, checked to answer as it did.

The exported graph takes `images`, (B, H, W, 3) uint8 RGB of the size that the run saw, and gives
`probabilities`, (B, C) or (B, C + 1) float32, the last the virtual class: what is done to pixels
before the net is part of it. safetensors holds weights alone; its metadata say what belongs to it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import nn

from csc_gpu import run
from csc_gpu.backend.resident import to_float
from csc_gpu.errors import ConfigError, OutputError
from csc_gpu.guarded import REJECTED
from csc_gpu.models import Net, new_model

TRIED = (1, 7)
"""Images that an export is tried on, together: one graph must do for any number."""
AGREE = 1e-4
"""Most by which a probability of the export may differ from ours."""
About = Mapping[str, str]
"""What is written beside the weights: model, classes, image_size, input, output."""
Outputs = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images (B, H, W, 3) -> probabilities (B, outputs)."""


class Served(nn.Module):
    """A net with what comes before and after it: uint8 pixels in, probabilities out."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, outputs) float32"""
        logits: torch.Tensor = self.net(to_float(images))
        return logits.softmax(dim=1)


def export(folder: Path, out: Path, layout: str, *, recovered: bool = False) -> None:
    """Write the model of a run to `out`; it appears there only if it answers as the model does.

    The concealed net, or the recovered one, which has no virtual class. Raises ConfigError for an
    unknown format or one whose packages are missing, CorpusError for a run without such a net,
    OutputError if the file cannot be written or answers otherwise.
    """
    if layout not in FORMATS:
        raise ConfigError(f"unknown format {layout!r}; there are {', '.join(FORMATS)}")
    chosen = FORMATS[layout]
    missing = [name for name in chosen.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{layout} needs {', '.join(missing)}; add them with: pip install 'csc-gpu[{layout}]'"
        )
    summary = run.read_summary(folder)
    net = run.load_net(folder, summary, recovered=recovered)
    served = Served(net).eval()
    height, width = summary["image_size"]
    images = trial(max(TRIED), height, width)
    partial = out.with_name(out.name + ".partial")
    with run.writing(out):
        try:
            chosen.write(partial, served, torch.from_numpy(images), about(summary, net))
            check(chosen.read(partial), served, images, out)
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)


def about(summary: Mapping[str, Any], net: Net) -> dict[str, str]:
    """What someone must know who has nothing but the file."""
    height, width = summary["image_size"]
    virtual = [REJECTED] * (net.n_outputs - summary["n_classes"])
    return {
        "model": summary["model"],
        "classes": json.dumps([*summary["classes"], *virtual]),
        "image_size": json.dumps([height, width]),
        "input": f"images (B, {height}, {width}, 3) uint8 RGB; the net sees (x / 255 - .5) / .25",
        "output": "probabilities (B, classes) float32, the softmax of the net's outputs",
    }


def trial(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Images to try a model on: noise, ever brighter. (count, height, width, 3)"""
    rng = np.random.default_rng(count)
    brightest = np.linspace(32, 256, count)[:, None, None, None]
    noise: NDArray[np.uint8] = (rng.random((count, height, width, 3)) * brightest).astype(np.uint8)
    return noise


def check(exported: Outputs, served: Served, images: NDArray[np.uint8], out: Path) -> None:
    """Raises OutputError unless the export gives our labels and, nearly, our probabilities."""
    for count in TRIED:
        with torch.inference_mode():
            ours = served(torch.from_numpy(images[:count])).numpy()
        theirs = exported(images[:count])
        off = np.abs(ours - theirs).max() if ours.shape == theirs.shape else np.inf
        if not off <= AGREE:
            raise OutputError(
                f"{out} is not written: of {count} images the export's probabilities are up to "
                f"{off:.2g} off; choose another --format"
            )


def _write_weights(path: Path, served: Served, images: torch.Tensor, about: About) -> None:
    weights = {name: value.contiguous() for name, value in served.net.state_dict().items()}
    path.write_bytes(save(weights, metadata=dict(about)))


def _read_weights(path: Path) -> Outputs:
    from safetensors import safe_open

    weights = load_file(path)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    n_outputs, (height, _) = len(json.loads(told["classes"])), json.loads(told["image_size"])
    net = new_model(told["model"], n_outputs, height, seed=0)
    net.load_state_dict(weights)
    return _asked(Served(net).eval())


def _write_torchscript(path: Path, served: Served, images: torch.Tensor, about: About) -> None:
    with _torchscript():
        traced = torch.jit.trace(served, images)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), path, _extra_files=dict(about))


def _read_torchscript(path: Path) -> Outputs:
    with _torchscript():
        return _asked(torch.jit.load(path))  # type: ignore[no-untyped-call]


@contextmanager
def _torchscript() -> Iterator[None]:
    """Torch has deprecated TorchScript as a whole, and names what to use instead in every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        yield


def _asked(module: Callable[[torch.Tensor], torch.Tensor]) -> Outputs:
    @torch.inference_mode()
    def asked(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        probabilities: NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return probabilities

    return asked


def _write_onnx(path: Path, served: Served, images: torch.Tensor, about: About) -> None:
    program = torch.onnx.export(
        served,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(path)


def _read_onnx(path: Path) -> Outputs:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def asked(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        probabilities: NDArray[np.float32] = session.run(None, {"images": images})[0]
        return probabilities

    return asked


@dataclass(frozen=True)
class Format:
    """How a model is written and asked again, and the packages that this takes."""

    write: Callable[[Path, Served, torch.Tensor, About], None]
    read: Callable[[Path], Outputs]
    needs: tuple[str, ...] = ()


FORMATS = {
    "safetensors": Format(_write_weights, _read_weights),
    "onnx": Format(_write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(_write_torchscript, _read_torchscript),
}
