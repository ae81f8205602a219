import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fastlatent import cli_train, trainer
from fastlatent.trainer import Progress

runner = CliRunner()
SMALL = ["--held-out", "40", "--latent-dim", "4", "--hidden", "16", "--batch-size", "32"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def app():
    app = typer.Typer()
    app.command()(cli_train.train)
    # with one command only, typer would take its name for an argument
    app.callback()(lambda: None)
    return app


@pytest.fixture
def array(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((200, 12)).astype(np.float32))
    return path


def invoke(app, *words):
    result = runner.invoke(app, ["train", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_a_run_from_the_command_line(app, array, tmp_path):
    out = tmp_path / "run"
    code, stdout, stderr = invoke(app, array, "--out", out, "--epochs", 3, *SMALL)
    assert (code, stderr) == (0, "")
    printed = stdout.splitlines()
    assert printed[0].startswith("step 15 of 15, epoch 3.00, ") and "samples/s" in printed[0]
    results = json.loads((out / "summary.json").read_text())["results"]
    assert f"{results['test_mse']:.4g}" in stdout
    assert f"waiting for data {results['waiting_share']:.1%}" in stdout
    assert f"latent table {results['table_share']:.1%}" in stdout
    assert "GiB" in stdout and printed[-1] == str(out)


def test_every_option_reaches_the_settings(app, array, tmp_path, monkeypatch):
    seen = {}

    def record(data, out, settings, **options):
        seen.update(data=data, out=out, settings=settings, **options)
        raise ValueError("enough")

    monkeypatch.setattr(trainer, "train", record)
    wanted = {
        "model": "ad", "latent_dim": 7, "network": "mlp", "hidden": (9, 8), "steps": 11,
        "batch_size": 13, "lr": 0.5, "code_lr": 0.25, "schedule": "cosine", "warmup": 2,
        "table_dtype": "bf16", "moment_dtype": "bf16", "rounding": "nearest",
        "step_mode": "dense", "projection": "ball", "radius": 3.0, "weight_decay": 0.125,
        "beta": 0.5, "held_out": 17, "seed": 19, "threads": 2, "impl": "cpu",
    }  # fmt: skip
    words = []
    for name, value in wanted.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    code, _, stderr = invoke(
        app, array, *words, "--linear-path", "--pca", "--time", 60, "--log-steps", 3,
        "--evaluate-seconds", 4, "--checkpoint-seconds", 5, "--workers", 6, "--tensorboard",
        "--resume", "--out", tmp_path / "o",
    )  # fmt: skip
    assert code == 2 and stderr == "error: enough\n"
    assert seen["settings"] == trainer.Settings(**wanted, linear_path=True, pca=True)
    assert (seen["seconds"], seen["log_steps"], seen["evaluate_seconds"]) == (60, 3, 4)
    assert (seen["checkpoint_seconds"], seen["workers"], seen["tensorboard"]) == (5, 6, True)
    assert (seen["resume"], seen["overwrite"], seen["data"]) == (True, False, str(array))


def test_every_setting_has_an_option():
    import inspect

    options = set(inspect.signature(cli_train.train).parameters)
    assert set(trainer.Settings.__dataclass_fields__) <= options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "gan", "--steps", "3"], "model must be one of ad, vad, ae, vae"),
        ([], "the run has no end: give epochs, steps or seconds"),
        (["--steps", "3", "--hidden", "a"], "hidden must be numbers such as 128,128"),
        (["--steps", "3", "--resume"], "there is no run to resume in"),
        (["--epochs", "3", "--steps", "3"], "epochs and steps exclude each other"),
    ],
)
def test_errors_are_one_line(app, array, tmp_path, words, message):
    code, stdout, stderr = invoke(app, array, "--out", tmp_path / "run", *words)
    assert code == 2 and stdout == ""
    assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_other_settings_are_printed_and_nothing_is_lost(app, array, tmp_path):
    out = tmp_path / "run"
    assert invoke(app, array, "--out", out, "--steps", 20, *SMALL)[0] == 0
    before = (out / "model.safetensors").read_bytes()
    code, _, stderr = invoke(
        app, array, "--out", out, "--steps", 20, *SMALL, "--lr", 0.5, "--resume"
    )
    assert code == 2 and "settings.lr is 0.5, there 0.001" in stderr
    np.save(array, np.zeros((200, 13), np.float32))
    code, _, stderr = invoke(app, array, "--out", out, "--steps", 20, *SMALL, "--resume")
    assert code == 2 and "data.sample_shape is [13], there [12]" in stderr
    assert (out / "model.safetensors").read_bytes() == before


def test_warnings_are_lines(app, array, tmp_path):
    out = tmp_path / "run"
    invoke(app, array, "--out", out, "--steps", 20, *SMALL)
    for file in (out / "checkpoints").glob("*/state.json"):
        file.write_text("{")
    code, stdout, stderr = invoke(app, array, "--out", out, "--steps", 25, *SMALL, "--resume")
    assert code == 0 and "25 steps" in stdout
    assert stderr.startswith("warning: the checkpoint ") and stderr.count("\n") == 1
    assert "is damaged" in stderr


def test_quiet_prints_nothing(app, array, tmp_path):
    found = invoke(app, array, "--out", tmp_path / "run", "--steps", 5, *SMALL, "--quiet")
    assert found == (0, "", "")


def test_lines_come_every_ten_seconds_and_at_the_end(capsys):
    from rich.console import Console

    view = cli_train._Lines(Console(highlight=False, soft_wrap=True))
    for step, seconds in ((1, 0.5), (2, 9.0), (3, 11.0), (4, 12.0), (5, 13.0)):
        view(Progress(step, 5, step / 2, seconds, 1234.5, 0.25, None if step < 5 else 0.5))
    assert capsys.readouterr().out.splitlines() == [
        "step 1 of 5, epoch 0.50, 1,234 samples/s, error 0.25",
        "step 3 of 5, epoch 1.50, 1,234 samples/s, error 0.25",
        "step 5 of 5, epoch 2.50, 1,234 samples/s, error 0.25, unseen 0.5",
    ]


def test_the_bar_shows_the_speed(capsys):
    from rich.console import Console

    view = cli_train._Live(Console(force_terminal=True, width=120))
    with view:
        view(Progress(1_500, None, 1.5, 3.0, 98_765.0, 0.25, None))
    task = view.bar.tasks[0]
    assert (task.description, task.total) == ("1,500", None)
    view(Progress(1_600, 2_000, 1.5, 3.0, 98_765.0, 0.25, 0.125))
    assert (task.completed, task.total) == (1_600, 2_000)
    assert task.fields["figures"] == "98,765 samples/s, error 0.25, unseen 0.125"


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(array, tmp_path):
    out = tmp_path / "run"
    code = (
        "import typer; from fastlatent.cli_train import train\n"
        "app = typer.Typer(); app.command()(train); app.callback()(lambda: None); app()"
    )
    words = [sys.executable, "-c", code, "train", str(array), "--out", str(out), "--log-steps", "1"]
    words += ["--steps", "1000000", *SMALL]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.startswith("interrupted: the checkpoint of step ")
    command = f"fastlatent train {array} --out {out}"
    assert command in stderr and stderr.rstrip().endswith("--resume")
    assert list((out / "checkpoints").glob("step-*"))
