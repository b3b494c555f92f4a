"""How far values lie from most others, in deviations that outliers do not move."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CONSISTENT = 1.4826
"""Times the median absolute deviation: the standard deviation, if it is normal."""
MEAN_CONSISTENT = 1.2533
"""Times the mean absolute deviation: the same (Iglewicz and Hoaglin, 1993)."""


def deviations(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each value lies above the median of all, in median absolute deviations. (C,)

    Where these are 0, as over half of the values are equal, mean ones stand in.
    """
    if not len(values):
        return values
    above = values - np.median(values)
    off = abs(above)
    deviation = CONSISTENT * np.median(off) or MEAN_CONSISTENT * off.mean()
    found: NDArray[np.float64] = above / deviation if deviation else off
    return found
