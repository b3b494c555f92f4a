"""The tables of the README and of docs/, cut from the result lines.

    python -m benchmarks.tables            # write them between <!-- name --> and <!-- /name -->
    python -m benchmarks.tables --check    # exit status 1 if a page does not say what the lines say

No figure of these tables is typed by hand, and a test compares them.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks import thresholds
from benchmarks.detection import (
    COLUMNS,
    DEFAULT,
    ORACLE,
    PLAIN,
    RESULTS,
    STUDY,
    alike,
    column,
    key_of,
    made_by,
    markdown,
    named,
    number,
    read,
    spread,
    usual,
)
from csc_gpu import comparison
from csc_gpu.matrix import read_rows
from csc_gpu.scoring import EFFECTIVE as HOLDS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "defenses.md")
ATTACKS = RESULTS.with_name("attacks.jsonl")
AGAIN = RESULTS.with_name("segregation-again.jsonl")
EARLIER = (
    RESULTS.with_name("segregation-earlier.jsonl"),
    RESULTS.with_name("attacks-earlier.jsonl"),
)
"""Lines that later ones of the same cells have replaced."""
MATRICES = "matrix-*.jsonl"
SHOWN = (
    *("acc", "asr", "ra", "recall", "false alarms", "recovered ra", "x plain", "images x plain"),
)
"""What the comparison of the defenses shows."""
GOAL = 0.9
"""Attack success before from which on the goals of the study at the usual rate count."""
MOSTLY = 2.0
"""Poison against the other rows of its label from where it is one of the hard cells."""
STAGES = {
    "clustering and rule": ("cluster", "segregate"),
    "verification": ("verify",),
    "`--recover`": ("recover",),
}
"""What the defense adds to a training."""
MOST = {"clustering and rule": 0.3, "verification": 2.0}
"""What these are to cost, in trainings."""
AS_IT_IS = ("6dcb9e21170a",)
"""Commits that judged by the rule as it is: what decides has not changed since (a test asks)."""
HELD_OUT = {
    *(("gtsrb32", seed) for seed in (7, 8, 9, 10)),
    *(("mnist", seed) for seed in (6, 7, 8, 9)),
    *(("cifar10-10k", seed) for seed in (6, 7)),
    *(("fashion-mnist", seed) for seed in (5, 6)),
}
"""Data sets and seeds that were trained when the rule was done,"""
RARE, RARE_HELD_OUT = 0.01, (1, 2)
"""of this rate these seeds,"""
MENDED = {("mnist", "blend", 6, 0.0), ("gtsrb32", "none", 7, 0.05)}
"""but for those that it was changed for: data set, attack, seed and label noise."""
RECOVERED = 0.9
"""Share of the oracle's RA that recovery is to reach."""
Line = dict[str, Any]


def tables(
    study: list[Line],
    attacks: list[Line],
    rows: list[Line],
    judged_again: list[Line],
    earlier: list[Line],
) -> dict[str, str]:
    """Every table by the name of its place."""
    ours = [line for line in study if line["rule"] == DEFAULT]
    attacked = [line for line in ours if line["attack"] != "none"]
    main, hard = [x for x in attacked if is_usual(x)], [x for x in attacked if not is_usual(x)]
    took = [line for line in main if line["before"]["asr"] >= HOLDS]
    clean = [line for line in ours if line["attack"] == "none"]
    papers = [line for line in study if line["rule"] not in (DEFAULT, ORACLE, PLAIN)]
    beside = {key_of(line) for line in papers}
    papers = [line for line in ours if key_of(line) in beside] + sorted(
        papers, key=lambda line: str(line["rule"])
    )
    before_after = ("accuracy before", "accuracy after")
    asr = ("asr before", "asr after")
    plainly = ("RA after", "clean rejected")
    repair = ("recovered accuracy", "RA recovered", "RA clean net")
    target = ("target class recovered", "target class clean net")
    return {
        "summary": summary(took),
        "main": markdown(took, ("recall", "false alarms", *asr, "clean net", *plainly)),
        "main2": markdown(took, (*before_after, "recovered asr", *repair, *target)),
        "oracle": told(study, main),
        "clean": markdown(clean, ("false alarms", *before_after)),
        "hard": markdown(
            hard,
            (
                "recall",
                "false alarms",
                *asr,
                *before_after,
                "recovered asr",
                *repair[:2],
                target[0],
            ),
        ),
        "others": markdown(papers, ("recall", "false alarms", *asr, "accuracy after")),
        "cost": cost(
            {
                "attacked": attacked,
                "without poison": clean,
                "every attack": [line for line in attacks if line["rule"] == DEFAULT],
            }
        ),
        "dear": dear([*ours, *(line for line in attacks if line["rule"] == DEFAULT)]),
        "short": short([line for line in took if line["before"]["asr"] >= GOAL], oracles(study)),
        "foot": made_by(study),
        "again": again(judged_again, study),
        "anew": anew([*study, *attacks], earlier),
        "held out": held_out(ours),
        "standing": standing([*ours, *(line for line in attacks if line["rule"] == DEFAULT)]),
        "attacks": every_attack(attacks),
        "attacks foot": made_by(attacks),
        "matrix": comparison.markdown(comparison.lines(rows), SHOWN).rstrip(),
    }


def is_usual(line: Line) -> bool:
    """One target, the usual rate, true labels, and no label that is mostly poison."""
    plain, counts = not line["set"] and not line["label_noise"], line["counts"]
    alone = line["target"].isdecimal() and line["rate"] == usual(line["attack"])[1]
    if not (line["attack"] in STUDY and plain and alone):
        return False
    return bool(counts["poison"] <= MOSTLY * counts["target_class_before"])


def oracles(study: list[Line]) -> dict[str, float]:
    """RA of the nets that were trained without the poison, by cell."""
    return {key_of(line): line["recovered"]["ra"] for line in study if line["rule"] == ORACLE}


def told(study: list[Line], cells: list[Line]) -> str:
    """Recovery beside a net that was trained without the poison: same cells, the key told."""
    oracle = oracles(study)
    lines = ["| data | attack | n | RA recovered | RA oracle | share |", "|---" * 6 + "|"]
    for same in alike([x for x in cells if key_of(x) in oracle and x["recovered"]]):
        ours, best = [x["recovered"]["ra"] for x in same], [oracle[key_of(x)] for x in same]
        shares = [ra / of for ra, of in zip(ours, best, strict=True)]
        words = [same[0]["data"], named(same[0]), str(len(same))]
        lines.append(f"| {' | '.join([*words, *map(spread, (ours, best, shares))])} |")
    return "\n".join(lines)


def again(lines: list[Line], study: list[Line]) -> str:
    """Whether the rule as it is now suspects whom it suspected when a line was made."""
    if not lines:
        return "None was judged again."
    before = {key_of(line): line for line in study if line["rule"] == DEFAULT}
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    same = sum(not line["changed"] for line in lines)
    told = [f"{len(lines)} cells judged again at {commits}: {same} with the same suspects."]
    for line in lines:
        if line["changed"]:
            was, now = (x["detection"] for x in (before[key_of(line)], line))
            told.append(
                f"- {line['data']} {named(line)} seed {line['seed']}: {line['changed']} rows "
                f"changed; recall {number(was['tpr'])} to {number(now['tpr'])}, "
                f"false alarms {number(was['fpr'], 4)} to {number(now['fpr'], 4)}"
            )
    return "\n".join(told)


def anew(lines: list[Line], earlier: list[Line]) -> str:
    """Cells that were trained and judged again from nothing: does a later commit say the same?"""
    nets = {(key_of(x), x["trained_at"]): x for x in earlier if x["rule"] == DEFAULT}
    before = {}  # the last line of each cell that is of another net than the one that stands
    for now in (line for line in lines if line["rule"] == DEFAULT):
        of_others = [
            was for (key, at), was in nets.items() if key == key_of(now) and at != now["trained_at"]
        ]
        if of_others:
            before[key_of(now)] = of_others[-1], now
    pairs = list(before.values())
    if not pairs:
        return "None was trained again."
    each = Counter(now["commit"] for _, now in pairs)
    commits = ", ".join(f"{commit} ({n})" for commit, n in sorted(each.items()))
    figures = ("before", "detection", "after", "recovered")
    other = [(was, now) for was, now in pairs if any(was[x] != now[x] for x in figures)]
    told = [
        f"{len(pairs)} cells trained and judged again from nothing, at {commits}: in "
        f"{len(pairs) - len(other)} every figure of the net, its suspects and what came of them is "
        "the same, to the last image."
    ]
    for was, now in other:
        rates = (
            f"{name} {number(was['detection'][key], digits)} to "
            f"{number(now['detection'][key], digits)}"
            for name, key, digits in (("recall", "tpr", 3), ("false alarms", "fpr", 4))
        )
        told.append(f"- {now['data']} {named(now)} seed {now['seed']}: {', '.join(rates)}")
    return "\n".join(told)


def held_out(lines: list[Line]) -> str:
    """The cells that nobody had looked at before the rule was done, one by one."""
    fresh = [
        line
        for line in lines
        if (line["data"], line["seed"]) in HELD_OUT
        or (line["attack"] != "none" and line["rate"] == RARE and line["seed"] in RARE_HELD_OUT)
        if (line["data"], line["attack"], line["seed"], line["label_noise"]) not in MENDED
    ]
    order = list(dict.fromkeys(line["data"] for line in lines))
    fresh.sort(
        key=lambda x: (order.index(x["data"]), x["attack"] == "none", -x["rate"], x["label_noise"])
    )
    names = ("recall", "false alarms", "asr before", "asr after", "clean net")
    names += ("accuracy before", "accuracy after", "RA recovered")
    rows = [f"| data | attack | seed, target | {' | '.join(names)} |", "|---" * 11 + "|"]
    for line in fresh:
        where = [line["data"], named(line), f"{line['seed']}, {line['target']}"]
        rows.append(f"| {' | '.join([*where, *shown([line], names)])} |".replace("**", ""))
    return "\n".join(rows)


def standing(lines: list[Line]) -> str:
    """How many cells the rule as it is has judged, and which it has not."""
    earlier = [line for line in lines if line["commit"] not in AS_IT_IS]
    told = [
        f"{len(lines) - len(earlier)} of {len(lines)} cells were judged by the rule as it is "
        f"({', '.join(AS_IT_IS)}), {len(earlier)} by an earlier one only:"
    ]
    for same in alike(earlier):
        seeds = ", ".join(f"{line['seed']} ({line['commit'][:7]})" for line in same)
        told.append(f"- {same[0]['data']} {named(same[0])} seed {seeds}")
    return "\n".join(told)


def summary(cells: list[Line]) -> str:
    """One short line for each data set and attack: medians over the seeds, nothing else."""
    figures = {
        "recall": ("recall", 3),
        "false alarms": ("false alarms", 4),
        "attack success": ("asr before", 3),
        "attack success after": ("asr after", 3),
        "accuracy": ("accuracy before", 3),
        "accuracy after": ("accuracy after", 3),
        "true class after `--recover`": ("RA recovered", 3),
    }
    lines = [f"| data | attack | seeds | {' | '.join(figures)} |", "|---" * 10 + "|"]
    for same in alike(cells):
        values = (column(same, *COLUMNS[name][0]) for name, _ in figures.values())
        known = [[value for value in of if value is not None] for of in values]
        middle = [statistics.median(of) if of else None for of in known]
        shown = map(number, middle, (digits for _, digits in figures.values()))
        words = [same[0]["data"], named(same[0]), str(len(same)), *shown]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def cost(kinds: dict[str, list[Line]]) -> str:
    """Wall seconds of what the defense adds, in multiples of the training: median (largest)."""
    lines = [f"| data | corpora | cells | {' | '.join(STAGES)} |", "|---" * (3 + len(STAGES)) + "|"]
    for kind, cells in kinds.items():
        for data in dict.fromkeys(line["data"] for line in cells):
            ours = [line for line in cells if line["data"] == data]
            words = [data, kind, str(len(ours))]
            for stage in STAGES:
                of = [multiple(line, stage) for line in ours]
                words.append(f"{number(statistics.median(of), 2)} ({number(max(of), 2)})")
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def multiple(line: Line, stage: str) -> float:
    """What a stage took, in multiples of the training."""
    took: float = sum(line["seconds"].get(part, 0.0) for part in STAGES[stage])
    return took / line["training_seconds"]["train"]


def dear(lines: list[Line]) -> str:
    """The cells where a stage cost more than the goal."""
    over = []
    for line in lines:
        told = {stage: multiple(line, stage) for stage in MOST}
        parts = [f"{stage} {number(told[stage], 2)}" for stage in MOST if told[stage] > MOST[stage]]
        if parts:
            over.append(f"- {line['data']} {named(line)} seed {line['seed']}: {', '.join(parts)}")
    return "\n".join(over)


def short(cells: list[Line], oracle: dict[str, float]) -> str:
    """What each cell misses of the goals."""
    lines = []
    for line in cells:
        before, after, found = line["before"], line["after"], line["detection"]
        allowed = 0.02 + (line["clean_net"]["asr"] if line["clean_net"] else 0.0)
        missed = [
            f"recall {number(found['tpr'])}" if found["tpr"] < 0.95 else "",
            f"false alarms {number(found['fpr'], 4)}" if found["fpr"] > 0.005 else "",
            f"asr after {number(after['asr'])}" if after["asr"] > allowed else "",
            f"accuracy {number(before['acc'])} to {number(after['acc'])}"
            if after["acc"] < before["acc"] - 0.01 - 1e-9
            else "",
        ]
        best = oracle.get(key_of(line), 0.0)
        if line["recovered"] and line["recovered"]["ra"] < RECOVERED * best:
            share = number(line["recovered"]["ra"] / best)
            missed.append(f"RA recovered {share} of the oracle's")
        if any(missed):
            what = ", ".join(filter(None, missed))
            lines.append(f"- {line['data']} {named(line)} seed {line['seed']}: {what}")
    compared = sum(key_of(line) in oracle for line in cells)
    lines.append(f"\nRA was compared with an oracle's in {compared} of these {len(cells)} cells.")
    return "\n".join(lines)


def every_attack(lines: list[Line]) -> str:
    """Each attack undefended, and what the defense made of it where it took hold."""
    defended = {key_of(line): line for line in lines if line["rule"] == DEFAULT}
    names = ("asr before", "clean net", "accuracy before")
    ours = ("recall", "false alarms", "asr after", "RA after", "accuracy after", "clean rejected")
    ours += ("RA recovered", "recovered asr")
    head = ["data", "attack", "n", *names, "judged", *ours]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for same in alike([line for line in lines if line["rule"] == PLAIN]):
        held = [line for line in same if line["before"]["asr"] >= HOLDS]
        done = [defended[key_of(line)] for line in held if key_of(line) in defended]
        n = f"{len(same)}, {len(held)} take" if 0 < len(held) < len(same) else str(len(same))
        words = [same[0]["data"], named(same[0]), n, *shown(same, names)]
        words += [str(len(done)) if held else "did not take hold", *shown(done, ours)]
        rows.append(f"| {' | '.join(words)} |")
    return "\n".join(rows)


def shown(lines: list[Line], names: Sequence[str]) -> list[str]:
    """Columns of some lines: the median, and each line's value."""
    return [spread(column(lines, *COLUMNS[name][0]), COLUMNS[name][1]) for name in names]


def filled(text: str, found: dict[str, str]) -> str:
    """The page with every table that it has a place for."""
    for name, table in found.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if start in text:
            head, rest = text.split(start)
            text = f"{head}{start}\n{table}\n{end}{rest.split(end)[1]}"
    return text


@click.command()
@click.argument("pages", type=click.Path(path_type=Path), nargs=-1)
@click.option("--check", is_flag=True, help="Change nothing; status 1 if it differs.")
def cli(pages: tuple[Path, ...], check: bool) -> None:
    """Write the tables of PAGES, or check them."""
    matrices = sorted(RESULTS.parent.glob(MATRICES), reverse=True)  # MNIST's, the fullest, first
    rows = [row for path in matrices for row in read_rows(path)]
    earlier = [line for path in EARLIER for line in read(path)]
    found = tables(read(RESULTS), read(ATTACKS), rows, read(AGAIN), earlier)
    found["thresholds"] = thresholds.markdown(thresholds.read(thresholds.RESULTS))
    for page in pages or PAGES:
        said = page.read_text(encoding="utf-8")
        text = filled(said, found)
        if check and text != said:
            raise click.ClickException(f"{page} differs; run python -m benchmarks.tables")
        if not check:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli()
