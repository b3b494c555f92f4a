"""Settings: named by dotted paths, checked by type, the same after a trip through TOML."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_gpu import csc
from csc_gpu.config import (
    explained,
    names,
    override,
    parse_change,
    read_toml,
    to_toml,
    typed,
)
from csc_gpu.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Oven:
    heat: float = 180.0
    shelves: tuple[float, ...] = (1.0, 2.0)
    fan: bool = False

    def __post_init__(self) -> None:
        if self.heat <= 0:
            raise ConfigError(f"oven.heat must be above 0, got {self.heat}")


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    name: str = "small"
    chairs: int = 4
    limit: float | None = 1.5
    oven: Oven = field(default_factory=Oven)


KITCHEN = Kitchen()


def through_toml(section: Any, path: Path) -> dict[str, Any]:
    path.write_text(to_toml(section), encoding="utf-8")
    return read_toml(path)


def values(section: Any) -> list[tuple[str, Any]]:
    return [(name, attrgetter(name)(section)) for name in names(section)]


# ----------------------------------------------------------------------------------------- override


def test_every_setting_is_named_by_its_dotted_path():
    there = ["name", "chairs", "limit", "oven.heat", "oven.shelves", "oven.fan"]
    assert names(KITCHEN) == there


def test_a_change_replaces_its_setting_and_no_other():
    assert override(KITCHEN, {"oven.fan": True}) == Kitchen(oven=Oven(fan=True))
    assert override(KITCHEN, {"name": "big", "chairs": 6}) == Kitchen(name="big", chairs=6)


def test_no_change_gives_equal_settings():
    assert override(KITCHEN, {}) == KITCHEN


def test_the_settings_given_stay_as_they_were():
    override(KITCHEN, {"oven.heat": 200.0, "chairs": 1})
    assert Kitchen() == KITCHEN


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("oven.heta", "oven.heat"), ("chars", "chairs"), ("fan", "oven.fan"), ("pan.fan", "oven.fan")],
)
def test_a_mistyped_name_gets_the_name_that_was_meant(typed: str, meant: str):
    with pytest.raises(ConfigError, match=f"unknown setting '{typed}'; did you mean '{meant}'\\?"):
        override(KITCHEN, {typed: 1})


@pytest.mark.parametrize("typed", ["zzz", ""])
def test_a_name_that_nothing_is_like_is_refused_with_what_there_is(typed: str):
    with pytest.raises(ConfigError, match=f"unknown setting '{typed}'; there are name, chairs"):
        override(KITCHEN, {typed: 1})


def test_an_unknown_name_is_told_before_a_wrong_value():
    with pytest.raises(ConfigError, match="unknown setting"):
        override(KITCHEN, {"chairs": "many", "zzz": 1})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("chairs", 1.5, "a whole number"),
        ("chairs", 4.0, "a whole number"),
        ("chairs", "4", "a whole number"),
        ("chairs", True, "a whole number"),
        ("oven.heat", "hot", "a number"),
        ("oven.heat", False, "a number"),
        ("oven.heat", [1.0], "a number"),
        ("oven.fan", 1, "true or false"),
        ("oven.fan", "true", "true or false"),
        ("name", 7.5, "a word"),
        ("name", True, "a word"),
        ("limit", "none", "a number"),
        ("oven.shelves", [1.0, "two"], "a number"),
        ("oven.shelves", True, "a number"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: Any, wanted: str):
    with pytest.raises(ConfigError, match=f"{name} must be {wanted}, got"):
        override(KITCHEN, {name: value})


def test_a_whole_number_serves_where_a_number_is_wanted():
    heat = override(KITCHEN, {"oven.heat": 200}).oven.heat
    assert heat == 200.0
    assert isinstance(heat, float)
    assert isinstance(override(KITCHEN, {"limit": 2}).limit, float)


def test_a_whole_number_serves_where_a_word_is_wanted():
    assert override(KITCHEN, {"name": 7}).name == "7"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (255.0, "255"),
        (0.002, "0.002"),
        (3, "3"),
        ("top-left", "top-left"),
        ("", '""'),
        ("7", '"7"'),
        ("true", '"true"'),
        (" a", '" a"'),
        ((0.5, 2.0), "[0.5,2]"),
        (("5", "cat"), '["5","cat"]'),
        ((), "[]"),
    ],
)
def test_a_value_is_typed_as_toml_or_as_a_bare_word_and_comes_back(value: Any, text: str):
    assert typed(value) == text
    back = parse_change(f"name={text}")[1]
    assert (tuple(back) if isinstance(value, tuple) else back) == value


@pytest.mark.parametrize("value", [[3, 4.5], (3, 4.5)])
def test_a_list_becomes_a_tuple_of_the_inner_type(value: Any):
    shelves = override(KITCHEN, {"oven.shelves": value}).oven.shelves
    assert shelves == (3.0, 4.5)
    assert all(isinstance(shelf, float) for shelf in shelves)


def test_one_value_serves_as_a_tuple_of_one():
    assert override(KITCHEN, {"oven.shelves": 3}).oven.shelves == (3.0,)


def test_a_section_still_refuses_what_is_out_of_its_range():
    with pytest.raises(ConfigError, match=r"oven\.heat must be above 0, got -1\.0"):
        override(KITCHEN, {"oven.heat": -1})


# --------------------------------------------------------------------------------------------- TOML


def test_tables_are_flattened_to_dotted_paths(tmp_path: Path):
    path = tmp_path / "a.toml"
    path.write_text('name = "x"\n[oven]\nheat = 20\n[a.b]\nc = [1, 2]\n', encoding="utf-8")
    assert read_toml(path) == {"name": "x", "oven.heat": 20, "a.b.c": [1, 2]}


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read settings from .*absent\.toml"):
        read_toml(tmp_path / "absent.toml")


def test_a_directory_is_no_settings_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read settings"):
        read_toml(tmp_path)


def test_text_that_is_not_toml_is_told_with_its_place(tmp_path: Path):
    (tmp_path / "bad.toml").write_text("a = 1\nb = = 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML: .*line 2"):
        read_toml(tmp_path / "bad.toml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "bytes.toml").write_bytes(b"a = '\xff\xfe'\n")
    with pytest.raises(ConfigError, match=r"cannot read settings from .*bytes\.toml"):
        read_toml(tmp_path / "bytes.toml")


def test_every_setting_of_a_run_survives_a_trip_through_toml(tmp_path: Path):
    default = csc.Settings()
    there = through_toml(default, tmp_path / "settings.toml")
    assert set(there) == set(names(default))
    assert override(default, there) == default


def test_changed_settings_survive_a_trip_through_toml(tmp_path: Path):
    changes = {
        "train.model": "resnet8",
        "train.flip": True,
        "train.lr": 1,
        "segregate.scales": [0.25, 0.5],
        "conceal.batch": 3,
        "watch.every": 0.1,
    }
    changed = override(csc.Settings(), changes)
    assert changed != csc.Settings()
    there = through_toml(changed, tmp_path / "settings.toml")
    assert override(csc.Settings(), there) == changed


@settings(deadline=None, max_examples=50)
@given(
    name=st.text(st.characters(exclude_categories=["Cs"])),
    chairs=st.integers(-(2**63), 2**63 - 1),
    heat=st.floats(1e-300, 1e300),
    shelves=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    fan=st.booleans(),
)
def test_any_settings_survive_a_trip_through_toml(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    chairs: int,
    heat: float,
    shelves: list[float],
    fan: bool,
):
    oven = Oven(heat=heat, shelves=tuple(shelves), fan=fan)
    there = Kitchen(name=name, chairs=chairs, oven=oven)
    path = tmp_path_factory.getbasetemp() / "kitchen.toml"
    assert override(KITCHEN, through_toml(there, path)) == there


# ------------------------------------------------------------------------------------- parse_change


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("train.epochs=3", "train.epochs", 3),
        ("train.lr=1e-2", "train.lr", 0.01),
        ("train.flip=true", "train.flip", True),
        ("train.model=resnet8", "train.model", "resnet8"),
        ('train.model="resnet8"', "train.model", "resnet8"),
        ("segregate.scales=[0.1, 0.2]", "segregate.scales", [0.1, 0.2]),
        (" train.epochs = 3 ", "train.epochs", 3),
        ("segregate.rule=two-stage ", "segregate.rule", "two-stage"),
        ("name=a=b", "name", "a=b"),
        ("train.model=", "train.model", ""),
    ],
)
def test_a_typed_change_is_a_name_and_a_toml_value_or_a_bare_word(text: str, name: str, value: Any):
    assert parse_change(text) == (name, value)
    assert type(parse_change(text)[1]) is type(value)


def test_a_change_without_an_equals_sign_is_refused():
    with pytest.raises(ConfigError, match=r"--set takes NAME=VALUE, got 'train\.epochs'"):
        parse_change("train.epochs")


@pytest.mark.parametrize(
    "name", [name for name, value in values(csc.Settings()) if isinstance(value, float)]
)
def test_no_setting_of_a_run_may_be_nan(name: str):
    with pytest.raises(ConfigError, match=re.escape(name)):
        override(csc.Settings(), dict([parse_change(f"{name}=nan")]))


def test_explained_settings_are_toml_with_every_meaning_above_its_value():
    told = explained(csc.Settings())
    assert tomllib.loads(told) == tomllib.loads(to_toml(csc.Settings()))
    lines = told.splitlines()
    for number, line in enumerate(lines):
        if " = " in line:
            assert lines[number - 1].startswith("# ") and lines[number - 1].endswith((".", ")"))
