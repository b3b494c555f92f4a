"""The pages: every command in them is one, and those of the guides run."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from csc_gpu.cli import cli
from csc_gpu.data.digits import open_digits

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
GUIDES = (ROOT / "README.md", ROOT / "docs" / "untrusted.md", ROOT / "docs" / "researchers.md")
SHORT = ("train.epochs=2", "train.min_steps=20", "watch.epochs=2")


def commands(page):
    """The indented lines of a page that call csc-gpu or a module of ours, as words."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    (.*(?:csc-gpu|csc_gpu|-m benchmarks).*)$", text, re.MULTILINE):
        words = shlex.split(line.replace("; ", "  ;  "), comments=True)
        while words:
            end = words.index(";") if ";" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


ALL = [(page.name, " ".join(words), words) for page in PAGES for words in commands(page)]


def parsed(command, words):
    """Parse the words as click would, without running anything; the name of what would run."""
    context = command.make_context(command.name, list(words), resilient_parsing=False)
    if not isinstance(command, click.Group):
        return command.name
    rest = [*context._protected_args, *context.args]
    _, inner, rest = command.resolve_command(context, rest)
    context = inner.make_context(inner.name, rest, parent=context)
    return inner.name


@pytest.mark.parametrize(("page", "line", "words"), ALL, ids=[f"{p}: {t}" for p, t, _ in ALL])
def test_every_command_of_the_pages_is_one(page, line, words):
    if "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
        at = words.index("-m") + 1
        module = importlib.import_module(words[at])
        found = [x for x in vars(module).values() if isinstance(x, click.Command)]
        group = [x for x in found if isinstance(x, click.Group)] or found
        assert group, words[at]
        assert parsed(group[0], words[at + 1 :])
    else:
        start = words.index("csc-gpu" if "csc-gpu" in words else "csc_gpu") + 1
        assert parsed(cli, words[start:])


def test_a_command_that_does_not_exist_would_be_noticed():
    with pytest.raises(click.UsageError):
        parsed(cli, ["train", "photos/", "--out", "run/", "--no-such-option"])
    with pytest.raises(click.UsageError):
        parsed(cli, ["no-such-command"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 300 digits, one folder a class."""
    place = tmp_path_factory.mktemp("docs")
    corpus = open_digits()
    for part, rows in (("train", range(240)), ("test", range(240, 300))):
        for row in rows:
            folder = place / "photos" / part / corpus.classes[corpus.labels[row]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(corpus.images[row])).save(folder / f"{row}.png")
    return place


@pytest.mark.parametrize("page", GUIDES, ids=[page.stem for page in GUIDES])
def test_the_commands_of_the_guides_run_one_after_the_other(page, photos, tmp_path, monkeypatch):
    shutil.copytree(photos / "photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in commands(page):
        if words[0] != "csc-gpu" or (words[1] == "train" and "--cpu" not in words):
            continue
        if words[1] == "train":
            words += [flag for name in SHORT for flag in ("--set", name)] + ["--threads", "1"]
        if words[1] in ("train", "poison", "clean") and "--resume" not in words:
            words += ["--force"]
        result = CliRunner().invoke(cli, words[1:])
        assert result.exit_code == 0, (words, result.output)
        ran.append(words[1])
    assert "train" in ran


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    words = (
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-d",
        str(tmp_path / "site"),
    )
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.stem for page in (tmp_path / "site").glob("*.html")} - {"404"}
    assert pages == {page.stem for page in (ROOT / "docs").glob("*.md")}
