"""The report's words against results in which either side wins, and its page as a file."""

import dataclasses
import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from fastlatent import figures, report
from fastlatent.comparison import Comparison, ModelResult
from fastlatent.figures import INKS, MODELS

EPOCHS = 12


def model(seed, train, test, *, kl=None, sigma=None, ms=0.01, seconds=2.0, shape=(1, 6, 5), **more):
    rng = np.random.default_rng(seed)
    pictures = {
        "reconstructions": rng.random((4, *shape), np.float32),
        "samples": rng.random((4, *shape), np.float32),
        "codes": rng.normal(size=(40, more.pop("dims", 3))).astype(np.float32),
    }
    if "test_mse_refined" in more:
        pictures["refined"] = rng.random((4, *shape), np.float32)
        more.setdefault("train_mse_refined", train * 0.9)
        more.setdefault("infer_ms_per_sample_refined", 1.5)
    start = more.pop("start", 0.1)
    history = {
        "epoch": list(range(1, EPOCHS + 1)),
        "seconds": [seconds * e / EPOCHS for e in range(1, EPOCHS + 1)],
        "mse": [train + start * 0.5**e for e in range(EPOCHS)],
    }
    return ModelResult(
        train_mse=train,
        test_mse=test,
        kl_nats=kl,
        parameters=1_000 + seed,
        train_seconds=seconds,
        infer_ms_per_sample=ms,
        mean_sigma=sigma,
        neighbour_agreement=0.5 + seed / 100,
        history=history,
        pictures=pictures,
        **more,
    )


def comparison(*, ae=None, ad=None, vae=None, vad=None, shape=(1, 6, 5), image=True, labels=True):
    ae = {"train": 0.004, "test": 0.01, "test_mse_refined": 0.008} | (ae or {})
    ad = {"train": 0.003, "test": 0.007, "ms": 2.0, "start": 0.2} | (ad or {})
    vae = {"train": 0.006, "test": 0.011, "kl": 12.0, "sigma": 0.4} | (vae or {})
    vad = {"train": 0.005, "test": 0.008, "kl": 15.0, "sigma": 0.3, "ms": 2.5} | (vad or {})
    models = {
        "autoencoder": model(1, **ae, shape=shape),
        "variational_autoencoder": model(2, **vae, shape=shape),
        "autodecoder": model(3, **ad, shape=shape),
        "variational_autodecoder": model(4, **vad, shape=shape),
    }
    result = Comparison(
        data={
            "name": "<digits & co>",
            "samples": 60,
            "train": 50,
            "test": 10,
            "sample_shape": list(shape),
            "image": image,
            "classes": 3 if labels else None,
            "fingerprint": "00",
        },
        settings={
            "latent_dim": 3,
            "epochs": EPOCHS,
            "batch_size": 8,
            "seed": 5,
            "hidden": None,
            "lr": 0.002,
            "decoder": {"name": "MLPDecoder", "parameters": 1234, "fingerprint": "01"},
        },
        versions={"fastlatent": "0.1.0"},
        models=models,
        originals=np.random.default_rng(9).random((4, *shape), np.float32),
        labels=np.arange(40) % 3 if labels else None,
    )
    if not labels:
        without = {k: dataclasses.replace(m, neighbour_agreement=None) for k, m in models.items()}
        result = dataclasses.replace(result, models=without)
    return result


def answers(result):
    spaced = [f"{f.verdict} {f.detail}" for f in report.findings(result)]
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in spaced]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (
            (0.004, 0.003),
            (0.01, 0.007),
            "The auto-encoder underfits: with the same decoder, the auto-decoder’s error is "
            "25% lower in training and 30% lower on unseen samples.",
        ),
        (
            (0.004, 0.003),
            (0.01, 0.012),
            "The auto-encoder underfits: with the same decoder, the auto-decoder’s error is "
            "25% lower in training and 20% higher on unseen samples.",
        ),
        (
            (0.004, 0.00401),
            (0.01, 0.01),
            "The auto-encoder does not underfit here: with the same decoder, the auto-decoder’s "
            "error is about the same in training and about the same on unseen samples.",
        ),
        (
            (0.004, 0.005),
            (0.01, 0.036),
            "The auto-decoder underfits here: with the same decoder, the auto-decoder’s error is "
            "25% higher in training and 3.6 times as high on unseen samples.",
        ),
        (
            (0.004, 0.00001),
            (0.01, 0.2),
            "The auto-encoder underfits: with the same decoder, the auto-decoder’s error is "
            "over 99% lower in training and 20 times as high on unseen samples.",
        ),
    ],
)
def test_headline_follows_the_figures(train, test, expected):
    result = comparison(
        ae={"train": train[0], "test": test[0]}, ad={"train": train[1], "test": test[1]}
    )
    assert report.headline(result) == expected


def test_findings_where_the_auto_decoder_wins():
    fits, unseen, amortisation, cost, time, noise = answers(comparison())
    assert fits.startswith("Yes: the auto-decoder’s training error is 25% lower. 0.00300 against")
    assert "brings it to 0.00360: the encoder accounts for 40% of the difference." in fits
    assert unseen.startswith("The auto-decoder: its error is 30% lower. 0.00700 against 0.0100.")
    assert "2.3 times that on training samples for the auto-decoder, 2.5 times for" in unseen
    assert amortisation.startswith("Its amortisation gap: with better codes its error is 20% lower")
    assert "is 14% higher than the auto-decoder’s 0.00700; as both kinds of code" in amortisation
    assert cost.startswith("Time: encoding an unseen sample takes 200 times as long. 2.0 ms")
    assert time.startswith("The auto-decoder: after 2.0 s its training error is 23% lower.")
    assert "15% lower" not in noise and "is 17% lower than the variational" in noise
    assert "15.0 nats with a mean σ of 0.300, the variational auto-encoder’s 12.0 nats" in noise


def test_findings_where_the_auto_decoder_loses():
    result = comparison(
        ae={"train": 0.003, "test": 0.004, "test_mse_refined": 0.005, "ms": 3.0},
        ad={"train": 0.008, "test": 0.0084, "ms": 1.5},
        vad={"train": 0.03},
    )
    fits, unseen, amortisation, cost, time, noise = answers(result)
    assert fits.startswith("No: the auto-decoder’s training error is 2.7 times as high.")
    assert "accounts for" not in fits
    assert unseen.startswith("The auto-encoder: the auto-decoder’s error is 2.1 times as high.")
    assert amortisation.startswith("It cannot be told: looking for better codes made the error 25%")
    assert "decoders" not in amortisation
    assert cost.startswith("No time: it even encodes an unseen sample faster.")
    assert time.startswith("The auto-encoder: after 2.0 s the auto-decoder’s training error is")
    assert "is not below the auto-encoder at the end of epoch 12." in time
    assert "is 5 times the variational auto-encoder’s." in noise
    winners = [f.winner for f in report.findings(result)]
    assert winners == ["autoencoder", "autoencoder", None, "autodecoder", None, None]


def test_findings_where_nothing_differs():
    same = {"train": 0.004, "test": 0.01, "ms": 1.0, "start": 0.1}
    result = comparison(
        ae=same | {"test_mse_refined": 0.01}, ad=same, vae={"train": 0.004}, vad={"train": 0.004}
    )
    fits, unseen, amortisation, cost, time, noise = answers(result)
    assert fits.startswith("Not here: the two training errors are level.")
    assert unseen.startswith("Neither: the two errors are level.")
    assert amortisation.startswith("Next to nothing")
    assert "level with the auto-decoder’s 0.0100: with equal means" in amortisation
    assert cost.startswith("No time: encoding an unseen sample takes as long.")
    assert time.startswith("Neither: after 2.0 s the two training errors are level.")
    assert "is level with the variational auto-encoder’s." in noise
    assert [f.figure for f in report.findings(result)][:4] == ["±0%", "±0%", "±0%", "×1"]


@pytest.mark.parametrize(
    ("refined", "share"), [(0.0025, "all"), (0.00399, "1%"), (0.0042, "none"), (0.0035, "50%")]
)
def test_share_of_the_encoder(refined, share):
    fits = answers(comparison(ae={"train_mse_refined": refined}))[0]
    assert f"the encoder accounts for {share} of the difference" in fits


def test_refined_auto_encoder_may_beat_the_auto_decoder():
    text = answers(comparison(ae={"test_mse_refined": 0.0035}))[2]
    assert "The result is 50% lower than the auto-decoder’s 0.00700" in text


@pytest.mark.parametrize(
    ("ad", "expected"),
    [
        ({"start": 0.05}, "is below the auto-encoder from the first on"),
        ({"start": 0.2}, "is below the auto-encoder from epoch 8 on"),
        ({"train": 0.004, "start": 0.2}, "is not below the auto-encoder at the end of epoch 12"),
    ],
)
def test_crossing_of_the_curves(ad, expected):
    result = comparison(ad=ad)
    ours, theirs = (result.models[k].history["mse"] for k in ("autodecoder", "autoencoder"))
    below = [a < b for a, b in zip(ours, theirs, strict=True)]
    assert expected in answers(result)[4]
    if "epoch 8" in expected:
        assert below == [False] * 7 + [True] * 5


def test_equal_time_compares_at_the_shorter_run():
    result = comparison(ae={"seconds": 4.0, "start": 0.4}, ad={"seconds": 2.0, "start": 0.1})
    # the auto-encoder is at its sixth epoch after 2 s: 0.004 + 0.4 / 2**5
    ours = result.models["autodecoder"].history["mse"][-1]
    text = answers(result)[4]
    assert text.startswith("The auto-decoder: after 2.0 s its training error is 82% lower.")
    assert f"{ours:.5f} against 0.0165, running" in text


def test_a_model_without_error_is_no_division_by_zero():
    result = comparison(ae={"train": 0.0, "test": 0.0, "test_mse_refined": 0.0})
    assert "infinitely many times as high in training" in report.headline(result)
    report.render(result)


@pytest.mark.parametrize(
    ("changes", "training", "unseen"),
    [
        ({}, "auto-decoder (0.00300)", "auto-decoder (0.00700)"),
        (
            {"ae": {"train_mse_refined": 0.002, "test_mse_refined": 0.0069}},
            "refined auto-encoder (0.00200)",
            "refined auto-encoder (0.00690)",
        ),
        (
            {"vad": {"train": 0.001}, "vae": {"test": 0.0001}},
            "variational auto-decoder (0.00100)",
            "variational auto-encoder (0.000100)",
        ),
    ],
)
def test_captions_name_the_lowest_error(changes, training, unseen):
    words = " ".join(report.render(comparison(**changes))[0].split())
    assert f"Lowest in training: {training}. Lowest on unseen samples: {unseen}." in words
    assert f"Closest over all 10 held-out samples: {unseen}." in words


def test_table_marks_the_best_of_each_line():
    lines = {line.name: line.cells for line in report.table(comparison())}
    assert lines["Training error"] == (
        ("0.00400", False),
        ("0.00600", False),
        ("0.00300", True),
        ("0.00500", False),
    )
    assert lines["Unseen error, refined"] == (("0.00800", False), *[("–", False)] * 3)
    assert [best for _, best in lines["Encoding"]] == [True, True, False, False]
    assert [text for text, _ in lines["KL"]] == ["–", "12.0", "–", "15.0"]
    assert not any(best for _, best in lines["Mean σ"])


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed out of order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.attributes, self.text, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_page_is_self_contained_and_says_what_the_result_says():
    result = comparison()
    text, files = report.render(result)
    page = Page(text)
    for tag, key, value in page.attributes:
        assert tag not in ("script", "link", "iframe", "object")
        if key in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:60])
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "@import" not in text and not any("url(h" in s.replace(" ", "") for s in styles)
    words = " ".join(" ".join(page.text).split())
    assert report.headline(result) in words
    assert all(answer in words for answer in answers(result))
    for line in report.table(result):
        for cell, _ in line.cells:
            assert cell in words
    assert "<digits & co>" in words and html.escape("<digits & co>") in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert set(files) == {
        "errors.png",
        "cost.png",
        "curves-epochs.png",
        "curves-seconds.png",
        "reconstructions.png",
        "samples.png",
        "codes-autoencoder.png",
        "codes-variational-autoencoder.png",
        "codes-autodecoder.png",
        "codes-variational-autodecoder.png",
    }
    assert all(content.startswith(b"\x89PNG") for content in files.values())


def test_page_is_deterministic():
    assert report.render(comparison()) == report.render(comparison())


def test_drawings_take_every_colour_from_the_style_sheet():
    text, _ = report.render(comparison())
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4
    known = {f"--{name}" for name in INKS} | {f"--{key.replace('_', '-')}" for key in MODELS}
    for drawing in drawings:
        assert set(re.findall(r"var\((--[a-z-]+)\)", drawing)) <= known
        # black is SVG's own default for what matplotlib leaves out, invisible on a dark page
        assert not re.findall(r"#[0-9a-fA-F]{3,6}\b(?![\"\)])", drawing)
    light, dark = text.split("@media (prefers-color-scheme: dark)", 1)
    for name in known:
        assert f"{name}: #" in light and f"{name}: #" in dark.split("</style>")[0]


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1,)])
def test_samples_that_are_no_images(shape):
    text, files = report.render(comparison(shape=shape, image=False))
    assert "per value" in text and "per pixel" not in text
    assert "tinted row" not in text
    assert files["reconstructions.png"].startswith(b"\x89PNG")


def test_colour_images_and_no_labels():
    text, _ = report.render(comparison(shape=(3, 6, 5), labels=False))
    assert "No labels, so no colours." in text
    assert "60 samples of 3 × 6 × 5" in text
    assert "nearest neighbour of the same class" not in text


def test_strip_shows_samples_beside_each_other():
    samples = np.zeros((3, 1, 2, 2), np.float32)
    samples[1] = 1
    strip = figures.strip(samples, image=True)
    cell = strip.shape[0]
    gap = (strip.shape[1] - 3 * cell) // 2
    assert strip[cell // 2, cell // 2].tolist() == [0, 0, 0, 255]
    assert strip[cell // 2, cell + gap // 2].tolist() == [0, 0, 0, 0]
    assert strip[cell // 2, cell + gap + cell // 2].tolist() == [255, 255, 255, 255]


def test_error_strip_is_opaque_where_the_error_is_large():
    originals, decoded = np.zeros((1, 1, 1, 3)), np.array([[[[0.0, 0.25, 0.9]]]])
    strip = figures.error_strip(originals, decoded, "#ff0000")
    third = strip.shape[1] // 3
    alphas = [strip[0, i * third + 1, 3] for i in range(3)]
    assert alphas == [0, 128, 255]


@pytest.mark.parametrize(
    ("shape", "method"),
    [
        ((30, 1), "the one number"),
        ((30, 2), "the codes themselves"),
        ((30, 5), "PCA of 5 dimensions"),
        ((120, 5), "t-SNE of 5 dimensions"),
    ],
)
def test_map_of_the_codes_says_how_it_was_made(shape, method):
    codes = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    points, words = report.flatten(codes)
    assert points.shape == (shape[0], 2) and np.isfinite(points).all()
    assert method in words
    if shape[1] == 2:
        assert np.array_equal(points, codes)
    else:
        assert np.array_equal(points, report.flatten(codes)[0])


def test_collapsed_codes_have_a_map():
    points, _ = report.flatten(np.ones((120, 4), np.float32))
    assert points.shape == (120, 2) and np.isfinite(points).all()
    figures.png(figures.code_map(points, None, "#123456"))


def test_many_classes_have_colours_of_their_own():
    assert len(set(figures.class_colours(10))) == 10
    assert len(set(figures.class_colours(25))) == 25
    labels = np.arange(60) % 25
    points = np.random.default_rng(0).normal(size=(60, 2))
    assert not figures.code_map(points, labels, "#123456").axes[0].texts
    assert len(figures.code_map(points, labels % 5, "#123456").axes[0].texts) == 5


def test_names_of_close_points_do_not_touch():
    near = {"test": 0.008, "ms": 1.5}
    figure = figures.cost(comparison(ad=near, vad=near, ae={"test_mse_refined": 0.008}).models)
    FigureCanvasAgg(figure).draw()
    boxes = [Text.get_window_extent(t) for t in figure.axes[0].texts if t.get_text()]
    assert len(boxes) == 5
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_users_matplotlib_state_is_left_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.render(comparison())
    assert dict(matplotlib.rcParams) == before
