"""The matrix: every combination once, what a group shares, what is kept apart, and what goes on."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from csc_gpu import comparison, matrix, run
from csc_gpu.backend import open_backend
from csc_gpu.checkpoint import Record, to_bytes
from csc_gpu.cli import cli
from csc_gpu.defenses import DEFENSES, Entry
from csc_gpu.errors import ConfigError, CorpusError, OutputError, Terminated
from csc_gpu.train import Budget, Moment
from csc_gpu.types import Corpus
from tests.test_defenses import clean

CPU = open_backend("cpu", 1)
QUICK = {"train.model": "resnet8", "train.epochs": 1, "train.min_steps": 0, "train.batch": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Digits 0 to 3 as a file: 160 to train on, 80 held out."""
    train, test = clean(0, 160), clean(160, 240)
    path = tmp_path_factory.mktemp("source") / "few.npz"
    arrays = {"x_train": train.images, "y_train": train.labels}
    np.savez(path, **arrays, x_test=test.images, y_test=test.labels)
    return path


def plan_of(source, **changes):
    usual = matrix.Plan(
        data=(f"few={source}",),
        attacks=("badnets",),
        rates=(0.1,),
        defenses=("plain", "oracle", "random", "spectral"),
        reserve=0.25,
        settings=QUICK,
    )
    return replace(usual, **changes)


@pytest.fixture(scope="module")
def ran(source, tmp_path_factory):
    """A small matrix: its rows, the file, and the folder of work."""
    place = tmp_path_factory.mktemp("ran")
    out, work = place / "rows.jsonl", place / "work"
    rows = list(matrix.cells(plan_of(source), out, work, CPU))
    return rows, out, work


def test_a_plan_is_every_combination_and_no_attack_is_there_once(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        'data = ["digits", "mine=some/where.npz"]\nattacks = ["none", "badnets", "sig"]\n'
        'rates = [0.05, 0.1]\nrates_of_target = [0.5]\nseeds = [0, 1]\ntargets = ["3", "4"]\n'
        'defenses = ["plain", "ac"]\n[settings]\ntrain.epochs = 3\n'
        '[defense.ac]\nac.decide = "size"\n[attack.badnets]\nalpha = 0.5\n'
    )
    plan = matrix.read_plan(path)
    assert plan.settings == {"train.epochs": 3}
    assert matrix.changes_of(plan, "ac", 0.0) == {"train.epochs": 3, "ac.decide": "size"}
    found = [group.about for group in matrix.groups(plan)]
    assert len(found) == 2 * 2 * (1 + 2 + 1)
    assert {(g["data"], g["source"]) for g in found} == {
        ("digits", "digits"),
        ("mine", "some/where.npz"),
    }
    assert {g["rate_of"] for g in found if g["attack"] == "sig"} == {"target"}
    assert {(g["seed"], g["target"]) for g in found} == {(0, "3"), (1, "4")}
    assert {str(g["attack_options"]) for g in found if g["attack"] == "sig"} == {"{}"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('defenses = ["magic"]', "magic"),
        ('attacks = ["magic"]', "magic"),
        ("seeds = []", "plan.seeds"),
        ("seeds = [-1]", "plan.seeds"),
        ("reserve = 1.0", "plan.reserve"),
        ("rates = [0.1, 5.0]", "plan.rates"),
        ("rates_of_target = [0]", "plan.rates_of_target"),
        ("colour = 1", "colour"),
        ("seeds = [0", "TOML"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(tmp_path, text, told):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        matrix.read_plan(path)


def test_a_setting_that_a_defense_does_not_have_is_refused_before_anything_runs(source, tmp_path):
    plan = plan_of(source, defense={"spectral": {"spectral.rat": 0.1}})
    with pytest.raises(ConfigError, match=r"did you mean 'spectral\.rate'"):
        next(matrix.cells(plan, tmp_path / "rows.jsonl", tmp_path, CPU))
    plan = plan_of(source, attack={"badnets": {"colour": 1}})
    with pytest.raises(ConfigError, match="colour"):
        next(matrix.cells(plan, tmp_path / "rows.jsonl", tmp_path, CPU))


def test_there_is_a_line_a_cell_with_its_scores_costs_and_settings(ran):
    rows, out, _ = ran
    assert [json.loads(line) for line in out.read_text().splitlines()] == json.loads(
        json.dumps(rows)
    )
    assert [row["defense"] for row in rows] == ["plain", "oracle", "random", "spectral"]
    for row in rows:
        assert row["error"] is None
        assert row["before"]["counts"]["acc"][1] == row["test_rows"]
        assert row["plain_seconds"] > 0 and row["times_plain"] > 0
        assert row["cpu_seconds"].keys() == row["seconds"].keys()
        spent = sum(row["cpu_seconds"].values()) / row["plain_cpu_seconds"]
        assert row["times_plain"] == pytest.approx(spent, rel=0.05)  # seconds have three digits
        assert row["settings"]["train.epochs"] == 1 and "gpu.memory" not in row["settings"]
        assert {"commit", "versions", "machine"} <= set(row)
    plain, oracle, random, spectral = rows
    assert plain["before"] == plain["after"] and plain["detection"] is None
    assert plain["times_plain"] == 1.0
    assert (oracle["detection"]["tpr"], oracle["detection"]["fpr"]) == (1.0, 0.0)
    flagged = [row["detection"]["counts"]["flagged"][0] for row in (oracle, random)]
    assert flagged == [16, 16] and random["detection"]["tpr"] < 1
    assert spectral["told_rate"] == 0.1 and spectral["settings"]["spectral.rate"] == 0.1
    assert oracle["told_rate"] is None


def test_a_line_says_by_stage_what_its_trainings_took(ran):
    plain, oracle, _, spectral = ran[0]
    assert plain["budget"] == {"train": {"steps": 5, "images": 160}}
    assert plain["plain_images"] == 160 and plain["images_times_plain"] == 1.0
    assert oracle["budget"] == {"retrain": {"steps": 5, "images": 144}}  # 16 of 160 were poison
    left = 160 - spectral["detection"]["counts"]["flagged"][0]
    assert spectral["budget"]["train"] == plain["budget"]["train"]  # found trained, counted too
    assert spectral["budget"]["retrain"]["images"] == left < 144
    assert spectral["images_times_plain"] == round((160 + left) / 160, 4)
    assert not {"epochs", "optimiser_steps"} & set(spectral)  # there is no one such figure


def test_the_multiple_is_of_processor_time_and_of_wall_time_where_that_is_not_known():
    cost = matrix.Cost({"train": 9.0, "judge": 21.0}, {"train": 2.0, "judge": 3.0})
    assert matrix.Undefended({}, 10.0, 2.0, 1).times(cost) == 2.5
    assert matrix.Undefended({}, 10.0, None, 1).times(cost) == 3.0  # an older folder of work
    assert matrix.Undefended({}, 10.0, 2.0, 1).times(matrix.Cost(cost.seconds, {})) == 3.0  # GPU
    assert matrix.Undefended({}, 0.0, None, 1).times(cost) is None
    shared = matrix.Undefended({}, 10.0, 4.0, 1).instead(cost)
    assert (shared.seconds["train"], shared.cpu_seconds["train"]) == (10.0, 4.0)
    unknown = matrix.Undefended({}, 10.0, None, 1)
    assert unknown.times(unknown.instead(cost)) == 3.1


def test_an_older_folder_of_work_without_processor_seconds_goes_on(ran, source, tmp_path):
    rows, _, work = ran
    mine = shutil.copytree(work, tmp_path / "work")
    (told,) = mine.glob("*/seconds.safetensors")
    seconds = rows[0]["plain_seconds"]
    told.write_bytes(to_bytes(Record({}, {"seconds": seconds})))
    again = list(matrix.cells(plan_of(source), tmp_path / "rows.jsonl", mine, CPU))
    spectral = again[-1]
    assert spectral["plain_cpu_seconds"] is None and "train" not in spectral["cpu_seconds"]
    assert spectral["times_plain"] == pytest.approx(spectral["seconds_in_all"] / seconds, rel=0.01)


def test_a_throw_away_step_is_taken_before_the_first_clock_starts(source, tmp_path, monkeypatch):
    events, train, clock = [], matrix.train.train, matrix.csc.Stopwatch.__call__

    def training(model, corpus, *rest, **how):
        events.append(("training", len(corpus)))
        return train(model, corpus, *rest, **how)

    def timed(self, stage):
        events.append(("clock", stage))
        return clock(self, stage)

    monkeypatch.setattr(matrix.train, "train", training)
    monkeypatch.setattr(matrix.csc.Stopwatch, "__call__", timed)
    plan = plan_of(source, defenses=("plain",))
    list(matrix.cells(plan, tmp_path / "rows.jsonl", tmp_path / "w", CPU))
    assert events[:3] == [("training", 32), ("clock", "train"), ("training", 160)]


def test_trainings_of_one_name_add_up_and_one_that_goes_on_counts_once():
    def at(step, images):
        return Moment(step, 0.0, torch.tensor(0.0), 0.1, Budget(1, 9), images=images)

    heard, tally = [], matrix.Tally(lambda event, **fields: heard.append(event))
    tally("triggers")
    for stage, step, images in [
        ("a", 3, 30),
        ("a", 4, 38),
        ("b", 1, 7),
        ("a", 1, 10),
        ("a", 2, 20),
    ]:
        tally("step", stage=stage, at=at(step, images))
    assert tally.budget == {"a": {"steps": 6, "images": 58}, "b": {"steps": 1, "images": 7}}
    assert tally.images == 65 and heard == ["triggers", *["step"] * 5]


def test_plain_oracle_and_random_are_rows_of_every_table(source, tmp_path):
    plan = plan_of(source, defenses=("spectral", "random"))
    assert plan.defenses == ("spectral", "random")
    rows = list(matrix.cells(plan, tmp_path / "rows.jsonl", tmp_path / "w", CPU))
    assert [row["defense"] for row in rows] == ["spectral", "random", "plain", "oracle"]
    assert rows[2]["seconds"]["train"] == rows[0]["plain_seconds"]


def test_clean_images_are_held_out_before_the_key_is_made(source, tmp_path):
    seen = {}

    def defend(view, settings, backend, *, seed, log, kept):
        seen["reserve"] = view.trusted
        return DEFENSES["plain"].run(view, settings, backend, seed=seed, log=log, kept=kept)

    with pytest.MonkeyPatch.context() as patch:
        curious = Entry(defend, DEFENSES["plain"].settings, "", needs=("reserve",))
        patch.setitem(DEFENSES, "curious", curious)
        patch.setattr(matrix.evaluate, "accuracy_and_attack", noting(seen))
        plan = plan_of(source, defenses=("curious", "plain"))
        rows = list(matrix.cells(plan, tmp_path / "rows.jsonl", tmp_path, CPU))
    reserve: Corpus = seen["reserve"]
    assert [row["reserve_rows"] for row in rows] == [len(reserve)] * 4  # alike for all defenses
    assert len(reserve) + rows[0]["test_rows"] == 80
    assert np.bincount(reserve.labels).tolist() == [5, 5, 5, 5]
    given = {image.tobytes() for image in reserve.images}
    assert not given & {image.tobytes() for image in seen["key"].test}


def noting(seen):
    def scored(net, key, n_classes, backend):
        seen["key"] = key
        return {"acc": 1.0}

    return scored


def test_ordinary_training_is_done_once_a_group(source, tmp_path):
    steps = []

    def log(event, **fields):
        if event == "step":
            steps.append(fields["stage"])

    plan = plan_of(source, defenses=("plain", "spectral"))
    rows = list(matrix.cells(plan, tmp_path / "rows.jsonl", tmp_path / "w", CPU, log=log))
    per_epoch = rows[0]["budget"]["train"]["steps"]
    found = steps.count("train") - 4  # each row, on finding it trained, sees the last step again
    assert per_epoch <= found <= per_epoch + 1
    assert rows[1]["seconds"]["train"] == rows[0]["plain_seconds"]
    assert rows[1]["seconds_in_all"] > rows[1]["plain_seconds"]
    apart = plan_of(source, defenses=("spectral",), defense={"spectral": {"train.lr": 0.01}})
    before = len([stage for stage in steps if stage == "train"])
    (row,) = matrix.cells(apart, tmp_path / "rows.jsonl", tmp_path / "w", CPU, log=log)
    assert len([s for s in steps if s == "train"]) - before >= per_epoch  # trained by itself
    assert row["before"] == rows[0]["before"]


def test_what_csc_trains_serves_the_others_and_is_what_plain_trains(source, tmp_path):
    quick = {"csc": {"watch.epochs": 1.0, "segregate.rule": "persistence"}}
    plan = plan_of(source, defenses=("plain", "csc"), defense=quick)
    rows = list(matrix.cells(plan, tmp_path / "rows.jsonl", tmp_path / "w", CPU))
    assert [row["defense"] for row in rows] == ["csc", "plain", "oracle", "random"]
    alone = list(
        matrix.cells(plan_of(source, defenses=("plain",)), tmp_path / "r2", tmp_path / "w2", CPU)
    )
    assert rows[1]["after"] == alone[0]["after"]
    assert rows[1]["plain_seconds"] == rows[0]["seconds"]["train"]


def test_what_is_done_is_not_done_again_and_half_a_line_is(ran, source, tmp_path):
    rows, out, _ = ran
    copy = tmp_path / "rows.jsonl"
    text = out.read_text()
    copy.write_text(text[:-40])  # the last line was cut off
    again = list(matrix.cells(plan_of(source), copy, tmp_path / "w", CPU))
    assert [row["defense"] for row in again] == ["spectral"]
    assert again[0]["after"] == rows[-1]["after"]
    assert list(matrix.cells(plan_of(source), copy, tmp_path / "w", CPU)) == []
    assert len(copy.read_text().splitlines()) == 4


def changed(source, path, what):
    """The same file but for one image or label of one part."""
    arrays = dict(np.load(source))
    name, part = what
    arrays[f"{name}_{part}"] = arrays[f"{name}_{part}"].copy()
    arrays[f"{name}_{part}"][0] = (arrays[f"{name}_{part}"][0] + 1) % 4
    np.savez(path, **arrays)


@pytest.mark.parametrize("what", [*itertools.product("xy", ("train", "test"))])
def test_a_folder_of_work_made_of_other_images_is_refused_and_left(source, tmp_path, what):
    mine = tmp_path / "few.npz"
    shutil.copy(source, mine)
    plan, work = plan_of(mine, defenses=("plain",)), tmp_path / "w"
    list(matrix.cells(plan, tmp_path / "rows.jsonl", work, CPU))
    left = {path: path.read_bytes() for path in work.rglob("*.safetensors")}
    changed(source, mine, what)
    with pytest.raises(OutputError, match=r"few\.npz has other images .* give another --work"):
        list(matrix.cells(plan, tmp_path / "again.jsonl", work, CPU))
    assert not (tmp_path / "again.jsonl").exists()
    assert left == {path: path.read_bytes() for path in work.rglob("*.safetensors")}
    shutil.copy(source, mine)
    again = list(matrix.cells(plan, tmp_path / "again.jsonl", work, CPU))
    assert len(again) == len(list(matrix.read_rows(tmp_path / "rows.jsonl")))


def test_a_folder_of_work_from_before_it_knew_its_images_is_taken_and_learns_them(
    ran, source, tmp_path
):
    work = shutil.copytree(ran[2], tmp_path / "w")
    (known,) = work.glob("*/corpus.safetensors")
    before = known.read_bytes()
    known.unlink()
    list(matrix.cells(plan_of(source), tmp_path / "rows.jsonl", work, CPU))
    assert known.read_bytes() == before


def failing(times):
    def defend(view, settings, backend, **how):
        times.append(1)
        raise ValueError("out of luck")

    return Entry(defend, DEFENSES["plain"].settings, "")


def test_a_failed_cell_is_a_line_with_its_error_and_the_others_go_on(source, tmp_path, monkeypatch):
    times = []
    monkeypatch.setitem(DEFENSES, "luckless", failing(times))
    plan, out = plan_of(source, defenses=("luckless", "plain")), tmp_path / "rows.jsonl"
    rows = list(matrix.cells(plan, out, tmp_path / "w", CPU))
    assert rows[0]["error"] == "ValueError: out of luck" and rows[1]["error"] is None
    assert any("out of luck" in line for line in rows[0]["trace"])
    assert not any('"/' in line or line.startswith("/") for line in rows[0]["trace"])
    assert list(matrix.cells(plan, out, tmp_path / "w", CPU)) == []
    assert len(list(matrix.cells(plan, out, tmp_path / "w", CPU, retry=True))) == 1
    assert len(times) == 2


def test_a_source_that_is_not_there_is_refused_before_anything_runs(source, tmp_path):
    rows = tmp_path / "rows.jsonl"
    gone = plan_of(source, data=(str(source), "no/where.npz"), defenses=("plain",))
    with pytest.raises(CorpusError, match=r"no/where\.npz"):
        list(matrix.cells(gone, rows, tmp_path / "w", CPU))
    assert not rows.exists()


def test_a_seed_or_rate_that_is_named_twice_is_run_once(source, tmp_path):
    plan = plan_of(source, defenses=("plain",), seeds=(0, 0), rates=(0.1, 0.1))
    assert len(set(matrix.groups(plan))) == 1
    rows = matrix.cells(plan, tmp_path / "rows.jsonl", tmp_path / "w", CPU)
    assert [row["defense"] for row in rows] == ["plain", "oracle", "random"]


def test_one_that_is_asked_to_stop_stops(source, tmp_path, monkeypatch):
    def defend(view, settings, backend, **how):
        raise Terminated("terminated")

    monkeypatch.setitem(DEFENSES, "slow", Entry(defend, DEFENSES["plain"].settings, ""))
    out = tmp_path / "rows.jsonl"
    with pytest.raises(Terminated):
        list(matrix.cells(plan_of(source, defenses=("slow",)), out, tmp_path / "w", CPU))
    assert not out.exists()


def test_a_second_process_is_refused_the_folder_of_work(source, tmp_path):
    with run.locked(tmp_path / "w"), pytest.raises(OutputError, match="another csc-gpu"):
        next(matrix.cells(plan_of(source), tmp_path / "rows.jsonl", tmp_path / "w", CPU))


def test_reading_rows_changes_no_file_and_a_whole_line_counts_without_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(made(key=name)) for name in "ab"]
    path.write_text("\n".join(lines))
    assert [row["key"] for row in matrix.read_rows(path)] == ["a", "b"]
    assert path.read_text() == "\n".join(lines)
    matrix.end_line(path)
    matrix.append(path, made(key="c"))
    assert [row["key"] for row in matrix.read_rows(path)] == ["a", "b", "c"]
    with path.open("a") as file:
        file.write('{"key": "d", "def')
    assert len(matrix.read_rows(path)) == 3 and path.read_text().endswith("def")
    matrix.end_line(path)
    assert path.read_text().endswith("}\n")
    with pytest.raises(ConfigError, match="no results file"):
        matrix.read_rows(tmp_path)


def test_a_rate_that_the_plan_gives_is_not_called_the_true_one(source):
    plan = plan_of(source, defense={"spectral": {"spectral.rate": 0.2}})
    assert matrix.changes_of(plan, "spectral", 0.1)["spectral.rate"] == 0.2
    assert not matrix._is_told(plan, "spectral", 0.1)
    assert matrix._is_told(plan_of(source), "spectral", 0.1)
    assert not matrix._is_told(plan_of(source), "spectral", 0.0)  # no attack: the default rate


# ------------------------------------------------------------------------------------ comparison


def made(defense="ac", seed=0, asr=0.1, **more):
    row = {
        "key": f"{defense}{seed}{more.get('attack', '')}", "data": "few", "attack": "badnets",
        "rate": 0.1, "rate_of": "corpus", "label_noise": 0.0, "attack_options": {}, "seed": seed,
        "defense": defense, "changed": {}, "error": None, "told_rate": None, "needs": [],
        "before": {"acc": 0.9, "asr": 0.95}, "after": {"acc": 0.8, "asr": asr, "ra": 0.7},
        "recovered": None, "detection": {"tpr": 0.5, "fpr": 0.25, "auroc": None},
        "seconds_in_all": 30.0, "times_plain": 3.0, "settings": {"train.model": "resnet8"},
        "versions": {"torch": "2"}, "machine": "m", "commit": "abc",
    }  # fmt: skip
    return row | more


def test_figures_are_means_over_seeds_with_n_and_spread():
    (line,) = comparison.lines([made(seed=0, asr=0.1), made(seed=1, asr=0.3)])
    assert line.figure("asr").mean == pytest.approx(0.2)
    assert line.figure("asr").spread == pytest.approx(0.2 / 2**0.5)
    assert line.figure("asr").text(3) == "0.200 ± 0.141"
    assert line.figure("auroc").text(3) == "-"
    (single,) = comparison.lines([made()])
    assert single.figure("asr").text(3) == "0.100"


def test_rows_of_other_settings_attacks_and_defenses_are_not_averaged():
    rows = [made(), made("scan"), made(attack="blend"), made(key="z", changed={"ac.dims": 6})]
    assert len(comparison.lines(rows)) == 4


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"settings": {"train.model": "resnet8"}}, {"settings": {"train.model": "resnet18"}},
         ("train.model=resnet8", "train.model=resnet18")),
        ({"reserve": 0.2}, {"reserve": 0.3}, ("reserve=0.2", "reserve=0.3")),
        ({"source": "a.npz"}, {"source": "b.npz"}, ("source=a.npz", "source=b.npz")),
        ({"rows": 6000}, {"rows": 3000}, ("rows=6000", "rows=3000")),
        ({"image_size": [8]}, {"image_size": [9]}, ("image_size=[8]", "image_size=[9]")),
        # a default that a later version changed: a row says what it was then
        ({"settings": {"ac.dims": 7}}, {"settings": {"ac.dims": 10}}, ("ac.dims=7", "ac.dims=10")),
    ],
)  # fmt: skip
def test_rows_that_are_no_replicates_are_lines_that_say_how_they_differ(one, other, told):
    rows = [made(**one), made(seed=1, **other), made(seed=2, **one)]
    found = comparison.lines(rows)
    assert [line.n for line in found] == [2, 1]
    assert tuple(line.told for line in found) == told
    assert set(comparison.labelled(found)) == {f"ac {text}" for text in told}


def test_a_setting_that_came_later_counts_as_its_default_and_told_rates_part_nobody():
    def of(settings, **more):
        return made("csc", settings={"train.model": "resnet8", **settings}, **more)

    rows = [of({}), of({"recover.most": 0.5}, seed=1), of({"gpu.memory": 9.0}, seed=2)]
    (line,) = comparison.lines([*rows, of({"checkpoint.minutes": 1.0}, seed=3)])
    assert line.n == 4 and line.told == ""
    unset, other = comparison.lines([of({}), of({"recover.most": 0.6}, seed=1)])
    assert (unset.told, other.told) == ("recover.most=0.5", "recover.most=0.6")
    told = [
        made("spectral", seed, told_rate=rate, settings={"spectral.rate": rate})
        for seed, rate in ((0, 0.05), (1, 0.049))
    ]
    assert [line.n for line in comparison.lines(told)] == [2]


@pytest.mark.parametrize(("classes", "pca", "lines"), [(10, 16, 1), (10, 20, 2), (400, 40, 1)])
def test_what_the_number_of_labels_decides_is_no_difference(classes, pca, lines):
    """Rows of before had the components by number that are now left to the labels."""
    least = min(0.002, 0.2 / classes)
    older = {"train.model": "resnet8", "segregate.pca": pca, "segregate.min_share": least}
    rows = [made("csc", 0, classes=classes), made("csc", 1, classes=classes, settings=older)]
    assert len(comparison.lines(rows)) == lines


def test_n_counts_seeds_and_two_targets_of_one_seed_are_one_figure():
    rows = [made(asr=0.1), made(key="again", asr=0.3, target="3"), made(seed=1, asr=0.4)]
    (line,) = comparison.lines(rows)
    assert line.n == 2 and line.figure("asr").values == (pytest.approx(0.2), 0.4)
    assert "| ac | 2 | 0.300 ± 0.141 |" in comparison.markdown([line], ("asr",))


def test_a_table_has_the_controls_first_and_the_defenses_as_they_are_listed():
    told = ("spectral", "own", "csc", "random", "ac", "oracle", "plain")
    found = comparison.lines([made(defense=name, seed=0) for name in told])
    (ours,) = comparison.cells(found).values()
    names = [line.first["defense"] for line in ours]
    assert names == ["plain", "oracle", "random", "csc", "ac", "spectral", "own"]
    rows = [text.split(" | ")[0] for text in comparison.markdown(found).splitlines()]
    assert [text[2:].rstrip("*†") for text in rows if text[2:].rstrip("*†") in told] == names
    listed = [text.split(",")[2] for text in comparison.table_csv(found).splitlines()[1:]]
    assert [text.rstrip("*†") for text in listed] == names


def test_a_row_that_failed_before_it_knew_its_corpus_is_of_the_line_of_the_others():
    failed = made(error="no luck")
    failed = {name: value for name, value in failed.items() if name != "settings"}
    (line,) = comparison.lines([failed, made(seed=1, rows=6000, reserve=0.2)])
    assert line.n == 1 and len(line.failed) == 1


def test_of_a_cell_that_was_run_again_the_last_row_counts():
    (line,) = comparison.lines([made(error="no luck"), made(asr=0.4)])
    assert line.figure("asr").values == (0.4,) and not line.failed


def test_images_are_a_column_and_a_row_from_before_they_were_counted_has_none():
    rows = [made(), made("scan", images_times_plain=1.75)]
    told = comparison.markdown(comparison.lines(rows), (comparison.IMAGES,))
    assert "| images x plain |" in told and "| ac | 1 | - |" in told and "| 1.75 |" in told
    assert "forward and back" in told
    assert comparison.IMAGES not in comparison.markdown(comparison.lines([made()]))


def test_an_attack_that_did_not_take_hold_and_a_failure_are_said():
    weak = made(before={"acc": 0.9, "asr": 0.2})
    assert comparison.NOT_TAKEN in comparison.lines([weak])[0].remark
    failed = {k: v for k, v in made(error="no luck").items() if k not in ("before", "after")}
    (line,) = comparison.lines([failed, made(seed=1)])
    assert "no luck" in line.remark and len(line.rows) == 1
    assert comparison.lines([made(told_rate=0.1)])[0].defense == "ac*"
    assert comparison.lines([made(needs=["reserve"])])[0].defense == "ac†"


def test_the_notes_name_every_commit_and_what_the_signs_mean():
    rows = [made(), made(seed=1, commit="def"), made("scan", needs=["reserve"]), made("ct")]
    told = " ".join(comparison.notes(comparison.lines(rows)))
    assert "commit abc, def." in told and "† was given clean images" in told
    assert "†" not in " ".join(comparison.notes(comparison.lines([made()])))


def test_what_was_changed_is_said_beside_the_remark_and_no_bar_breaks_the_table():
    weak = made(before={"acc": 0.9, "asr": 0.2}, changed={"ac.dims": 6})
    assert comparison.lines([weak])[0].told == f"{comparison.NOT_TAKEN}; ac.dims=6"
    failed = comparison.markdown(comparison.lines([made(error="a | b")]))
    assert r"a \| b" in failed


def test_names_in_a_plot_do_not_overlap_and_two_of_a_kind_are_told_apart():
    rows = [made(f"defense-{number}", asr=1.0) for number in range(12)]
    named = comparison.labelled(comparison.lines([*rows, made(), made(key="z", changed={"d": 6})]))
    assert {"ac", "ac d=6"} <= set(named)
    svg = ElementTree.fromstring(comparison.scatter(named, "asr", "acc", "x", "y"))
    texts = [text for text in svg.iter() if text.tag.endswith("text") and "fill" in text.attrib]
    places = {(text.attrib["x"], text.attrib["y"]) for text in texts}
    assert len(texts) == len(places) == 14
    heights = sorted(float(y) for x, y in places if float(x) > 300)
    assert min(np.diff(heights)) >= 10 and max(heights) < comparison.HEIGHT
    assert len({comparison.colour(number) for number in range(18)}) == 18


def test_a_plot_tells_n_and_spread():
    named = comparison.labelled(comparison.lines([made(seed=0, asr=0.1), made(seed=1, asr=0.3)]))
    told = comparison.scatter(named, "asr", "acc", "x", "y")
    assert "x 0.2000 ± 0.1414, y 0.8000 ± 0.0000, n 2" in told
    drawn = comparison.bars(named, "seconds", "x plain", "cost")
    assert "30.0 ± 0.0 seconds, 3.00 ± 0.00 x plain" in drawn


def test_bars_are_of_seconds_and_long_names_leave_them_their_length():
    long = made("b" * 90, seconds_in_all=15.0, times_plain=None)
    drawn = comparison.bars(
        comparison.labelled(comparison.lines([made(), long])), "seconds", "x plain", "cost"
    )
    svg = ElementTree.fromstring(drawn)
    widths = [float(bar.attrib["width"]) for bar in svg if bar.tag.endswith("rect")]
    assert widths == [200.0, 100.0] and float(svg.attrib["width"]) > 740
    assert ">15.0 seconds</text>" in drawn and ">30.0 seconds, 3.00 x plain</text>" in drawn


def test_a_table_of_the_page_has_no_empty_column_and_says_changes_beside_the_name():
    plain = made("plain", detection=None, attack="none", changed={"train.lr": 0.1})
    weak = made("scan", before={"acc": 0.9, "asr": 0.2})
    page = comparison.page(comparison.lines([made(), made(seed=1), weak, plain]))
    first, second = (part.partition("</table>")[0] for part in page.split("<table>")[1:])
    assert "<th>recall" in first and "<th>recall" not in second
    assert "<th>recovered ra" not in first + second and "<th>x plain" in second
    assert "plain<small>train.lr=0.1</small><td>1" in second
    assert "<td>0.800<small>± 0.000</small>" in first
    assert f"<td class=words>{comparison.NOT_TAKEN}" in first
    assert "remark" not in second  # nobody has one


def test_the_page_is_whole_and_its_plots_hold_every_defense(tmp_path):
    rows = [made(), made("a<b"), made("scan", detection=None), made(attack="none", asr=None)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = comparison.write(source, tmp_path / "out")
    assert [path.name for path in paths] == ["table.md", "table.csv", "table.html"]
    page = paths[2].read_text()
    assert "<script" not in page and "src=" not in page and "href=" not in page
    assert "a&lt;b" in page and "a<b" not in page
    plots = [part.partition("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    drawn = [ElementTree.fromstring(f"<svg{plot}") for plot in plots]
    circles = [len(list(plot.iter("{http://www.w3.org/2000/svg}circle"))) for plot in drawn]
    assert circles == [3, 2, 0, 1, 0]  # asr, detection, cost; without attack detection and cost
    table = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [row["defense"] for row in table] == ["ac", "scan", "a<b", "ac"]
    assert table[0]["asr"] == "0.1" and table[0]["asr sd"] == "" and table[0]["asr n"] == "1"
    assert "### few, badnets 0.1" in paths[0].read_text()


def test_a_file_without_rows_or_with_others_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="no rows"):
        comparison.write(tmp_path / "none.jsonl", tmp_path / "out")
    strange = tmp_path / "strange.jsonl"
    thin = json.dumps({name: value for name, value in made().items() if name != "rate"})
    for text, told in (('{"a": 1}', "line 1 has no 'key'"), ("5", "line 1 has no 'key'"),
                       (f"{json.dumps(made())}\n{thin}", "line 2 has no 'rate'")):  # fmt: skip
        strange.write_text(f"{text}\n")
        with pytest.raises(ConfigError, match=f"no results file.*{told}"):
            comparison.write(strange, tmp_path / "out")


def test_the_commands_run_a_plan_and_make_its_tables(source, tmp_path, monkeypatch):
    plan = tmp_path / "plan.toml"
    told = "".join(f"{name} = {json.dumps(value)}\n" for name, value in QUICK.items())
    plan.write_text(
        f'data = ["few={source}"]\nattacks = ["badnets"]\ndefenses = ["plain"]\n[settings]\n{told}'
    )
    words = ["matrix", plan, "--out", tmp_path / "rows.jsonl", "--cpu", "--threads", 1]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("few badnets 0.05 seed 0 plain: asr before")
    monkeypatch.setitem(DEFENSES, "luckless", failing([]))
    plan.write_text(plan.read_text().replace('["plain"]', '["plain", "luckless"]'))
    failed = CliRunner().invoke(cli, [str(word) for word in words])
    assert failed.exit_code == 1 and "luckless: failed: ValueError: out of luck" in failed.stdout
    assert failed.stderr.endswith("1 cells failed; with --retry they are run again\n")
    again = CliRunner().invoke(cli, [str(word) for word in words])  # runs nothing; it still stands
    assert again.exit_code == 1 and not again.stdout
    assert again.stderr.endswith("1 cells failed; with --retry they are run again\n")
    monkeypatch.setitem(DEFENSES, "luckless", DEFENSES["plain"])
    mended = CliRunner().invoke(cli, [str(word) for word in (*words, "--retry")])
    assert mended.exit_code == 0 and "luckless: asr before" in mended.stdout
    plan.write_text(plan.read_text().replace(', "luckless"', ""))
    words = ["report", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "table.html").exists()
