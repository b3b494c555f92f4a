"""What the project's figures are made with. Each module says its own command."""

import os

# As csc-gpu has it, and before torch loads, which reads it once: with spinning threads a small step
# took 50 ms on two busy cores and not .5.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
