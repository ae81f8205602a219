"""SparseAdam against torch's own classes, and its errors."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import fastlatent as fl

IMPLS = ("reference", "cpu")
N, D, B = 60, 5, 16
STEPS = 50
# both sides round fp64 (2.2e-16) a few times a step; a unit-sized weight drifts apart by less
EXACT = {"rtol": 0, "atol": 1e-12}


def batches(steps=STEPS, gap=True):
    """Random indices with duplicates, and rows that stay away for long."""
    for step in range(steps):
        low = 0 if not gap or step % 10 < 7 else N // 2
        index = torch.randint(low, N, (B,))
        index[1] = index[0]
        yield index, torch.randn(B, D, dtype=torch.float64)


def table(impl, **options):
    return fl.LatentTable(N, D, dtype=torch.float64, impl=impl, **options)


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t % 9) / 9 + 0.1)


def train(module, optimizer, steps=STEPS, data=None, scheduler=None):
    scheduler = scheduler or schedule(optimizer)
    for index, target in data or batches(steps):
        optimizer.zero_grad()
        ((module(index) - target) ** 2).sum().backward()
        optimizer.step()
        scheduler.step()
    return module.weight.detach()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("maximize", [False, True])
def test_global_is_torch_sparse_adam(impl, maximize):
    ours = table(impl)
    theirs = nn.Embedding(N, D, sparse=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    data = list(batches())
    options = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-3, "maximize": maximize}
    expected = train(theirs, torch.optim.SparseAdam(theirs.parameters(), **options), data=data)
    got = train(ours, fl.SparseAdam(ours.parameters(), impl=impl, **options), data=data)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_row_is_one_torch_adam_per_row(impl, weight_decay):
    ours = table(impl)
    rows = [nn.Parameter(row.clone()) for row in ours.weight.detach()]
    options = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": weight_decay}
    each = torch.optim.AdamW(rows, **options)
    optimizer = fl.SparseAdam(ours.parameters(), step_mode="row", impl=impl, **options)
    schedulers = schedule(each), schedule(optimizer)
    for index, target in batches():
        each.zero_grad()
        optimizer.zero_grad()
        ((ours(index) - target) ** 2).sum().backward()
        codes = torch.stack([rows[i] for i in index.tolist()])
        ((codes - target) ** 2).sum().backward()
        each.step()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(ours.weight.detach(), torch.stack(rows).detach(), **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.8, 0.99), (0.9, 0.7), (0.0, 0.9)])
def test_dense_is_torch_adam_on_the_whole_table(impl, weight_decay, betas):
    ours = table(impl)
    theirs = nn.Embedding(N, D, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    data = list(batches())
    options = {"lr": 0.03, "betas": betas, "eps": 1e-3, "weight_decay": weight_decay}
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), **options), data=data)
    optimizer = fl.SparseAdam(ours.parameters(), step_mode="dense", impl=impl, **options)
    got = train(ours, optimizer, data=data)
    if betas[0] or weight_decay:
        assert (got - expected).abs().max() > 1e-3, "no row was behind: the test shows nothing"
    optimizer.flush()
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_replays_only_what_can_be_seen(impl):
    """A row away for 1,500 steps equals one that took each of them, to fp32 resolution."""
    ours = fl.LatentTable(4, D, impl=impl)
    theirs = nn.Embedding(4, D)
    theirs.load_state_dict(ours.state_dict())
    optimizer = fl.SparseAdam(ours.parameters(), lr=0.01, step_mode="dense", impl=impl)
    oracle = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for step in range(1500):
        index = torch.tensor([0, 1, 2, 3] if step < 3 else [0])
        for module, one in ((ours, optimizer), (theirs, oracle)):
            one.zero_grad()
            module(index).sum().backward()
            one.step()
    ours.flush()
    # 228 replayed steps in another order of rounding, each within eps of weights of about 1
    bound = 300 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.weight[1:], theirs.weight[1:], rtol=0, atol=bound)


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_lookup_returns_the_row_as_dense_adam_left_it(impl):
    ours = table(impl)
    optimizer = fl.SparseAdam(ours.parameters(), lr=0.1, step_mode="dense", impl=impl)
    ours(torch.arange(N)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = ours.weight.detach().clone()
    for _ in range(3):
        ours(torch.tensor([0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(ours.weight[1:], before[1:])
    assert (ours(torch.tensor([5]))[0] - before[5]).abs().min() > 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_options_changed_in_the_middle_bind_from_then_on(impl):
    ours = table(impl)
    theirs = nn.Embedding(N, D, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.03, "weight_decay": 0.1}
    pairs = [
        (ours, fl.SparseAdam(ours.parameters(), step_mode="dense", impl=impl, **options)),
        (theirs, torch.optim.AdamW(theirs.parameters(), **options)),
    ]
    for number, (index, target) in enumerate(batches(30)):
        for module, optimizer in pairs:
            if number == 15:
                optimizer.param_groups[0].update(betas=(0.5, 0.9), eps=1e-2, weight_decay=0.5)
            optimizer.zero_grad()
            ((module(index) - target) ** 2).sum().backward()
            optimizer.step()
    ours.flush()
    torch.testing.assert_close(ours.weight, theirs.weight, **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step_mode", fl.optim.STEP_MODES)
def test_late_row_moves(impl, step_mode):
    """What step_mode is for: a row first seen at step 1,001 moves 2.5·lr ("global") or lr."""
    ours = fl.LatentTable(2, 1, dtype=torch.float64, impl=impl)
    optimizer = fl.SparseAdam(ours.parameters(), lr=0.01, step_mode=step_mode, impl=impl)
    for _ in range(1000):
        ours(torch.tensor([0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = ours.weight[1].item()
    ours(torch.tensor([1])).sum().backward()
    optimizer.step()
    moved = before - ours.weight[1].item()
    t = 1001
    late = 0.01 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * 0.1 / math.sqrt(0.001)
    expected = 0.01 if step_mode == "row" else late
    assert moved == pytest.approx(expected, rel=1e-5)
    assert late / 0.01 == pytest.approx(2.515, abs=0.001)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step_mode", fl.optim.STEP_MODES)
@pytest.mark.parametrize("kind", ["plain", "variational"])
def test_fused_equals_unfused(impl, step_mode, kind):
    torch.manual_seed(1)
    if kind == "plain":
        first = table(impl)
    else:
        first = fl.VariationalLatentTable(N, D, dtype=torch.float64, impl=impl)
    options = {"lr": 0.03, "step_mode": step_mode, "weight_decay": 0.1, "impl": impl}
    options |= {"projection": "ball", "radius": 2.0}
    second = copy.deepcopy(first)
    runs = []
    for module, fused in ((first, False), (second, True)):
        torch.manual_seed(2)
        optimizer = fl.SparseAdam(module.parameters(), in_backward=fused, **options)
        scheduler = schedule(optimizer)
        for index, target in batches(30):
            optimizer.zero_grad()
            if kind == "plain":
                loss = ((module(index) - target) ** 2).sum()
            else:
                z, kl = module(index)
                loss = ((z - target) ** 2).sum() + kl.sum()
            loss.backward()
            optimizer.step()
            scheduler.step()
        module.flush()
        runs.append(module.weight.detach())
    assert not torch.equal(runs[0], torch.zeros_like(runs[0]))
    torch.testing.assert_close(runs[1], runs[0], **EXACT)


@pytest.mark.parametrize("kind", ["plain", "variational"])
def test_fused_sums_several_lookups_of_a_step(kind):
    make = fl.LatentTable if kind == "plain" else fl.VariationalLatentTable
    first = make(N, D, dtype=torch.float64)
    second = copy.deepcopy(first)
    for module, fused in ((first, False), (second, True)):
        torch.manual_seed(3)
        optimizer = fl.SparseAdam(module.parameters(), lr=0.1, step_mode="row", in_backward=fused)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = [module(torch.tensor(index)) for index in ([1, 2, 2], [2, 3], [4])]
            if kind == "variational":
                outputs = [z * 2 + kl[..., None] for z, kl in outputs]
            (outputs[0].sum() + outputs[1].square().sum()).backward()
            optimizer.step()
    assert not torch.equal(first.weight[2], copy.deepcopy(first).weight[1])
    torch.testing.assert_close(second.weight, first.weight, **EXACT)


def test_fused_does_not_wait_for_a_dropped_graph():
    module = table("auto")
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, in_backward=True)
    module(torch.tensor([5]))
    before = module.weight.detach().clone()
    module(torch.tensor([1])).sum().backward()
    assert not torch.equal(module.weight[1], before[1]), "the backward pass itself updates"
    assert torch.equal(module.weight[5], before[5])
    optimizer.step()
    optimizer.zero_grad()
    assert module.weight.grad is None


def test_fused_zero_grad_forgets_a_deferred_gradient():
    module = table("auto")
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, in_backward=True)
    before = module.weight.detach().clone()
    kept = module(torch.tensor([5]))
    module(torch.tensor([1])).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(module.weight, before)
    del kept


def test_fused_refuses_accumulation():
    module = table("auto")
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, in_backward=True)
    module(torch.tensor([1])).sum().backward()
    after = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="accumulated"):
        module(torch.tensor([1])).sum().backward()
    assert torch.equal(module.weight, after)
    optimizer.zero_grad()
    module(torch.tensor([1])).sum().backward()
    assert not torch.equal(module.weight, after)


def test_fused_refuses_retain_graph():
    module = table("auto")
    fl.SparseAdam(module.parameters(), lr=0.1, in_backward=True)
    loss = module(torch.tensor([1])).sum()
    loss.backward(retain_graph=True)
    after = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()
    assert torch.equal(module.weight, after)


@pytest.mark.parametrize(
    "clip",
    [
        lambda params: nn.utils.clip_grad_norm_(params, 1.0),
        lambda params: nn.utils.clip_grad_value_(params, 1.0),
        lambda params: [param.grad.norm() for param in params],
    ],
)
def test_fused_refuses_clipping(clip):
    module = table("auto")
    fl.SparseAdam(module.parameters(), lr=0.1, in_backward=True)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="in_backward=False"):
        clip(list(module.parameters()))
    assert "AppliedGradient" in repr(module.weight.grad)


def test_fused_refuses_grad_scaler():
    module = fl.LatentTable(N, D)
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(module(torch.tensor([1])).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


@pytest.mark.parametrize("impl", IMPLS)
def test_grad_scaler(impl):
    """Scaled gradients give the unscaled step; an overflow skips it and its clock."""
    scaled, plain = (fl.LatentTable(N, D, dtype=torch.float64, impl=impl) for _ in range(2))
    plain.load_state_dict(scaled.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pair = [fl.SparseAdam(m.parameters(), lr=0.1, impl=impl) for m in (scaled, plain)]
    for step in range(4):
        index = torch.randint(0, N, (B,))
        weight = torch.randn(B, D, dtype=torch.float64)
        poisoned = weight * (math.inf if step == 2 else 1)
        pair[0].zero_grad()
        scaler.scale((scaled(index) * poisoned).sum()).backward()
        scaler.step(pair[0])
        scaler.update()
        if step != 2:
            pair[1].zero_grad()
            (plain(index) * weight).sum().backward()
            pair[1].step()
    assert pair[0].state[scaled.weight]["step"] == 3
    torch.testing.assert_close(scaled.weight, plain.weight, **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
def test_accumulation_and_clipping_work_unfused(impl):
    module = table(impl)
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, step_mode="row", impl=impl)
    module(torch.tensor([1, 2])).sum().backward()
    module(torch.tensor([2, 3])).sum().backward()
    assert module.weight.grad.to_dense()[1:4, 0].tolist() == [1, 2, 1]
    module.weight.grad._values().mul_(0.5)
    before = module.weight.detach().clone()
    optimizer.step()
    # the first step of Adam is lr·g/|g| whatever the size of g
    moved = before - module.weight.detach()
    torch.testing.assert_close(
        moved[1:4], torch.full((3, D), 0.1, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("projection", ["ball", "sphere"])
def test_projection(impl, projection):
    module = table(impl)
    with torch.no_grad():
        module.weight[0] *= 1e-3
    optimizer = fl.SparseAdam(
        module.parameters(),
        lr=1e-6,
        step_mode="row",
        projection=projection,
        radius=0.7,
        impl=impl,
    )
    before = module.weight.detach().clone()
    module(torch.tensor([0, 1, 2])).sum().backward()
    optimizer.step()
    norms = module.weight.detach().norm(dim=1)
    torch.testing.assert_close(norms[1:3], torch.full((2,), 0.7, dtype=torch.float64), **EXACT)
    if projection == "ball":
        assert norms[0] < 0.01
    else:
        assert norms[0] == pytest.approx(0.7, abs=1e-12)
    assert torch.equal(module.weight[3:], before[3:])


@pytest.mark.parametrize("impl", IMPLS)
def test_projection_of_a_variational_table_leaves_the_variance(impl):
    module = fl.VariationalLatentTable(8, D, dtype=torch.float64, impl=impl)
    with torch.no_grad():
        module.mean.add_(3)
    optimizer = fl.SparseAdam(
        module.parameters(), lr=1e-9, projection="sphere", radius=0.5, impl=impl
    )
    z, kl = module(torch.tensor([0]))
    (z.sum() + kl.sum()).backward()
    optimizer.step()
    assert module.mean[0].norm().item() == pytest.approx(0.5, abs=1e-12)
    assert module.log_variance[0].tolist() == pytest.approx([-4.0] * D, abs=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(impl, dtype):
    """Steps far below half a unit in the last place are lost when rounded to nearest."""
    rows, dim, steps, lr = 4096, 32, 4, 1e-4
    moved = {}
    for stochastic in (False, True):
        module = fl.LatentTable(rows, dim, dtype=dtype, impl=impl)
        with torch.no_grad():
            module.weight.fill_(1.0)
        optimizer = fl.SparseAdam(
            module.parameters(),
            lr=lr,
            step_mode="row",
            stochastic_rounding=stochastic,
            assume_unique=True,
            impl=impl,
            seed=5,
        )
        for _ in range(steps):
            optimizer.zero_grad()
            module(torch.arange(rows)).sum().backward()
            optimizer.step()
        moved[stochastic] = 1 - module.weight.detach().double()
    assert moved[False].abs().max() == 0
    # each step subtracts lr on average; below one the units are eps/2, so the variance of a step
    # is lr·unit, and the mean of rows·dim elements lies within 5 standard errors
    unit = torch.finfo(dtype).eps / 2
    error = 5 * math.sqrt(steps * lr * unit / (rows * dim))
    assert moved[True].mean().item() == pytest.approx(steps * lr, abs=error)


@pytest.mark.parametrize("impl", IMPLS)
def test_skip_nonfinite(impl):
    module = table(impl)
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, skip_nonfinite=True, impl=impl)
    before = module.weight.detach().clone()
    scale = torch.tensor([[1.0], [math.nan], [math.inf]], dtype=torch.float64)
    (module(torch.tensor([1, 2, 3])) * scale).sum().backward()
    optimizer.step()
    assert optimizer.state[module.weight]["skipped"] == 2
    assert torch.equal(module.weight[2:], before[2:])
    assert not torch.equal(module.weight[1], before[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step_mode", fl.optim.STEP_MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_survives_exactly(impl, step_mode, dtype, tmp_path):
    torch.manual_seed(4)
    whole = fl.LatentTable(N, D, dtype=dtype, impl=impl)
    halves = copy.deepcopy(whole)
    data = [(index, target.to(dtype)) for index, target in batches(20)]
    options = {"lr": 0.01, "step_mode": step_mode, "impl": impl, "seed": 3}
    options["stochastic_rounding"] = dtype == torch.bfloat16
    straight = fl.SparseAdam(whole.parameters(), **options)
    resumed = fl.SparseAdam(halves.parameters(), **options)
    train(whole, straight, data=data[:10])
    train(halves, resumed, data=data[:10])
    straight.flush()
    torch.save({"t": halves.state_dict(), "o": resumed.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    fresh = fl.LatentTable(N, D, dtype=dtype, impl=impl)
    fresh.load_state_dict(saved["t"])
    optimizer = fl.SparseAdam(fresh.parameters(), **options)
    optimizer.load_state_dict(saved["o"])
    for name, value in resumed.state[halves.weight].items():
        loaded = optimizer.state[fresh.weight][name]
        if isinstance(value, torch.Tensor):
            assert loaded.dtype == value.dtype and torch.equal(loaded, value), name
        else:
            assert loaded == value
    train(whole, straight, data=data[10:])
    train(fresh, optimizer, data=data[10:])
    whole.flush()
    fresh.flush()
    assert torch.equal(fresh.weight, whole.weight)


def test_loads_the_state_of_torch_sparse_adam():
    theirs = nn.Embedding(N, D, sparse=True, dtype=torch.float64)
    ours = table("auto")
    ours.load_state_dict(theirs.state_dict())
    data = list(batches(20))
    oracle = torch.optim.SparseAdam(theirs.parameters(), lr=0.02)
    train(theirs, oracle, data=data[:10])
    ours.load_state_dict(theirs.state_dict())
    optimizer = fl.SparseAdam(ours.parameters(), lr=0.02)
    optimizer.load_state_dict(oracle.state_dict())
    oracle.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.02
    for module, one in ((theirs, oracle), (ours, optimizer)):
        for index, target in data[10:]:
            one.zero_grad()
            ((module(index) - target) ** 2).sum().backward()
            one.step()
    torch.testing.assert_close(ours.weight, theirs.weight, **EXACT)


def test_load_refuses_another_table():
    ours, other = table("auto"), fl.LatentTable(N + 1, D, dtype=torch.float64)
    optimizers = [fl.SparseAdam(m.parameters(), step_mode="row") for m in (ours, other)]
    for module, optimizer in zip((ours, other), optimizers, strict=True):
        module(torch.tensor([0])).sum().backward()
        optimizer.step()
    before = optimizers[0].state[ours.weight]["exp_avg"].clone()
    with pytest.raises(ValueError, match=re.escape(f"[{N + 1}, {D}]")):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert torch.equal(optimizers[0].state[ours.weight]["exp_avg"], before)


def test_state_moves_with_the_table():
    module = fl.LatentTable(N, D)
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, step_mode="row")
    module(torch.tensor([1])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    module.double()
    module(torch.tensor([1])).sum().backward()
    optimizer.step()
    state = optimizer.state[module.weight]
    assert state["exp_avg"].dtype == torch.float64
    assert state["row_step"][1] == 2
    optimizer.zero_grad()
    module.to(torch.bfloat16)
    module(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert optimizer.state[module.weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_moment_dtype(impl):
    module = fl.LatentTable(N, D, impl=impl)
    optimizer = fl.SparseAdam(
        module.parameters(), lr=0.1, step_mode="row", moment_dtype=torch.bfloat16, impl=impl
    )
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.tensor([1])).sum().backward()
        optimizer.step()
    state = optimizer.state[module.weight]
    assert state["exp_avg"].dtype == torch.bfloat16
    # gradient one: m = 1 − 0.9³, stored in 8 bits three times
    assert state["exp_avg"][1, 0].item() == pytest.approx(1 - 0.9**3, rel=3 * 2**-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_tensor_lr_and_duplicate_free_promise(impl):
    first, second = table(impl), table(impl)
    second.load_state_dict(first.state_dict())
    lr = torch.tensor(0.05, dtype=torch.float64)
    tensor = fl.SparseAdam(first.parameters(), lr=lr, assume_unique=True, impl=impl)
    number = fl.SparseAdam(second.parameters(), lr=0.05, impl=impl)
    for step in range(5):
        index = torch.randperm(N)[:B]
        for module, optimizer in ((first, tensor), (second, number)):
            optimizer.zero_grad()
            module(index).square().sum().backward()
            optimizer.step()
        lr.fill_(0.05 / (step + 2))
        number.param_groups[0]["lr"] = 0.05 / (step + 2)
    torch.testing.assert_close(first.weight, second.weight, **EXACT)


@pytest.mark.parametrize("step_mode", fl.optim.STEP_MODES)
def test_empty_batch_does_nothing_to_the_rows(step_mode):
    module = table("auto")
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, step_mode=step_mode)
    before = module.weight.detach().clone()
    codes = module(torch.empty(0, 3, dtype=torch.int64))
    assert codes.shape == (0, 3, D)
    codes.sum().backward()
    optimizer.step()
    assert torch.equal(module.weight, before)


def test_gradient_is_not_copied_and_updates_count_as_writes():
    module = fl.LatentTable(N, D)
    optimizer = fl.SparseAdam(module.parameters())
    codes = module(torch.tensor([3, 1]))
    incoming = torch.ones_like(codes)
    version = module.weight._version
    codes.backward(incoming)
    assert module.weight.grad._values().data_ptr() == incoming.data_ptr()
    assert not module.weight.grad.is_coalesced()
    optimizer.step()
    assert module.weight._version > version


def test_closure_and_parameters_without_gradient():
    modules = nn.ModuleList([table("auto"), table("auto")])
    optimizer = fl.SparseAdam(modules.parameters())

    def closure():
        loss = modules[0](torch.tensor([1])).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert modules[1].weight not in optimizer.state


def test_two_groups_keep_their_own_options():
    modules = [table("auto"), table("auto")]
    groups = [{"params": modules[0].parameters(), "lr": 0.5}, {"params": modules[1].parameters()}]
    optimizer = fl.SparseAdam(groups, lr=0.25, step_mode="row")
    before = [module.weight.detach().clone() for module in modules]
    sum(module(torch.tensor([1])).sum() for module in modules).backward()
    optimizer.step()
    moved = [(b - m.weight.detach())[1, 0].item() for b, m in zip(before, modules, strict=True)]
    assert moved == pytest.approx([0.5, 0.25], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and at least 0; got -1.0"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"lr": torch.ones(2)}, "0-dim"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"step_mode": "lazy"}, "step_mode must be one of global, row, dense; got 'lazy'"),
        ({"projection": "cube"}, "projection must be None, 'ball' or 'sphere'"),
        ({"radius": 0.0}, "radius must be above 0"),
        ({"moment_dtype": torch.int8}, "moment_dtype must be"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, cpu, reference"),
        ({"capturable": True, "step_mode": "dense"}, "capturable"),
    ],
)
def test_illegal_options(options, message):
    with pytest.raises(ValueError, match=message):
        fl.SparseAdam(table("auto").parameters(), **options)


@pytest.mark.parametrize(
    ("param", "options", "message"),
    [
        (torch.zeros(3), {}, r"\[N, D\] tables"),
        (torch.zeros(3, 2, dtype=torch.complex64), {}, "floating-point"),
        (torch.zeros(3, 2).to_sparse(), {}, "sparse table"),
        (torch.zeros(3, 2), {"in_backward": True}, "LatentTable"),
        (torch.zeros(3, 2), {"step_mode": "dense"}, "LatentTable"),
    ],
)
def test_illegal_parameters(param, options, message):
    with pytest.raises(ValueError, match=message):
        fl.SparseAdam([nn.Parameter(param)], **options)
    optimizer = fl.SparseAdam(table("auto").parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(param)], **options})
    assert len(optimizer.param_groups) == 1


def test_dense_gradient_is_refused_and_nothing_is_written():
    modules = [table("auto"), nn.Embedding(N, D)]
    optimizer = fl.SparseAdam([p for m in modules for p in m.parameters()])
    before = modules[0].weight.detach().clone()
    sum(module(torch.tensor([1])).double().sum() for module in modules).backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(modules[0].weight, before)


def test_gradient_of_another_shape_is_refused():
    module = table("auto")
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1)
    module(torch.tensor([1])).sum().backward()
    module.weight.data = torch.zeros(N + 1, D, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=re.escape(f"[{N}, {D}]")):
        optimizer.step()
    assert module.weight.abs().max() == 0


def test_state_of_another_shape_is_refused():
    module = table("auto")
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1)
    module(torch.tensor([1])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    module.weight.data = torch.zeros(N + 1, D, dtype=torch.float64)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="exp_avg has shape"):
        optimizer.step()


def test_a_second_optimizer_takes_over():
    module = table("auto")
    first = fl.SparseAdam(module.parameters(), lr=0.1, step_mode="dense")
    module(torch.arange(N)).sum().backward()
    first.step()
    first.zero_grad()
    module(torch.tensor([0])).sum().backward()
    first.step()
    first.zero_grad()
    assert first.state[module.weight]["row_step"].min() == 1
    fl.SparseAdam(module.parameters(), lr=0.1)
    assert module._link is None
    assert first.state[module.weight]["row_step"].min() == 2, "what was owed was paid first"


@pytest.mark.parametrize("impl", IMPLS)
def test_bitwise_deterministic(impl):
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        module = fl.LatentTable(N, D, impl=impl)
        optimizer = fl.SparseAdam(module.parameters(), lr=0.1, step_mode="row", impl=impl)
        data = [(i, t.float()) for i, t in batches(20)]
        results.append(train(module, optimizer, data=data).clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_variational_table_looked_up_twice_in_a_step(impl):
    """Catching up for the second lookup writes to rows that the first one did not read."""
    module = fl.VariationalLatentTable(N, D, dtype=torch.float64, impl=impl)
    optimizer = fl.SparseAdam(module.parameters(), lr=0.1, step_mode="dense", impl=impl)
    for _ in range(3):
        optimizer.zero_grad()
        first, _ = module(torch.tensor([0, 1]))
        second, _ = module(torch.tensor([1, 2]))
        (first.sum() + second.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        module(torch.tensor([0]))[0].sum().backward()
        optimizer.step()
    assert optimizer.state[module.weight]["step"] == 6


@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_dense_moments_fade_over_missed_steps(beta1):
    """What torch's Adam has in exp_avg after steps without a gradient; β₁ = 0 forgets at once."""
    plain = nn.Parameter(torch.randn(N, D, dtype=torch.float64))
    module = table("reference")
    options = {"lr": 0.1, "betas": (beta1, 0.9)}
    ours = fl.SparseAdam(module.parameters(), step_mode="dense", impl="reference", **options)
    theirs = torch.optim.Adam([plain], **options)
    for row in (0, 1, 2, 3):
        for optimizer, codes in ((ours, module(torch.tensor([row]))), (theirs, plain[[row]])):
            optimizer.zero_grad()
            plain.grad = torch.zeros_like(plain) if optimizer is theirs else plain.grad
            codes.sum().backward()
            optimizer.step()
    ours.flush()
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            ours.state[module.weight][name], theirs.state[plain][name], **EXACT
        )
