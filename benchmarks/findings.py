"""Writes docs/ae-versus-ad.md and its figures from the committed results of the studies.

`python benchmarks/findings.py` writes the page; with `--record OUT [NAME]` it first takes the
studies from OUT/comparison.json of `fastlatent compare --study ...` as the results of the data set
NAME ("digits" comes first on the page, with its figures), `--title` their heading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from fastlatent import figures, studies
from fastlatent._files import write
from fastlatent.studies._section import Section, Table, unstated

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
DIGITS = "digits"
_INTRODUCTION = """\
# Auto-encoder or auto-decoder?

An auto-encoder (AE) computes a sample’s code; an auto-decoder (AD) looks it up in a table and
trains it by gradient descent beside the decoder. The variational ones (VAE, VAD) give every code a
distribution and pay for its distance from a prior. This page puts figures on what follows from
that, where the auto-decoder wins and where it loses. Every sentence and table below is made from
measured results by `python benchmarks/findings.py`; the results come from
`fastlatent compare --study all`, which does the same for your data.

Figures are means over the seeds of split, weights, batches and noise, with the range of the seeds
in brackets and as bands. Two errors are called different where the 95 % interval of their ratio
leaves out 1 and its mean is 2 % or more away from it.
"""


def load() -> dict[str, dict[str, Any]]:
    """The committed results by data set, digits first."""
    files = sorted(RESULTS.glob("*/studies-*.json"), key=lambda f: (DIGITS not in f.stem, f.stem))
    return {f.stem.removeprefix("studies-"): json.loads(f.read_text()) for f in files}


def sections(content: dict[str, Any]) -> dict[str, Section]:
    """The sections of the studies that a result holds, in the order of `studies.NAMES`.

    Raises:
        ValueError: a finding with a number that is not in the result.
    """
    made = {}
    for name in studies.NAMES:
        if name not in content["studies"]:
            continue
        entry = content["studies"][name]
        section = studies.load(name).section(studies.read(name, entry))
        for finding in section.findings:
            if missing := unstated(finding, entry):
                raise ValueError(f"study {name}: {missing} of {finding!r} are not in its result")
        made[name] = section
    return made


def render(results: dict[str, dict[str, Any]]) -> tuple[str, dict[str, bytes]]:
    """The page, and its PNG files by name."""
    parts, files = [_INTRODUCTION], {}
    first = True
    for data, content in results.items():
        found = sections(content)
        parts.append(f"## {_heading(content)}\n\n{_setting(content)}\n")
        for name, section in found.items():
            parts.append(f"### {section.title}\n\n{section.question}\n")
            parts.append("\n".join(f"- {finding}" for finding in section.findings) + "\n")
            if not first:
                continue
            file = f"study-{name}.png"
            files[file] = figures.png(section.figure)
            parts.append(f"![{section.title} on {data}](figures/{file})\n\n*{section.caption}*\n")
            parts.append(_table(section.table))
            parts += [f"{note}\n" for note in section.notes]
        first = False
    return "\n".join(parts), files


def record(out: Path, name: str, title: str | None) -> None:
    """Take over the studies of a comparison; `title` says what the data are, if not their name."""
    comparison = json.loads((out / "comparison.json").read_text())
    content = {
        "machine": {
            "device": f"cpu-{platform.machine()}-{os.cpu_count()}-cores",
            "cores": os.cpu_count(),
        },
        "title": title or comparison["data"]["name"],
        **{key: comparison[key] for key in ("data", "settings", "versions", "studies")},
    }
    target = RESULTS / content["machine"]["device"] / f"studies-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _heading(content: dict[str, Any]) -> str:
    about = next(iter(content["studies"].values()))["about"]
    shape = " × ".join(map(str, about["sample_shape"]))
    return f"{content['title']}: {about['samples']:,} samples of {shape}"


def _setting(content: dict[str, Any]) -> str:
    s, versions = content["settings"], content["versions"]
    about = next(iter(content["studies"].values()))["about"]
    seeds = ", ".join(map(str, about["settings"]["seeds"]))
    return (
        f"{about['train']:,} samples to train and {about['test']:,} held out, {s['latent_dim']} "
        f"latent dimensions and {about['settings']['epochs']} epochs unless said otherwise, "
        f"decoder of {s['decoder']['parameters']:,} parameters, seeds {seeds}; "
        f"{content['machine']['cores']} cores, torch {versions['torch']}."
    )


def _table(table: Table) -> str:
    lines = [table.head, ("---", *["---:"] * (len(table.head) - 1)), *table.rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
    return text + (f"\n{table.caption}\n" if table.caption else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", nargs="+", metavar=("OUT", "NAME"), help="take results over")
    parser.add_argument("--title", help="what the data are, in the heading of their part")
    arguments = parser.parse_args()
    if arguments.record:
        out, name = (*arguments.record, DIGITS)[:2]
        record(Path(out), name, arguments.title)
    page, files = render(load())
    (DOCS / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write(DOCS / "figures" / name, content)
    write(DOCS / "ae-versus-ad.md", page.encode())


if __name__ == "__main__":
    main()
