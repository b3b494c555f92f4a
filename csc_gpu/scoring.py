"""What a run is worth by the answer key: the command score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from csc_gpu import answers, evaluate, run
from csc_gpu.backend import Backend, open_backend
from csc_gpu.errors import CorpusError
from csc_gpu.run import read_summary
from csc_gpu.types import AnswerKey, Mask

EFFECTIVE = 0.5
"""Below this attack success without a defense, none can claim to have suppressed it."""


def score(folder: Path, key_path: Path, *, cpu: bool) -> str:
    """Compare a run with the key and write score.json; a small table."""
    summary = read_summary(folder)
    key = answers.load_key(key_path)
    if list(key.test.shape[1:3]) != summary["image_size"]:
        raise CorpusError(
            f"the run saw images of {summary['image_size']} pixels, the key holds "
            f"{list(key.test.shape[1:3])}; train with --set data.size={key.test.shape[1]}"
        )
    backend = open_backend("cpu" if cpu else summary["backend"])
    n_classes = summary["n_classes"]
    result: dict[str, Any] = {"key": str(key_path), "recipe": dict(key.recipe), "detection": None}
    if (folder / run.RESERVE).exists():
        known = answers.is_among(key.test, run.load_reserve(folder / run.RESERVE))
        key = answers.without_test(key, known)
        result["test_left_out"] = int(known.sum())  # the defense was given them as clean images
    for when, name, outputs in (
        ("before", "undefended", n_classes),
        ("after", "model", summary["n_outputs"]),
    ):
        if not (folder / f"{name}.safetensors").exists() and when == "before":
            result[when] = None  # the defense trains no net that it does not defend
            continue
        model = run.load_model(folder / f"{name}.safetensors", summary, outputs)
        model.to(backend.device)
        result[when] = evaluate.accuracy_and_attack(model, key, n_classes, backend)
    result["recovered"] = recovered_score(folder, summary, key, backend)
    if (folder / "suspects.csv").exists():
        suspects = run.load_suspects(folder / "suspects.csv")
        told = joined(suspects, key, key_path)
        not_seen = len(key.paths) - len(suspects.paths)
        result["detection"] = {**evaluate.detection(*told, key), "rows_not_seen": not_seen}
        result["curves"] = evaluate.curves(told[1], key)
    with run.writing(folder / "score.json"):
        run.write_json(folder / "score.json", result)
    where = f"\nsuspects: {folder / 'suspects.csv'}" if result["detection"] else ""
    return f"{table(result)}\nscore: {folder / 'score.json'}{where}"


def recovered_score(
    folder: Path, summary: Mapping[str, Any], key: AnswerKey, backend: Backend
) -> evaluate.Score | None:
    """acc, asr and ra of the recovered net, over its C outputs; None if the run has none."""
    if not (folder / "recovered.safetensors").exists():
        return None
    model = run.load_net(folder, summary, recovered=True).to(backend.device)
    return evaluate.accuracy_and_attack(model, key, summary["n_classes"], backend)


def joined(
    suspects: run.Suspects, key: Any, key_path: Path
) -> tuple[Mask, np.ndarray[Any, np.dtype[np.float64]]]:
    """Verdict and score in the key's row order, joined by path; rows left out are not suspect."""
    at = {path: row for row, path in enumerate(key.paths)}
    strangers = [path for path in suspects.paths if path not in at]
    if strangers:
        raise CorpusError(
            f"{key_path} is not the key to this run: it does not know {strangers[0]} "
            f"and {len(strangers) - 1} more rows"
        )
    suspect, score = np.zeros(len(key.paths), bool), np.zeros(len(key.paths))
    rows = np.array([at[path] for path in suspects.paths])
    suspect[rows], score[rows] = suspects.suspect, suspects.score
    return suspect, score


def table(result: Mapping[str, Any]) -> str:
    """before and after, line by line; - where there is nothing to count."""

    def cell(name: str, value: float | None) -> str:
        return f"{name} {'-' if value is None else format(value, '.3f')}"

    shown = {
        "before": ("acc", "asr"),
        "after": ("acc", "asr", "ra", "virtual_triggered", "virtual_clean"),
        "recovered": ("acc", "asr", "ra"),
        "detection": ("tpr", "fpr", "precision", "auroc"),
    }
    lines = [
        f"{part:10s} " + "  ".join(cell(name, result[part][name]) for name in names)
        for part, names in shown.items()
        if result[part]
    ]
    asr = result["before"]["asr"] if result["before"] else None
    if asr is not None and asr < EFFECTIVE:
        lines.append(
            f"the attack did not take hold (asr before {asr:.3f}): no suppression is claimed"
        )
    return "\n".join(lines)
