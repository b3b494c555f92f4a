"""The pattern that two groups differ by: a trigger commands a label, a difference of shade not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from csc_gpu.backend import open_backend
from csc_gpu.trigger import evenly, mean_image, transfers
from csc_gpu.types import Corpus, Transfer

CPU = open_backend("cpu", 1)


class Corner(nn.Module):
    """A backdoored net: label 0 if the last pixel is bright, else label 1. Notes what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        bright = images[:, :, -1, -1].mean(1) > 1.0
        return torch.stack([bright, ~bright], dim=1).float()


def stamped_corpus(n: int = 90) -> tuple[Corpus, dict[str, np.ndarray]]:
    """Dark images with noise, labels 0 to 2; a third of label 0 is stamped in the last pixel."""
    rows = np.arange(n)
    pixels = np.random.default_rng(0).integers(0, 100, (n, 5, 6, 3)).astype(np.uint8)
    labels = rows % 3
    stamped = (labels == 0) & (rows % 9 == 0)
    pixels[stamped, -1, -1] = 255
    benign = (labels == 0) & ~stamped
    masks = {"stamped": stamped, "benign": benign, "others": labels != 0}
    masks |= {"one half": benign & (rows % 2 == 0), "other half": benign & (rows % 2 == 1)}
    return Corpus(labels, tuple("abc"), rows, ("",) * n, pixels), masks


@pytest.mark.parametrize(
    ("group", "rest", "share"),
    [
        ("stamped", "benign", 1.0),
        ("stamped", "others", 1.0),
        ("benign", "stamped", 0.0),
        ("one half", "other half", 0.0),
        ("benign", "others", 0.0),
    ],
)
def test_the_pattern_of_stamped_rows_commands_the_label_and_no_other_does(group, rest, share):
    corpus, rows = stamped_corpus()
    assert transfers(Corner(), corpus, rows[group], rows[rest], 0, CPU).share == share


class Choosy(Corner):
    """Obeys the corner but in images that are bright in the middle, as label 1's are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = super().forward(images)
        refused = images[:, :, 2, 2].mean(1) > 1.0
        return torch.where(refused[:, None], torch.tensor([0.0, 1.0]), found)


def for_one_label() -> tuple[Corpus, dict[str, np.ndarray]]:
    """Benign images of label 0 have a mark of their own; stamped ones are those of label 2."""
    corpus, rows = stamped_corpus()
    corpus.pixels[corpus.labels == 1, 2, 2] = 255
    corpus.pixels[rows["benign"], 0, 0] = 255
    return corpus, rows


def test_a_trigger_for_one_label_shows_in_that_labels_share():
    corpus, rows = for_one_label()
    found = transfers(Choosy(), corpus, rows["stamped"], rows["benign"], 0, CPU)
    assert (found.label, found.source, found.most, found.share) == (0, 2, 1.0, 0.5)
    assert found.groups == Transfer.fingerprint(rows["stamped"], rows["benign"])
    other = transfers(Choosy(), corpus, rows["benign"], rows["stamped"], 0, CPU)
    assert (other.source, other.most) == (-1, 0.0)


def test_no_share_of_one_label_is_told_if_the_group_is_not_made_of_its_images():
    """A kind of benign images may turn those of another label into its own, whatever they show."""
    corpus, rows = for_one_label()
    corpus.pixels[rows["stamped"], 1:3, 1:3] = 255  # unlike label 2, more than benign rows are
    corpus.pixels[rows["benign"], 1:3, 1:3] = 255
    found = transfers(Choosy(), corpus, rows["stamped"], rows["benign"], 0, CPU)
    assert (found.source, found.most, found.share) == (-1, 0.0, 0.5)


def test_of_a_label_of_which_few_images_are_tried_no_share_is_told(monkeypatch):
    corpus, rows = for_one_label()  # 30 of either other label
    monkeypatch.setattr("csc_gpu.trigger.OF_ONE", 30)
    assert transfers(Corner(), corpus, rows["stamped"], rows["benign"], 0, CPU).source == 2
    monkeypatch.setattr("csc_gpu.trigger.OF_ONE", 31)
    found = transfers(Corner(), corpus, rows["stamped"], rows["benign"], 0, CPU)
    assert (found.source, found.most, found.share) == (-1, 0.0, 1.0)


def test_the_pattern_is_tried_on_other_labels_and_on_neither_group():
    corpus, rows = stamped_corpus()
    net, zero = Corner(), np.zeros(len(corpus), bool)
    group, rest = rows["stamped"] | (corpus.labels == 1), zero | (np.arange(len(corpus)) == 2)
    transfers(net, corpus, group, rest, 0, CPU)
    as_they_are, seen = net.seen
    assert len(as_they_are) == len(seen) == (corpus.labels == 2).sum() - 1


def test_where_the_groups_are_all_there_is_the_pattern_is_tried_on_every_other_label():
    corpus, rows = stamped_corpus()
    net = Corner()
    transfers(net, corpus, rows["stamped"], rows["others"], 0, CPU)
    assert len(net.seen[0]) == rows["others"].sum()


class Shared(Corner):
    """Gives label 0 to every image of the darkest so many, too, whatever is in its corner."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shade = images[:, :, 0, 0].mean(1)
        dark = shade <= torch.quantile(shade, self.share)
        found = super().forward(images)
        return torch.where(dark[:, None], torch.tensor([1.0, 0.0]), found)


@pytest.mark.parametrize(
    ("share", "trigger", "halves"),
    [(0.3, 1.0, 0.0), (0.45, 1.0, 0.0), (0.5, 0.0, 0.0), (0.6, 0.0, 0.0)],
)
def test_images_that_have_the_label_anyway_say_nothing_of_a_pattern(share, trigger, halves):
    corpus, rows = stamped_corpus()
    of = {"stamped": "benign", "one half": "other half"}
    found = [transfers(Shared(share), corpus, rows[a], rows[b], 0, CPU) for a, b in of.items()]
    assert [answer.share for answer in found] == pytest.approx([trigger, halves], abs=0.06)


def test_stamped_images_stay_within_the_range_of_images(monkeypatch):
    monkeypatch.setattr("csc_gpu.trigger.TRIED", 7)
    corpus, rows = stamped_corpus()
    corpus.pixels[rows["others"], -1, -1] = 200
    net = Corner()
    transfers(net, corpus, rows["stamped"], rows["benign"], 0, CPU)
    _, seen = net.seen
    assert len(seen) == 7
    assert seen.max() == 2.0 and seen.min() >= -2.0
    assert (seen[:, :, -1, -1] == 2.0).all()


def test_the_net_is_asked_in_eval_mode_and_the_corpus_stays_as_it_was():
    corpus, rows = stamped_corpus()
    before, net = corpus.pixels.copy(), Corner()
    net.train()
    transfers(net, corpus, rows["stamped"], rows["benign"], 0, CPU)
    assert not net.training
    assert (corpus.pixels == before).all()


def test_the_mean_image_is_that_of_the_rows(monkeypatch):
    monkeypatch.setattr("csc_gpu.trigger.BATCH", 4)
    corpus, rows = stamped_corpus()
    found = mean_image(corpus, rows["benign"], CPU).numpy()
    wanted = ((corpus.pixels[rows["benign"]] / 255 - 0.5) / 0.25).mean(axis=0)
    np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), atol=1e-5)


def test_of_many_rows_some_are_taken_evenly_from_first_to_last():
    rows = np.arange(100) % 2 == 0
    assert evenly(rows, 3).tolist() == [0, 48, 98]
    assert evenly(rows, 1000).tolist() == list(range(0, 100, 2))
    assert evenly(np.zeros(4, bool), 3).tolist() == []
