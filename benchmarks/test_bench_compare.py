"""The main job with its defaults, three seeds: auto-encoder against auto-decoder on digits."""

import statistics

import pytest

import fastlatent as fl

SEEDS = (0, 1, 2)
FIGURES = ("train_mse", "test_mse", "infer_ms_per_sample", "train_seconds")


@pytest.mark.benchmark(group="compare")
def test_compare(benchmark):
    comparisons = {}

    def run(seed):
        comparisons[seed] = fl.compare(seed=seed).to_json()

    seeds = iter(SEEDS)
    benchmark.pedantic(run, setup=lambda: ((next(seeds),), {}), rounds=len(SEEDS), iterations=1)
    first = comparisons[SEEDS[0]]
    models = {}
    for name in first["models"]:
        models[name] = {}
        for figure in FIGURES:
            values = [comparisons[seed]["models"][name][figure] for seed in SEEDS]
            models[name][figure] = {
                "mean": statistics.mean(values),
                "low": min(values),
                "high": max(values),
            }
    benchmark.extra_info.update(
        seeds=list(SEEDS),
        epochs=first["settings"]["epochs"],
        latent_dim=first["settings"]["latent_dim"],
        models=models,
        autodecoder_over_autoencoder={
            f"{figure}, seed {seed}": comparisons[seed]["models"]["autodecoder"][figure]
            / comparisons[seed]["models"]["autoencoder"][figure]
            for figure in ("train_mse", "test_mse")
            for seed in SEEDS
        },
    )
