"""Writes the README's tables from the committed results: `python benchmarks/readme.py`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-x86_64-2-cores"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def step_table() -> str:
    content = load("bench_step")
    results, machine = content["results"], content["machine"]
    dense, compiled = results["test_dense_adam"], results["test_compiled_step"]
    variational, rows = results["test_variational_step"], results["test_rows"]
    lines = [
        "| step, N = 10⁶, D = 64 | fastlatent, ms | the other, ms | times faster |",
        "| --- | ---: | ---: | ---: |",
    ]

    def row(name: str, result: dict[str, Any], other: str) -> str:
        ours, theirs = result["median_ms"]["fastlatent"], result["median_ms"][other]
        return f"| {name} against {other} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |"

    for variant in ("global", "row", "row, unique", "row, in_backward"):
        lines.append(row(variant, results[f"test_step[{variant}]"], "torch SparseAdam"))
    lines.append(row("row, unique", compiled, "torch.compile"))
    lines.append(row("row", dense, "torch fused Adam"))
    lines += ["", "| variational step, N = 10⁶, 32 dimensions | ms | times faster |"]
    lines.append("| --- | ---: | ---: |")
    for name, median in variational["median_ms"].items():
        ratio = variational["times_faster_than_plain_PyTorch"][name]
        lines.append(f"| {name} | {median:.2f} | {ratio:.1f} |")
    sizes = ", ".join(
        f"{name.removeprefix('N = ')}: {median:.2f} ms"
        for name, median in rows["median_ms"].items()
    )
    lines += ["", f"The same step against the number of rows: {sizes}. "]
    lines[-1] += f"({machine['processor']}, {machine['cores']} cores, "
    lines[-1] += f"torch {machine['versions']['torch']}; load {machine['load_average_before']:.1f} "
    lines[-1] += "before the run.)"
    whole = []
    for name in ("fastlatent", "torch fused Adam"):
        result = load("bench_scaling")["results"][f"test_scaling_training[{name}]"]
        few, many = (result["median_ms"][size] for size in ("N = 1e5", "N = 1e7"))
        ratio = result["times_the_step_at_1e5_rows"]
        whole.append(
            f"{few:.1f} ms at 10⁵ rows, {many:.1f} ms at 10⁷ ({ratio:.2f} times) with {name}"
        )
    lines += [
        "",
        "A whole training step of the auto-decoder of the million patches below, with its decoder: "
        f"{'; '.join(whole)}.",
    ]
    return "\n".join(lines)


def compare_table() -> str:
    results = load("bench_compare")["results"]["test_compare"]
    lines = [
        f"Digits, {results['latent_dim']} dimensions, {results['epochs']} epochs, mean squared "
        "error per pixel, mean and range over the seeds "
        f"{', '.join(map(str, results['seeds']))}:",
        "",
        "| | training error | unseen error | encoding, ms a sample |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, figures in results["models"].items():
        cells = [
            "{mean:{form}} ({low:{form}}–{high:{form}})".format(**figures[key], form=form)
            for key, form in (
                ("train_mse", ".5f"),
                ("test_mse", ".5f"),
                ("infer_ms_per_sample", "#.2g"),
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


GOALS = {
    "share below zeros, 50 steps": "error from the nearest code below that from zeros, 50 steps",
    "share below zeros, 200 steps": "the same after 200 steps",
    "time over Adam's": "Levenberg-Marquardt's time over that of 300 Adam steps, same error",
    "times the loop": "samples a second over those of a loop, one at a time",
    "same codes, float32": "largest difference of a code with and without compaction, fp32",
    "same codes, float64": "the same, fp64",
    "times faster, float32": "compaction, times faster where half converge early, fp32",
    "times faster, float64": "the same, fp64",
    "half missing, AD below AE and VAE": "AD's error on missing pixels, half missing; goal: VAE's",
}


def infer_table() -> str:
    """Every goal that the inference benchmarks state, whether it is met or not."""
    lines = ["| encoding unseen digits | goal | measured |", "| --- | ---: | ---: |"]
    for result in load("bench_infer")["results"].values():
        for name, entry in result.items():
            if name.startswith("goal "):
                met = "" if entry["met"] else ", missed"
                title = GOALS[name.removeprefix("goal ")]
                lines.append(f"| {title} | {entry['goal']:.3g} | {entry['measured']:.3g}{met} |")
    return "\n".join([*lines, "", refinement()])


def refinement() -> str:
    """What going on from an earlier fit saves as more of a sample is seen."""
    found = load("bench_infer")["results"]["test_infer_reveal"]

    def told(kind: str) -> str:
        steps = found[f"{kind}refinement_steps_over_fresh"].items()
        return ", ".join(f"{value:.2f} at {share}" for share, value in steps)

    more = max(found["fine, observed_error_over_fresh"].values()) - 1
    return (
        "As 10 %, 25 %, 50 % and all of the pixels come to be seen, going on from the fit before "
        f"(`init=fit`) takes of a fresh fit's steps {told('')}: a guess from few pixels is often "
        f"the wrong one, and the nearest code replaces it. In steps of 10 %: {told('fine, ')}, "
        f"with up to {more:.1%} more error."
    )


def million_table() -> str:
    content = load("bench_million")
    results, machine = content["results"], content["machine"]
    lines = [
        "| 1.4 million patches, 32 dimensions | auto-decoder | variational |",
        "| --- | ---: | ---: |",
    ]
    runs = [results[f"test_million[{kind}]"] for kind in ("ad", "vad")]

    def row(name: str, form: str, value: Any) -> None:
        lines.append(f"| {name} | {' | '.join(form.format(value(run)) for run in runs)} |")

    row("training, seconds", "{:.0f}", lambda run: run["run"]["seconds"])
    row("samples a second", "{:,.0f}", lambda run: run["run"]["samples_per_second"])
    row("unseen error, share of the variance", "{:.5f}", lambda run: run["run"]["test_error"])
    row("the same of PCA", "{:.5f}", lambda run: run["pca"]["test_error"])
    row("table's share of a step, profiler", "{:.1%}", lambda r: r["table_share_by_the_profiler"])
    row("time waiting for data", "{:.2%}", lambda run: run["run"]["waiting_share"])
    row("peak memory, GiB, at most", "{:.2f}", lambda run: run["resident_gib"])
    rounding = results["test_rounding"]["over_fp32"]
    shares = ", ".join(f"{name} {value:.4f}" for name, value in rounding.items() if name != "fp32")
    lines += [
        "",
        f"Unseen error of bf16 tables over that of fp32 after {results['test_rounding']['epochs']} "
        f"epochs: {shares}. ({runs[0]['settings']['threads']} threads; load "
        f"{machine['load_average_before']:.1f} before the run.)",
        "",
        small_steps(),
    ]
    return "\n".join(lines)


def small_steps() -> str:
    found = load("bench_rounding")["results"]["test_small_steps"]
    options = found["settings"]
    shares = ", ".join(
        f"{name} {value:.3f}"
        for name, value in found["training_mse_over_fp32"].items()
        if name != "fp32"
    )
    return (
        f"Where steps are small rounding to nearest loses them: training error over that of fp32, "
        f"digits, {options['latent_dim']} dimensions, {options['epochs']} epochs, codes' learning "
        f"rate {options['code_lr']:g} with a cosine, mean of {len(found['seeds'])} seeds: {shares}."
    )


TABLES = {
    "compare": compare_table,
    "step": step_table,
    "infer": infer_table,
    "million": million_table,
}


def render(text: str) -> str:
    for name, table in TABLES.items():
        pattern = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)"
        text = re.sub(pattern, (table() + "\n").replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def main() -> None:
    target = ROOT / "README.md"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(render(target.read_text()))
    os.replace(temporary, target)


if __name__ == "__main__":
    main()
