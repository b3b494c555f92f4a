"""The attacks by name: a new one is a file and a line here."""

from __future__ import annotations

from csc_gpu.attacks import badnets, blend, none, sig
from csc_gpu.attacks.attack import Attack

ATTACKS: dict[str, Attack] = {
    "badnets": badnets.ATTACK,
    "badnets-a2a": badnets.ALL_TO_ALL,
    "blend": blend.ATTACK,
    "sig": sig.ATTACK,
    "none": none.ATTACK,
}
