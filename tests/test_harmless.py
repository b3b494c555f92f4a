"""Names that strangers chose do no harm in a terminal or a spreadsheet, and can be had back."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csc_gpu.harmless import cell, plain, printable
from csc_gpu.run import COLUMNS, Names, load_suspects, save_suspects
from csc_gpu.types import Segregation

FORMULAS = ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", '=HYPERLINK("x")']


@given(st.text())
def test_a_cell_gives_its_text_back(text):
    assert plain(cell(text)) == text


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_told_to_be_none(text):
    assert cell(text) == "'" + text


@pytest.mark.parametrize("text", ["cat", "a=b", "train/=x.png", "-1", "+2.5", "", "ü", "a b"])
def test_other_words_and_numbers_stay_as_they_are(text):
    assert cell(text) == text


def test_an_apostrophe_of_somebody_else_s_stays():
    assert plain("'tis") == "'tis" and plain("'") == "'" and plain("'-2") == "'-2"


def test_what_does_not_print_is_spelled_out():
    assert printable("a\x1b[31mb\x07\r") == "a\\x1b[31mb\\x07\\r"
    assert printable("\u202egnp.exe") == "\\u202egnp.exe"
    assert printable("\udcff") == "\\udcff"
    assert printable("übel 漢字\n<b>") == "übel 漢字\n<b>"


def test_hostile_paths_are_joined_again_after_a_spreadsheet_safe_file(tmp_path):
    paths = (*FORMULAS, "train/'\"<script>/ü \n.png", "\udcff.png")
    n = len(paths)
    labels = tuple("=cat" if row % 2 else "dog" for row in range(n))
    table = {name: np.arange(n) for name in COLUMNS}
    told = Segregation(np.arange(n) == 1, np.linspace(0, 1, n, dtype=np.float32), table, {})
    save_suspects(tmp_path / "suspects.csv", Names(np.arange(n), paths, labels), told)
    text = (tmp_path / "suspects.csv").read_text(errors="surrogateescape")
    with (tmp_path / "suspects.csv").open(newline="", errors="surrogateescape") as file:
        cells = [word for line in csv.reader(file) for word in line]
    assert not [word for word in cells if word[:1] in tuple("=+@\t\r")] and "'=cat" in text
    back = load_suspects(tmp_path / "suspects.csv")
    assert back.paths == paths and back.labels == labels
