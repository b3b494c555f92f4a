"""Record what ART makes of a small feature matrix, for tests/test_against_art.py.

    python tests/art_verdicts.py tests/art_verdicts.npz

Run it in an environment of its own, with adversarial-robustness-toolbox 1.20.1, packaging and
numpy 2.1.3: ART is not needed, nor wanted, beside csc_gpu. ART's k-means is unseeded, so each of
its verdicts is taken many times and must not change.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CLASSES, ROWS, SMALLER, POISON, DIMS, REPEATS = 4, 120, 48, 40, 24, 10
RATE_IN_CLASS = 0.25
"""ART's expected_pp_poison: a share of each class."""


class Shim:
    """What ART asks of a classifier: here, the features are the activations."""

    layer_names = ("features",)
    nb_classes = CLASSES

    def get_activations(self, x: Any, layer: int, batch_size: int, framework: bool = False) -> Any:
        del layer, batch_size, framework
        return x


def matrix() -> tuple[Any, Any, Any]:
    """Classes of a larger and a smaller benign group, and poison in class 0."""
    rng = np.random.default_rng(7)
    labels = np.repeat(np.arange(CLASSES), ROWS)
    points = 6 * np.eye(DIMS)[labels] + rng.normal(0, 1, (len(labels), DIMS))
    smaller = np.arange(len(labels)) % ROWS < SMALLER
    smaller &= labels > 0  # class 0 has the poison
    points[smaller] += 8 * np.eye(DIMS)[12 + labels[smaller]]
    stamped = rng.normal(0, 0.5, (POISON, DIMS)) + 9 * np.eye(DIMS)[10]
    points = np.concatenate([points, stamped]).astype(np.float32)
    labels = np.concatenate([labels, np.zeros(POISON, int)])
    order = rng.permutation(len(labels))
    return points[order], labels[order], (np.arange(len(labels)) >= CLASSES * ROWS)[order]


def main(out: Path) -> None:
    """Take ART's verdicts and write them."""
    from art.defences.detector.poison import ActivationDefence, SpectralSignatureDefense

    points, labels, poison = matrix()
    hot = np.eye(CLASSES)[labels]
    found: dict[str, Any] = {}
    for analysis in ("smaller", "relative-size"):
        told = []
        for _ in range(REPEATS):
            defence = ActivationDefence(Shim(), points, hot)
            clean = defence.detect_poison(
                nb_clusters=2, nb_dims=10, reduce="PCA", cluster_analysis=analysis
            )[1]
            told.append(np.array(clean) == 0)
        assert all((one == told[0]).all() for one in told), analysis
        found[f"ac_{analysis.replace('-', '_')}"] = told[0]
    spectral = SpectralSignatureDefense(
        Shim(), points, hot, expected_pp_poison=RATE_IN_CLASS, eps_multiplier=1.5
    )
    found["spectral"] = np.array(spectral.detect_poison()[1]) == 0
    packages = ("adversarial-robustness-toolbox", "numpy", "scikit-learn")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    np.savez_compressed(
        out,
        features=points,
        labels=labels,
        stamped=poison,
        rate_in_class=np.array(RATE_IN_CLASS),
        versions=np.array(versions),
        **found,
    )
    for name, flagged in found.items():
        caught, spoilt = flagged[poison].mean(), flagged[~poison].mean()
        sys.stdout.write(f"{name}: {caught:.3f} of poison, {spoilt:.3f} of the rest\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
