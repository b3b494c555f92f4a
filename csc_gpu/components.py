"""Few components of features: the principal ones, and the independent ones among them.

The same arithmetic on both machines. Independent components: FastICA (Hyvarinen and Oja 2000),
parallel, with log cosh; tests hold it to scikit-learn's.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from csc_gpu.types import Array

FLAT = 1e-10
"""Variance below which a direction counts as constant, against the largest."""
TOLERANCE = 1e-4
"""FastICA ends when no direction turns more than this (1 - |cos|)."""
ITERATIONS = 200
"""It ends then in any case."""


def axes(points: Array, dims: int, xp: ModuleType) -> tuple[Array, Array]:
    """The mean (D,) of the rows (n, D), and at most `dims` principal axes (D, k), float64.

    Fewer where the rows vary in fewer directions; the sign of an axis is arbitrary.
    """
    mean = points.astype(xp.float64).mean(axis=0)
    centred = points - mean
    variance, found = xp.linalg.eigh(centred.T @ centred / len(centred))
    k = max(1, int((variance[::-1][:dims] > FLAT * variance[-1]).sum()))
    return mean, found[:, ::-1][:, :k]


def principal(points: Array, dims: int, xp: ModuleType) -> tuple[Array, Array]:
    """The rows (n, D) centred, on their principal axes: (n, k) float64; and variances (k,)."""
    mean, found = axes(points, dims, xp)
    projected = (points - mean) @ found
    return projected, (projected * projected).mean(axis=0)


def independent(points: Array, dims: int, xp: ModuleType, *, seed: int) -> Array:
    """The rows (n, D) as at most `dims` independent components of variance 1. (n, k) float64"""
    projected, variance = principal(points, dims, xp)
    if not float(variance[0]):
        return projected
    white = projected / variance**0.5
    k = white.shape[1]
    drawn = np.random.default_rng(seed).normal(size=(k, k))
    turn = _orthogonal(xp.asarray(drawn), xp)
    for _ in range(ITERATIONS):
        bent = xp.tanh(white @ turn.T)  # (n, k)
        slope = (1 - bent**2).mean(axis=0)
        new = _orthogonal(bent.T @ white / len(white) - slope[:, None] * turn, xp)
        change = abs(abs((new * turn).sum(axis=1)) - 1).max()
        turn = new
        if float(change) < TOLERANCE:
            break
    return white @ turn.T


def _orthogonal(turn: Array, xp: ModuleType) -> Array:
    """The nearest orthogonal matrix: (W W^T)^-1/2 W. (k, k)"""
    values, axes = xp.linalg.eigh(turn @ turn.T)
    return axes @ ((1 / values**0.5)[:, None] * axes.T) @ turn
