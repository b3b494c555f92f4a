"""What attacks that learn share: a surrogate, a training loop for their nets, a cache of triggers.

A trigger learnt once is kept in `<cache home>/csc-gpu/triggers/<sha256>.safetensors`, under a name
made of all that it depends on: attack, settings and the files they name, target, seed, the pixels
and labels learnt from, the machine and its threads (sums are rounded in another order on others),
version of torch, and FORMAT. A file that is broken, or says
another key than its own, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from csc_gpu import cache, train
from csc_gpu.attacks.attack import Attack, Learned, Pixels, Tensors
from csc_gpu.attacks.pictures import rounded
from csc_gpu.backend import Backend
from csc_gpu.errors import ConfigError
from csc_gpu.models import Net, new_model
from csc_gpu.types import Corpus, Log

FORMAT = 4
"""Raise it when an attack learns otherwise than before: what is kept is then learnt anew."""
FILES = ("picture", "mask")
"""Settings that name a file: its bytes belong to the key, not its name alone."""
TOGETHER = 256
"""Images stamped at a time."""
SURROGATE, NETS, ROWS, CHANCE, SECRET = 11, 12, 13, 14, 15
"""Tell the random numbers of these from each other, and from those of the victim's training."""

Module = TypeVar("Module", bound=nn.Module)


Practice = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Images (B, 3, H, W) as the net sees them, labels (B,), share of the peak learning rate -> loss;
it updates the nets."""


# --- learning -----------------------------------------------------------------------------------


def derived(seed: int, purpose: int) -> int:
    """A seed for one purpose: the victim, trained with the same seed, must not begin as we do."""
    return int(np.random.default_rng((seed, purpose)).integers(2**31))


def surrogate(corpus: Corpus, model: str, steps: int, backend: Backend, seed: int, log: Log) -> Net:
    """A classifier of the clean corpus, trained here for `steps` steps or one epoch; eval mode."""
    start = derived(seed, SURROGATE)
    net = new_model(model, corpus.n_classes, corpus.image_size[0], seed=start).to(backend.device)
    settings = train.Settings(model=model, epochs=1, min_steps=steps)
    for moment in train.train(net, corpus, settings, backend, seed=start):
        log("step", stage="surrogate", at=moment)
    return frozen(net)


def practise(
    step: Practice,
    corpus: Corpus,
    *,
    steps: int,
    batch: int,
    backend: Backend,
    seed: int,
    stage: str,
    log: Log,
) -> None:
    """Run `step` on shuffled batches, in whole epochs, for `steps` steps or more."""
    rng = np.random.default_rng(derived(seed, ROWS))
    usual = train.Settings(model="resnet8", epochs=1, min_steps=steps, batch=batch)
    budget = train.budget(len(corpus), usual)
    warmup, done = 0.1 * budget.steps, 0
    for _ in range(budget.epochs):
        for part in backend.batches(corpus, batch, order=rng.permutation(len(corpus))):
            done += 1
            share = train.one_cycle(done, warmup, budget.steps)
            loss = step(part.images, part.labels, share)
            epoch = done / budget.steps_per_epoch
            log("step", stage=stage, at=train.Moment(done, epoch, loss, share, budget))


def some(corpus: Corpus, count: int, backend: Backend, seed: int) -> torch.Tensor:
    """Images of the corpus, drawn by chance, as the net sees them. (B, 3, H, W) on the device"""
    rng = np.random.default_rng(derived(seed, CHANCE))
    rows = rng.choice(len(corpus), min(count, len(corpus)), replace=False)
    parts = [part.images for part in backend.batches(corpus, TOGETHER, order=rows)]
    return torch.cat(parts)


def initialised(build: Callable[[], Module], seed: int) -> Module:
    """A freshly initialised net. The same seed gives the same weights; no other chance is moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived(seed, NETS))
        return build()


def frozen(net: Module) -> Module:
    """The net in eval mode, its weights no longer trained."""
    net.eval()
    return net.requires_grad_(False)


# --- between nets and tensors -------------------------------------------------------------------


def packed(nets: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The weights of all nets, each under its net's name and a dot; on the CPU."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, net in nets.items()
        for key, value in net.state_dict().items()
    }


def unpacked(net: Module, tensors: Tensors, name: str) -> Module:
    """The net with the weights that go by its name; frozen."""
    start = f"{name}."
    net.load_state_dict(
        {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    )
    return frozen(net)


def seen(pixels: Pixels) -> torch.Tensor:
    """Pixels (B, H, W, 3) as a net sees them, (pixel / 255 - .5) / .25. (B, 3, H, W) float32"""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub_(127.5).div_(63.75)


def shown(images: torch.Tensor) -> Pixels:
    """Images (B, 3, H, W) as a net sees them as pixels, rounded and clipped. (B, H, W, 3)"""
    grey: NDArray[np.float32] = (images * 63.75 + 127.5).permute(0, 2, 3, 1).numpy()
    return rounded(grey)


def in_parts(count: int) -> Iterator[slice]:
    """Which images to stamp at a time."""
    return (slice(start, start + TOGETHER) for start in range(0, count, TOGETHER))


# --- the cache ----------------------------------------------------------------------------------


def learnt(
    name: str,
    attack: Attack,
    corpus: Corpus,
    target: int,
    settings: Any,
    backend: Backend,
    seed: int,
    log: Log,
) -> Tensors:
    """What the attack learns from these rows, from the cache if it has been learnt before."""
    assert attack.learn is not None
    key = cache_key(name, corpus, target, settings, backend, seed)
    path = cache_home() / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    kept = recalled(path, key)
    if kept is not None:
        log("trigger", learnt=False, file=str(path))
        return kept
    tensors = attack.learn(corpus, target, settings, backend, seed, log)
    log("trigger", learnt=True, file=str(path) if remember(path, key, tensors) else None)
    return tensors


def cache_home() -> Path:
    """Where triggers are kept."""
    return cache.home() / "triggers"


def cache_key(
    name: str, corpus: Corpus, target: int, settings: Any, backend: Backend, seed: int
) -> str:
    """All that a learnt trigger depends on, as JSON. Raises ConfigError for a missing picture."""
    return json.dumps(
        {
            "format": FORMAT,
            "attack": name,
            "settings": asdict(settings),
            "files": digests(settings),
            "target": target,
            "seed": seed,
            "corpus": _of_corpus(corpus),
            "backend": backend.name,
            "machine": backend.machine,
            "torch": torch.__version__,
        },
        sort_keys=True,
    )


def recalled(path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """What is kept there under this key; None if nothing is, or nothing that can be trusted."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return tensors if about.get("digest") == _of_tensors(tensors) else None


def remember(path: Path, key: str, tensors: Tensors) -> bool:
    """Keep the tensors there, all at once; False where there is no room or no right to."""
    about = {"key": key, "digest": _of_tensors(tensors)}
    content = save(dict(tensors), metadata=about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    except OSError:
        return False  # the trigger is learnt all the same, and will be once more
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        return False
    return True


def _of_corpus(corpus: Corpus) -> str:
    """Digest of the labels and the pixels."""
    images = np.ascontiguousarray(corpus.images)
    told = hashlib.sha256(f"{images.shape} {corpus.n_classes}".encode())
    told.update(np.ascontiguousarray(corpus.labels, np.int64).data)
    told.update(images.data)
    return told.hexdigest()


def digests(trigger: Any) -> dict[str, Any]:
    """SHA-256 of what a trigger is made of beside its settings: the files they name, and tensors.

    trigger: settings, or Learned. Raises ConfigError for a missing picture.
    """
    chosen = asdict(trigger.settings if isinstance(trigger, Learned) else trigger)
    found: dict[str, Any] = {
        field: _of_file(field, chosen[field]) for field in FILES if chosen.get(field)
    }
    for field in (f"{name}s" for name in FILES):
        if chosen.get(field):
            found[field] = [path and _of_file(field, path) for path in chosen[field]]
    if isinstance(trigger, Learned):
        found["learnt"] = _of_tensors(trigger.tensors)
    return found


def _of_file(setting: str, path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as fault:
        raise ConfigError(f"cannot read attack.{setting}: {fault}") from fault


def _of_tensors(tensors: Tensors) -> str:
    """Digest of names, kinds, shapes and values."""
    told = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        told.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        told.update(value.view(-1).numpy().tobytes())
    return told.hexdigest()
