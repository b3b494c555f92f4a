"""The attacks by name: a new one is a file and a line here."""

from __future__ import annotations

from csc_gpu.attacks import (
    adap_blend,
    adap_k_way,
    adap_patch,
    baat,
    badnets,
    blend,
    bpp,
    ctrl,
    filter,
    ftrojan,
    input_aware,
    label_consistent,
    low_frequency,
    none,
    sample_specific,
    sig,
    tact,
    trojan,
    wanet,
)
from csc_gpu.attacks.attack import Attack

ATTACKS: dict[str, Attack] = {
    "badnets": badnets.ATTACK,
    "badnets-a2a": badnets.ALL_TO_ALL,
    "blend": blend.ATTACK,
    "sig": sig.ATTACK,
    "trojan": trojan.ATTACK,
    "label-consistent": label_consistent.ATTACK,
    "input-aware": input_aware.ATTACK,
    "dynamic": input_aware.DYNAMIC,
    "sample-specific": sample_specific.ATTACK,
    "tact": tact.ATTACK,
    "adap-blend": adap_blend.ATTACK,
    "adap-patch": adap_patch.ATTACK,
    "adap-k-way": adap_k_way.ATTACK,
    "wanet": wanet.ATTACK,
    "filter": filter.ATTACK,
    "baat": baat.ATTACK,
    "ftrojan": ftrojan.ATTACK,
    "ctrl": ctrl.ATTACK,
    "low-frequency": low_frequency.ATTACK,
    "bpp": bpp.ATTACK,
    "none": none.ATTACK,
}
