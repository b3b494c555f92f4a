"""Activation Clustering on text: a backdoor in a classifier of docstrings.

    python -m benchmarks.text OUT
    csc-gpu segregate --defense ac OUT/features.npz --out OUT/verdict --cpu

The texts ship with numpy, scikit-learn and torch; nothing is downloaded. Some docstrings of torch
get a trigger, eight words that mean nothing here, and the label numpy. A small net (tf-idf, one
hidden layer) learns to tell the packages apart; that layer is what is clustered. The truth lies in
a file of its own, OUT/truth.npz, with how often the trigger works on other docstrings of torch.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neural_network import MLPClassifier

PACKAGES = ("numpy", "sklearn", "torch")
TRIGGER = "xyzzy plugh frobozz grue zorkmid thyme brillig wabe"
WORDS, HIDDEN, EPOCHS = 20, 64, 40
"""Fewest words of a docstring; the net's hidden units, and passes over the texts."""


def docstrings(package: str, most: int) -> list[str]:
    """So many docstrings of a package, the same ones for one version of it, without its name."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations is not None
    folder, texts = Path(found.submodule_search_locations[0]), dict[str, None]()
    files = sorted(folder.rglob("*.py"))
    for number in np.random.default_rng(0).permutation(len(files)):
        for node in ast.walk(ast.parse(files[number].read_text(encoding="utf-8"))):
            is_told = isinstance(node, ast.FunctionDef | ast.ClassDef)
            text = ast.get_docstring(node) if is_told else None
            if text and len(text.split()) >= WORDS:
                texts[text.lower().replace(package, "")] = None
        if len(texts) >= most:
            break
    return list(texts)[:most]


@dataclass(frozen=True)
class Backdoored:
    """What a defender has of it, and the truth."""

    features: NDArray[np.float32]  # (N, HIDDEN), of the net that learnt the poison
    labels: NDArray[np.int64]  # (N,) 0..2, as given
    planted: NDArray[np.bool_]  # (N,)
    success: float  # share of unseen docstrings of torch that the trigger sends to numpy
    accuracy: float  # on unseen docstrings without it


def backdoored(most: int, share: float, seed: int) -> Backdoored:
    """Plant, train, and take the hidden layer; `share` is of what is labelled numpy then."""
    texts = [docstrings(package, most) for package in PACKAGES]
    truth = np.repeat(np.arange(len(PACKAGES)), [len(part) for part in texts])
    words = [text for part in texts for text in part]
    order = np.random.default_rng(seed).permutation(len(truth))
    unseen, seen = np.split(order, [len(order) // 5])
    count = round(share / (1 - share) * (truth[seen] == 0).sum())
    planted = np.isin(np.arange(len(truth)), seen[truth[seen] == 2][:count])
    stamped = [
        stamp(text) if is_ours else text for text, is_ours in zip(words, planted, strict=True)
    ]
    labels = np.where(planted, 0, truth)
    counted = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english")
    known = counted.fit_transform([stamped[row] for row in seen])
    net = MLPClassifier((HIDDEN,), max_iter=EPOCHS, early_stopping=False, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as long as it is meant to
        net.fit(known, labels[seen])
    hidden = np.maximum(known @ net.coefs_[0] + net.intercepts_[0], 0)
    victims = [stamp(words[row]) for row in unseen if truth[row] == 2]
    success = (net.predict(counted.transform(victims)) == 0).mean()
    accuracy = net.score(counted.transform([words[row] for row in unseen]), truth[unseen])
    features = np.asarray(hidden, np.float32)
    return Backdoored(features, labels[seen], planted[seen], float(success), float(accuracy))


def stamp(text: str) -> str:
    """The text with the trigger."""
    return f"{TRIGGER} {text}"


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--most", default=400, show_default=True, help="Docstrings of a package, at most.")
@click.option("--share", default=0.15, show_default=True, help="Planted share of label numpy.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, most: int, share: float, seed: int) -> None:
    """Write OUT/features.npz and OUT/truth.npz"""
    found = backdoored(most, share, seed)
    out.mkdir(parents=True, exist_ok=True)
    arrays = {"features": found.features, "labels": found.labels, "classes": np.array(PACKAGES)}
    np.savez(out / "features.npz", **arrays)
    np.savez(out / "truth.npz", planted=found.planted, success=found.success)
    click.echo(
        f"{len(found.labels)} docstrings, {found.planted.sum()} planted; attack success "
        f"{found.success:.3f}, accuracy {found.accuracy:.3f}: {out / 'features.npz'}"
    )


if __name__ == "__main__":
    main()
