"""Tables in files: the same training bit for bit, little memory, and what can go wrong."""

import errno
import gc
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlatent import LatentTable, SparseAdam, VariationalLatentTable, _files, mapped
from fastlatent.checkpoint import Checkpoints, captured, restore

N, D = 500, 6
FILES = ["exp_avg.npy", "exp_avg_sq.npy", "row_step.npy", "weight.npy"]


def train(table, optimizer, steps=5, batch=64):
    torch.manual_seed(1)
    for _ in range(steps):
        out = table(torch.randint(0, len(table.weight), (batch,)))
        loss = out.square().sum() if isinstance(out, torch.Tensor) else out[0].sum() + out[1].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def pair(kind, folder, dtype=torch.float32, **options):
    """A table and its optimizer in memory, or with everything in files if there is a folder."""
    torch.manual_seed(0)
    table = kind(N, D, dtype=dtype)
    if folder is not None:
        mapped.map_table(table, folder)
    optimizer = SparseAdam(table.parameters(), lr=0.1, seed=3, **options)
    if folder is not None:
        mapped.map_moments(optimizer, table, folder)
    return table, optimizer


@pytest.mark.parametrize("kind", [LatentTable, VariationalLatentTable])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"step_mode": "row"}),
        (torch.float32, {"step_mode": "global"}),
        (torch.float32, {"step_mode": "dense"}),
        (torch.float64, {"step_mode": "row", "impl": "reference"}),
        (
            torch.bfloat16,
            {"step_mode": "row", "moment_dtype": torch.bfloat16, "stochastic_rounding": True},
        ),
    ],
)
def test_training_is_the_same(tmp_path, kind, dtype, options):
    (ours, optimizer), (theirs, oracle) = (
        pair(kind, folder, dtype, **options) for folder in (tmp_path / "run", None)
    )
    assert torch.equal(ours.weight, theirs.weight)
    train(ours, optimizer)
    train(theirs, oracle)
    assert torch.equal(ours.weight, theirs.weight)
    state, other = optimizer.state[ours.weight], oracle.state[theirs.weight]
    assert set(state) == set(other)
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[name], value) and state[name].dtype == value.dtype, name
    names = [name for name in FILES if options["step_mode"] != "global" or name[:3] != "row"]
    assert sorted(os.listdir(tmp_path / "run")) == names
    mapped.flush(tmp_path / "run")
    # the files are what training changed, in a format that others read
    saved = np.load(tmp_path / "run" / "weight.npy", mmap_mode="r")
    kept = ours.weight.detach()
    kept = kept.view(torch.uint16) if dtype == torch.bfloat16 else kept
    assert np.array_equal(saved, kept.numpy())


def test_rows_begin_at_a_page(tmp_path):
    table, _ = pair(LatentTable, tmp_path / "run")
    page = os.sysconf("SC_PAGE_SIZE")
    assert table.weight.data_ptr() % page == 0
    assert (tmp_path / "run" / "weight.npy").stat().st_size == page + N * D * 4


def test_a_run_goes_on_from_its_files(tmp_path):
    table, optimizer = pair(LatentTable, tmp_path / "run", step_mode="row")
    train(table, optimizer, 3)
    weight = table.weight.detach().clone()
    moments = optimizer.state[table.weight]["exp_avg"].clone()
    del table, optimizer
    again = mapped.map_table(LatentTable(1, D), tmp_path / "run", num_embeddings=N, mode="r+")
    other = SparseAdam(again.parameters(), lr=0.1, step_mode="row")
    mapped.map_moments(other, again, tmp_path / "run", mode="r+")
    assert torch.equal(again.weight, weight) and again.num_embeddings == N
    assert torch.equal(other.state[again.weight]["exp_avg"], moments)
    assert int(other.state[again.weight]["row_step"].sum()) > 0


def test_optimizer_state_is_taken_along(tmp_path):
    table, optimizer = pair(LatentTable, None, step_mode="row")
    train(table, optimizer)
    before = {name: value.clone() for name, value in optimizer.state[table.weight].items()}
    parameter, weight = table.weight, table.weight.detach().clone()
    mapped.map_table(table, tmp_path)
    mapped.map_moments(optimizer, table, tmp_path)
    assert table.weight is parameter and torch.equal(table.weight, weight)
    for name, value in before.items():
        assert torch.equal(optimizer.state[table.weight][name], value)
    train(table, optimizer)
    assert not torch.equal(table.weight, weight)


def test_moments_that_are_views_of_one_buffer_are_taken_along(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_PIECE", 64 * D * 4)
    table, optimizer = pair(LatentTable, None, step_mode="row")
    train(table, optimizer)
    state = optimizer.state[table.weight]
    both = torch.stack([state["exp_avg"], state["exp_avg_sq"]], 1)
    state.update(exp_avg=both[:, 0], exp_avg_sq=both[:, 1])
    mapped.map_moments(optimizer, table, tmp_path)
    for number, name in enumerate(("exp_avg", "exp_avg_sq")):
        assert torch.equal(state[name], both[:, number])
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), both[:, number].numpy())


def test_new_rows_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "_CHUNK", 4 * D * 100)
    table = mapped.map_table(LatentTable(1, D), tmp_path / "a", num_embeddings=20_000)
    # a mean of 120,000 normals and their mean square, at five standard deviations
    drawn = table.weight.detach()
    assert abs(float(drawn.mean())) < 5 / 120_000**0.5
    assert abs(float(drawn.square().mean()) - 1) < 5 * (2 / 120_000) ** 0.5
    assert len(drawn.unique()) > 100_000
    counts = []

    def draw(count):
        counts.append(count)
        return torch.full((count, D), float(len(counts)))

    table = mapped.map_table(LatentTable(1, D), tmp_path / "b", num_embeddings=251, draw=draw)
    assert counts == [100, 100, 50]
    assert table.weight[1:, 0].tolist() == [1.0] * 100 + [2.0] * 100 + [3.0] * 50
    variational = VariationalLatentTable(1, D, prior_std=0.5)
    mapped.map_table(variational, tmp_path / "c", num_embeddings=1000)
    assert len(variational.log_variance.unique()) == 1
    assert variational.mean.std() == pytest.approx(0.5, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_in_memory_that_is_not_used(tmp_path):
    """A table of 64 MB with its moments; RSS counts the pages that are touched."""
    rows, dim = 2**18, 64
    # imports what a table and its optimizer need
    pair(LatentTable, tmp_path / "small", step_mode="row")
    table = LatentTable(1, dim)
    gc.collect()
    before = _resident()
    mapped.map_table(table, tmp_path, num_embeddings=rows)
    optimizer = SparseAdam(table.parameters(), step_mode="row")
    mapped.map_moments(optimizer, table, tmp_path)
    # one chunk of 16 MB is drawn at a time, converted and written
    assert _resident() - before < 3 * 2**24
    assert optimizer.state[table.weight]["exp_avg"].count_nonzero() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_of_a_large_table_leave_only_its_files_pages_in_memory(tmp_path):
    """All rows of 67 MB of codes and 134 MB of moments are trained, written down and read back.

    Pages of files are what the system takes back when it needs memory; the others it cannot.
    """
    rows, dim = 2**18, 64
    table = LatentTable(1, dim)
    # compiles, and fills the allocator's pools with a batch
    small = LatentTable(4096, dim)
    train(small, SparseAdam(small.parameters(), step_mode="row"), batch=4096)
    gc.collect()
    before = _resident("RssAnon")
    most = [0]

    def note():
        most[0] = max(most[0], _resident("RssAnon") - before)

    def draw(count):
        note()
        return torch.randn(count, dim)

    mapped.map_table(table, tmp_path / "run", num_embeddings=rows, draw=draw)
    optimizer = SparseAdam(table.parameters(), step_mode="row", assume_unique=True)
    mapped.map_moments(optimizer, table, tmp_path / "run")
    for index in torch.randperm(rows).split(4096):
        table(index).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        note()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(1, captured(table, [optimizer]), {})
    note()
    expected = table.weight.detach()[::1000].clone()
    table.weight.detach().zero_()
    restore(table, [optimizer], checkpoints.latest())
    note()
    assert torch.equal(table.weight.detach()[::1000], expected)
    assert int(optimizer.state[table.weight]["row_step"].min()) == 1
    shared = _resident("RssFile") + _resident("RssShmem")
    # one chunk of 16 MB is drawn and written, a batch of 1 MB and a permutation of 2 MB are there
    assert most[0] < 3 * 2**24 < rows * dim * 4 < shared


def _resident(kind="VmRSS"):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def test_no_space(tmp_path, monkeypatch):
    table = LatentTable(1, D)
    with pytest.raises(OSError, match="no space for") as error:
        mapped.map_table(table, tmp_path / "a", num_embeddings=10**13)
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path / "a") == [] and table.num_embeddings == 1
    # the disk fills up between the question and the reservation
    free = shutil.disk_usage(tmp_path).free

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"no space for 4[.]12 kB, .* were free before"):
        mapped.map_table(table, tmp_path / "a")
    assert os.listdir(tmp_path / "a") == [] and free > 0


def test_bad_files(tmp_path):
    pair(LatentTable, tmp_path / "run", step_mode="row")
    path = tmp_path / "run" / "weight.npy"
    fresh = LatentTable(N, D)
    before = fresh.weight.detach().clone()
    with pytest.raises(FileExistsError, match="mode 'w' to replace it"):
        mapped.map_table(fresh, tmp_path / "run")
    with pytest.raises(ValueError, match=r"float32 of shape \[500, 6\]; the table needs"):
        mapped.map_table(LatentTable(N, D + 1), tmp_path / "run", mode="r+")
    with pytest.raises(ValueError, match=r"needs torch\.bfloat16"):
        mapped.map_table(LatentTable(N, D, dtype=torch.bfloat16), tmp_path / "run", mode="r+")
    with pytest.raises(FileNotFoundError, match="no mapped table"):
        mapped.map_table(fresh, tmp_path / "other", mode="r+")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="not the whole file"):
        mapped.map_table(fresh, tmp_path / "run", mode="r+")
    os.truncate(path, path.stat().st_size + 9)
    with pytest.raises(ValueError, match=r"not the file of a mapped table: float32 of shape"):
        mapped.open_tensor(path)
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(ValueError, match="not the whole file"):
        mapped.open_tensor(path)
    np.save(path, np.zeros(3, dtype=np.complex64))
    with pytest.raises(ValueError, match="complex64"):
        mapped.open_tensor(path)
    assert torch.equal(fresh.weight, before)


def test_read_only(tmp_path, monkeypatch):
    mapped.create(tmp_path / "weight.npy", (N, D), torch.float32)
    if os.geteuid() == 0:
        # root may write to any file
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        (tmp_path / "weight.npy").chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        mapped.map_table(LatentTable(N, D), tmp_path, mode="r+")


def test_bad_arguments(tmp_path):
    table = LatentTable(N, D)
    with pytest.raises(ValueError, match="mode must be one of x, w, r\\+; got 'a'"):
        mapped.map_table(table, tmp_path, mode="a")
    with pytest.raises(ValueError, match="num_embeddings=3: the table has 500 rows"):
        mapped.map_table(table, tmp_path, num_embeddings=3)
    with pytest.raises(ValueError, match=r"draw\(2\) must be \[2, 6\]; got \[2, 3\]"):
        mapped.map_table(
            table, tmp_path, num_embeddings=N + 2, draw=lambda count: torch.zeros(count, 3)
        )
    with pytest.raises(ValueError, match="for the CPU; the table is on meta"):
        mapped.map_table(LatentTable(N, D, device="meta"), tmp_path)
    with pytest.raises(ValueError, match="at least one value"):
        mapped.map_table(LatentTable(0, D), tmp_path)
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32"):
        mapped.create(tmp_path / "x.npy", (2,), torch.int8)
    optimizer = SparseAdam(table.parameters())
    with pytest.raises(RuntimeError, match="before it is made"):
        mapped.map_table(table, tmp_path, num_embeddings=N + 1)
    with pytest.raises(ValueError, match="does not train the weight"):
        mapped.map_moments(optimizer, LatentTable(N, D), tmp_path)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="has a gradient"):
        mapped.map_table(table, tmp_path)
    assert os.listdir(tmp_path) == []


def test_growing_brings_a_table_back_into_memory(tmp_path):
    table, optimizer = pair(LatentTable, tmp_path, step_mode="row")
    train(table, optimizer)
    table.append(3)
    table.weight.detach().zero_()
    assert len(table.weight) == N + 3
    assert np.load(tmp_path / "weight.npy").any()
    train(table, optimizer)


def run(folder, steps, **options):
    from fastlatent.trainer import Settings, train

    settings = {"model": "vad", "latent_dim": 3, "hidden": (8,), "batch_size": 200}
    settings = Settings(**settings, steps=steps, held_out=20, mapped=True)
    return train("digits", folder, settings, log_steps=2, **options)


def test_a_mapped_run_ends_and_resumes_as_any_other(tmp_path):
    from fastlatent import load_model

    run(tmp_path / "whole", 12)
    run(tmp_path / "parts", 6)
    summary = run(tmp_path / "parts", 12, resume=True)
    whole, parts = (load_model(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert whole["table.weight"].shape == (summary["data"]["samples"], 6)
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name
    # the files are of use while the run is going only
    assert not (tmp_path / "parts" / "mapped" / "rank-0").exists()


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    from fastlatent import memory

    machine = memory.Machine(memory=10**12, disk=1000)
    monkeypatch.setattr(memory.Machine, "here", lambda *_, **__: machine)
    with pytest.raises(MemoryError, match="of disk where 1 kB are free"):
        run(tmp_path / "run", 12)
    assert not (tmp_path / "run").exists()
