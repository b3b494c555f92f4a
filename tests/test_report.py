"""The page of a run: all there is on it, nothing from outside, no harm from any name."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from csc_gpu import report, run
from csc_gpu.cli import cli
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.report import findings, pictures
from tests.browser import complaints, opened

QUICK = ("--set", "train.epochs=4", "--set", "train.min_steps=1", "--set", "train.batch=32",
         "--set", "segregate.rule=persistence", "--set", "segregate.persistence=1",
         "--set", "segregate.min_rows=4")  # fmt: skip
HOSTILE = ("<script>alert(1)</script>", '=cmd|\' "x"', "ü 漢&amp;'\"><img src=x onerror=alert(1)>")
LIMIT = 5_000_000


def call(*words: object):
    return CliRunner().invoke(cli, [str(word) for word in words])


def folder_of(name: str) -> str:
    return name.replace("/", "\u2215")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run on digits, scored; and one on an image folder whose every name is hostile."""
    at = tmp_path_factory.mktemp("place")
    os.environ["XDG_CACHE_HOME"] = str(at / "cache")
    steps = [
        ("poison", "digits", at / "p", "--attack", "badnets", "--rate", 0.1, "--target", 3),
        ("train", at / "p", "--out", at / "run", "--cpu", "--threads", 1, *QUICK),
        ("score", at / "run", "--key", at / "p" / "key.npz"),
        ("report", at / "run"),
    ]
    rng = np.random.default_rng(0)
    for label, name in enumerate(HOSTILE):
        folder = at / "hostile" / folder_of(name)
        folder.mkdir(parents=True)
        for row in range(20):
            image = rng.integers(0, 80, (12, 12, 3)) + 80 * label
            image[-3:, -3:] = 255 * (row < 6)
            file = folder / f"{row} {folder_of(name)}.png"
            Image.fromarray(image.astype(np.uint8)).save(file)
    steps.append(("train", at / "hostile", "--out", at / "bad", "--cpu", "--threads", 1,
                  "--set", "segregate.rule=algorithm1", *QUICK[:6]))  # fmt: skip
    for step in steps:
        done = call(*step)
        assert done.exit_code == 0, done.output
    return at


class Reader(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    VOID = frozenset({"meta", "img", "link", "input", "br"})

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_parses_and_says_the_verdict(place):
    page = Reader(place / "run" / "report.html")
    assert not page.open
    verdict = json.loads((place / "run" / "summary.json").read_text())["verdict"]
    assert verdict.startswith("poison suspected") and verdict[1:] in page.text
    for words in ("labelled", "accuracy", "attack success", "Clusters", "csc-gpu train", "torch"):
        assert words in page.text
    assert (place / "run" / "report.html").stat().st_size < LIMIT


def test_train_writes_the_page_and_score_adds_to_it(place):
    assert (place / "bad" / "report.html").is_file()
    assert "attack success" not in Reader(place / "bad" / "report.html").text


def test_the_recovered_net_s_score_is_on_the_page_if_there_is_one():
    rates = {"acc": 0.9, "asr": 1.0, "ra": 0.875}
    scored = {"before": rates, "after": rates, "detection": None}
    for recovered, shown in ((rates, ["87.5%"]), (None, [])):
        told = report.tiles({"rows": 9, "suspects": 1}, {**scored, "recovered": recovered})
        assert [value for name, value, _ in told if name == "true class"] == shown


def test_the_page_says_what_each_witness_found():
    case = {"label": 0, "commands": [["core", 0.1], ["halves", 0.25]], "limit": 0.5, "flagged": 7}
    told = {"labels": [case | {"trigger": False}], "cleared_labels": [1], "verified": True}
    line, cleared = report.witness({"segregation": told, "classes": ["cat", "dog"]})
    assert "turns 25.0% of them into 'cat': no trigger (the limit is 50.0%). 7 rows" in line
    assert cleared == "'dog' was suspected and cleared."
    narrow = case | {"trigger": False, "chosen": "narrow", "source": 1, "most": 0.96}
    (line,) = report.witness({"segregation": {"labels": [narrow]}, "classes": ["cat", "dog"]})
    assert "It turns 96.0% of 'dog' into 'cat': a trigger for these alone. 7 rows" in line


def test_on_paper_the_notes_are_as_large_as_the_text_and_closed_parts_are_open(place, tmp_path):
    with opened(tmp_path / "profile") as browser:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        browser.get((place / "run" / "report.html").as_uri())
        size = "return getComputedStyle(document.querySelector(arguments[0])).fontSize"
        text, note = (float(browser.execute_script(size, tag)[:-2]) for tag in ("p", "td"))
        assert note <= text
        last = "return document.querySelector('main details:last-of-type td').checkVisibility()"
        assert browser.execute_script(last.replace("()", "({contentVisibilityAuto: true})"))
        assert not browser.find_element("id", "told").is_displayed()


def test_plots_are_files_too(place):
    names = ("features", "k-distance", "training", "roc", "precision-recall")
    for name in names:
        with Image.open(place / "run" / "plots" / f"{name}.png") as image:
            image.verify()
        assert "<svg" in (place / "run" / "plots" / f"{name}.svg").read_text()
    assert {path.stem for path in (place / "run" / "plots").iterdir()} == set(names)


@pytest.mark.parametrize("name", ["run", "bad"])
def test_nothing_on_the_page_comes_from_outside(place, name):
    page = Reader(place / name / "report.html")
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    text = (place / name / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "https:" not in text and "http:" not in text
    assert not re.search(r"url\((?!\"data:|#)", text)


def test_hostile_names_are_text_on_the_page(place, tmp_path):
    found = findings.read(place / "bad")
    assert found.suspects is not None
    n = len(found.suspects.paths)
    suspects = replace(found.suspects, suspect=np.arange(n) % 2 == 0)
    counts = dict.fromkeys(found.summary["classes"], n // 6)
    found = replace(
        found, suspects=suspects, summary={**found.summary, "suspects_by_class": counts}
    )
    (tmp_path / "page.html").write_text(report.html(found, report.looks(found), {}))
    page = Reader(tmp_path / "page.html")
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {},
    ]  # fmt: skip
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes]
    shown = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]
    for name in HOSTILE:
        assert any(folder_of(name) in alt for alt in shown)


def test_the_trigger_shows_in_the_mean_difference(place):
    found = findings.read(place / "run")
    (shown,) = report.looks(found).galleries[:1]
    assert shown.label == "3" and shown.suspects and shown.others
    assert [one.name for one in shown.means][-1].startswith("bright")


def test_means_differ_where_the_trigger_is():
    rng = np.random.default_rng(0)
    others = rng.integers(0, 255, (60, 8, 8, 3)).astype(np.uint8)
    suspects = rng.integers(0, 255, (60, 8, 8, 3)).astype(np.uint8)
    suspects[:, -2:, -2:] = 255
    agreed = pictures.agreement(suspects, others)[..., 0]
    assert (agreed[-2:, -2:] == 255).all() and agreed[:-2, :-2].max() < 128
    off = pictures.difference(suspects.mean(axis=0), others.mean(axis=0)).astype(int)
    assert off[-2:, -2:].min() > 200 and np.abs(off[:-2, :-2] - 127).max() < 100


def test_a_source_that_is_gone_is_said_on_the_page(place, tmp_path):
    found = findings.read(place / "run")
    gone = {**found.summary, "source": str(tmp_path / "gone")}
    looks = report.looks(replace(found, summary=gone))
    assert "could not be read" in looks.missing and str(tmp_path / "gone") in looks.missing
    assert looks.missing in report.html(found, looks, {}).replace("&#39;", "'")


def test_a_run_without_what_can_be_drawn_still_has_a_page(place, tmp_path):
    for path in (place / "run").iterdir():
        if path.name in ("summary.json", "settings.toml"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    page = Reader(report.write(tmp_path))
    assert not page.open and "kept nothing to draw" in page.text


def test_a_page_that_fails_leaves_the_run_whole(place, tmp_path, monkeypatch):
    def fail(*words: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(report, "write", fail)
    done = call("train", place / "p", "--out", tmp_path / "r", "--cpu", "--threads", 1, *QUICK[:6],
                "--defense", "plain")  # fmt: skip
    assert done.exit_code == 0 and "no report (planted)" in done.output
    assert (tmp_path / "r" / "summary.json").is_file()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"summary\.json"):
        report.write(tmp_path)
    assert call("report", tmp_path).exit_code == 2


def test_umap_without_kept_features_is_refused(place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(ConfigError, match="umap-learn is not installed"):
        report.write(place / "run", "umap")


def test_the_command_gives_the_run_again(place):
    words = findings.read(place / "run").command()
    assert words.startswith("csc-gpu train ") and "--seed 0 --cpu" in words
    assert "--set train.epochs=4" in words and "segregate.persistence=1" in words


def test_a_drawing_is_read_as_it_was_written(place, tmp_path):
    drawing = run.load_drawing(place / "run" / "drawing.npz")
    run.save_drawing(tmp_path / "d.npz", drawing)
    again = run.load_drawing(tmp_path / "d.npz")
    assert all((getattr(drawing, name) == getattr(again, name)).all() for name in vars(drawing))
    assert drawing.plane.shape == (*drawing.cluster.shape, 2)


@pytest.mark.parametrize("name", ["run", "bad"])
def test_a_browser_shows_the_page_without_a_complaint(place, tmp_path, name):
    with opened(tmp_path / "profile") as browser:
        browser.get((place / name / "report.html").as_uri())
        drawn = len(run.load_drawing(place / name / "drawing.npz").rows)
        assert len(browser.find_elements("css selector", "#map circle")) == drawn
        browser.find_element("css selector", "input[value=label]").click()
        browser.find_element("id", "map").click()
        assert "labelled" in browser.find_element("id", "told").text
        assert browser.find_element("id", "thumb").is_displayed()
        assert complaints(browser) == []
