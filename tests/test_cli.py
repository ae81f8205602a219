"""The command line: options, errors, progress, interruption."""

import importlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fastlatent import _terminal, cli, models
from fastlatent.report import headline

KEYS = ["autoencoder", "variational_autoencoder", "autodecoder", "variational_autodecoder"]
module = importlib.import_module("fastlatent.comparison")
runner = CliRunner()


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    """A file of 40 samples with 5 values each."""
    path = tmp_path_factory.mktemp("data") / "few.npy"
    np.save(path, np.random.default_rng(0).random((40, 5), np.float32))
    return path


@pytest.fixture
def small(array, tmp_path):
    options = {
        "--data": array,
        "--out": tmp_path / "out",
        "--epochs": 4,
        "--latent-dim": 2,
        "--hidden": "6,7",
    }
    return ["compare", *(str(part) for pair in options.items() for part in pair)]


def run(arguments):
    return runner.invoke(cli.app, arguments)


def plain(text):
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split())


def interrupt(monkeypatch, model, error=KeyboardInterrupt):
    """Make the training of this model fail when it begins."""
    whole = module.fit
    kind = getattr(models, model)

    def fit(trained, *rest, **options):
        if isinstance(trained, kind):
            raise error
        return whole(trained, *rest, **options)

    monkeypatch.setattr(module, "fit", fit)


def test_defaults_are_those_of_the_python_call():
    call = inspect.signature(module.compare).parameters
    command = inspect.signature(cli.compare).parameters
    own = {"context", "quiet", "out"}
    assert set(command) - own < set(call)
    for name in set(command) - own:
        assert command[name].default == call[name].default, name


def test_run_without_a_terminal_prints_plain_lines(small, tmp_path):
    result = run(small)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    lines = result.output.splitlines()
    for name in map(cli._name, KEYS):
        assert f"{name}: training, 4 epochs" in lines
        assert f"{name}: encoding the held-out samples" in lines
        epochs = [line for line in lines if line.startswith(f"{name}: epoch ")]
        assert [line.split(",")[0][-6:] for line in epochs] == [f"{e} of 4" for e in range(1, 5)]
        assert all(re.search(r"error [\d.e-]+, (\d+ s|\d+:\d\d) left$", line) for line in epochs)
        assert any(line.startswith(f"{name}: finished, training error") for line in lines)
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["settings"]["hidden"] == [6, 7] and content["settings"]["epochs"] == 4
    text = plain(result.output)
    assert "AE VAE AD VAD" in text and "Training error" in text
    comparison = module.compare(small[2], latent_dim=2, epochs=4, hidden=(6, 7))
    assert headline(comparison) in text
    assert lines[-2:] == [str(tmp_path / "out" / n) for n in ("report.html", "comparison.json")]


def test_quiet_prints_nothing(small, tmp_path):
    result = run([*small, "--quiet"])
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out" / "report.html").exists()


def test_interruption_says_what_is_kept_and_how_to_go_on(small, tmp_path, monkeypatch):
    interrupt(monkeypatch, "AutoDecoder")
    result = run(small)
    assert result.exit_code == 130
    assert "interrupted: 2 of 4 models are finished (auto-encoder, variational" in result.stderr
    assert f"in {tmp_path / 'out'}." in result.stderr
    assert not (tmp_path / "out" / "comparison.json").exists()
    monkeypatch.undo()

    command = shlex.split(result.stderr.split("To go on: ")[1])
    assert command[0] == "fastlatent" and command[-1] == "--resume"
    result = run(command[1:])
    assert result.exit_code == 0, result.output
    kept = [line for line in result.output.splitlines() if ": kept, training error" in line]
    assert [line.split(":")[0] for line in kept] == [cli._name(key) for key in KEYS[:2]]
    assert (tmp_path / "out" / "comparison.json").exists()


def test_the_command_to_go_on_does_not_overwrite(small, monkeypatch):
    run(small)
    interrupt(monkeypatch, "AutoEncoder")
    result = run([*small, "--overwrite", "--quiet"])
    assert result.exit_code == 130
    assert "0 of 4 models are finished (none)" in result.stderr
    command = shlex.split(result.stderr.split("To go on: ")[1])
    assert "--overwrite" not in command and command[-2:] == ["--quiet", "--resume"]


def test_interruption_before_anything_is_written(small, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load_data", stop)
    result = run(small)
    assert result.exit_code == 130
    assert result.stderr == "interrupted before anything was written\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "epochs must be an integer of at least 1; got 0"),
        (["--threads", "0"], "threads must be an integer of at least 1"),
        (["--hidden", "a,b"], "hidden must be numbers such as 128,128; got 'a,b'"),
        (["--network", "conv"], "hidden is for network='mlp'"),
        (["--data", "nonesuch"], "unknown data set 'nonesuch'"),
        (["--data", "./nonesuch.npy"], "nonesuch.npy does not exist"),
        (["--data", "MNIST", "--root", "."], "MNIST needs train-images"),
        (["--resume"], "there is no comparison to resume"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--image-size", "4"], "image_size=4"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(small, tmp_path, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run([*small, *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_out_below_a_file(small, tmp_path):
    (tmp_path / "file").touch()
    result = run([*small, "--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2
    assert "cannot be written: Not a directory" in result.stderr
    assert result.stderr.count("\n") == 1


def test_out_with_a_comparison(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.json").write_text("{}")
    result = run(small)
    assert result.exit_code == 2
    assert "holds a comparison" in result.stderr and "--overwrite" in result.stderr
    assert run([*small, "--overwrite"]).exit_code == 0


def test_divergence_is_an_error_not_a_traceback(small, monkeypatch):
    interrupt(monkeypatch, "VariationalAutoEncoder", FloatingPointError("not finite in epoch 3"))
    result = run(small)
    assert result.exit_code == 2
    assert result.stderr == (
        "error: the variational auto-encoder diverged: not finite in epoch 3\n"
    )


def test_a_bug_is_not_taken_for_a_users_error(small, monkeypatch):
    interrupt(monkeypatch, "AutoEncoder", AssertionError("a bug"))
    result = run(small)
    assert isinstance(result.exception, AssertionError)


@pytest.mark.parametrize("arguments", [["compare", "--nonesuch"], ["nonesuch"]])
def test_unknown_options_and_commands(arguments):
    result = run(arguments)
    assert result.exit_code == 2 and "nonesuch" in result.stderr


def test_version():
    result = run(["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("fastlatent 0.")


def test_help_as_a_module_names_every_option():
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}
    shown = subprocess.run(
        [sys.executable, "-m", "fastlatent", "compare", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    ).stdout
    for option in inspect.signature(cli.compare).parameters:
        if option != "context":
            assert f"--{option.replace('_', '-').replace('studies', 'study')}" in shown


def test_live_bar_shows_the_remaining_time_and_finished_models(array, monkeypatch):
    comparison = module.compare(np.load(array), latent_dim=2, epochs=1, hidden=(6,))
    result = comparison.models["autoencoder"]
    now = iter(range(0, 1_000, 50))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    frames: list[str] = []
    with cli._Live(console) as view:
        for step in (
            ("autoencoder", "kept", 3, None, 0.0, 10.0, result),
            ("autodecoder", "training", 2, 0.01, 2.0, 10.0),
            ("variational_autodecoder", "inference", 3, 0.01, 4.0, 10.0),
            ("", "report", 0, None, 9.0, 10.0),
        ):
            before = len(stream.getvalue())
            view(module.Progress(*step[:3], 3, *step[3:]))
            view.bar.refresh()
            frames.append(plain(stream.getvalue()[before:]))
    assert re.search(r"✓ auto-encoder training error .* s \(kept\)", frames[0])
    # 2 of 10 units took 50 s, then 4 of 10 took 100 s
    assert re.search(r"auto-decoder epoch 2/3 .* 20% 3:20 left", frames[1])
    assert re.search(r"variational auto-decoder encoding held-out .* 40% 2:30 left", frames[2])
    assert re.search(r"drawing the report .* 90% 17 s left", frames[3])
    cli._summary(console, comparison, array)
    assert "mean squared error per value" in plain(stream.getvalue())


def test_a_terminal_gets_the_live_bar(small, monkeypatch):
    used = []

    class Spy(cli._Live):
        def __init__(self, console):
            used.append(self)
            super().__init__(console)

    monkeypatch.setattr(cli, "_Live", Spy)
    monkeypatch.setattr(cli.sys, "stdout", Terminal())
    cli.app(small, standalone_mode=False)
    assert used


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_clock_counts_at_the_mean_pace(monkeypatch):
    now = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(now))
    clock = cli._Clock()
    assert clock.left(0, 100) is None
    assert clock.left(20, 100) == 40
    assert clock.left(50, 100) == 30


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01")])
def test_durations(seconds, text):
    assert cli._duration(seconds) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.npy"), "No such file or dir"),
        (PermissionError(13, "Permission denied"), "error: Permission denied\n"),
        (ValueError("two\nlines [bold]"), "error: two lines [bold]\n"),
    ],
)
def test_messages_of_the_system_are_readable(error, text, capsys):
    with pytest.raises(cli.typer.Exit) as exit_:
        _terminal.fail(error)
    assert exit_.value.exit_code == 2
    assert text in capsys.readouterr().err
