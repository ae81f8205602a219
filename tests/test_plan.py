"""The memory plan: its sums, what it says of a machine, and what training really takes."""

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlatent import LatentTable, SparseAdam, VariationalLatentTable
from fastlatent.memory import DISK, GPU, MEMORY, Machine, plan, size
from fastlatent.networks import build_decoder

LARGE = Machine(memory=10**15, gpu=10**15, disk=10**15)
BF16 = {"table_dtype": "bf16", "moment_dtype": "bf16"}


def parts(found):
    return {part.name: part.bytes for part in found.parts}


@pytest.mark.parametrize(
    ("dtype", "moments", "bytes_a_value"),
    [("fp32", None, 12), ("fp32", "bf16", 8), ("bf16", "bf16", 6), ("bf16", None, 6)],
)
@pytest.mark.parametrize(("model", "columns"), [("ad", 64), ("vad", 128)])
def test_bytes_of_a_layout(dtype, moments, bytes_a_value, model, columns):
    found = plan(10**8, 64, model=model, dtype=dtype, moments=moments, machine=LARGE)
    assert found.total() == 10**8 * (columns * bytes_a_value + 4)
    assert found.fits and found.alternatives()[:1] != [found]


def test_models_with_an_encoder_have_no_table():
    found = plan(10**8, 64, model="vae", data_shape=(1, 8, 8), machine=LARGE)
    assert set(parts(found)) == {"networks and their Adam", "activations of a step"}


def test_networks_are_those_that_training_builds():
    decoder = build_decoder("mlp", 16, (3, 8, 8), hidden=(32, 64))
    weights = sum(p.numel() for p in decoder.parameters())
    found = plan(100, 16, data_shape=(3, 8, 8), hidden=(32, 64), machine=LARGE)
    assert parts(found)["networks and their Adam"] == 4 * 4 * weights


def test_activations_cover_what_autograd_keeps():
    batch, shape, hidden = 256, (3, 8, 8), (32, 64)
    decoder = build_decoder("mlp", 16, shape, hidden=hidden)
    own = {p.untyped_storage()._cdata for p in decoder.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        z = torch.randn(batch, 16, requires_grad=True)
        loss = (decoder(z) - torch.randn(batch, *shape)).square().sum()
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    found = plan(100, 16, batch_size=batch, data_shape=shape, hidden=hidden, machine=LARGE)
    step = parts(found)["activations of a step"]
    # beside what is saved for it, the backward pass holds the gradients of a layer's two ends and
    # one temporary, none larger than the largest tensor of the step
    assert saved <= step <= saved + 4 * 4 * batch * 192
    loss.backward()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("model", "dtype"), [("ad", "fp32"), ("vad", "fp32"), ("ad", "bf16")])
def test_plan_against_resident_memory(model, dtype):
    rows, dim = 2**18, 64
    if model == "vad":
        rows //= 2
    if dtype == "bf16":
        rows *= 2
    kind = LatentTable if model == "ad" else VariationalLatentTable
    found = plan(rows, dim, model=model, dtype=dtype, machine=LARGE)
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16

    def train(count):
        table = kind(count, dim, dtype=torch_dtype)
        optimizer = SparseAdam(
            table.parameters(), step_mode="row", moment_dtype=torch_dtype, assume_unique=True
        )
        for index in torch.arange(count).split(4096):
            out = table(index)
            (out if model == "ad" else out[0].sum() + out[1]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return table, optimizer

    # compiles, starts threads and fills the pools of the allocator
    train(2**16)
    gc.collect()
    before = _resident()
    kept = train(rows)
    gc.collect()
    measured = _resident() - before
    del kept
    assert found.total() == pytest.approx(200e6, rel=0.05)
    # the bound; the pages at the ends of the tensors and the allocator's own are far less
    assert measured == pytest.approx(found.total(), rel=0.05)


class Repeated:
    """1,009 samples again and again, so that reading takes no memory but the result's."""

    value_range = (-10.0, 10.0)

    def __init__(self, count, values):
        self.shape, self.count = (values,), count
        generator = np.random.default_rng(0)
        self.samples = generator.normal(size=(1_009, values)).astype(np.float32)

    def __len__(self):
        return self.count

    def read(self, rows):
        return self.samples[rows % 1_009]


def start(count, values, options):
    """Measures a run in this process, which is a child of the test's."""
    from fastlatent import LatentData, Settings, train
    from fastlatent.metrics import peak_resident
    from fastlatent.settings import memory_plan

    def run(count, folder):
        settings = Settings(hidden=(32,), steps=-(-count // 1024), held_out=0, pca=True, **options)
        data = LatentData(Repeated(count, values), name="repeated")
        train(data, folder, settings, checkpoint_seconds=1e9)
        return memory_plan(settings, data, Path(folder), 1)

    with tempfile.TemporaryDirectory() as folder:
        # imports, compiles, starts threads and fills the buffers of BLAS, with little data: what
        # is free in the allocator's pools then would be taken again unseen
        run(256, f"{folder}/small")
        gc.collect()
        before = _resident("VmRSS")
        found = run(count, f"{folder}/run")
    print(json.dumps([peak_resident() - before, parts(found)]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("count", "values", "options"),
    [
        # by the covariance; what finding the components takes is more than moments and steps do
        (60_000, 800, {"latent_dim": 32}),
        # by a random range
        (30_000, 1200, {"latent_dim": 32, "linear_path": True}),
        # no fp32 copy of the codes is ever there
        (400_000, 40, {"latent_dim": 48, "projection": "ball", **BF16}),
    ],
)
def test_plan_against_the_peak_of_a_run_from_components(count, values, options):
    command = [sys.executable, __file__, json.dumps([count, values, options])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    measured, planned = json.loads(ran.stdout.splitlines()[-1])
    total = sum(planned.values())
    # BLAS takes buffers of its own, whose size is that of its problem up to a bound
    assert 0.95 * total < measured < 1.05 * total + 40e6, planned


def _resident(kind="RssAnon"):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def test_starting_from_components_counts_where_it_takes_more_than_the_steps():
    options = {"data_shape": (3, 32, 32), "batch_size": 64, "machine": LARGE}
    plain, found = plan(10**6, 32, **options), plan(10**6, 32, pca=True, **options)
    assert found.total() == plain.total() + parts(found)["start from PCA"]
    # 50,000 samples of 3,072 values are 614 MB, moments 256 MB
    assert parts(found)["start from PCA"] > 614.4e6 - 2 * 128e6 - 10e6
    assert parts(plan(10**8, 32, pca=True, **options))["start from PCA"] == 0
    gpu = plan(10**8, 32, pca=True, device="cuda", **options)
    assert gpu.total(MEMORY) == parts(gpu)["start from PCA"] > 614.4e6
    in_files = plan(10**8, 32, pca=True, mapped=True, **options)
    assert 0 < parts(in_files)["start from PCA"] < parts(gpu)["start from PCA"]
    four = plan(10**8, 32, pca=True, mapped=True, ranks=4, **options)
    assert parts(four)["start from PCA"] == 4 * parts(in_files)["start from PCA"]


def test_what_does_not_fit_names_what_would():
    small = Machine(memory=40 * 10**9, disk=10**15)
    found = plan(10**8, 64, machine=small)
    assert found.lacking() == {MEMORY: (10**8 * (64 * 12 + 4), 40 * 10**9)}
    with pytest.raises(MemoryError) as error:
        found.check()
    text = str(error.value)
    assert "77.2 GB of memory where 40 GB are free" in text
    assert "bf16 table and moments (--dtype bf16 --moments bf16): 38.8 GB of memory fit" in text
    assert "--mapped" in text
    # 8 bytes a value are 51.6 GB
    assert [other.layout for other in found.alternatives()] == [
        "bf16 table and moments",
        "fp32 table and moments, memory-mapped",
        "fp32 table, bf16 moments, memory-mapped",
        "bf16 table and moments, memory-mapped",
    ]
    found.alternatives()[0].check()


def test_mapped_tables_need_the_disk():
    machine = Machine(memory=10**9, disk=50 * 10**9)
    found = plan(10**8, 64, mapped=True, machine=machine)
    assert found.total(MEMORY) == 0 and found.total(DISK) == 10**8 * (64 * 12 + 4)
    assert [other.layout for other in found.alternatives()] == [
        "bf16 table and moments, memory-mapped"
    ]
    with pytest.raises(MemoryError, match=r"77\.2 GB of disk where 50 GB are free"):
        found.check()
    with pytest.raises(MemoryError, match="no other layout fits"):
        plan(10**10, 64, mapped=True, machine=machine).check()


def test_gpu_holds_all_but_the_data():
    machine = Machine(memory=10**9, gpu=10**10, disk=10**15)
    found = plan(10**8, 64, dtype="bf16", device="cuda:0", data_bytes=10**8, machine=machine)
    assert found.total(GPU) == 10**8 * (64 * 6 + 4) and found.total(MEMORY) == 10**8
    assert found.alternatives() == []
    with pytest.raises(MemoryError, match="GPU memory where 10 GB are free"):
        found.check()


def test_ranks_share_the_rows():
    options = {"data_shape": (3, 8, 8), "machine": LARGE}
    one, four = plan(10**6, 8, **options), plan(10**6, 8, ranks=4, **options)
    assert parts(four)["table"] == parts(one)["table"]
    name = "networks and their Adam"
    assert parts(four)[name] == 4 * parts(one)[name]
    gpu = plan(10**6, 8, ranks=4, device="cuda", machine=LARGE)
    assert parts(gpu)["table"] == parts(one)["table"] // 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"samples": 0}, "samples must be an integer of at least 1; got 0"),
        ({"dim": 1.5}, "dim must be an integer"),
        ({"model": "gan"}, "model must be one of ad, vad, ae, vae; got 'gan'"),
        ({"dtype": "int8"}, "dtype must be one of fp32"),
        ({"moments": "fp16"}, "moments must be one of fp32, bf16, fp64"),
        ({"data_shape": (3, 0)}, "data_shape must be sizes"),
        ({"data_bytes": -1}, "data_bytes must be at least 0"),
        ({"device": "cuda", "mapped": True}, "mapped tables are for the CPU"),
        ({"device": "mps"}, "device must be cpu or cuda"),
        ({"model": "ae", "mapped": True}, "has no table that could be mapped"),
        ({"model": "ae", "pca": True}, "has no table that could start from PCA"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        plan(**{"samples": 10, "dim": 2, "machine": LARGE, **arguments})


def test_this_machine(tmp_path):
    machine = Machine.here(directory=tmp_path / "not" / "there")
    assert machine.gpu is None and machine.memory > 0 and machine.disk > 0
    assert plan(10, 2).machine.memory > 0


def test_control_groups_limit_the_memory(tmp_path, monkeypatch):
    from fastlatent import memory as module

    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert module._allowed(tmp_path, "memory.max", "memory.current") == [3000]
    (tmp_path / "memory.max").write_text("max\n")
    assert module._allowed(tmp_path, "memory.max", "memory.current") == []
    assert module._allowed(tmp_path / "none", "memory.max", "memory.current") == []
    monkeypatch.setattr(module, "_group_memory", lambda: [12345])
    assert Machine.here().memory == 12345


def test_sizes_in_words():
    cases = {0: "0 bytes", 999: "999 bytes", 999_999: "1 MB", 38.4e9: "38.4 GB", 2.5e12: "2.5 TB"}
    assert {value: size(value) for value in cases} == cases


if __name__ == "__main__":
    start(*json.loads(sys.argv[1]))
