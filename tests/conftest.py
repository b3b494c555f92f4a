"""Before torch loads: threads that wait must not spin, or two test runs at once take ten times."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
