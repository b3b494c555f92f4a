"""A training that differs from the ordinary one: objective, rates, optimiser; it resumes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from csc_gpu.backend import open_backend
from csc_gpu.checkpoint import Folder
from csc_gpu.models import new_model
from csc_gpu.train import Budget, Method, constant, falling, train
from tests.test_train import ONE_EPOCH, corpus, equal, weights

CPU = open_backend("cpu", 1)
THREE = replace(ONE_EPOCH, epochs=3)


def trained(there, plan, method, **more):
    model = new_model("resnet8", there.n_classes, 8, seed=0)
    moments = list(train(model, there, plan, CPU, seed=0, method=method, **more))
    return model, moments


def test_the_ordinary_method_is_what_is_done_without_one():
    there = corpus()
    with_one, _ = trained(there, THREE, Method())
    without = new_model("resnet8", 2, 8, seed=0)
    for _ in train(without, there, THREE, CPU, seed=0):
        pass
    assert equal(weights(with_one), weights(without))


def test_rates_that_stay_and_rates_that_fall():
    budget = Budget(epochs=4, steps_per_epoch=10)
    assert {constant(step, budget) for step in range(1, 41)} == {1.0}
    rate = falling(1, 3, by=0.5)
    assert [rate(step, budget) for step in (1, 10, 11, 30, 31, 40)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    _, moments = trained(corpus(), THREE, Method(rate=falling(1)))
    assert [round(m.lr / THREE.lr, 6) for m in moments] == [1] * 3 + [0.1] * 6


def test_an_objective_sees_every_row_once_an_epoch_and_the_steps_in_order():
    seen, steps = [], []

    def objective(forward, batch, step):
        seen.extend(batch.rows.tolist())
        steps.append(step)
        return functional.cross_entropy(forward(batch.images), batch.labels)

    trained(corpus(20), THREE, Method(objective=objective))
    assert sorted(seen) == sorted(list(range(20)) * 3)
    assert steps == list(range(1, 10))


def test_ascent_is_a_negative_objective():
    there = corpus(40)
    plan = replace(THREE, epochs=6)

    def ascend(forward, batch, step):
        return -functional.cross_entropy(forward(batch.images), batch.labels)

    _, down = trained(there, plan, Method())
    _, up = trained(there, plan, Method(objective=ascend))
    assert float(-up[-1].loss) > float(down[-1].loss)


def test_what_needs_no_gradient_stays_and_parts_may_be_set_to_eval():
    there, model = corpus(), new_model("resnet8", 2, 8, seed=0)
    model.features.requires_grad_(False)
    before = weights(model)

    def objective(forward, batch, step):
        model.features.eval()
        return functional.cross_entropy(forward(batch.images), batch.labels)

    for _ in train(model, there, ONE_EPOCH, CPU, seed=0, method=Method(objective=objective)):
        pass
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_another_optimiser_goes_on_from_a_checkpoint_as_if_nothing_had_been(tmp_path, kind):
    there = corpus()
    method = Method(optimiser=lambda weights: kind(weights, lr=0.01), rate=constant)
    plan = replace(THREE, lr=0.01)
    whole, _ = trained(there, plan, method)
    model = new_model("resnet8", 2, 8, seed=0)
    kept = Folder(tmp_path, minutes=100)
    for at in train(model, there, plan, CPU, seed=0, method=method, kept=kept):
        if at.step == 5:  # after the first epoch's record
            break
    resumed = new_model("resnet8", 2, 8, seed=5)
    steps = [at.step for at in train(resumed, there, plan, CPU, seed=0, method=method, kept=kept)]
    assert steps[0] == 3 and steps[-1] == 9
    assert equal(weights(whole), weights(resumed))


def test_any_module_may_learn_a_pattern_instead_of_weights():
    there = corpus(40)
    net = new_model("resnet8", 2, 8, seed=0).eval()

    class Pattern(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pattern = torch.nn.Parameter(torch.zeros(3, 8, 8))

        def forward(self, images):
            return net(images + self.pattern)

    def objective(forward, batch, step):
        return functional.cross_entropy(forward(batch.images), torch.ones_like(batch.labels))

    before = weights(net)
    pattern = Pattern()
    plan = replace(ONE_EPOCH, shift=0.0)
    for _ in train(pattern, there, plan, CPU, seed=0, method=Method(objective=objective)):
        pass
    assert equal(before, weights(net))
    assert np.abs(pattern.pattern.detach().numpy()).max() > 0
