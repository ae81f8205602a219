"""Several ranks: the same numbers as one, checkpoints for any number of ranks, and lost ranks.

The ranks are processes that run this file; what they find they write to files that the tests read.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COUNT, DIM, SHAPE, BATCH, STEPS = 37, 3, (1, 4, 4), 10, 9


def data():
    from fastlatent import load_data

    generator = torch.Generator().manual_seed(5)
    return load_data(torch.randn(COUNT, *SHAPE, generator=generator, dtype=torch.float64))


def settings(model="ad", **options):
    from fastlatent.trainer import Settings

    defaults = {"model": model, "latent_dim": DIM, "hidden": (8,), "batch_size": BATCH}
    return Settings(**{**defaults, "steps": STEPS, "held_out": 0, **options})


class Doubled:
    """The trainer's loss in float64: the samples of a data set are float32."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, index, x):
        return self.loss(index, x.double())


def trained(folder, options, steps, group=None, resume=False):
    """A float64 run of so many steps, with a checkpoint at its end; the trainer."""
    from fastlatent.trainer import Alone, Trainer, build_model

    samples = data()
    group = group or Alone()
    folder.mkdir(exist_ok=True)
    model = build_model(settings(**options), samples, group.own(len(samples))).double()
    trainer = Trainer(
        model, samples, None, settings(**{**options, "steps": steps}), folder, group=group,
        log_steps=3,
    )  # fmt: skip
    trainer.loss = Doubled(trainer.loss)
    if options.get("model") in ("vad", "vae"):
        # ranks draw noise of their own: compare what has none, the steps from the means
        model.eval()
        model.train = lambda mode=True: model
    assert trainer.resume() == resume
    trainer.run()
    return trainer


def numbers(trainer):
    """All that was trained, with the table of all ranks, by name."""
    model = trainer.model
    with trainer.group.whole(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


CASES = {
    "ad": {},
    "global": {"step_mode": "global"},
    "ball": {"projection": "ball", "weight_decay": 0.01},
    "vad": {"model": "vad"},
    "vae": {"model": "vae"},
}


# a table of 1 MB for data of 64 kB; it is drawn, and read for its components, in small pieces
START = {"latent_dim": 64, "hidden": (8,), "batch_size": 32, "steps": 1, "held_out": 0, "pca": True}
STARTS = {
    "drawn": {"pca": False},
    "drawn, vad, mapped": {"pca": False, "model": "vad", "mapped": True},
    "components": {"linear_path": True},
    "ball": {"projection": "ball"},
    "bf16, mapped": {"table_dtype": "bf16", "mapped": True},
}
PIECES = {
    "settings._DRAWN": 64 * 99,
    "settings.FITTED": 500,
    "settings.CHUNK": 128,
    "models._PCA_SAMPLES": 500,
    "models._PCA_CHUNK": 101,
}


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest storage that any operator returns."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def begun(folder, name, group=None):
    """The model of a run before its first step, and the bytes of its largest tensor so far."""
    from fastlatent.trainer import Settings, Trainer, train

    samples = torch.randn(4001, 4, generator=torch.Generator().manual_seed(6))
    found, largest = {}, Largest()

    class Begun(Exception):
        pass

    def stop(trainer, seconds):
        found["largest"] = largest.bytes
        found["model"] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        raise Begun

    with ExitStack() as stack:
        for place, value in PIECES.items():
            stack.enter_context(patch(f"fastlatent.{place}", value))
        stack.enter_context(patch.object(Trainer, "run", stop))
        stack.enter_context(pytest.raises(Begun))
        stack.enter_context(largest)
        train(samples, folder, Settings(**{**START, **STARTS[name]}), group=group)
    return found


def work_together(folder):
    """All that two ranks can do in turn; what went wrong is written to <work>.<rank>."""
    for work in (work_start, work_train, work_part, work_table, work_full, work_strided):
        place = folder / work.__name__
        place.mkdir(exist_ok=True)
        try:
            work(place)
        except Exception:
            (folder / f"{work.__name__}.{os.environ['RANK']}").write_text(traceback.format_exc())
            raise


def work_start(folder):
    from fastlatent.distributed import Ranks

    for name in STARTS:
        group = Ranks()
        torch.save(begun(folder / name, name, group), folder / f"{name}.{group.rank}.pt")


def work_train(folder):
    from fastlatent.distributed import Ranks

    for name in CASES:
        trainer = trained(folder / name, CASES[name], STEPS, Ranks())
        found = numbers(trainer)
        if trainer.group.rank == 0:
            torch.save(found, folder / f"{name}.pt")


def work_part(folder):
    from fastlatent.distributed import Ranks

    trained(folder, {}, 4, Ranks())


def work_resume(folder):
    """Goes on with each run in the folder."""
    from fastlatent.distributed import Ranks

    for place in sorted(folder.iterdir()):
        trainer = trained(place, {}, STEPS, Ranks(), resume=True)
        found = numbers(trainer)
        if trainer.group.rank == 0:
            torch.save(found, place / "resumed.pt")


def work_table(folder):
    """Lookups of rows of all ranks, their gradients and a step, against one table."""
    import torch.distributed as dist

    import fastlatent as fl
    from fastlatent import distributed

    rank, world = dist.get_rank(), dist.get_world_size()
    full = torch.randn(11, DIM, dtype=torch.float64)
    whole = fl.LatentTable.from_pretrained(full.clone(), freeze=False)
    rows = distributed.partition(11, rank, world)
    shard = fl.LatentTable.from_pretrained(full[rows.start : rows.stop].clone(), freeze=False)
    table = distributed.ShardedTable(shard, 11)
    optimizers = [fl.SparseAdam(t.parameters(), lr=0.1, step_mode="row") for t in (whole, shard)]
    for shape in ((4, 2), (0,), (9,)):
        asked = [torch.randint(0, 11, shape, dtype=torch.int32) for _ in range(world)]
        weights = [torch.randn(*shape, DIM, dtype=torch.float64) for _ in range(world)]
        if shape == (9,):
            asked[0].fill_(10)
        codes = table(asked[rank])
        assert torch.equal(codes, whole(asked[rank]))
        (codes * weights[rank]).sum().backward()
        sum((whole(a) * w).sum() for a, w in zip(asked, weights, strict=True)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # sums of a few float64 products in another order, through Adam's normalised step
        torch.testing.assert_close(
            shard.weight, whole.weight[rows.start : rows.stop], rtol=0, atol=1e-12
        )
    variational = fl.VariationalLatentTable(len(rows), DIM)
    z, kl = distributed.ShardedTable(variational, 11).eval()(torch.tensor([[10, 0]]))
    assert z.shape == (1, 2, DIM) and kl.shape == (1, 2)
    (z.sum() + kl.sum()).backward()
    gathered = [torch.zeros(2, DIM) for _ in range(world)]
    dist.all_gather(gathered, z[0].detach())
    assert torch.equal(gathered[0], gathered[1])
    with pytest.raises(IndexError):
        table(torch.tensor([11]))
    with pytest.raises(ValueError, match="this rank owns"):
        distributed.ShardedTable(shard, 110)


def work_full(folder):
    """A checkpoint that one rank cannot write is an OSError on all, and leaves nothing."""
    import torch.distributed as dist

    from fastlatent import checkpoint
    from fastlatent.distributed import Ranks

    def fail(_):
        raise OSError(28, "No space left on device", "a file")

    whole = checkpoint._to_disk
    if dist.get_rank() == 0:
        checkpoint._to_disk = fail
    try:
        with pytest.warns(RuntimeWarning, match=r"No space left on device.*goes on"):
            trained(folder, {}, 4, Ranks())
    finally:
        checkpoint._to_disk = whole
    dist.barrier()
    assert list((folder / "checkpoints").iterdir()) == []


def work_strided(folder):
    """Moments that are the two halves of one buffer, [N, 2, D], are saved and loaded."""
    import torch.distributed as dist

    from fastlatent import distributed

    rows = distributed.partition(COUNT, dist.get_rank(), dist.get_world_size())
    both = torch.randn(COUNT, 2, DIM, generator=torch.Generator().manual_seed(7))
    own = both[rows.start : rows.stop]
    names = ["optimizer.1.0.exp_avg", "optimizer.1.0.exp_avg_sq"]
    counts = dict.fromkeys(names, COUNT)
    saved = {name: own[:, number] for number, name in enumerate(names)}
    distributed.save(folder / "saved", saved, counts)
    again = torch.zeros_like(own)
    distributed.load(
        folder / "saved", {name: again[:, number] for number, name in enumerate(names)}, counts
    )
    assert torch.equal(again, own)
    for name, tensor in distributed.stored(folder / "saved"):
        assert torch.equal(tensor, saved[name])
    # the bytes that cross the network when the rows are gathered
    ranks = distributed.Ranks()
    assert ranks.own(COUNT) == rows
    whole = ranks._gathered(own[:, 1])
    assert (whole is None) == (ranks.rank > 0)
    assert whole is None or torch.equal(whole, both[:, 1])


def work_endless(folder):
    from fastlatent.distributed import Ranks

    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    trained(folder, {}, 10**6, Ranks())


def main(work, folder):
    from fastlatent import distributed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with distributed.joined(timeout=float(os.environ.get("TEST_TIMEOUT", "60"))):
            globals()[f"work_{work}"](Path(folder))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)


def start(work, folder, world, ranks=None, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, __file__, work, str(folder)],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (range(world) if ranks is None else ranks)
    ]


def finish(processes, timeout=120):
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    finish(start("together", folder, 2))
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What one rank trains, by case."""
    folder = tmp_path_factory.mktemp("one")
    return {name: numbers(trained(folder / name, CASES[name], STEPS)) for name in CASES}


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # the bound; only the order of float64 sums differs
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_what_one_does(name, two_ranks, expected):
    check_same(torch.load(two_ranks / "work_train" / f"{name}.pt"), expected[name])


@pytest.mark.parametrize("name", STARTS)
def test_a_rank_starts_with_its_rows_of_the_whole_and_holds_no_others(name, two_ranks, tmp_path):
    whole = begun(tmp_path / "run", name)["model"]
    parts = [torch.load(two_ranks / "work_start" / f"{name}.{rank}.pt") for rank in (0, 1)]
    rows = [part["model"].pop("table.weight") for part in parts]
    table = whole.pop("table.weight")
    assert [len(own) for own in rows] == [2001, 2000]
    assert torch.equal(torch.cat(rows), table)
    # pieces with the same random numbers would have equal rows
    assert len(table.unique(dim=0)) == len(table)
    for part, own in zip(parts, rows, strict=True):
        assert part["model"].keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(part["model"][key], value), key
        # fp32 codes or moments; a file that is mapped is a storage too
        assert part["largest"] == 4 * own.numel()


def test_a_table_of_one_piece_starts_as_before_there_were_pieces():
    from fastlatent import AutoDecoder
    from fastlatent.networks import build_decoder
    from fastlatent.trainer import build_model

    samples = data()
    torch.manual_seed(0)
    whole = AutoDecoder(build_decoder("mlp", DIM, SHAPE, hidden=(8,), output="linear"), COUNT, DIM)
    built = build_model(settings(), samples)
    assert torch.equal(built.table.weight, whole.table.weight)
    for own in (range(0), range(5), range(7, 30), range(30, COUNT), range(COUNT, COUNT)):
        part = build_model(settings(), samples, own)
        assert part.num_samples == len(own)
        assert torch.equal(part.table.weight, whole.table.weight[own.start : own.stop])


@pytest.mark.parametrize("work", ["work_start", "work_table", "work_full", "work_strided"])
def test_two_ranks_are_content_with(work, two_ranks):
    """Lookups of rows that live elsewhere; a disk that is full on one rank."""
    assert (two_ranks / work).exists() and not list(two_ranks.glob(f"{work}.*"))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resumed_on_another_number_of_ranks(world, two_ranks, expected, tmp_path):
    """A run of two ranks, and on two also one of a single process."""
    shutil.copytree(two_ranks / "work_part", tmp_path / "of-two")
    if world == 1:
        check_same(numbers(trained(tmp_path / "of-two", {}, STEPS, resume=True)), expected["ad"])
        return
    if world == 2:
        trained(tmp_path / "of-one", {}, 4)
    finish(start("resume", tmp_path, world))
    for place in tmp_path.iterdir():
        check_same(torch.load(place / "resumed.pt"), expected["ad"])


def test_damage_is_recognised(two_ranks, tmp_path):
    from fastlatent.checkpoint import Checkpoints

    folder = tmp_path / "checkpoints"
    shutil.copytree(two_ranks / "work_part" / "checkpoints", folder)
    (place,) = folder.iterdir()
    files = json.loads((place / "state.json").read_text())["files"]
    assert set(files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    content = bytearray((place / "__1_0.distcp").read_bytes())
    content[100] ^= 1
    (place / "__1_0.distcp").write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"SHA-256 of __1_0\.distcp is wrong"):
        assert Checkpoints(folder).latest() is None


def test_a_rank_that_dies_stops_the_other(tmp_path):
    processes = start("endless", tmp_path, 2, TEST_TIMEOUT="30")
    while not all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    time.sleep(1)
    processes[1].send_signal(signal.SIGKILL)
    message = processes[0].communicate(timeout=60)[1]
    processes[1].communicate()
    assert processes[0].returncode == 3, message
    assert "rank 0 of 2: another rank died or did not answer within 30 s" in message
    assert "start again with --resume" in message


def test_a_missing_rank(tmp_path):
    (process,) = start("endless", tmp_path, 2, ranks=[0], TEST_TIMEOUT="3")
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 3
    assert "not all of the 2 ranks joined within 3 s" in message


def test_without_torchrun(monkeypatch):
    from fastlatent import distributed

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(RuntimeError, match=r"RANK, WORLD_SIZE, MASTER_ADDR not set.*torchrun"),
        distributed.joined(),
    ):
        pass


def test_the_command_under_torchrun(tmp_path):
    """Two ranks from PCA, a checkpoint, held-out samples; then the whole model is in one file."""
    from fastlatent import load_model

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "fastlatent", "train", "digits"]
    command += ["--steps", "6", "--latent-dim", "4", "--hidden", "16", "--batch-size", "300"]
    command += ["--log-steps", "2", "--pca", "--mapped", "--out", str(tmp_path / "two")]
    ran = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    # one rank speaks
    assert ran.stdout.count("6 steps") == 1
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert len(load_model(tmp_path / "two").codes) == summary["data"]["samples"]
    (place,) = (tmp_path / "two" / "checkpoints").iterdir()
    assert (place / "__1_0.distcp").exists()
    assert not list((tmp_path / "two" / "mapped").iterdir())

    from fastlatent.trainer import Settings, train

    settings = Settings(steps=6, latent_dim=4, hidden=(16,), batch_size=300, pca=True, mapped=True)
    alone = train("digits", tmp_path / "one", settings, log_steps=2)["results"]
    # the same steps in fp32, of which a code's first ones keep only the sign of its gradient
    assert summary["results"]["test_mse"] == pytest.approx(alone["test_mse"], rel=1e-3)


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (9, 4), (2, 4), (0, 2)])
def test_partition(count, world):
    from fastlatent import distributed
    from fastlatent.loader import Sampler

    parts = [distributed.partition(count, rank, world) for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(count))
    chunks = torch.arange(count).chunk(world)
    if count:
        assert [len(part) for part in parts if part] == [len(chunk) for chunk in chunks]
        assert parts == [Sampler(count, 2, 0, rank, world).rows for rank in range(world)]


if __name__ == "__main__":
    main(*sys.argv[1:])
