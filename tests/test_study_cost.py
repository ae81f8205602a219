"""The study of costs: its own training loop against `fit`, its counts by hand, its words."""

import dataclasses
import json

import pytest
import torch

from fastlatent.data import load_data
from fastlatent.studies import _run, cost, read
from fastlatent.studies._run import MODEL_KEYS, About, Result, Settings, build_model, train_model
from fastlatent.studies._section import unstated

TINY = Settings(epochs=4, hidden=(16,), latent_dim=2, batch_size=16, seeds=(0, 1))


@pytest.fixture(scope="module")
def few():
    return load_data("digits").subset(torch.arange(0, 1797, 15), "few digits")


@pytest.mark.parametrize("name", MODEL_KEYS)
def test_one_step_a_visit_is_what_fit_does(few, name):
    train, _ = TINY.split(few, 0)
    model = build_model(name, train, TINY, 0)
    errors, seconds = cost.train_with_visits(model, train, TINY, 0, 1)
    theirs = train_model(name, train, dataclasses.replace(TINY, epochs=2), 0)
    for key, value in theirs.state_dict().items():
        # NaN: an auto-encoder's sampler before it is fitted
        assert torch.equal(model.state_dict()[key].nan_to_num(), value.nan_to_num()), key
    assert len(errors) == len(seconds) == 2 and seconds[1] > seconds[0] > 0
    x = train.tensor()
    decoded = theirs.reconstruct(torch.arange(len(train)), x)
    assert errors[-1] == (decoded - x).double().square().mean().item()


@pytest.mark.parametrize("name", ["autodecoder", "variational_autodecoder"])
def test_more_steps_a_visit_move_the_codes_only(few, name):
    train, _ = TINY.split(few, 0)
    model = build_model(name, train, TINY, 0)
    optimizers = model.optimizers(TINY.lr, TINY.code_lr, assume_unique=True)
    index, x = torch.arange(16), train.batch(torch.arange(16))
    decoders, codes, gradients = [], [], []

    class Spy:
        def __init__(self, inner):
            self.inner, self.zero_grad = inner, inner.zero_grad

        def step(self):
            before = model.decoder.layers[0].weight.clone(), model.codes.clone()
            gradients.append(model.decoder.layers[0].weight.grad is not None)
            self.inner.step()
            decoders.append(not torch.equal(before[0], model.decoder.layers[0].weight))
            codes.append((before[1] != model.codes).any(1))

    cost._visit(model, [Spy(o) for o in optimizers], index, x, 3)
    assert decoders == [False, False, True, False]
    # of the decoder none are computed that are not used
    assert gradients == [False, False, True, True]
    for moved in (codes[0], codes[1], codes[3]):
        assert moved[:16].all() and not moved[16:].any()
    assert all(p.requires_grad for p in model.decoder.parameters())
    assert sum(int(o.state[p]["step"]) for o in optimizers[:1] for p in o.state) == len(
        list(model.decoder.parameters())
    )


def test_first_epoch_at_a_level():
    assert cost.first_epoch([5.0, 3.0, 4.0, 1.0], 3.0) == 2
    assert cost.first_epoch([5.0], 5.0) == 1
    assert cost.first_epoch([5.0, 4.0], 1.0) is None


def synthetic(scale):
    """Two seeds of four epochs; `scale` multiplies a model's error, key by key."""
    about = About("toy", 60, 50, 10, (1, 8, 8), True, 10, dataclasses.replace(TINY, epochs=8))
    results = []
    for cell in cost.cells(None, TINY):
        name, visits = cell["model"], cell["visits"]
        for seed in TINY.seeds:
            factor = scale.get((name, visits), 1.0) * (1 + seed / 1000)
            figures = {
                "mse": [factor * e for e in (0.08, 0.03, 0.024, 0.02)],
                "seconds": [visits * s for s in (0.5, 1.0, 1.5, 2.0)],
                "test_mse": 0.04 * factor,
                "steps": 4,
            }
            results.append(Result(seed, cell, figures, {}))
    return cost.collect(results, about)


def test_counts_by_hand():
    study = synthetic({("autodecoder", 1): 0.5, ("autodecoder", 10): 1.5})
    ae, ad = study.course("autoencoder"), study.course("autodecoder")
    # 1.25 · 0.02 is first reached by 0.024 in epoch 3, of 4 steps each
    by_level = {r.level: r for r in ae.reached}
    assert [by_level[level].epochs.mean for level in (1.5, 1.25, 1.0)] == [2, 3, 4]
    assert by_level[1.25].passes.mean == 12 and by_level[1.25].seconds.mean == 1.5
    assert {r.level: r.epochs.mean for r in ad.reached}[1.25] == 2
    assert study.ratio("autodecoder", 1.25).passes.mean == pytest.approx(2 / 3)
    assert study.ratio("autodecoder", 1.25).seconds.mean == pytest.approx(1 / 1.5)
    many = study.course("autodecoder", 10)
    assert many.against_one.mean == pytest.approx(3) and many.seconds_against_one.mean == 10
    never = {r.level: r for r in many.reached}[1.25]
    assert (never.seeds, never.passes, never.seconds) == (0, None, None)
    assert study.course("variational_autodecoder", 5).reached[2].passes.mean == 12 * 5


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ({("autodecoder", 1): 0.5}, "AD takes 0.67 times the passes and 0.67 times the seconds"),
        ({("autodecoder", 1): 9.0}, "AD does not in 4 epochs"),
        ({("autodecoder", 10): 0.5}, "lower AD’s training error to 0.50 of that with one"),
        ({("autodecoder", 10): 2.0}, "raise AD’s training error to 2.00 times that with one"),
        (
            {},
            "move AD’s training error no farther than the seeds scatter (1.0 times that with one)",
        ),
        ({}, "for 10 times the seconds; its error on unseen samples is 1.0 times that with one"),
        ({}, "soonest with 1 latent step a visit (latent steps: time; 1: 1.5 s, 2: 3.0 s, 5: 7.5"),
        ({("autodecoder", 1): 9.0}, "soonest with 2 latent steps a visit (latent steps: time; 2:"),
        ({}, "AE comes to 1.25 times its last error after 12 passes through the decoder, in 1.5 s"),
    ],
)
def test_findings_follow_the_figures(scale, words):
    study = synthetic(scale)
    text = " ".join(cost.section(study).findings)
    assert words in text
    assert unstated(text, study.to_json()) == []


def test_a_level_that_one_seed_misses_says_so():
    study = synthetic({})
    # the second seed's auto-decoder is off by a thousandth, as the auto-encoder is: equal
    assert study.ratio("autodecoder", 1.0).seeds == 2
    runs = {
        ("autoencoder", 1): {s: {"mse": [1.0], "seconds": [1.0], "steps": 2} for s in (0, 1)},
        ("autodecoder", 1): {s: {"mse": [1.0 + s], "seconds": [2.0], "steps": 2} for s in (0, 1)},
    }
    ratio = cost._ratio(runs, "autodecoder", 1.0)
    assert (ratio.seeds, ratio.passes.mean, ratio.seconds.mean) == (1, 1.0, 2.0)
    ratios = tuple(ratio if (r.model, r.level) == ("autodecoder", 1.0) else r for r in study.ratios)
    text = " ".join(cost.section(dataclasses.replace(study, ratios=ratios)).findings)
    assert "AD takes 1.0 times the passes and 2.0 times the seconds (in 1 of 2 seeds)" in text


def test_a_whole_study(few):
    def run():
        return _run.run("cost", few, TINY, workers=1)["cost"]

    study = run()
    # seconds take no part in the comparison
    assert run() == study
    content = json.loads(json.dumps(study.to_json()))
    assert read("cost", content) == study
    section = cost.section(study)
    assert unstated(" ".join(section.findings), content) == []
    assert [(c.model, c.visits) for c in study.courses] == [
        (c["model"], c["visits"]) for c in cost.cells(few, TINY)
    ]
    assert study.epochs == 2 and study.courses[0].curve_epochs == (1, 2)
    assert all(len(row) == len(section.table.head) for row in section.table.rows)
    assert len(section.figure.axes) == 3
