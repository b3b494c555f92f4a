"""Checkpoints: a run that ended anywhere goes on to the same end; half a record is never read."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from csc_gpu import checkpoint, csc, pipeline, run, segregate
from csc_gpu.backend import Augment, loader, open_backend, resident
from csc_gpu.backend.passes import Portion
from csc_gpu.checkpoint import NOWHERE, Folder, Record
from csc_gpu.cli import cli
from csc_gpu.errors import ConfigError, CorpusError, Interrupted, OutputError, Terminated
from csc_gpu.files import Files
from csc_gpu.models import new_model
from csc_gpu.progress import Console
from csc_gpu.train import Settings, train
from csc_gpu.types import Corpus, DefenderView, Outcome
from tests.test_csc import settings_of
from tests.test_gpu_backend import digits

CPU = open_backend("cpu", 1)
KIND = run.RUN
TRAINING = Settings(model="resnet8", epochs=3, min_steps=0, batch=8, flip=True, shift=0.2)


def record(value: float = 1.0, **facts: object) -> Record:
    return Record({"x": torch.tensor([value, float("nan")]), "b": torch.tensor([True])}, facts)


class Cut(Exception):
    """The power fails."""


class Failing:
    """Checkpoints in memory; the power fails right after the given saves, counted from 1."""

    def __init__(self, *cuts: int, every_step: bool = False) -> None:
        self.held: dict[str, Record] = {}
        self.saves, self.cuts, self.every_step = 0, cuts, every_step
        self.names: list[str] = []

    def load(self, name: str) -> Record | None:
        return self.held.get(name)

    def save(self, name: str, told: Callable[[], Record]) -> None:
        found = told()
        tensors = {key: value.clone() for key, value in found.tensors.items()}
        self.held[name] = Record(tensors, json.loads(json.dumps(found.facts)))
        self.saves += 1
        self.names.append(name.split("-")[0])
        if self.saves in self.cuts:
            raise Cut

    def is_due(self) -> bool:
        return self.every_step


# --- records --------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was(tmp_path: Path):
    kept = Folder(tmp_path / "deep" / "kept", minutes=1)
    assert kept.load("a") is None
    kept.save("a", lambda: record(1.5, step=3, random={"state": 2**127, "said": "ä"}))
    back = Folder(tmp_path / "deep" / "kept", minutes=1).load("a")
    assert back is not None
    assert back.facts == {"step": 3, "random": {"state": 2**127, "said": "ä"}}
    assert torch.equal(back.tensors["x"].nan_to_num(7), torch.tensor([1.5, 7.0]))
    assert back.tensors["b"].dtype == torch.bool
    kept.save("a", lambda: record(2.5))
    again = kept.load("a")
    assert again is not None and again.tensors["x"][0] == 2.5 and again.facts == {}


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_record(when: str, tmp_path: Path, monkeypatch):
    kept = Folder(tmp_path, minutes=1)
    kept.save("a", lambda: record(1.0, step=1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, when, full)
        with pytest.raises(OSError, match="No space left"):
            kept.save("a", lambda: record(9.0, step=2))
    back = kept.load("a")
    assert back is not None and back.facts == {"step": 1} and back.tensors["x"][0] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "content",
    [b"", b"cut off", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."],
    ids=["empty", "cut", "pickle"],
)
def test_what_is_no_record_is_refused_in_one_line(content: bytes, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CorpusError, match=r"cannot read the checkpoint .*a\.safetensors: ") as told:
        Folder(tmp_path, minutes=1).load("a")
    assert "--force" in str(told.value)


def test_weights_of_someone_else_are_no_record(tmp_path: Path):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CorpusError, match="cannot read the checkpoint"):
        Folder(tmp_path, minutes=1).load("a")


def test_a_record_that_lacks_something_says_so_when_it_is_asked(tmp_path: Path):
    kept = Folder(tmp_path, minutes=1)
    kept.save("run", lambda: Record({}, {}))
    with pytest.raises(CorpusError, match=r"lacks 'starts'.* --force"):
        pipeline.count_start(kept, {}, csc.Settings(), Console())
    kept.save("run", lambda: Record({}, [1]))  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match="cannot read the checkpoint"):
        kept.load("run")


@pytest.mark.parametrize("facts", ["[" * 100_000, "[1]", '"x"', "{"])
def test_facts_that_are_none_are_refused_in_one_line(facts: str, tmp_path: Path):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"facts": facts})
    with pytest.raises(CorpusError, match="cannot read the checkpoint"):
        Folder(tmp_path, minutes=1).load("a")


def test_numbers_and_names_of_another_kind_are_refused(tmp_path: Path):
    kept = Folder(tmp_path, minutes=1)
    for facts in ({"starts": "x", "about": {}}, {"starts": True}, {"starts": 1, "about": [1]}):
        kept.save("run", partial(Record, {}, facts | {"commit": "c"}))
        with pytest.raises(CorpusError, match=r"damaged, .* \(its '(starts|about)' is .* --force"):
            pipeline.count_start(kept, {}, csc.Settings(), Console())


def test_a_checkpoint_is_due_after_the_minutes_since_the_last(tmp_path: Path):
    now = [100.0]
    kept = Folder(tmp_path, minutes=2, now=lambda: now[0])
    assert not kept.is_due()
    now[0] += 119
    assert not kept.is_due()
    now[0] += 1
    assert kept.is_due()
    kept.save("a", record)
    assert not kept.is_due()
    with pytest.raises(ConfigError, match=r"checkpoint\.minutes must be above 0"):
        checkpoint.Settings(minutes=0)


def test_sigterm_asks_for_a_last_record(tmp_path: Path, monkeypatch):
    kept = Folder(tmp_path, minutes=99)
    before = signal.getsignal(signal.SIGTERM)
    with kept.heeding_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        assert kept.is_due()
        with pytest.raises(Terminated):
            kept.save("a", record)
        assert kept.load("a") is not None
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

    def work() -> None:
        with Folder(tmp_path, minutes=99).heeding_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # and nobody comes to the end of a step

    monkeypatch.setattr(checkpoint, "PATIENCE", 0.05)
    with pytest.raises(Terminated):
        work()


def test_sigterm_ends_what_survives_any_exception_however_often_it_comes(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.2)
    monkeypatch.setattr(checkpoint, "AGAIN", 0.05)

    def look_at_headers() -> None:
        with Folder(tmp_path, minutes=99).heeding_sigterm():
            survived = 0
            while survived < 1:
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.1)
                except Exception:  # as when a decoder is fed with anything
                    survived += 1
            time.sleep(5)

    start = time.monotonic()
    with pytest.raises(Terminated):
        look_at_headers()
    assert time.monotonic() - start < 3


# --- training -------------------------------------------------------------------------------------


def corpus(n: int = 27) -> Corpus:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)
    names = tuple(f"{row}.png" for row in range(n))
    return Corpus(np.arange(n) % 3, ("a", "b", "c"), np.arange(n), names, pixels)


def trained(kept: checkpoint.Checkpoints = NOWHERE, **how: object) -> dict[str, torch.Tensor]:
    model = new_model("resnet8", 3, 8, seed=0)
    for _ in train(model, corpus(), TRAINING, CPU, seed=0, kept=kept, **how):  # type: ignore[arg-type]
        pass
    return model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("cut", range(1, 13))
def test_training_goes_on_from_any_step_to_the_same_weights(cut: int):
    """12 steps: three epochs of four, the last step of an epoch among them."""
    kept = Failing(cut, every_step=True)
    with pytest.raises(Cut):
        trained(kept)
    assert same(trained(kept), trained())
    assert kept.saves == 12


def test_training_begins_again_with_the_moment_it_was_left_at():
    kept = Failing(8)  # epochs only: 3, and steps 2 and 5, 9, 10, 11
    whole = list(train(new_model("resnet8", 3, 8, seed=0), corpus(), TRAINING, CPU, seed=0))
    model = new_model("resnet8", 3, 8, seed=0)
    how = {"seed": 0, "kept": kept, "keep_at": {2, 5, 9, 10, 11}}
    with pytest.raises(Cut):
        list(train(model, corpus(), TRAINING, CPU, **how))
    rest = list(train(new_model("resnet8", 3, 8, seed=0), corpus(), TRAINING, CPU, **how))
    assert [moment.step for moment in rest] == [12]
    assert (rest[0].lr, rest[0].epoch) == (whole[-1].lr, whole[-1].epoch)
    assert torch.equal(rest[0].loss, whole[-1].loss)


def test_other_rows_do_not_go_on_from_these():
    kept = Failing()
    trained(kept)
    some = np.arange(20)
    assert same(trained(kept, rows=some), trained(rows=some))
    assert len(kept.held) == 2


def test_the_state_of_another_net_is_refused():
    kept = Failing()
    trained(kept)
    model = new_model("resnet8", 5, 8, seed=0)
    with pytest.raises(CorpusError, match="of another net"):
        next(train(model, corpus(), TRAINING, CPU, seed=0, kept=kept))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "x"},
        {"step": -3},
        {"step": 13},
        {"step": 4.0},
        {"lr": "x"},
        {"random": 1},
        {"random": {"bit_generator": "PCG64", "state": "x"}},
    ],
)
def test_a_training_in_a_state_that_cannot_be_is_not_gone_on_with(changes: dict[str, object]):
    kept = Failing()
    trained(kept)
    ((name, record),) = kept.held.items()
    kept.held[name] = Record(record.tensors, {**record.facts, **changes})
    with pytest.raises(CorpusError, match="the checkpoint is damaged, or of another version"):
        trained(kept)


@pytest.mark.parametrize("skip", [0, 1, 3, 4])
@pytest.mark.parametrize("streamed", [False, True])
def test_skipped_batches_are_drawn_and_not_given(skip: int, streamed: bool, tmp_path: Path):
    there = corpus()
    run_to = {"order": np.random.default_rng(1).permutation(27), "augment": Augment(2, True)}
    if streamed:
        from PIL import Image

        for row, name in enumerate(there.paths):
            Image.fromarray(there.images[row]).save(tmp_path / name)
        files = Files.whole(tmp_path, there.paths)
        there = replace(there, pixels=None, files=files, read_at=(8, 8), file_bytes=192)

    def given(skip: int) -> tuple[list[tuple[bytes, bytes]], float]:
        rng = np.random.default_rng(2)
        if streamed:
            found = loader.stream(
                there, 8, CPU.decoder, rng=rng, portion=Portion(slice(skip, None)), **run_to
            )
        else:
            pixels = torch.from_numpy(there.images)
            found = resident.batches(
                pixels, there.labels, 8, rng=rng, portion=Portion(slice(skip, None)), **run_to
            )
        seen = [(b.images.numpy().tobytes(), b.rows.numpy().tobytes()) for b in found]
        return seen, float(rng.random())

    everything, after = given(0)
    assert len(everything) == 4
    assert given(skip) == (everything[skip:], after)


# --- the whole defense ----------------------------------------------------------------------------


def defended(kept: checkpoint.Checkpoints) -> Outcome:
    there, _ = digits()
    how = settings_of(keep=True, recovering=True)
    return csc.defend(DefenderView(there), how, CPU, seed=1, kept=kept)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Outcome, Failing]:
    kept = Failing()
    return defended(kept), kept


def same_outcome(one: Outcome, other: Outcome) -> bool:
    told, wanted = one.segregation, other.segregation
    assert told is not None and wanted is not None
    return (
        same(one.model.state_dict(), other.model.state_dict())
        and same(one.undefended.state_dict(), other.undefended.state_dict())
        and same(one.recovered.model.state_dict(), other.recovered.model.state_dict())
        and np.array_equal(told.suspect, wanted.suspect)
        and np.array_equal(told.score, wanted.score)
        and run.plain(told.notes) == run.plain(wanted.notes)
        and run.plain(list(told.clusters)) == run.plain(list(wanted.clusters))
        and told.transfers == wanted.transfers
        and one.snapshots.keys() == other.snapshots.keys()
        and all(np.array_equal(one.snapshots[k], other.snapshots[k]) for k in one.snapshots)
    )


def test_a_defense_cut_off_after_any_record_ends_the_same(undisturbed):
    wanted, told = undisturbed
    assert wanted.segregation.suspect.any() and wanted.recovered is not None
    assert {"train", "snapshot", "verdict", "verify", "concealed", "recover"} == set(told.names)
    kept = Failing(*range(1, told.saves + 1))
    for _ in range(told.saves):
        with pytest.raises(Cut):
            defended(kept)
    assert same_outcome(defended(kept), wanted)
    assert kept.names == told.names  # nothing was done twice


def test_without_checkpoints_the_outcome_is_the_same(undisturbed):
    assert same_outcome(defended(NOWHERE), undisturbed[0])


@pytest.mark.parametrize(
    ("name", "fact", "value"),
    [
        ("snapshot", "epoch", "x"),
        ("snapshot", "min_samples", None),
        ("snapshot", "radii", [1]),
        ("snapshot", "radii", [[1.0, 1.0]] * 99),
        ("verdict", "words", [1]),
        ("verdict", "checks", "x"),
        ("verdict", "transfers", [{"label": 1}]),
        ("verdict", "notes", "x"),
    ],
)
def test_evidence_of_another_kind_is_refused(undisturbed, name: str, fact: str, value: object):
    kept = Failing()
    kept.held = dict(undisturbed[1].held)
    key = next(key for key in kept.held if key.startswith(name))
    kept.held[key] = Record(kept.held[key].tensors, {**kept.held[key].facts, fact: value})
    with pytest.raises(CorpusError, match="the checkpoint is damaged, or of another version"):
        defended(kept)


def test_a_head_of_another_shape_is_refused(undisturbed):
    kept = Failing()
    kept.held = dict(undisturbed[1].held)
    key = next(key for key in kept.held if key.startswith("concealed"))
    head = {name: value[:-1] for name, value in kept.held[key].tensors.items()}
    kept.held[key] = Record(head, {})
    with pytest.raises(CorpusError, match="the checkpoint is damaged, or of another version"):
        defended(kept)


def test_a_verdict_comes_back_as_it_was(undisturbed):
    told = undisturbed[0].segregation
    found = segregate.of_verdict(told)
    back = segregate.to_verdict(Record(found.tensors, json.loads(json.dumps(found.facts))))
    assert list(back.table) == list(told.table)
    for name, column in told.table.items():
        assert back.table[name].dtype.kind == column.dtype.kind
        assert np.array_equal(back.table[name], column, equal_nan=column.dtype.kind == "f")
    assert back.checks and len(back.checks) == len(told.checks)
    for one, other in zip(back.checks, told.checks, strict=True):
        for name in ("candidates", "controls", "predicted"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


# --- the run directory ----------------------------------------------------------------------------


def interrupted(out: Path) -> None:
    def work() -> None:
        with run.fresh_directory(out, KIND, force=False) as folder:
            (folder / "log.jsonl").write_text("{}\n")
            (folder / run.CHECKPOINTS).mkdir()
            (folder / run.CHECKPOINTS / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        work()


def test_what_can_be_gone_on_with_is_not_thrown_away(tmp_path: Path):
    out = tmp_path / "run"
    interrupted(out)
    again = run.fresh_directory(out, KIND, force=False)
    with pytest.raises(OutputError, match="go on with --resume, or begin anew with --force"), again:
        pass
    with run.fresh_directory(out, KIND, force=False, resume=True) as folder:
        assert (folder / run.CHECKPOINTS / "a").read_text() == "a"
    assert (out / "log.jsonl").exists()
    assert not (out / run.CHECKPOINTS).exists()  # it is not needed any more


def test_force_begins_anew(tmp_path: Path):
    interrupted(tmp_path / "run")
    with run.fresh_directory(tmp_path / "run", KIND, force=True) as folder:
        assert [path.name for path in folder.iterdir()] == [run.OURS]


def test_refused_input_keeps_checkpoints_and_says_how_to_go_on(tmp_path: Path):
    interrupted(tmp_path / "run")
    with (
        pytest.raises(CorpusError),
        run.fresh_directory(tmp_path / "run", KIND, force=False, resume=True),
    ):
        raise CorpusError("a file vanished")
    assert (tmp_path / "run.partial" / run.CHECKPOINTS / "a").exists()
    with (
        pytest.raises(Interrupted, match=r"checkpoint, log\.jsonl; go on with --resume$"),
        run.fresh_directory(tmp_path / "run", KIND, force=False, resume=True),
    ):
        raise KeyboardInterrupt


def test_two_do_not_write_one_directory(tmp_path: Path):
    out = tmp_path / "run"
    with run.fresh_directory(out, KIND, force=False) as folder:
        (folder / "mine").touch()
        for force in (False, True):
            second = run.fresh_directory(out, KIND, force=force, resume=not force)
            with pytest.raises(OutputError, match="another csc-gpu is writing"), second:
                pass
        assert (folder / "mine").exists()
        (folder / "mine").unlink()
    with run.fresh_directory(out, KIND, force=True):
        pass  # the lock went with its holder


# --- the command ----------------------------------------------------------------------------------

WORDS = ("--cpu", "--threads", "1", "--seed", "0", "--no-report")
QUICK = ("train.epochs=2", "train.min_steps=1", "segregate.check_epochs=1", "conceal.epochs=1")
SETS = tuple(word for change in QUICK for word in ("--set", change))


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    return done.exit_code, done.output


def test_resume_starts_goes_on_and_says_that_it_is_finished(tmp_path: Path, monkeypatch):
    out = tmp_path / "run"
    words = ("train", "digits", "--out", out, *WORDS, *SETS, "--resume")
    real = Folder.save

    def cut(self: Folder, name: str, told: Callable[[], Record]) -> None:
        real(self, name, told)
        if name.startswith("snapshot"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "save", cut)
        status, told = command(*words)
    assert status == 130 and "go on with --resume" in told
    status, told = command(*words, "--set", "train.lr=0.01")
    assert status == 2
    assert "the interrupted run had train.lr 0.05, not 0.01; resume it as it was begun" in told
    assert "lr = 0.05" in (tmp_path / "run.partial" / "settings.toml").read_text()
    status, told = command(*words, "--set", "checkpoint.minutes=3")  # this one may change
    assert status == 0, told
    assert "resumed, start 2" in told
    assert json.loads((out / "summary.json").read_text())["starts"] == 2
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [event["start"] for event in events if event["event"] == "resumed"] == [2]
    before = (out / "summary.json").read_bytes()
    status, told = command(*words)
    assert status == 0 and f"{out} is finished: " in told
    assert (out / "summary.json").read_bytes() == before


def begin_from(path: Path, seed: int) -> None:
    state = new_model("resnet8", 3, 8, seed=seed).state_dict()
    save_file({name: weight.contiguous() for name, weight in state.items()}, path)


def arrays(path: Path, seed: int) -> Path:
    """48 images of three classes; another seed has other pixels, and the same labels."""
    rng, labels = np.random.default_rng(seed), np.arange(48) % 3
    pixels = rng.integers(0, 200, (48, 8, 8, 3), np.uint8) + labels[:, None, None, None].astype(
        "u1"
    )
    test = {"x_test": pixels[:9], "y_test": labels[:9]}
    np.savez(path, x_train=pixels, y_train=labels, **test)
    return path


def images(folder: Path, seed: int) -> Path:
    """The same as files of one size and one date, as `csc-gpu poison` writes them."""
    with np.load(arrays(folder.with_suffix(".npz"), seed)) as there:
        for row, (pixels, label) in enumerate(zip(there["x_train"], there["y_train"], strict=True)):
            place = folder / f"{label}" / f"{row}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place, compress_level=0)
            os.utime(place, (WRITTEN, WRITTEN))
    return folder


WRITTEN = 10**9
FAST = ("train.epochs=2", "train.min_steps=1", "train.batch=16")
SHORT = (*WORDS, *(word for change in FAST for word in ("--set", change)))


def cut(monkeypatch, *words: object) -> None:
    """The run is interrupted after its first snapshot."""
    with monkeypatch.context() as patched:
        patched.setattr(csc, "conclude", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        status, told = command("train", *words, *SHORT)
    assert status == 130, told


def assert_refused(words: tuple[object, ...], *needles: str) -> None:
    status, told = command("train", *words, *SHORT, "--resume")
    last = told.strip().splitlines()[-1]
    assert status == 2 and last.startswith("Error: "), told
    assert all(needle in last for needle in needles), last


def test_a_finished_run_answers_for_nothing_else(tmp_path: Path):
    corpus, other = arrays(tmp_path / "c.npz", 0), arrays(tmp_path / "d.npz", 1)
    out = tmp_path / "run"
    assert command("train", corpus, "--out", out, *SHORT)[0] == 0
    before = (out / "summary.json").read_bytes()
    for words, said in (
        ((corpus, "--seed", 5), "had --seed 0, not 5; choose another place"),
        ((other,), "had source "),
        (("digits",), "had source "),
        ((corpus, "--defense", "plain"), "had --defense 'csc', not 'plain'"),
        ((corpus, "--set", "train.lr=0.01"), "had train.lr 0.05, not 0.01"),
        ((corpus, "--set", "gpu.bf16=false"), "had gpu.bf16 True, not False"),
    ):
        status, told = command("train", *words[:1], "--out", out, *SHORT, *words[1:], "--resume")
        assert status == 2 and said in told.strip().splitlines()[-1], told
    os.utime(corpus, (WRITTEN, WRITTEN))  # its bytes count, not its date
    status, told = command("train", corpus, "--out", out, *SHORT, "--resume")
    assert status == 0 and f"{out} is finished: " in told, told
    other.replace(corpus)
    assert_refused((corpus, "--out", out), "had contents of ", "train anew with --force")
    assert (out / "summary.json").read_bytes() == before
    again = command("train", corpus, "--out", out, *SHORT, "--resume", "--force", "--seed", 5)
    assert again[0] == 0 and "is finished" not in again[1]
    assert json.loads((out / "summary.json").read_text())["seed"] == 5


def test_other_images_with_the_same_labels_are_not_gone_on_with(tmp_path: Path, monkeypatch):
    corpus, weights = arrays(tmp_path / "c.npz", 0), tmp_path / "init.safetensors"
    words = (corpus, "--out", tmp_path / "run", "--model", "resnet8", "--init", weights)
    begin_from(weights, 1)
    cut(monkeypatch, *words)
    arrays(corpus, 1)
    assert_refused(words, "the interrupted run had contents of ", "without --resume")
    arrays(corpus, 0)
    begin_from(weights, 2)
    assert_refused(words, "the interrupted run had contents of train.init ")
    begin_from(weights, 1)
    assert_refused((*words, "--set", "gpu.bf16=false"), "had gpu.bf16 True, not False")
    status, told = command("train", *words, *SHORT, "--resume", "--set", "gpu.prefetch=3")
    assert status == 0 and "resumed, start 2" in told, told


def test_other_files_are_not_gone_on_with_and_a_copy_if_one_says_so(tmp_path: Path, monkeypatch):
    corpus = images(tmp_path / "photos", 0)
    words = (corpus, "--out", tmp_path / "run")
    cut(monkeypatch, *words)
    images(corpus, 1)  # sizes and dates are those of the others
    assert_refused(words, "the interrupted run had contents of ")
    images(corpus, 0)
    os.utime(corpus / "1" / "1.png", (WRITTEN, WRITTEN + 1))
    assert_refused(words, "had other dates of ", "add --set checkpoint.dates=false")
    cut(monkeypatch, *words, "--resume", "--set", "checkpoint.dates=false")
    status, told = command("train", *words, *SHORT, "--resume")  # the dates of now are known
    assert status == 0 and "resumed, start 3" in told, told


def test_a_checkpoint_with_a_pickle_inside_ends_in_one_line(tmp_path: Path, monkeypatch):
    out = tmp_path / "run"
    words = ("train", "digits", "--out", out, *WORDS, *SETS, "--resume")
    with monkeypatch.context() as patched:
        patched.setattr(csc, "conclude", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*words)[0] == 130
    (state,) = (tmp_path / "run.partial" / run.CHECKPOINTS).glob("train-*")
    torch.save({"x": Path("evil")}, state)
    status, told = command(*words)
    assert status == 2
    assert len(told.strip().splitlines()[-1:]) == 1 and "cannot read the checkpoint" in told
    assert (tmp_path / "run.partial" / run.CHECKPOINTS / "run.safetensors").exists()


def steps_done(state: Path) -> int:
    return checkpoint.fact(checkpoint.from_bytes(state.read_bytes()), "step", int)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to heed")
def test_sigterm_ends_with_143_and_a_checkpoint(tmp_path: Path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "csc_gpu", "train", "digits", "--out", str(out), *WORDS]
    words += ["--set", "train.batch=8"]  # a long epoch, at whose end a state is kept in any case
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    states = tmp_path / "run.partial" / run.CHECKPOINTS
    deadline = time.monotonic() + 120
    while not list(states.glob("snapshot-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.1)  # until the first epoch has ended, and what is done then
    (state,) = states.glob("train-*.safetensors")
    before = steps_done(state)
    asked = time.monotonic()
    process.terminate()
    told, _ = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10  # as docs/scale.md has it: 8 s, and the end
    assert process.returncode == 143, told
    assert "terminated; kept in" in told and "go on with --resume" in told
    assert before < steps_done(state) < 2 * before  # at the end of a step of the second epoch
