"""1.4 million real patches, D = 32: memory, speed, the table's share, and the error beside PCA's.

Ten minutes of training for each of AD and VAD, then three runs over the roundings of a bf16 table;
FASTLATENT_BENCH_SECONDS sets another time for the first two. Every run has a process of its own, so
that its peak memory is its own. The length of a run is set by a trial of ten seconds. The width of
the decoder and the codes' learning rate were chosen among four short runs by their error on the
held-out squares, so the errors here are a little kinder than those of settings chosen blindly.
"""

import json
import multiprocessing
import os
import warnings

import pytest
import torch
from sklearn.decomposition import PCA
from torch.profiler import ProfilerActivity, profile, record_function

from fastlatent.data import load_data, split, spread
from fastlatent.loader import Sampler
from fastlatent.settings import Settings, build_model, build_optimizers, start_from_pca
from fastlatent.trainer import train

SECONDS = float(os.environ.get("FASTLATENT_BENCH_SECONDS", 600))
OPTIONS = {
    "latent_dim": 32,
    "hidden": (256,),
    "linear_path": True,
    "pca": True,
    "batch_size": 2048,
    "lr": 2e-3,
    "code_lr": 0.05,
}
MODELS = {"ad": {"model": "ad"}, "vad": {"model": "vad", "beta": 1e-4}}
TABLES = {
    "fp32": {},
    "bf16 stochastic": {"table_dtype": "bf16"},
    "bf16 nearest": {"table_dtype": "bf16", "rounding": "nearest"},
    "bf16 stochastic, bf16 moments": {"table_dtype": "bf16", "moment_dtype": "bf16"},
}
ROUNDING_EPOCHS = int(os.environ.get("FASTLATENT_BENCH_EPOCHS", 4))
PROFILED = 40


def alone(out, settings, seconds=None):
    """The summary of a run in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(
        target=train,
        args=("patches", str(out), settings),
        kwargs={"seconds": seconds, "overwrite": True, "checkpoint_seconds": 1e9},
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def pca():
    """Errors of PCA at the same dimension, of the very samples that the trainer evaluates."""
    training, held_out = split(load_data("patches"))
    fitted = PCA(OPTIONS["latent_dim"], random_state=0)
    fitted.fit(training.batch(spread(len(training), 100_000)).flatten(1).double().numpy())
    x = held_out.batch(spread(len(held_out), 1_000)).flatten(1).double().numpy()
    squared = ((fitted.inverse_transform(fitted.transform(x)) - x) ** 2).sum()
    return {"test_mse": squared / x.size, "test_error": squared / ((x - x.mean(0)) ** 2).sum()}


@pytest.mark.benchmark(group="million")
@pytest.mark.parametrize("kind", MODELS)
def test_million(benchmark, tmp_path, pca, kind):
    threads = torch.get_num_threads()
    options = {**OPTIONS, **MODELS[kind], "threads": threads}
    trial = alone(tmp_path / "trial", Settings(**options), seconds=10)
    speed, count = trial["results"]["samples_per_second"], trial["data"]["samples"]
    epochs = max(1, int(0.95 * SECONDS * speed / count))
    settings = Settings(**options, epochs=epochs, schedule="cosine")
    found = {}

    def run():
        found.update(alone(tmp_path / "run", settings, seconds=SECONDS))

    benchmark.pedantic(run, rounds=1, iterations=1)
    results = found["results"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, lines) if line["kind"] == "evaluation"]
    benchmark.extra_info.update(
        data=found["data"],
        settings=found["settings"],
        run={name: value for name, value in results.items() if value is not None},
        pca=pca,
        error_over_that_of_pca=results["test_mse"] / pca["test_mse"],
        resident_gib=results["peak_resident_bytes"] / 2**30,
        table_share_by_the_profiler=profiled_share(Settings(**options, steps=1)),
        course={
            name: [line[name] for line in evaluations]
            for name in ("seconds", "step", "test_mse", "test_error")
        },
    )


def profiled_share(settings):
    """The share of the table's operators (lookup, its backward, update) of the time of a step."""
    training, _ = split(load_data("patches"))
    model = build_model(settings, training)
    optimizers = build_optimizers(model, settings)
    start_from_pca(model, training)
    sampler = Sampler(len(training), settings.batch_size, settings.seed)
    batches = [(i, training.batch(i)) for i in map(sampler.batch, range(PROFILED + 10))]

    def step(index, x):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.loss(index, x).total.sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    for batch in batches[:10]:
        step(*batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            for batch in batches[10:]:
                with record_function("training step"):
                    step(*batch)
    events = measured.key_averages()
    table = sum(event.cpu_time_total for event in events if event.key.startswith("fastlatent::"))
    return table / next(e.cpu_time_total for e in events if e.key == "training step")


@pytest.mark.benchmark(group="rounding")
def test_rounding(benchmark, tmp_path, pca):
    """The same run with four tables; few epochs, as only their difference matters."""
    errors, memory = {}, {}

    def run(name):
        settings = Settings(
            **OPTIONS, **TABLES[name], epochs=ROUNDING_EPOCHS, schedule="cosine",
            threads=torch.get_num_threads(),
        )  # fmt: skip
        results = alone(tmp_path / "run", settings)["results"]
        errors[name], memory[name] = results["test_mse"], results["peak_resident_bytes"] / 2**30

    names = iter(TABLES)
    benchmark.pedantic(run, setup=lambda: ((next(names),), {}), rounds=len(TABLES), iterations=1)
    benchmark.extra_info.update(
        epochs=ROUNDING_EPOCHS,
        test_mse=errors,
        resident_gib=memory,
        over_fp32={name: error / errors["fp32"] for name, error in errors.items()},
        pca=pca,
    )
