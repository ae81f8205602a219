"""The study of added classes: what each approach may touch, its sums and its sentences."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from fastlatent.data import load_data
from fastlatent.studies import incremental
from fastlatent.studies._run import Result, Settings, run, train_model
from fastlatent.studies._section import unstated
from fastlatent.training import fit

SETTINGS = Settings(latent_dim=2, epochs=4, hidden=(8,), batch_size=16, seeds=(0, 1))
KEYS = ("autoencoder", "autodecoder")
OLD, NEW = torch.arange(30), torch.arange(30, 42)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few():
    """Digits 0 to 3, 30 of each."""
    digits = load_data("digits")
    rows = torch.cat([(digits.labels == c).nonzero()[:30, 0] for c in range(4)])
    return digits.subset(rows, "few digits")


@pytest.fixture(scope="module")
def study(few):
    return run(["incremental"], few, replace(SETTINGS, seeds=(0,)), workers=1)["incremental"]


def course(name, data):
    start = train_model(name, data.subset(OLD), SETTINGS, 0)
    kind = incremental._TableCourse if name == "autodecoder" else incremental._EncoderCourse
    return kind(start, data, SETTINGS, 0)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return {n for n in first if torch.equal(first[n], second[n]) or "code_" in n} == set(first)


@pytest.mark.parametrize("name", KEYS)
def test_frozen_trains_nothing(few, name):
    one = course(name, few)
    before = state(one.model)
    one.add("frozen", OLD, NEW)
    after = state(one.model)
    if name == "autodecoder":
        assert len(after["table.weight"]) == 42
        after["table.weight"] = after["table.weight"][:30]
    assert same(before, after)


@pytest.mark.parametrize("name", KEYS)
def test_again_is_training_on_everything(few, name):
    one = course(name, few)
    one.add("again", OLD, NEW)
    assert same(
        state(one.model), state(train_model(name, few.subset(torch.arange(42)), SETTINGS, 0))
    )


@pytest.mark.parametrize("name", KEYS)
def test_tuning_on_the_new_class_sees_no_old_sample(few, name):
    one = course(name, few)
    before = state(one.model)
    one.tune("new", torch.full((30, *few.sample_shape), torch.nan), few.batch(NEW))
    after = state(one.model)
    assert not torch.equal(before["decoder.layers.0.weight"], after["decoder.layers.0.weight"])
    if name == "autoencoder":
        by_hand = train_model(name, few.subset(OLD), SETTINGS, 0)
        fit(by_hand, few.subset(NEW), epochs=1, **one.rates)
        assert same(after, state(by_hand))
        return
    assert torch.equal(before["table.weight"], after["table.weight"][:30])
    only = course(name, few)
    only.tune("frozen", few.batch(OLD), few.batch(NEW))
    assert not torch.equal(only.model.codes[30:], one.model.codes[30:])


@pytest.mark.parametrize("name", KEYS)
def test_old_data_and_old_codes_are_two_things(few, name):
    """Replay never reads the old samples once their codes are there; kept data are read."""
    blank = torch.zeros(30, *few.sample_shape)
    states = {}
    for approach in ("codes", "data"):
        for what, known in (("true", few.batch(OLD)), ("blank", blank)):
            one = course(name, few)
            if name == "autoencoder":
                one.codes = one.model.encode(OLD, few.batch(OLD))
            one.tune(approach, known, few.batch(NEW))
            states[approach, what] = state(one.model)
    assert same(states["codes", "true"], states["codes", "blank"])
    assert not same(states["data", "true"], states["data", "blank"])
    assert not same(states["data", "true"], states["codes", "true"])


def test_an_encoder_replays_what_its_decoder_made_of_its_codes(few):
    one = course("autoencoder", few)
    by_hand = copy.deepcopy(one.model)
    one.tune("codes", few.batch(OLD), few.batch(NEW))
    replayed = torch.cat([by_hand.reconstruct(OLD, few.batch(OLD)), few.batch(NEW)])
    fit(by_hand, load_data(replayed), epochs=1, **one.rates)
    assert same(state(one.model), state(by_hand))
    assert torch.equal(one.codes, by_hand.encode(torch.arange(42), replayed))
    one.tune("codes", torch.full((42, *few.sample_shape), torch.nan), few.batch(NEW))
    assert len(one.codes) == 54


def test_classes():
    def classes(labels):
        data = load_data(torch.rand(len(labels), 3).numpy(), labels=labels)
        return incremental._classes(data), incremental.cells(data, SETTINGS)

    cells = [{"model": name} for name in KEYS]
    assert classes([3, 5, 7, 9] * 20) == (([3, 5], [7, 9]), cells)
    assert classes([0, 1, 2] * 20) == (([0], [1, 2]), cells)
    assert classes([4, 8] * 20) == (([4], [8]), cells)
    # nobody is held out of a class of one sample
    assert classes([0] * 20 + [1] * 20 + [2])[1] == []


def test_errors_of_old_and_new_classes(few):
    """By hand, from the first training to the last addition of nothing but codes."""
    found = incremental.measure(few, SETTINGS, 1, model="autodecoder").figures
    assert found["old"] == [0, 1] and found["added"] == [2, 3]
    assert list(found["steps"]) == list(incremental.APPROACHES)
    train, test = SETTINGS.split(few, 1)

    def part(data, *classes):
        return data.subset(torch.cat([(data.labels == c).nonzero()[:, 0] for c in classes]))

    old = part(train, 0, 1)
    model = train_model("autodecoder", old, replace(SETTINGS, epochs=2), 1)

    def unseen(*classes):
        x = part(test, *classes).tensor()
        with torch.no_grad():
            return (model.decoder(model.infer(x).latent) - x).double().square().mean().item()

    start, middle, end = found["steps"]["frozen"]
    assert start["old_test"] == unseen(0, 1) and start["coming_test"] == unseen(2, 3)
    assert start["new_train"] is start["new_test"] is None and start["seconds"] == 0
    x = old.tensor()
    trained = (model.reconstruct(torch.arange(len(x)), x) - x).double().square().mean().item()
    assert start["old_train"] == middle["old_train"] == end["old_train"] == trained
    model.extend(part(train, 2).tensor())
    assert middle["new_test"] == unseen(2) and middle["coming_test"] == unseen(3)
    model.extend(part(train, 3).tensor())
    assert end["new_test"] == unseen(2, 3) and end["coming_test"] is None
    x = part(train, 2, 3).tensor()
    rows = torch.arange(len(old), model.num_samples)
    assert end["new_train"] == (model.reconstruct(rows, x) - x).double().square().mean().item()


def test_collect_subtracts_within_a_seed_whatever_the_order(study):
    results = []
    for seed in (0, 1):
        for name in KEYS:
            steps = [
                {e: 2.0 ** (10 * seed) * (place + 1) for e in incremental._ERRORS}
                | {"seconds": 1.0}
                for place in range(3)
            ]
            steps[0]["new_test"] = None
            figures = {"old": [0, 1], "added": [2, 3]}
            figures["steps"] = dict.fromkeys(incremental.APPROACHES, steps)
            results.append(Result(seed, {"model": name}, figures, {}))
    found = incremental.collect(results, study.about)
    assert found == incremental.collect(results[::-1], study.about)
    start, _, end = found.models["autodecoder"]["codes"]
    assert start.new_test is None and start.forgetting.maximum == 0 and start.seconds.mean == 1
    assert (end.forgetting.minimum, end.forgetting.maximum) == (2, 2 * 2**10)
    assert end.seconds.mean == 3


def test_study_from_end_to_end(study):
    assert (study.old, study.added) == ((0, 1), (2, 3))
    assert (study.epochs, study.tuning_epochs) == (2, 1)
    content = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert incremental.IncrementalStudy.from_json(content) == study
    for name in KEYS:
        for approach, steps in study.models[name].items():
            assert len(steps) == 3
            assert (steps[2].new_refined is None) == (name == "autodecoder")
            assert 0 == steps[0].seconds.mean < steps[1].seconds.mean < steps[2].seconds.mean
            if approach == "frozen":
                # an encoder's products of 64 numbers round differently in a larger batch
                budget = 64 * torch.finfo(torch.float32).eps if name == "autoencoder" else 0
                error = steps[0].old_train.mean
                assert abs(steps[2].forgetting_train.mean) <= budget * error
    section = incremental.section(study)
    assert len(section.findings) >= 7
    for text in section.findings:
        assert unstated(text, content) == [], text
    assert len(section.figure.axes) == 2
    assert all(len(row) == len(section.table.head) for row in section.table.rows)


def test_the_best_approach_is_named_as_measured(study):
    content = json.loads(json.dumps(study.to_json()))
    for approach, steps in content["models"]["autodecoder"].items():
        for name in ("old_test", "new_test"):
            steps[-1][name]["mean"] = 0.001 if approach in ("new", "again") else 0.5
    texts = incremental.section(incremental.IncrementalStudy.from_json(content)).findings
    best = next(t for t in texts if t.startswith("AD’s lowest"))
    assert f"“{incremental.APPROACHES['new']}”" in best


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (None, "no labels"),
        ([6] * 30, "one class only"),
        ([0] * 15 + [1] * 14 + [2], "too few samples"),
    ],
)
def test_what_cannot_be_measured_is_said(few, labels, reason):
    data = load_data(few.tensor()[:30], labels=labels)
    found = run(["incremental"], data, SETTINGS, workers=1)["incremental"]
    assert found.models == {} and incremental.IncrementalStudy.from_json(found.to_json()) == found
    section = incremental.section(found)
    assert all(reason in text for text in (*section.findings, *section.notes))
    assert section.findings and section.table.rows == () and section.figure.axes
