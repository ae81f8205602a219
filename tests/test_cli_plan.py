"""`fastlatent plan`: the printed plan, the exit status and the errors."""

import pytest
import typer
from typer.testing import CliRunner

from fastlatent import memory as module
from fastlatent.cli_plan import plan
from fastlatent.memory import Machine

app = typer.Typer()
app.command()(plan)


@pytest.fixture
def run(monkeypatch):
    machine = Machine(memory=40 * 10**9, disk=10**12)
    monkeypatch.setattr(module.Machine, "here", lambda *_: machine)
    return lambda words: CliRunner().invoke(app, words.split())


def test_a_plan_that_fits(run):
    found = run("--samples 1e8 --dim 64 --dtype bf16 --data-shape 3,8,8")
    assert found.exit_code == 0, found.output
    for text in (
        "100,000,000 samples, 64 dimensions, bf16 table and moments",
        "12,800,000,000",
        "25,600,000,000",
        "networks and their Adam",
        "memory: 38.8 GB of 40 GB that are free, fits",
    ):
        assert text in found.output


def test_a_plan_that_does_not_fit(run):
    found = run("--samples 100000000 --dim 64")
    assert found.exit_code == 1
    assert "too much" in found.output
    assert "--dtype bf16 --moments bf16): 38.8 GB of memory fit" in found.stderr


def test_mapped(run):
    found = run("--samples 1e8 --dim 64 --mapped --data-shape 3,8,8")
    assert found.exit_code == 0
    assert "disk: 77.2 GB of 1 TB that are free, fits" in found.output


def test_components(run):
    found = run("--samples 1e6 --dim 8 --data-shape 3,32,32 --pca")
    assert found.exit_code == 0 and "start from PCA" in found.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--samples many", "samples must be a whole number such as 1000000 or 1e8; got 'many'"),
        ("--samples 1.5", "samples must be a whole number"),
        ("--samples inf", "samples must be a whole number"),
        ("--samples 0", "samples must be an integer of at least 1"),
        ("--samples 10 --dtype int4", "dtype must be one of fp32"),
        ("--samples 10 --data-shape 3x8", "data_shape must be sizes such as 3,8,8; got '3x8'"),
        ("--samples 10 --mapped --device cuda", "mapped tables are for the CPU"),
    ],
)
def test_bad_options(run, words, text):
    found = run(words)
    assert found.exit_code == 2
    assert text in " ".join(found.stderr.split())


def test_long_numbers_keep_their_digits(run):
    assert "9,007,199,254,740,993 samples" in run("--samples 9007199254740993").output
