"""Kill a training run at random moments and resume it: are the last bytes those of an unkilled run?

    python benchmarks/kill.py [--kills 20] [--record]

Each kill is a SIGKILL, every second one during the writing of a checkpoint. `--record` writes
benchmarks/results/<device>/kill.json.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import signal
import tempfile
import time
import warnings
from pathlib import Path

from fastlatent.trainer import Settings, train

SETTINGS = Settings(
    model="vad",
    latent_dim=8,
    hidden=(32,),
    batch_size=32,
    steps=600,
    schedule="cosine",
    warmup=20,
    table_dtype="bf16",
    seed=3,
)
OPTIONS = {"log_steps": 5, "checkpoint_seconds": 0.0, "evaluate_seconds": 1e9}


def quiet_train(data, out, settings, resume):
    warnings.simplefilter("ignore")
    train(data, out, settings, resume=resume, **OPTIONS)


def kill_and_resume(folder, kills, seed=0, settings=SETTINGS, data="digits"):
    """The report of one run that is killed `kills` times, beside one that is not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastlatent.trainer"])
    whole, killed = Path(folder, "whole"), Path(folder, "killed")

    def start(out, resume):
        process = context.Process(target=quiet_train, args=(data, str(out), settings, resume))
        process.start()
        return process

    process = start(whole, False)
    process.join()
    assert process.exitcode == 0
    draw, report = random.Random(seed), []
    for number in range(kills):
        process = start(killed, (killed / "run.json").exists())
        # counted in steps: how long a start and a step take varies with the machine
        step = draw.uniform(number, number + 0.8) * settings.steps / kills
        while process.is_alive() and max(steps_of(killed), default=0) < step:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.002))
        if number % 2:
            while process.is_alive() and not writing(killed):
                pass
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        at = max(steps_of(killed), default=0)
        report.append({"step": at, "during_a_checkpoint": writing(killed)})
    process = start(killed, True)
    process.join()
    assert process.exitcode == 0
    files = {
        "model": "model.safetensors",
        "checkpoint": f"checkpoints/step-{settings.steps:012d}/tensors.safetensors",
    }
    digests = {
        name: [digest(run / file) for run in (whole, killed)] for name, file in files.items()
    }
    return {
        "kills": report,
        "killed_during_a_checkpoint": sum(kill["during_a_checkpoint"] for kill in report),
        "sha256": digests,
        "identical": all(one == other for one, other in digests.values()),
    }


def writing(run):
    """Whether an unfinished checkpoint is there."""
    return any((run / "checkpoints").glob(".new*"))


def steps_of(run):
    folder = run / "checkpoints"
    return sorted(int(p.name[5:]) for p in folder.glob("step-*")) if folder.exists() else []


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = kill_and_resume(folder, arguments.kills)
    print(json.dumps(report, indent=2))
    if arguments.record:
        from conftest import RESULTS, device_name, machine

        target = RESULTS / device_name() / "kill.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(), "settings": str(SETTINGS), "results": report}
        target.write_text(json.dumps(content, indent=2) + "\n")
    return 0 if report["identical"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
