"""Classes that come later: what adding them costs, and what is forgotten of the old ones."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any

import torch
from matplotlib.lines import Line2D
from torch import Tensor

from fastlatent.data import LatentData, load_data
from fastlatent.figures import INKS, MODELS, label, panels
from fastlatent.models import AutoDecoder, LatentModel
from fastlatent.studies._codes import has_table, mean_squared_error, training_codes, unseen_codes
from fastlatent.studies._run import About, Measured, Result, Settings, train_model
from fastlatent.studies._section import Estimate, Record, Section, Table, significant
from fastlatent.studies._words import listed
from fastlatent.training import fit

TITLE = "Adding data"
QUESTION = "What happens when classes are added, one after the other, that training did not see?"
MODEL_KEYS = ("autoencoder", "autodecoder")
APPROACHES = {
    "frozen": "nothing trained",
    "new": "tuned on the new class",
    "codes": "tuned, old codes replayed",
    "data": "tuned, old data kept",
    "again": "trained again on everything",
}

_MARKERS = {"frozen": "o", "new": "X", "codes": "D", "data": "s", "again": "*"}
_ERRORS = (
    "old_train",
    "old_test",
    "new_train",
    "new_test",
    "old_refined",
    "new_refined",
    "coming_test",
)


@dataclass(frozen=True)
class Step(Record):
    """One model after an addition, over the seeds; errors are mean squared errors per value.

    Attributes:
        old_train, old_test: errors on the first classes, training and unseen samples.
        new_train, new_test: on the classes added so far; None at the start.
        old_refined, new_refined: old_test and new_test if `infer` goes on from the encoder's codes;
            None for the auto-decoder.
        coming_test: on unseen samples of the classes not yet added; None at the end.
        forgetting_train, forgetting: rise of old_train and old_test since the start.
        seconds: processor time of all additions so far: codes and tuning, without measuring.
    """

    old_train: Estimate
    old_test: Estimate
    new_train: Estimate | None
    new_test: Estimate | None
    old_refined: Estimate | None
    new_refined: Estimate | None
    coming_test: Estimate | None
    forgetting_train: Estimate
    forgetting: Estimate
    seconds: Estimate


@dataclass(frozen=True)
class IncrementalStudy(Record):
    """The result of the study; without classes to add `models` is empty.

    Attributes:
        epochs: of the first training and of training again.
        tuning_epochs: of tuning after each addition.
        old, added: the first classes, and the others in the order of their addition.
        models: "autoencoder" and "autodecoder"; in each `APPROACHES`, the start and a `Step` for
            each addition.
    """

    about: About
    epochs: int
    tuning_epochs: int
    old: tuple[int, ...]
    added: tuple[int, ...]
    models: dict[str, dict[str, tuple[Step, ...]]]


def cells(data: LatentData, settings: Settings) -> list[dict[str, Any]]:
    """None where a class to train on or to add has no training or no unseen samples."""
    if data.labels is None or len(data.labels.unique()) < 2:
        return []
    old, added = _classes(data)
    for seed in settings.seeds:
        for part in settings.split(data, seed):
            if any(len(_rows(part, group)) == 0 for group in (old, *([c] for c in added))):
                return []
    return [{"model": model} for model in MODEL_KEYS]


def measure(data: LatentData, settings: Settings, seed: int, *, model: str) -> Measured:
    """All approaches for one model, from the same start.

    Returns "old" and "added", the classes, and "steps", for each approach the errors of `Step` and
    the seconds of each addition.
    """
    train, test = settings.split(data, seed)
    old, added = _classes(data)
    settings = replaced(settings, epochs=_epochs(settings))
    start = train_model(model, train.subset(_rows(train, old)), settings, seed)
    kind = _EncoderCourse if model == "autoencoder" else _TableCourse
    steps = {}
    for approach in APPROACHES:
        course = kind(copy.deepcopy(start), train, settings, seed)
        steps[approach] = [_errors(course.model, train, test, old, added, 0, seed, seconds=0.0)]
        for done, label_ in enumerate(added, start=1):
            known = _rows(train, (*old, *added[: done - 1]))
            begin = time.process_time()
            course.add(approach, known, _rows(train, [label_]))
            seconds = time.process_time() - begin
            course.model.eval()
            steps[approach].append(
                _errors(course.model, train, test, old, added, done, seed, seconds)
            )
    return Measured({"old": old, "added": added, "steps": steps})


class _Course:
    """A model through its additions."""

    def __init__(
        self, model: LatentModel, train: LatentData, settings: Settings, seed: int
    ) -> None:
        self.model, self.train, self.settings, self.seed = model, train, settings, seed

    def add(self, approach: str, known: Tensor, new: Tensor) -> None:
        """Add the samples in the rows `new`, where those in `known` have been trained on."""
        if approach == "again":
            everything = self.train.subset(torch.cat([known, new]))
            name = MODEL_KEYS[isinstance(self.model, AutoDecoder)]
            self.model = train_model(name, everything, self.settings, self.seed)
        else:
            self.tune(approach, self.train.batch(known), self.train.batch(new))

    def tune(self, approach: str, known: Tensor, new: Tensor) -> None:
        raise NotImplementedError

    @property
    def rates(self) -> dict[str, Any]:
        return {
            "batch_size": self.settings.batch_size,
            "lr": self.settings.lr,
            "code_lr": self.settings.code_lr,
            "seed": self.seed,
        }


class _EncoderCourse(_Course):
    # codes of what was trained on, kept in place of the samples
    codes: Tensor | None = None

    def tune(self, approach: str, known: Tensor, new: Tensor) -> None:
        if approach == "frozen":
            training_codes(self.model, new)
            return
        x = new
        if approach == "data":
            x = torch.cat([known, new])
        elif approach == "codes":
            codes = training_codes(self.model, known) if self.codes is None else self.codes
            with torch.no_grad():
                x = torch.cat([self.model.decoder(codes), new])
        fit(self.model, load_data(x), epochs=_tuning_epochs(self.settings), **self.rates)
        if approach == "codes":
            self.codes = training_codes(self.model.eval(), x)


class _TableCourse(_Course):
    model: AutoDecoder

    def tune(self, approach: str, known: Tensor, new: Tensor) -> None:
        epochs = _tuning_epochs(self.settings)
        if approach in ("codes", "data"):
            data = known if approach == "data" else None
            self.model.extend(new, tune=epochs, data=data, **self.rates)
            return
        rows = self.model.extend(new)
        if approach == "new":
            part = AutoDecoder(self.model.decoder, len(new), self.model.latent_dim)
            part.codes.copy_(self.model.codes[rows])
            fit(part, load_data(new), epochs=epochs, **self.rates)
            self.model.codes[rows] = part.codes


def collect(results: Sequence[Result], about: About) -> IncrementalStudy:
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result.arguments["model"], []).append(result.figures)
    first = next(iter(found.values()))[0] if found else {"old": (), "added": ()}

    def step(seeds: list[list[dict[str, Any]]], place: int) -> Step:
        def over(value: Callable[[list[dict[str, Any]]], float | None]) -> Estimate | None:
            values = [value(steps) for steps in seeds]
            return None if None in values else Estimate.of(values)

        return Step(
            **{name: over(lambda s, name=name: s[place][name]) for name in _ERRORS},
            forgetting_train=over(lambda s: s[place]["old_train"] - s[0]["old_train"]),
            forgetting=over(lambda s: s[place]["old_test"] - s[0]["old_test"]),
            seconds=over(lambda s: math.fsum(part["seconds"] for part in s[: place + 1])),
        )

    return IncrementalStudy(
        about=about,
        epochs=_epochs(about.settings),
        tuning_epochs=_tuning_epochs(about.settings),
        old=tuple(first["old"]),
        added=tuple(first["added"]),
        models={
            model: {
                approach: tuple(
                    step([f["steps"][approach] for f in figures], place)
                    for place in range(len(first["added"]) + 1)
                )
                for approach in APPROACHES
            }
            for model, figures in found.items()
        },
    )


def section(study: IncrementalStudy) -> Section:
    notes = [
        f"The first training and training again take {study.epochs} epochs, tuning takes "
        f"{study.tuning_epochs} after each addition, at the same rates and with fresh optimizers. "
        "Codes of new samples come from the encoder (AE) or from inference with the decoder frozen "
        "(AD). Replay trains on what the decoder made of the old codes before, beside the new "
        "samples (pseudo-rehearsal; Robins 1995), so that no old sample need be kept; an AE, which "
        "keeps no codes by itself, is given those of its encoder.",
        "Seconds are processor time of one thread, for all additions together.",
    ]
    if not study.models:
        notes = [_reason(study.about)]
    return Section(
        title=TITLE,
        question=QUESTION,
        findings=tuple(_findings(study)) if study.models else (_reason(study.about),),
        figure=_figure(study),
        caption=(
            f"After the last addition, unseen samples: error per {study.about.unit} on the classes "
            "added against that on the old ones (dotted: the old ones before any addition), and "
            "against the processor time spent. Lines: the range of the seeds."
        ),
        table=_table(study),
        notes=tuple(notes),
    )


def _reason(about: About) -> str:
    if about.classes is None:
        why = "the data have no labels"
    elif about.classes < 2:
        why = "the data have one class only"
    else:
        why = "a class has too few samples to train on some and hold out others"
    return f"Not measured: {why}."


def _findings(study: IncrementalStudy) -> list[str]:
    old, added = _named(study.old), _named(study.added)

    def last(model: str, approach: str) -> Step:
        return study.models[model][approach][-1]

    def both(approach: str, name: str) -> str:
        return listed(
            [f"{_error(getattr(last(m, approach), name))} for {_short(m)}" for m in MODEL_KEYS]
        )

    start = {m: study.models[m]["frozen"][0] for m in MODEL_KEYS}
    findings = [
        f"After training on {old} the error on unseen samples of the same is "
        f"{listed([f'{_error(start[m].old_test)} ({_short(m)})' for m in MODEL_KEYS])}. With "
        f"{added} added and nothing trained, the error on unseen samples of what is added is "
        f"{both('frozen', 'new_test')}; trained again on everything, {both('again', 'new_test')}.",
        "With nothing trained and AE’s codes refined by inference, its error there is "
        f"{_error(last('autoencoder', 'frozen').new_refined)}.",
        "Tuned on the new classes alone, the error on unseen samples of the old ones goes "
        + listed(
            [
                f"from {_error(start[m].old_test)} to {_error(last(m, 'new').old_test)} for "
                f"{_short(m)}"
                for m in MODEL_KEYS
            ]
        )
        + f", that on the new ones to {both('new', 'new_test')}.",
    ]
    for approach, words in (
        ("codes", "With the old codes replayed in place of the old samples"),
        ("data", "With the old samples themselves kept for tuning"),
    ):
        findings.append(
            f"{words}, the error on unseen samples of the old classes ends at "
            f"{both(approach, 'old_test')}, that on the new ones at {both(approach, 'new_test')}."
        )
    best = {m: _closest(study, m) for m in MODEL_KEYS}
    findings += [
        f"{_short(m)}’s lowest error on unseen samples of all classes together, training again "
        f"left aside, is that of “{APPROACHES[best[m]]}”, for "
        f"{significant(last(m, best[m]).seconds.mean, 2)} processor seconds; training again took "
        f"{significant(last(m, 'again').seconds.mean, 2)}."
        for m in MODEL_KEYS
    ]
    kept = last("autodecoder", "codes")
    findings.append(
        "With old codes replayed, the error of AD’s old training samples goes from "
        f"{_error(start['autodecoder'].old_train)} to {_error(kept.old_train)}, that of AE’s from "
        f"{_error(start['autoencoder'].old_train)} to "
        f"{_error(last('autoencoder', 'codes').old_train)}."
    )
    return findings


def _closest(study: IncrementalStudy, model: str) -> str:
    def total(approach: str) -> float:
        step = study.models[model][approach][-1]
        assert step.new_test is not None
        return len(study.old) * step.old_test.mean + len(study.added) * step.new_test.mean

    return min((a for a in APPROACHES if a != "again"), key=total)


def _named(classes: Sequence[int]) -> str:
    if len(classes) == 1:
        return f"class {classes[0]}"
    if len(classes) > 2 and list(classes) == list(range(classes[0], classes[-1] + 1)):
        return f"classes {classes[0]} to {classes[-1]}"
    return f"classes {listed([str(c) for c in classes])}"


def _short(model: str) -> str:
    return MODELS[model].short


def _error(estimate: Estimate | None) -> str:
    assert estimate is not None
    return significant(estimate.mean)


def _figure(study: IncrementalStudy) -> Any:
    figure, axes = panels(2, height=3.7)
    unit = study.about.unit
    names = ("old classes", "processor seconds")
    for panel, name, title in zip(axes, names, ("Old and new", "What it costs"), strict=True):
        label(panel, title, name, "new classes, error per " + unit)
    axes[0].set_xlabel(f"old classes, error per {unit}")
    if not study.models:
        for panel in axes:
            panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center")
        return figure
    for model in MODEL_KEYS:
        colour = MODELS[model].light
        start = study.models[model]["frozen"][0].old_test.mean
        axes[0].axvline(start, color=colour, lw=1, ls=":")
        for approach, steps in study.models[model].items():
            last = steps[-1]
            assert last.new_test is not None
            y = last.new_test
            for panel, x in zip(axes, (last.old_test, last.seconds), strict=True):
                panel.plot([x.minimum, x.maximum], [y.mean] * 2, color=colour, lw=1.2)
                panel.plot([x.mean] * 2, [y.minimum, y.maximum], color=colour, lw=1.2)
                size = 10 if _MARKERS[approach] == "*" else 7
                panel.plot(x.mean, y.mean, _MARKERS[approach], ms=size, color=colour)
    axes[1].set_xscale("log")
    handles = [
        Line2D([], [], ls="", marker=_MARKERS[a], color=INKS["muted"][0], ms=6, label=words)
        for a, words in APPROACHES.items()
    ] + [
        Line2D([], [], ls="", marker="o", color=MODELS[m].light, ms=6, label=_short(m))
        for m in MODEL_KEYS
    ]
    style = {"frameon": False, "fontsize": 8.5, "labelcolor": INKS["ink"][0], "handletextpad": 0.3}
    figure.legend(handles=handles, loc="outside lower center", ncols=4, **style)
    return figure


def _table(study: IncrementalStudy) -> Table:
    head = ("unseen samples", "added", "old classes", "forgetting", "new classes", "seconds")
    rows = []
    for model, approaches in study.models.items():
        for approach, steps in approaches.items():
            for place, step in enumerate(steps):
                if place == 0 and approach != "frozen":
                    continue
                rows.append(
                    (
                        _short(model) + (f", {APPROACHES[approach]}" if place else ", the start"),
                        listed([str(c) for c in study.added[:place]]) if place else "",
                        step.old_test.text(),
                        significant(step.forgetting.mean, 2) if place else "",
                        step.new_test.text() if step.new_test is not None else "",
                        significant(step.seconds.mean, 2) if place else "",
                    )
                )
    caption = f"Mean of {len(study.about.settings.seeds)} seeds (smallest – largest)."
    return Table(head=head, rows=tuple(rows), caption=caption)


def _epochs(settings: Settings) -> int:
    return max(1, settings.epochs // 2)


def _tuning_epochs(settings: Settings) -> int:
    return max(1, settings.epochs // 4)


def _classes(data: LatentData) -> tuple[list[int], list[int]]:
    """The classes of the start, all but two or the first of two, and those that are added."""
    assert data.labels is not None
    classes = data.labels.unique().tolist()
    start = max(1, len(classes) - 2)
    return classes[:start], classes[start:]


def _rows(data: LatentData, classes: Sequence[int]) -> Tensor:
    """Rows of the samples of these classes, class by class."""
    assert data.labels is not None
    return torch.cat([(data.labels == c).nonzero()[:, 0] for c in classes])


def _errors(
    model: LatentModel,
    train: LatentData,
    test: LatentData,
    old: Sequence[int],
    added: Sequence[int],
    done: int,
    seed: int,
    seconds: float,
) -> dict[str, float | None]:
    """Errors after `done` additions; the table's rows are those of the classes in their order."""
    x = train.batch(_rows(train, (*old, *added[:done])))
    codes = training_codes(model, x)
    first = len(_rows(train, old))

    def unseen(classes: Sequence[int], *, refine: bool = False) -> float | None:
        if not classes or (refine and has_table(model)):
            return None
        samples = test.batch(_rows(test, classes))
        codes = unseen_codes(model, samples, seed, refine=refine)
        return mean_squared_error(model, codes, samples)

    return {
        "old_train": mean_squared_error(model, codes[:first], x[:first]),
        "new_train": mean_squared_error(model, codes[first:], x[first:]) if done else None,
        "old_test": unseen(old),
        "new_test": unseen(added[:done]),
        "old_refined": unseen(old, refine=True),
        "new_refined": unseen(added[:done], refine=True),
        "coming_test": unseen(added[done:]),
        "seconds": seconds,
    }
