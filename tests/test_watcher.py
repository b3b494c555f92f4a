"""Somebody else's loop: suspects by what the Watcher saw, and their own head conceals."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from csc_gpu import csc, segregate, watcher
from csc_gpu.backend import open_backend
from csc_gpu.config import override
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.watcher import Watcher, conceal, head_input
from tests.worlds import oracle, world

CPU = open_backend("cpu", 1)
FEW = override(csc.Settings(), {"segregate.pca": 0})


def watched(there, epochs=3, settings=FEW, rng=None):
    """A watcher that saw the world at so many epochs, in batches, in orders of their own."""
    found, rng = Watcher(there.labels, settings, CPU), rng or np.random.default_rng(0)
    for epoch in range(1, epochs + 1):
        for rows in np.array_split(rng.permutation(len(there.labels)), 7):
            found.see(epoch, torch.from_numpy(rows), torch.from_numpy(there.points[rows]))
    return found


# --- the watcher --------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 3, 8])
def test_it_names_whom_segregation_names_on_the_same_snapshots(epochs: int):
    there = world()
    told = watched(there, epochs).suspects()
    scales = segregate.looked_at(range(epochs), FEW.segregate)
    how = FEW.segregate, CPU
    seen = [
        segregate.observe(there.points, there.labels, 1.0 + n, *how, scales=scales[n])
        for n in range(epochs)
    ]
    known = segregate.segregate(seen, there.labels, *how)
    assert (told.suspect == known.suspect).all()
    assert (told.score == known.score).all()
    assert told.notes == known.notes
    assert told.suspect[there.poison].mean() > 0.9 and not told.suspect[~there.poison].any()


def test_without_a_witness_it_says_that_nothing_was_verified():
    assert watched(world()).suspects().notes["verified"] is False


def test_a_witness_is_heard():
    there = world()
    told = watched(there).suspects(oracle(there, commands=1.0))
    assert told.notes["verified"] is True
    assert (told.suspect == there.poison).all()


def test_suspects_may_be_asked_for_on_the_way():
    there, rng = world(), np.random.default_rng(0)
    found = watched(there, 2)
    first = found.suspects().suspect
    rows = rng.permutation(len(there.labels))
    found.see(3, rows, there.points[rows])
    assert (found.suspects().suspect == first).all()


def test_only_features_of_snapshots_that_count_are_kept():
    found = watched(world(), 8)
    found.suspects()
    assert sorted(found._points) == [4, 5, 6, 7, 8]
    every = watched(world(), 8, override(FEW, {"segregate.rule": "text"}))
    assert sorted(every._points) == list(range(1, 9))


def test_features_given_are_left_as_they_were():
    there = world()
    before = there.points.copy()
    watched(there).suspects()
    assert (there.points == before).all()


@pytest.mark.parametrize(
    ("epoch", "rows", "features", "said"),
    [
        (2, [0, 1], np.zeros((2, 20)), "438 of 440 rows were not seen, the first is 2"),
        (0, range(440), np.zeros((440, 20)), "count upwards"),
        (1, [0], np.zeros((1, 19)), "different numbers"),
        (1, [440], np.zeros((1, 20)), "rows must be 0..439"),
        (1, [-1], np.zeros((1, 20)), "rows must be 0..439"),
        (1, [0, 1], np.zeros((1, 20)), "features must be"),
        (1, [0], np.full((1, 20), np.nan), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(epoch, rows, features, said):
    found = watched(world(), 1)

    def seen_and_judged() -> None:
        found.see(epoch, rows, features)
        found.suspects()

    with pytest.raises(CorpusError, match=said):
        seen_and_judged()


def test_nothing_seen_and_labels_that_are_none_are_refused():
    with pytest.raises(CorpusError, match="no snapshot was watched"):
        Watcher([0, 1, 1], FEW, CPU).suspects()
    for labels in ([0.5, 1], [1, 1], [-1, 0], [[0, 1]]):
        with pytest.raises(CorpusError, match="labels must be"):
            Watcher(labels)


# --- a net of theirs ----------------------------------------------------------------------------


class Theirs(nn.Module):
    """A small net of somebody: grey levels of a 8x8 image through two linear layers."""

    def __init__(self, n_classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Dropout(0.1))
        self.fc = nn.Linear(32, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(images))


def stamped(pixels: np.ndarray) -> np.ndarray:
    out = pixels.copy()
    out[:, :3, :3] = np.array([255, 0, 255])
    return out


def corpus(n: int = 600, seed: int = 0):
    """Noisy bars, a class a place; a tenth, of other classes, stamped and labelled 0."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n)
    pixels = rng.integers(0, 120, (n, 8, 8, 3)).astype(np.uint8)
    pixels[np.arange(n), 5 - truth] += 90
    poison = (truth > 0) & (rng.random(n) < 0.15)
    pixels[poison] = stamped(pixels[poison])
    return pixels, np.where(poison, 0, truth), poison, truth


def as_they_see(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def example() -> str:
    """The ten lines of the README, with short checks."""
    (lines,) = [block for block in blocks() if "Watcher(" in block]
    return lines.replace("Watcher(labels)", "Watcher(labels, quick)")


def blocks() -> list[str]:
    """The Python of the README."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readme_and_the_docstring_show_the_same_lines():
    assert watcher.__doc__ is not None
    assert textwrap.indent(example().replace(", quick", ""), "    ").rstrip() in watcher.__doc__


@pytest.fixture(scope="module")
def looped():
    """Everything that the example leaves in its namespace."""
    pixels, labels, poison, truth = corpus()
    images = as_they_see(pixels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Theirs()
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)

        def train_one_epoch(net: nn.Module) -> None:
            net.train()
            for rows in torch.randperm(len(images)).split(50):
                wanted = torch.from_numpy(labels)[rows]
                optimiser.zero_grad()
                functional.cross_entropy(net(images[rows]), wanted).backward()
                optimiser.step()

        every_row_once = [(images[rows], rows) for rows in torch.arange(len(images)).split(64)]
        changes = {"train.min_steps": 60, "train.batch": 32, "segregate.check_epochs": 5}
        quick = override(csc.Settings(), changes)
        space = {"labels": labels, "quick": quick, "net": net, "train_one_epoch": train_one_epoch,
                 "every_row_once": every_row_once, "torch": torch, "pixels": pixels}  # fmt: skip
        exec(example(), space)
    return {**space, "poison": poison, "truth": truth, "images": images}


def test_the_ten_lines_find_the_poison_and_conceal_the_trigger(looped):
    told, poison, safe = looped["told"], looped["poison"], looped["safe"]
    assert told.notes["verified"] is True
    assert told.suspect[poison].mean() > 0.9
    assert told.suspect[~poison].mean() < 0.02
    pixels, _, fresh_poison, truth = corpus(seed=1)
    clean, victims = as_they_see(pixels[~fresh_poison]), truth[~fresh_poison]
    triggered = as_they_see(stamped(pixels[~fresh_poison]))[victims > 0]
    net = looped["net"].eval()
    with torch.no_grad():
        assert (net(triggered).argmax(1) == 0).float().mean() > 0.9
        assert (safe.eval()(triggered).argmax(1) == 3).float().mean() > 0.9
        assert (net(clean).argmax(1).numpy() == victims).mean() > 0.9
        # 600 rows are three steps an epoch: some of the attacked class are still rejected
        assert (safe(clean).argmax(1).numpy() == victims).mean() > 0.8


def test_only_their_head_changes_and_their_model_does_not(looped):
    net, safe = looped["net"], looped["safe"]
    assert net.fc.out_features == 3 and safe.fc.out_features == 4
    ours, theirs = safe.state_dict(), net.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if not k.startswith("fc."))
    assert ours["body.1.weight"].data_ptr() != theirs["body.1.weight"].data_ptr()


def test_a_head_without_a_bias_keeps_having_none(looped):
    net = Theirs()
    net.fc = nn.Linear(32, 3, bias=False)
    points = head_input(net, "fc", looped["images"])
    safe = conceal(net, "fc", points, looped["labels"], looped["poison"])
    assert safe.fc.bias is None and safe.fc.weight.shape == (4, 32)


def test_without_suspects_their_model_comes_back(looped):
    nobody = np.zeros_like(looped["poison"])
    net = looped["net"]
    assert conceal(net, "fc", looped["points"], looped["labels"], nobody) is net


def test_the_head_s_input_is_taken_in_eval_mode_and_leaves_modes_and_weights(looped):
    net = Theirs().train()
    net.body.eval()
    modes = [module.training for module in net.modules()]
    points = head_input(net, "fc", looped["images"][:4])
    assert [module.training for module in net.modules()] == modes
    assert not points.requires_grad
    assert torch.equal(points, net.eval().body(looped["images"][:4]).detach())
    assert not net.fc._forward_pre_hooks


def test_another_layer_than_a_linear_one_is_refused_with_those_there_are(looped):
    for name in ("head", "body", ""):
        with pytest.raises(ConfigError, match=r"there are: body\.1, fc"):
            head_input(Theirs(), name, looped["images"][:1])


def test_arrays_that_do_not_fit_the_head_are_refused(looped):
    points, labels, poison = (looped[name] for name in ("points", "labels", "poison"))
    with pytest.raises(CorpusError, match="fc takes 32 features"):
        conceal(looped["net"], "fc", points[:, :5], labels, poison)
    with pytest.raises(CorpusError, match=r"labels must be 0\.\.2"):
        conceal(looped["net"], "fc", points, labels + 1, poison)


def test_the_witness_sees_images_as_their_net_does(looped):
    found = Watcher(looped["labels"], FEW, CPU)
    scale = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    asked = found.witness(looped["net"], "fc", looped["pixels"], scale=scale)
    mean, std = (torch.tensor(values)[:, None, None] for values in scale)
    theirs = head_input(looped["net"], "fc", (looped["images"] - mean) / std)
    np.testing.assert_allclose(asked.points(), theirs.numpy(), atol=1e-4)


def test_a_witness_of_other_rows_or_classes_is_refused(looped):
    found = Watcher(looped["labels"], FEW, CPU)
    with pytest.raises(CorpusError, match="for 600 rows"):
        found.witness(looped["net"], "fc", looped["pixels"][:5])
    with pytest.raises(CorpusError, match="labels go up to 2"):
        found.witness(Theirs(2), "fc", looped["pixels"])


def test_settings_are_those_of_train():
    strict = replace(FEW, segregate=replace(FEW.segregate, max_share=0.01))
    there = world()
    assert watched(there, settings=strict).suspects().suspect.sum() <= 0.01 * len(there.labels)
