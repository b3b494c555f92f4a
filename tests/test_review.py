"""People's word: a page in a real browser, a review file, and what honours it."""

from __future__ import annotations

import csv
import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from csc_gpu import clean, review, run
from csc_gpu.cli import cli
from csc_gpu.errors import ConfigError, CorpusError, OutputError
from csc_gpu.review import Session, application, groups
from tests.browser import complaints, opened

flask = pytest.importorskip("flask", reason="flask is not installed")
TOKEN = "the-token"
HOME = {"Host": "127.0.0.1:8000"}
QUICK = ("--set", "train.epochs=2", "--set", "train.min_steps=1", "--set", "train.batch=32",
         "--set", "conceal.epochs=2", "--set", "segregate.rule=persistence",
         "--set", "segregate.persistence=1", "--set", "segregate.min_rows=4")  # fmt: skip


def call(*words: object):
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on poisoned digits, whose verdict is then set: 30 rows in two clusters."""
    at = tmp_path_factory.mktemp("trained")
    os.environ["XDG_CACHE_HOME"] = str(at / "cache")
    for step in (
        ("poison", "digits", at / "p", "--attack", "badnets", "--rate", 0.1, "--target", 3),
        ("train", at / "p", "--out", at / "run", "--cpu", "--threads", 1, "--no-report", *QUICK),
    ):
        done = call(*step)
        assert done.exit_code == 0, done.output
    path = at / "run" / "suspects.csv"
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    threes = [row for row, line in enumerate(lines) if line["label"] == "3"][:30]
    for row, line in enumerate(lines):
        line["is_poison_issue"] = str(row in threes)
        line["cluster"] = "1" if row in threes[:20] else "2"
        line["cluster_size"], line["cluster_density"] = "20", "1"
    run.write_table(path, list(lines[0]), [list(line.values()) for line in lines])
    return at, threes


@pytest.fixture
def folder(trained):
    """The run, without a review."""
    (trained[0] / "run" / run.REVIEW).unlink(missing_ok=True)
    return trained[0] / "run"


def test_suspects_are_grouped_by_cluster_largest_first(folder, trained):
    found = groups(run.load_suspects(folder / "suspects.csv"))
    assert [(one.label, one.name, one.rows) for one in found] == [
        ("3", "cluster 1", trained[1][:20]),
        ("3", "cluster 2", trained[1][20:]),
    ]


@pytest.mark.parametrize("path", ["/", "/wrong/", "/wrong/image/1.png", f"/{TOKEN}x/"])
def test_a_wrong_token_is_refused(folder, path):
    client = application(folder, TOKEN).test_client()
    assert client.get(path, headers=HOME).status_code == 403
    saved = client.post(path.rstrip("/") + "/review", json={}, headers=HOME)
    assert saved.status_code == 403 and not (folder / run.REVIEW).exists()


def test_another_name_of_this_machine_is_refused(folder):
    client = application(folder, TOKEN).test_client()
    assert client.get(f"/{TOKEN}/", headers=HOME).status_code == 200
    assert client.get(f"/{TOKEN}/", headers={"Host": "evil.example:8000"}).status_code == 403


def test_only_suspects_have_images(folder, trained):
    client = application(folder, TOKEN).test_client()
    image = client.get(f"/{TOKEN}/image/{trained[1][0]}.png", headers=HOME)
    assert image.status_code == 200 and image.data.startswith(b"\x89PNG")
    others = np.setdiff1d(np.arange(100), trained[1])
    assert client.get(f"/{TOKEN}/image/{others[0]}.png", headers=HOME).status_code == 404


@pytest.mark.parametrize("said", [{"x": "fine"}, {"9" * 5000: "fine"}, [], {"ROW": "bad"}])
def test_what_is_no_review_is_not_saved(folder, trained, said):
    if isinstance(said, dict):
        said = {key.replace("ROW", str(trained[1][0])): word for key, word in said.items()}
    client = application(folder, TOKEN).test_client()
    assert client.post(f"/{TOKEN}/review", json=said, headers=HOME).status_code == 400
    assert not (folder / run.REVIEW).exists()


def test_a_review_is_saved_and_shown_again(folder, trained):
    first, second, third = trained[1][:3]
    client = application(folder, TOKEN).test_client()
    client.post(f"/{TOKEN}/review", json={first: "fine", second: "poison"}, headers=HOME)
    client.post(f"/{TOKEN}/review", json={first: "fine", third: "poison"}, headers=HOME)
    paths = run.load_suspects(folder / "suspects.csv").paths
    told = {paths[first]: "fine", paths[third]: "poison"}
    assert clean.load_review(folder / run.REVIEW) == told
    page = application(folder, TOKEN).test_client().get(f"/{TOKEN}/", headers=HOME).text
    assert f'data-row="{first}" title="{paths[first]}" data-said="fine"' in page


def test_the_page_forbids_everything_from_outside(folder):
    answer = application(folder, TOKEN).test_client().get(f"/{TOKEN}/", headers=HOME)
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "http" not in answer.text


def test_hostile_names_are_text_on_the_page(folder, trained, monkeypatch):
    hostile = review.Group("<script>alert(1)</script>\x1b", "cluster 1", trained[1])
    monkeypatch.setattr(review, "groups", lambda suspects: [hostile])
    page = application(folder, TOKEN).test_client().get(f"/{TOKEN}/", headers=HOME).text
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b" in page


def test_nothing_listens_beyond_loopback(folder):
    session = Session(folder)
    try:
        port = int(session.url.split(":")[2].split("/")[0])
        assert session._server.socket.getsockname() == ("127.0.0.1", port)
        assert session.url.startswith("http://127.0.0.1:") and len(session.url) > 50
        with pytest.raises(OutputError, match="is taken"):
            Session(folder, port)
        outside = socket.gethostbyname(socket.gethostname())
        if not outside.startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((outside, port), timeout=5)
    finally:
        session._server.server_close()


def test_two_sessions_have_other_tokens(folder):
    sessions = [Session(folder), Session(folder)]
    for session in sessions:
        session._server.server_close()
    assert sessions[0].url.rsplit("/", 2)[1] != sessions[1].url.rsplit("/", 2)[1]


def test_a_run_that_suspects_nobody_has_nothing_to_review(folder, tmp_path):
    for name in ("summary.json", "settings.toml", "suspects.csv"):
        content = (folder / name).read_text().replace(",True,", ",False,")
        (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match="nothing to review"):
        application(tmp_path, TOKEN)


def test_flask_that_is_missing_is_said(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "werkzeug.serving", None)
    with pytest.raises(ConfigError, match=r"csc-gpu\[review\]"):
        Session(folder)


def test_in_a_browser_a_cluster_is_marked_fine_and_clean_honours_it(folder, trained, tmp_path):
    rows = trained[1]
    with opened(tmp_path / "profile") as browser:
        session = Session(folder)
        thread = threading.Thread(target=session.serve)
        thread.start()
        try:
            browser.get(session.url)
            from selenium.webdriver.support.ui import WebDriverWait

            body = browser.find_element("tag name", "body")
            body.send_keys("F")  # the first cluster, as a whole
            body.send_keys("\ue015")  # arrow down: to the second
            body.send_keys("p")
            body.send_keys("s")
            WebDriverWait(browser, 60).until(
                lambda page: page.find_element("id", "state").text == "saved 21"
            )
            assert "1 poison, 20 fine, 9 open" in browser.find_element("id", "count").text
            assert complaints(browser) == []
        finally:
            session.close()
            thread.join()
    done = call("clean", folder, trained[0] / "p", tmp_path / "out", "--as", "folder",
                "--review", folder / run.REVIEW)  # fmt: skip
    assert "10 of 1438 rows left out (20 suspects kept" in done.output, done.output
    with (tmp_path / "out" / "removed.csv").open(newline="") as file:
        told = {int(line["row"]): line["on_the_word_of"] for line in csv.DictReader(file)}
    assert told == {rows[20]: "review"} | dict.fromkeys(rows[21:], "run")


def test_the_head_is_concealed_anew_as_reviewed(folder, trained, tmp_path):
    rows, suspects = trained[1], run.load_suspects(folder / "suspects.csv")
    said = {suspects.paths[row]: clean.FINE for row in rows[:20]}
    clean.save_review(tmp_path / "review.csv", suspects, said)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = call("conceal", folder, "--out", tmp_path / "new", "--review", tmp_path / "review.csv",
                "--cpu", "--threads", 1)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "poison suspected in 10 of 1438 rows" in done.output
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary["suspects"] == 10 and summary["n_outputs"] == 11
    assert summary["segregation"]["reviewed"][0]["role"] == "review"
    again = run.load_suspects(tmp_path / "new" / "suspects.csv")
    assert np.flatnonzero(again.suspect).tolist() == rows[20:]
    assert again.paths == suspects.paths and again.score[rows[0]] == 0
    scored = call("score", tmp_path / "new", "--key", Path(trained[0]) / "p" / "key.npz")
    assert scored.exit_code == 0, scored.output
    assert (tmp_path / "new" / "report.html").is_file()
    assert (tmp_path / "new" / "undefended.safetensors").read_bytes() == before[
        "undefended.safetensors"
    ]
