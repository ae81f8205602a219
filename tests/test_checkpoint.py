import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastlatent import _files
from fastlatent import checkpoint as module
from fastlatent.checkpoint import STATE, TENSORS, Checkpoints, captured, locked, restore
from fastlatent.data import load_data
from fastlatent.trainer import Settings, build_model, build_optimizers


def tensors(value=1.0):
    return {
        "a": torch.full((50, 3), value),
        "b": torch.arange(4, dtype=torch.int32),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def test_what_is_written_is_read(checkpoints):
    written = tensors()
    state = {"seconds": 1.25, "rates": [0.1, 1e-17], "metrics": 123, "none": None}
    checkpoints.write(12, written, state)
    found = checkpoints.latest()
    assert (found.step, found.state) == (12, state)
    read = dict(found.tensors())
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_the_newest_two_are_kept(checkpoints):
    for step in (1, 10, 5, 1_000_000):
        checkpoints.write(step, tensors(step), {})
    assert checkpoints.steps() == [10, 1_000_000]
    assert checkpoints.latest().step == 1_000_000
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "step-000000000010", "step-000001000000",
    ]  # fmt: skip


def test_without_any_there_is_none(checkpoints):
    assert checkpoints.latest() is None and checkpoints.steps() == []


def damage_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a bit of the tensors": lambda place: damage_byte(place / TENSORS),
    "tensors cut short": lambda place: os.truncate(place / TENSORS, 100),
    "no tensors": lambda place: (place / TENSORS).unlink(),
    "a bit of the state": lambda place: damage_byte(place / STATE),
    "state cut short": lambda place: os.truncate(place / STATE, 40),
    "empty state": lambda place: os.truncate(place / STATE, 0),
    "no state": lambda place: (place / STATE).unlink(),
    "a state of something else": lambda place: (place / STATE).write_text("[1]"),
    "empty folder": lambda place: (shutil.rmtree(place), place.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(checkpoints, damage):
    checkpoints.write(1, tensors(1), {"of": 1})
    checkpoints.write(2, tensors(2), {"of": 2})
    DAMAGES[damage](checkpoints.folder / "step-000000000002")
    with pytest.warns(RuntimeWarning, match=r"000002' is damaged \(.*\): that of step 1 is tried"):
        found = checkpoints.latest()
    assert (found.step, found.state) == (1, {"of": 1})
    assert torch.equal(dict(found.tensors())["a"], tensors(1)["a"])


def test_if_all_are_damaged_it_says_so(checkpoints):
    checkpoints.write(1, tensors(), {})
    damage_byte(checkpoints.folder / "step-000000000001" / TENSORS)
    with pytest.warns(RuntimeWarning, match="is damaged .*: there is no other"):
        assert checkpoints.latest() is None


def test_a_state_with_another_step_is_damaged(checkpoints):
    checkpoints.write(1, tensors(), {})
    os.rename(checkpoints.folder / "step-000000000001", checkpoints.folder / "step-000000000009")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert checkpoints.latest() is None


@pytest.mark.parametrize("at", ["mkdir", "tensors", "state", "_to_disk", "rename"])
def test_a_full_disk_leaves_the_checkpoints_as_they_were(checkpoints, monkeypatch, at):
    checkpoints.write(1, tensors(1), {})
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_, **__):
        raise full

    if at == "mkdir":
        monkeypatch.setattr(type(checkpoints.folder), "mkdir", fail)
    elif at == "tensors":

        def half(*_):
            yield b"half"
            raise full

        monkeypatch.setattr(_files, "pieces", half)
    elif at == "state":
        monkeypatch.setattr(type(checkpoints.folder), "write_bytes", fail)
    elif at == "_to_disk":
        monkeypatch.setattr(module, "_to_disk", fail)
    else:
        monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError) as error:
        checkpoints.write(2, tensors(2), {})
    assert error.value.errno == errno.ENOSPC
    if at in ("tensors", "state"):
        assert "no space for " in str(error.value) and " were free before" in str(error.value)
        assert error.value.filename.endswith({"tensors": TENSORS, "state": STATE}[at])
    monkeypatch.undo()
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-000000000001"]
    assert checkpoints.latest().step == 1


def test_no_space_is_found_before_anything_is_written(checkpoints, monkeypatch):
    checkpoints.write(1, tensors(1), {})
    usage = shutil.disk_usage(checkpoints.folder)._replace(free=999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    wanted = r"no space for 1\.\d+ kB, 999 bytes are free: .*000002/tensors\.safetensors"
    with pytest.raises(OSError, match=wanted) as error:
        checkpoints.write(2, tensors(2), {})
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-000000000001"]


def test_the_file_is_that_of_safetensors(tmp_path):
    found = {**tensors(), "sch\u00f6n": torch.ones(3, 0), "a.b": torch.ones(2, dtype=torch.float64)}
    for dtype in _files._TYPES:
        found[str(dtype)] = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    _files.write_tensors(tmp_path / "ours", found)
    save_file(found, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for bad in (torch.ones(2, dtype=torch.complex128), torch.eye(2).to_sparse()):
        with pytest.raises(ValueError, match=r"bad is .*: safetensors has no such"):
            _files.write_tensors(tmp_path / "bad", {"bad": bad})
    assert not (tmp_path / "bad").exists()


def test_strided_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    """Moments that are the two halves of one buffer, [N, 2, D]."""
    moments = torch.randn(100, 2, 7)
    found = {"exp_avg": moments[:, 0], "exp_avg_sq": moments[:, 1], "turned": torch.randn(3, 5).T}
    monkeypatch.setattr(_files, "_PIECE", 10 * 7 * 4)
    parts = [len(part) for part in _files.pieces(found["exp_avg"])]
    assert parts == [280] * 10
    _files.write_tensors(tmp_path / "ours", found)
    save_file({name: part.contiguous() for name, part in found.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_that_the_system_cuts_short_is_an_error(checkpoints):
    checkpoints.write(1, tensors(1), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match="too large") as error:
            checkpoints.write(2, {"big": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-000000000001"]


def test_what_a_kill_left_behind_is_no_checkpoint_and_is_replaced(checkpoints):
    checkpoints.write(1, tensors(1), {})
    left = checkpoints.folder / ".new-000000000002"
    left.mkdir()
    (left / TENSORS).write_bytes(b"half")
    assert checkpoints.latest().step == 1
    checkpoints.write(2, tensors(2), {})
    assert checkpoints.latest().step == 2 and not left.exists()


def test_files_and_folders_reach_the_disk_before_the_name(checkpoints, monkeypatch):
    events = []
    to_disk, rename = module._to_disk, os.rename
    monkeypatch.setattr(module, "_to_disk", lambda p: (events.append(p.name), to_disk(p)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    checkpoints.write(3, tensors(), {})
    assert events == [TENSORS, STATE, ".new-000000000003", "rename", "checkpoints"]


@pytest.fixture(scope="module")
def data():
    return load_data("digits").subset(torch.arange(40))


def trained(data, settings, steps=3):
    model = build_model(settings, data)
    optimizers = build_optimizers(model, settings)
    for step in range(steps):
        torch.manual_seed(step)
        index = torch.arange(step, len(data), 2)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.loss(index, data.batch(index)).total.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


@pytest.mark.parametrize("step_mode", ["row", "global", "dense"])
@pytest.mark.parametrize("kind", ["ad", "vad", "ae"])
def test_model_and_optimizers_come_back_bit_for_bit(checkpoints, data, kind, step_mode):
    settings = Settings(model=kind, latent_dim=3, hidden=(8,), step_mode=step_mode)
    model, optimizers = trained(data, settings)
    taken = captured(model, optimizers)
    checkpoints.write(3, taken, {})
    other, their_optimizers = trained(data, settings, 0)
    restore(other, their_optimizers, checkpoints.latest())
    again = captured(other, their_optimizers)
    assert taken.keys() == again.keys()
    for name, tensor in taken.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].nan_to_num(), tensor.nan_to_num()), name


def test_moments_that_are_views_of_one_buffer_come_back(checkpoints, data):
    settings = Settings(latent_dim=3, hidden=(8,))
    model, optimizers = trained(data, settings)
    checkpoints.write(3, captured(model, optimizers), {})
    whole = (checkpoints.folder / "step-000000000003" / TENSORS).read_bytes()

    def interleaved(model, optimizers):
        state = optimizers[1].state[model.table.weight]
        both = torch.stack([state["exp_avg"], state["exp_avg_sq"]], 1)
        state.update(exp_avg=both[:, 0], exp_avg_sq=both[:, 1])
        return both

    before = interleaved(model, optimizers)
    checkpoints.write(4, captured(model, optimizers), {})
    assert (checkpoints.folder / "step-000000000004" / TENSORS).read_bytes() == whole
    other, theirs = trained(data, settings, 1)
    both = interleaved(other, theirs)
    restore(other, theirs, checkpoints.latest())
    assert torch.equal(both, before)


def test_nothing_is_copied(data):
    model, optimizers = trained(data, Settings(latent_dim=3, hidden=(8,)))
    taken = captured(model, optimizers)
    assert taken["model.table.weight"].data_ptr() == model.table.weight.data_ptr()
    moments = optimizers[1].state[model.table.weight]["exp_avg"]
    assert taken["optimizer.1.0.exp_avg"].data_ptr() == moments.data_ptr()


def test_a_checkpoint_of_another_model_is_refused(checkpoints, data):
    checkpoints.write(1, captured(*trained(data, Settings(latent_dim=3, hidden=(8,)))), {})
    for other in (Settings(latent_dim=4, hidden=(8,)), Settings(latent_dim=3, table_dtype="bf16")):
        with pytest.raises(ValueError, match="does not fit the model"):
            restore(*trained(data, other, 0), checkpoints.latest())


def test_two_runs_in_one_folder(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(RuntimeError, match=rf"another run \(process {os.getpid()}\)"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


def test_the_lock_goes_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "import fcntl; f = open(Path(sys.argv[1]) / '.lock', 'a+'); fcntl.flock(f, 2)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(RuntimeError, match="another run"), locked(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with locked(tmp_path), open(tmp_path / ".lock") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert file.read() == str(os.getpid())


def test_the_state_is_readable_json(checkpoints):
    checkpoints.write(3, tensors(), {"seconds": 0.1})
    content = json.loads((checkpoints.folder / "step-000000000003" / STATE).read_text())
    assert content["step"] == 3 and content["state"] == {"seconds": 0.1}
