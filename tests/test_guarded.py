"""The guarded model in other hands: predict, the library behind it, and the exported files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from csc_gpu import export as exporting
from csc_gpu import guarded, run
from csc_gpu.answers import load_key
from csc_gpu.backend import open_backend
from csc_gpu.errors import ConfigError, CorpusError, OutputError
from csc_gpu.guarded import REJECTED, GuardedClassifier
from csc_gpu.models import Net, new_model
from csc_gpu.serving import as_json, as_line
from csc_gpu.types import Corpus
from tests.test_cli import assert_refused, call, finished, own_cache  # noqa: F401

CPU = open_backend("cpu", 1)
COLOURS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}


class Colours(torch.nn.Module):
    """The mean of each colour: an extractor whose features are known."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def colours_net(*rows: tuple[float, float, float]) -> Net:
    """A net of an output a row, whose weights of red, green and blue it gives."""
    net = Net(Colours(), 3, len(rows))
    with torch.no_grad():
        net.head.weight.copy_(3 * torch.tensor(rows))
        net.head.bias.zero_()
    return net


BY_COLOUR = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def by_colour(size: int = 8) -> GuardedClassifier:
    """Red is the class red, green the class green, and blue is the trigger."""
    return GuardedClassifier(colours_net(*BY_COLOUR), ("red", "green"), (size, size), CPU)


def plain(*names: str, size: int = 8) -> np.ndarray:
    return np.array([np.full((size, size, 3), COLOURS[name], np.uint8) for name in names])


def saved(folder: Path, name: str, colour: str, size: int = 8) -> Path:
    path = folder / name
    Image.fromarray(plain(colour, size=size)[0]).save(path)
    return path


# --- the library --------------------------------------------------------------------------------


def test_images_get_class_names_and_the_trigger_is_rejected():
    model = by_colour()
    assert model.classes_.tolist() == ["red", "green", REJECTED]
    there = plain("green", "blue", "red")
    assert model.predict(there).tolist() == ["green", REJECTED, "red"]
    assert model.rejects(there).tolist() == [False, True, False]


def test_probabilities_have_a_column_for_each_of_classes_and_sum_to_one():
    model, there = by_colour(), plain("green", "blue", "red")
    shares = model.predict_proba(there)
    assert shares.shape == (3, 3) and shares.dtype == np.float32
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert (model.classes_[shares.argmax(axis=1)] == model.predict(there)).all()


def test_a_model_that_conceals_nothing_rejects_nothing():
    net = Net(Colours(), 3, 2)
    model = GuardedClassifier(net, ("red", "green"), (8, 8), CPU)
    assert model.classes_.tolist() == ["red", "green"]
    assert not model.rejects(plain("red", "green", "blue")).any()


def with_recovered() -> GuardedClassifier:
    """As by_colour; and a net without the virtual class takes what is blue for green."""
    recovered = colours_net((1.0, 0.0, 0.0), (0.0, 1.0, 0.8))
    return GuardedClassifier(
        colours_net(*BY_COLOUR), ("red", "green"), (8, 8), CPU, recovered=recovered
    )


def test_a_recovered_net_names_what_the_tripwire_still_rejects(tmp_path):
    model, there = with_recovered(), plain("green", "blue", "red")
    assert model.classes_.tolist() == ["red", "green"]
    assert model.predict(there).tolist() == ["green", "green", "red"]
    assert model.predict_proba(there).shape == (3, 2)
    assert model.rejects(there).tolist() == [False, True, False]
    (tmp_path / "bad.png").write_bytes(b"no image")
    asked = [
        saved(tmp_path, "b.png", "blue"),
        tmp_path / "bad.png",
        saved(tmp_path, "r.png", "red"),
    ]
    answers = list(model.answers(asked))
    assert [answer.rejected for answer in answers] == [True, False, False]
    assert as_line(answers[0], model).split("\t")[1::2] == ["green", REJECTED]
    assert as_line(answers[2], model).split("\t")[1] == "red"
    told = [json.loads(as_json(answer, model)) for answer in answers]
    assert [one.get("label") for one in told] == ["green", None, "red"]
    assert [one.get("rejected") for one in told] == ["trigger", None, None]


def test_no_images_get_no_answers():
    assert by_colour().predict(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 9, 9, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
    ],
)
def test_images_of_another_kind_are_refused_with_what_is_wanted(images: np.ndarray):
    with pytest.raises(CorpusError, match=r"uint8 of shape \(N, 8, 8, 3\), got"):
        by_colour().predict(images)


def test_grey_images_are_taken_as_colour():
    grey = np.full((1, 8, 8), 90, np.uint8)
    model = by_colour()
    assert np.array_equal(
        model.predict_proba(grey), model.predict_proba(np.repeat(grey[..., None], 3, 3))
    )


def test_files_are_answered_in_order_with_faults_in_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(guarded, "TOGETHER", 2)
    there = [saved(tmp_path, f"{n}.png", c) for n, c in enumerate(("green", "blue", "red"))]
    (tmp_path / "bad.png").write_bytes(b"no image")
    asked = [there[0], tmp_path / "bad.png", tmp_path / "none.png", there[1], there[2]]
    model = by_colour()
    answers = list(model.answers(asked))
    assert [answer.path for answer in answers] == [str(path) for path in asked]
    assert [answer.fault for answer in answers] == ["", "not an image", "missing", "", ""]
    found = [a.probabilities.argmax() for a in answers if a.probabilities is not None]
    assert found == [1, 2, 0]


def test_a_file_of_another_size_is_resized_as_for_training(tmp_path):
    path = saved(tmp_path, "large.png", "green", size=31)
    (answer,) = by_colour().answers([path])
    assert answer.probabilities.argmax() == 1


# --- the command --------------------------------------------------------------------------------


def lines_of(result) -> list[list[str]]:
    return [line.split("\t") for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def triggered(finished):  # noqa: F811
    """Triggered test images of the finished run as files, whose order is their name's."""
    key = load_key(finished / "p" / "key.npz")
    folder = finished / "triggered" / "deeper"
    folder.mkdir(parents=True)
    for row, image in enumerate(key.triggered):
        Image.fromarray(image).save(folder / f"{row}.png")
    return finished / "triggered", key


def test_predict_says_rejected_at_the_rate_that_score_reports(finished, triggered):  # noqa: F811
    folder, key = triggered
    scored = call("score", finished / "run", "--key", finished / "p" / "key.npz", "--cpu")
    assert scored.exit_code == 0, scored.output
    score = json.loads((finished / "run" / "score.json").read_text())
    done = call("predict", finished / "run", folder, "--cpu")
    assert done.exit_code == 0, done.output
    told = lines_of(done)
    assert [Path(line[0]).stem for line in told] == [str(n) for n in range(len(key.triggered))]
    wanted = key.attack_labels[key.attack_labels >= 0]
    others = wanted != key.test_labels[key.attack_labels >= 0]
    hits = [line[1] == REJECTED for line, other in zip(told, others, strict=True) if other]
    assert [sum(hits), len(hits)] == score["after"]["counts"]["virtual_triggered"]
    assert sum(hits) > 0


def test_the_same_files_as_arrays_as_lines_and_as_json_agree(finished, triggered):  # noqa: F811
    folder, key = triggered
    model = GuardedClassifier.load(finished / "run", cpu=True)
    table = lines_of(call("predict", finished / "run", folder, "--cpu"))
    done = call("predict", finished / "run", folder, "--jsonl", "--cpu")
    assert [line[1] for line in table] == model.predict(key.triggered).tolist()
    for line, told in zip(table, map(json.loads, done.stdout.splitlines()), strict=True):
        assert told["path"] == line[0]
        assert (told["label"] or f"rejected: {told['rejected']}") == line[1]
        assert (told["label"] is None) == (told["rejected"] == "trigger")
        assert list(told["probabilities"]) == model.classes_.tolist()
        assert f"{told['probability']:.3f}" == f"{float(line[2]):.3f}"


def test_paths_come_from_stdin_too(finished, triggered):  # noqa: F811
    from click.testing import CliRunner

    from csc_gpu.cli import cli

    names = [str(triggered[0] / "deeper" / f"{n}.png") for n in (3, 1)]
    words = ["predict", str(finished / "run"), "-", "--cpu"]
    done = CliRunner().invoke(cli, words, input="\n".join(names) + "\n\n")
    assert done.exit_code == 0, done.output
    assert [line[0] for line in lines_of(done)] == names


def test_a_bad_image_has_its_line_and_the_status_is_2(finished, triggered, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    good = triggered[0] / "deeper" / "0.png"
    asked = ("no\tsuch\x1b[1m.png", tmp_path / "cut.jpg", tmp_path / "empty", good)
    for extra in ((), ("--jsonl",)):
        done = call("predict", finished / "run", *asked, "--cpu", *extra)
        assert_refused(done, "3 of 4 images could not be read")
        assert len(done.stdout.splitlines()) == 4
        assert "\x1b" not in done.stdout
    done = call("predict", finished / "run", *asked, "--cpu")
    told = lines_of(done)
    assert told[0] == ["no\\tsuch\\x1b[1m.png", "error: missing"]
    assert told[1][1] == "error: truncated JPEG"
    assert told[2][1] == "error: not a regular file"
    assert len(told[3]) == 3


def test_what_is_no_run_is_refused(tmp_path):
    assert_refused(call("predict", tmp_path, "x.png"), "no finished run")
    done = call("export-model", tmp_path, tmp_path / "x", "--format", "onnx")
    assert_refused(done, "no finished run")


# --- export -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(finished):  # noqa: F811
    """500 test images, of which some are triggered."""
    key = load_key(finished / "p" / "key.npz")
    return np.concatenate([key.test, key.triggered])[-500:]


@pytest.mark.parametrize("layout", exporting.FORMATS)
def test_an_export_gives_the_same_labels_on_500_images(
    layout,
    finished,  # noqa: F811
    images,
    tmp_path,
):
    out = tmp_path / "model"
    done = call("export-model", finished / "run", out, "--format", layout)
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model = GuardedClassifier.load(finished / "run", cpu=True)
    ours, theirs = model.predict_proba(images), exporting.FORMATS[layout].read(out)(images)
    assert len(images) == 500 and len(np.unique(ours.argmax(axis=1))) > 3
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert_refused(call("export-model", finished / "run", out, "--format", layout), "--force")
    if layout == "onnx":
        told = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
        assert json.loads(told["classes"]) == model.classes_.tolist()
    if layout == "safetensors":
        known = load_file(finished / "run" / "model.safetensors")
        assert all(torch.equal(load_file(out)[name], known[name]) for name in known)


BLANK = Corpus(
    np.zeros(1, np.int64), ("a", "b"), np.arange(1), ("",), np.zeros((1, 8, 8, 3), np.uint8)
)


def small_run(folder: Path) -> Path:
    """The least that is a run: an untrained net and its summary."""
    folder.mkdir()
    net = new_model("resnet8", 3, 8, seed=0)
    run.save_model(folder / "model.safetensors", net, "resnet8", BLANK)
    about = {"model": "resnet8", "n_classes": 2, "n_outputs": 3, "classes": ["a", "b"]}
    run.write_json(folder / "summary.json", about | {"image_size": [8, 8], "backend": "cpu"})
    return folder


def test_a_run_s_recovered_net_is_asked_and_exported_where_there_is_one(tmp_path):
    folder, image = small_run(tmp_path / "run"), saved(tmp_path, "x.png", "red")
    asked = ("predict", folder, image, "--cpu", "--recovered")
    export = ("export-model", folder, tmp_path / "m", "--format", "safetensors", "--recovered")
    for words in (asked, export):
        assert_refused(call(*words), "has no recovered net", "--recover")
    other = new_model("resnet8", 2, 8, seed=1)
    run.save_model(folder / "recovered.safetensors", other, "resnet8", BLANK)
    done = call(*asked)
    assert done.exit_code == 0, done.output
    model = GuardedClassifier.load(folder, cpu=True, recovered=True)
    path, label, share, *alarm = done.stdout.rstrip("\n").split("\t")
    there = plain("red")
    assert [path, label] == [str(image), *model.predict(there)]
    assert share == f"{model.predict_proba(there).max():.4f}"
    assert alarm == [REJECTED] * int(model.rejects(there)[0])
    done = call(*export)
    assert done.exit_code == 0, done.output
    ours, theirs = model.predict_proba(there), exporting.FORMATS["safetensors"].read(tmp_path / "m")
    np.testing.assert_allclose(ours, theirs(there), atol=1e-5)


def test_an_export_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    wrong = exporting.Format(
        exporting._write_weights, lambda path: lambda images: np.full((len(images), 3), 1 / 3)
    )
    monkeypatch.setitem(exporting.FORMATS, "safetensors", wrong)
    with pytest.raises(OutputError, match="is not written"):
        exporting.export(small_run(tmp_path / "run"), tmp_path / "out", "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_formats_that_are_unknown_or_lack_packages_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="there are safetensors, onnx, torchscript"):
        exporting.export(tmp_path, tmp_path / "out", "pickle")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'csc-gpu\[onnx\]'"):
        exporting.export(tmp_path, tmp_path / "out", "onnx")


def test_trial_images_are_not_all_alike_to_a_net():
    images = exporting.trial(7, 8, 8)
    assert images.shape == (7, 8, 8, 3) and images.dtype == np.uint8
    assert (np.diff(images.mean(axis=(1, 2, 3))) > 5).all()
