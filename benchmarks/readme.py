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
            "{mean:.{d}f} ({low:.{d}f}–{high:.{d}f})".format(**figures[key], d=digits)
            for key, digits in (
                ("train_mse", 5),
                ("test_mse", 5),
                ("infer_ms_per_sample", 2),
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def render(text: str) -> str:
    for name, table in (("compare", compare_table()), ("step", step_table())):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


def main() -> None:
    target = ROOT / "README.md"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(render(target.read_text()))
    os.replace(temporary, target)


if __name__ == "__main__":
    main()
