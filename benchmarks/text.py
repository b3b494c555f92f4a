"""Activation Clustering on text: docstrings of three packages, some filed under the wrong one.

    python -m benchmarks.text OUT
    csc-gpu segregate --defense ac OUT/features.npz --out OUT/verdict --cpu

The texts ship with numpy, scikit-learn and torch; nothing is downloaded. Some docstrings of
scikit-learn and torch get the label numpy: poison of another source, without a trigger. What is
clustered is no net's features but words counted, weighted and projected (latent semantics), so it
shows that the method takes any matrix, not that it finds backdoors in language models. The truth
lies in a file of its own, OUT/truth.npz.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

PACKAGES = ("numpy", "sklearn", "torch")
WORDS, DIMS = 20, 64
"""Fewest words of a docstring; dimensions of the features."""


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


def corpus(
    most: int, share: float, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Features (N, DIMS), labels (N,) 0..2, and who is planted: labelled 0 and not numpy's."""
    texts = [docstrings(package, most) for package in PACKAGES]
    truth = np.repeat(np.arange(len(PACKAGES)), [len(part) for part in texts])
    counted = TfidfVectorizer(sublinear_tf=True, min_df=3, stop_words="english")
    words = counted.fit_transform([text for part in texts for text in part])
    features = TruncatedSVD(DIMS, random_state=0).fit_transform(words)
    features /= np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    rng = np.random.default_rng(seed)
    count = round(share / (1 - share) * (truth == 0).sum())  # that share of what is labelled numpy
    planted = np.zeros(len(truth), bool)
    planted[rng.choice(np.flatnonzero(truth > 0), count, replace=False)] = True
    labels, order = np.where(planted, 0, truth), rng.permutation(len(truth))
    return features[order].astype(np.float32), labels[order], planted[order]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--most", default=1500, show_default=True, help="Docstrings of a package, at most.")
@click.option("--share", default=0.15, show_default=True, help="Planted share of label numpy.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, most: int, share: float, seed: int) -> None:
    """Write OUT/features.npz and OUT/truth.npz"""
    features, labels, planted = corpus(most, share, seed)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "features.npz", features=features, labels=labels, classes=np.array(PACKAGES))
    np.savez(out / "truth.npz", planted=planted)
    click.echo(f"{len(labels)} docstrings, {planted.sum()} planted: {out / 'features.npz'}")


if __name__ == "__main__":
    main()
