"""The Triton kernels against the reference: interpreted where there is no GPU, else natively."""

import math
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy import stats

import fastlatent as fl
from fastlatent import _ops, reference
from fastlatent.kernels import adam, duplicates, gather, launch, numerics, reparameterize
from fastlatent.kernels import variational as variational_kernels
from fastlatent.kernels.cpu import philox as cpu_philox

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
WIDTHS = st.sampled_from([1, 4, 7, 16, 33, 64, 100])
SENTINEL = 77.0

# the interpreter is NumPy, which warns where arithmetic wraps or overflows as it should
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes in the interpreter
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def guarded(values):
    """``values`` on the device amid sentinels, and a check that those still stand."""
    edge = 32
    buffer = torch.full((values.numel() + 2 * edge,), SENTINEL, dtype=values.dtype, device=DEVICE)
    inside = buffer[edge:-edge].view(values.shape)
    inside.copy_(values)

    def intact():
        return bool((buffer[:edge] == SENTINEL).all() and (buffer[-edge:] == SENTINEL).all())

    return inside, intact


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch):
    """Fresh memory holds NaN, and has guard bands that must be whole when the test ends."""
    if request.function.__name__ == "test_opcheck":  # which compares the layout of the memory too
        yield
        return
    empty, checks = torch.empty, []

    def poisoned_empty(*size, **options):
        plain = empty(*size, **options)
        if plain.device.type == "meta" or not plain.is_floating_point():
            return plain
        inside, intact = guarded(torch.full_like(plain, math.nan, device="cpu"))
        checks.append(intact)
        return inside if plain.device == inside.device else plain

    for module in (gather, duplicates, reparameterize, variational_kernels):
        monkeypatch.setattr(module.torch, "empty", poisoned_empty)
    yield
    assert all(intact() for intact in checks)


def assert_within_budget(actual, same, exact):
    """|actual − exact| ≤ 2·(error of the reference in the same dtype + eps·max|exact|)."""
    actual, exact = actual.cpu().double(), exact.double()
    eps = torch.finfo(same.dtype).eps
    scale = exact.abs().max() if exact.numel() else 0.0
    budget = 2 * ((same.double() - exact).abs().max() + eps * scale) if exact.numel() else 0.0
    assert actual.shape == exact.shape
    assert bool(((actual - exact).abs() <= budget).all()), (
        f"error {(actual - exact).abs().max():.3g} above the budget {budget:.3g}"
    )


def launch_is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def assert_same_arithmetic(actual, expected):
    """Equal; on a GPU two kernels may contract the same multiply-adds differently."""
    if launch_is_interpreted():
        assert torch.equal(actual, expected)
    elif expected.numel():
        bound = 8 * torch.finfo(expected.dtype).eps * expected.abs().max()
        assert bool(((actual - expected).abs() <= bound).all())


# lookups


@examples(20)
@given(
    rows=st.integers(1, 50),
    batch=st.integers(0, 40),
    columns=WIDTHS,
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    stride=st.integers(0, 2),
    data=st.data(),
)
def test_gather_is_exact(rows, batch, columns, dtype, index_dtype, stride, data):
    weight, intact = guarded(torch.randn(rows, columns).to(dtype))
    span = max(batch, 1) * max(stride, 1)
    entries = st.integers(-2, rows + 1) | st.just(rows - 1) | st.just(0)
    values = data.draw(st.lists(entries, min_size=span, max_size=span))
    index = torch.tensor(values, dtype=index_dtype)
    index = index[:1].expand(batch) if stride == 0 else index[::stride][:batch]
    outside = (index < 0) | (index >= rows)
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    out = _ops.gather(weight, index.to(DEVICE), count, "triton")
    expected = weight.cpu()[index.long().clamp(0, rows - 1)]
    expected[outside] = 0
    assert torch.equal(out.cpu(), expected)
    assert int(count) == int(outside.sum())
    assert intact()


@pytest.mark.parametrize("columns", [3000, 3001])
def test_gather_of_wide_and_of_strided_rows(columns):
    weight = torch.randn(5, columns, device=DEVICE)
    index = torch.tensor([4, 0, -1, 4], device=DEVICE)
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    out = _ops.gather(weight, index, count, "triton")
    assert torch.equal(out[[0, 1, 3]], weight[index[[0, 1, 3]]])
    assert bool((out[2] == 0).all())
    assert int(count) == 1
    view = weight[:, 5:12]
    assert torch.equal(_ops.gather(view, index.abs(), None, "triton"), view[index.abs()])


def beyond_int32(values):
    """``values`` ``[3, W]`` as the rows of a table of more than 2³¹ elements."""
    stride = 2**30 + 4
    storage = torch.UntypedStorage((2 * stride + 4) * values.element_size(), device=DEVICE)
    flat = torch.tensor([], dtype=values.dtype, device=DEVICE)
    rows = flat.set_(storage, 0, values.shape, (stride, 1))
    rows.copy_(values)
    return rows


def test_offsets_beyond_int32():
    values = torch.randn(3, 4).half()
    weight = beyond_int32(values)
    index = torch.tensor([2, 1], dtype=torch.int32, device=DEVICE)
    assert torch.equal(_ops.gather(weight, index, None, "triton").cpu(), values[[2, 1]])
    update = options(step_mode="global", assume_unique=True)
    small = [values.clone(), torch.zeros(3, 4), torch.zeros(3, 4), None]
    gradient = torch.randn(2, 4).half()
    state = [weight, *(torch.zeros(3, 4, device=DEVICE) for _ in range(2)), None]
    adam_step(state, index, gradient, 1, 0.1, update)
    reference_step(small, index.cpu(), gradient, 1, 0.1, update)
    assert_within_budget(state[0], small[0], small[0])
    del state, weight
    moment = beyond_int32(torch.zeros(3, 4, dtype=torch.bfloat16))
    state = [values.to(DEVICE), moment, torch.zeros(3, 4, device=DEVICE), None]
    adam_step(state, index, gradient, 1, 0.1, update)
    assert_within_budget(moment, small[1].bfloat16(), small[1])


# the update

OPTIONS = {
    "history": None,
    "grad_scale": None,
    "found_inf": None,
    "skipped": None,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "maximize": False,
    "step_mode": "row",
    "projection": "none",
    "radius": 1.0,
    "columns": 1,
    "seed": None,
    "assume_unique": False,
}


def options(**chosen):
    return {**OPTIONS, **chosen}


def tables(rows, columns, dtype, moment_dtype, step_mode):
    """The same state twice: guarded and on the device, and plain for the reference."""
    plain = [
        torch.randn(rows, columns).to(dtype),
        torch.zeros(rows, columns, dtype=moment_dtype),
        torch.zeros(rows, columns, dtype=moment_dtype),
        None if step_mode == "global" else torch.zeros(rows, dtype=torch.int32),
    ]
    pairs = [(None, lambda: True) if t is None else guarded(t) for t in plain]
    return [t for t, _ in pairs], plain, lambda: all(intact() for _, intact in pairs)


def exact_tables(plain):
    """The state in float64, for the exact result."""
    return [t if t is None else t.clone() if t.dtype == torch.int32 else t.double() for t in plain]


def clone(state):
    return [None if t is None else t.clone() for t in state]


def adam_step(state, index, gradient, step, lr, update):
    arguments = [on_device(value) for value in update.values()]
    _ops.adam_rows_(
        *(*state, index.to(DEVICE), gradient.to(DEVICE), torch.tensor(step), torch.tensor(lr)),
        *(*arguments, "triton"),
    )


def reference_step(state, index, gradient, step, lr, update):
    reference.adam_rows_(
        *(*state, index, gradient, torch.tensor(step), torch.tensor(lr)), *update.values()
    )


def learning_rates(count, weight_decay):
    history = torch.zeros(count + 1, 2, dtype=torch.float64)
    for step in range(1, count + 1):
        history[step, 0] = float(torch.tensor(0.1 / (1 + step % 7)))
        history[step, 1] = history[step - 1, 1] + math.log1p(-history[step, 0] * weight_decay)
    return history


@st.composite
def updates(draw):
    columns = draw(WIDTHS)
    chosen = options(
        beta1=draw(st.sampled_from([0.5, 0.9])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        maximize=draw(st.booleans()),
        step_mode=draw(st.sampled_from(["row", "global", "dense"])),
        projection=draw(st.sampled_from(["none", "ball", "sphere"])),
        radius=draw(st.sampled_from([0.5, 3.0])),
        columns=draw(st.sampled_from([columns, (columns + 1) // 2])),
        assume_unique=draw(st.booleans()),
        grad_scale=draw(st.sampled_from([None, torch.tensor(4.0)])),
    )
    return columns, draw(st.integers(1, 30)), draw(st.integers(0, 20)), chosen


@examples(30)
@given(
    shape=updates(),
    moment_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_update_within_the_error_budget(shape, moment_dtype, index_dtype, seed):
    columns, rows, batch, update = shape
    torch.manual_seed(seed)
    state, plain, intact = tables(rows, columns, torch.float32, moment_dtype, update["step_mode"])
    exact = exact_tables(plain)
    batch = min(batch, rows) if update["assume_unique"] else batch
    update["history"] = learning_rates(4, update["weight_decay"])
    for step in (1, 2, 4):
        index = torch.randint(0, rows, (batch,))
        if update["assume_unique"]:
            index = torch.randperm(rows)[:batch]
        index, gradient = index.to(index_dtype), torch.randn(batch, columns)
        lr = float(update["history"][step, 0])
        adam_step(state, index, gradient, step, lr, update)
        reference_step(plain, index, gradient, step, lr, update)
        reference_step(exact, index, gradient.double(), step, lr, update)
    for actual, same, best in zip(state[:3], plain[:3], exact[:3], strict=True):
        assert_within_budget(actual, same, best)
    if plain[3] is not None:
        assert torch.equal(state[3].cpu(), plain[3])
    assert intact()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("step_mode", ["row", "global", "dense"])
def test_stochastic_rounding_uses_the_reference_words(dtype, step_mode):
    """A zero learning rate leaves a weight as it is; a decay moves each by the same random bits."""
    rows, columns = 40, 34
    state, plain, intact = tables(rows, columns, dtype, torch.float32, step_mode)
    update = options(step_mode=step_mode, seed=2**61 + 5, columns=columns, assume_unique=True)
    update["history"] = torch.zeros(9, 2, dtype=torch.float64)
    index = torch.randperm(rows)[:30]
    # w·½ needs no rounding, w·0.75 does, and both are the same in any fp32 arithmetic
    for step, decay in ((1, 0.0), (2, 0.5), (3, 0.25)):
        update["weight_decay"] = decay
        gradient = torch.zeros(30, columns, dtype=dtype)
        for run, tensors in ((adam_step, state), (reference_step, plain)):
            run(tensors, index, gradient, step, 1.0, update)
        assert torch.equal(state[0].cpu(), plain[0])
    assert intact()


@triton.jit
def _dither_kernel(out, values, words, DITHER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    word = tl.load(words + i).to(tl.uint32)
    tl.store(out + i, numerics.dithered(tl.load(values + i), word, DITHER))


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_the_reference_rounding_and_unbiased(dtype):
    code = {torch.bfloat16: 1, torch.float16: 2}[dtype]
    count = 2**12
    magnitude = torch.logspace(-8, 4, count)
    values = torch.cat([magnitude, -magnitude, torch.tensor([math.nan, 0.0, -0.0, 1.5])])
    values = torch.nn.functional.pad(values, (0, 2 * count - 4))
    words = torch.randint(0, 2**32, values.shape)
    out = torch.zeros_like(values, device=DEVICE)
    size = values.numel()
    _dither_kernel[(1,)](out, values.to(DEVICE), words.to(DEVICE), code, size)
    expected = reference.round_stochastically(values, dtype, words)
    assert torch.equal(out.cpu().to(dtype).nan_to_num(7), expected.nan_to_num(7))

    value, unit = 1.3, float(torch.finfo(dtype).eps)
    same = torch.full((size,), value)
    _dither_kernel[(1,)](out, same.to(DEVICE), words.to(DEVICE), code, size)
    # a uniform rounding error of one unit has a variance of at most ¼ unit²: five deviations
    assert abs(out.double().mean().item() - float(same[0])) < 5 * unit / 2 / math.sqrt(size)


@examples(8)
@given(
    columns=st.sampled_from([4, 33]),
    beta1=st.sampled_from([0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.05]),
    projection=st.sampled_from(["none", "ball", "sphere"]),
    last=st.sampled_from([3, 40, 400]),
)
def test_catching_up_takes_the_missed_dense_steps(columns, beta1, weight_decay, projection, last):
    rows = 12
    state, plain, intact = tables(rows, columns, torch.float32, torch.float32, "dense")
    update = options(
        step_mode="dense", beta1=beta1, weight_decay=weight_decay, projection=projection
    )
    update.update(columns=columns, history=learning_rates(last, weight_decay))
    exact = exact_tables(plain)
    index, gradient = torch.tensor([0, 3, 3, 7]), torch.randn(4, columns)
    lr = float(update["history"][1, 0])
    adam_step(state, index, gradient, 1, lr, update)
    promised = clone(state)
    reference_step(plain, index, gradient, 1, lr, update)
    reference_step(exact, index, gradient.double(), 1, lr, update)
    index = torch.tensor([7, 0, 5, 7, 11])
    rule = (
        *(beta1, 0.999, 1e-8, weight_decay, projection, update["radius"], columns),
        None,
    )
    history = update["history"]
    _ops.catch_up_(
        *(*state, index.to(DEVICE), torch.tensor(last), history.to(DEVICE), *rule),
        *(False, "triton"),
    )
    # a caller who knows that no row stands twice in the index need not have it sorted
    adam.catch_up_(
        *(*promised, index[:-2].to(DEVICE), torch.tensor(last), history.to(DEVICE), *rule, True)
    )
    adam.catch_up_(
        *(*promised, index[-1:].to(DEVICE), torch.tensor(last), history.to(DEVICE), *rule)
    )
    assert all(torch.equal(a, b) for a, b in zip(state, promised, strict=True))
    reference.catch_up_(*plain, index, torch.tensor(last), history, *rule)
    reference.catch_up_(*exact, index, torch.tensor(last), history, *rule)
    assert torch.equal(state[3].cpu(), plain[3])
    for actual, same, best in zip(state[:3], plain[:3], exact[:3], strict=True):
        assert_within_budget(actual, same, best)
    assert intact()


@pytest.mark.parametrize(
    ("batch", "distinct"), [(1, 1), (31, 1), (64, 1), (70, 2), (2100, 3), (2080, 1), (2112, 40)]
)
@pytest.mark.parametrize("columns", [4, 5, 17])
def test_long_runs_are_split_and_deterministic(batch, distinct, columns):
    rows = 50
    places = torch.randperm(rows)[:distinct]
    index = places[torch.randint(0, distinct, (batch,))]
    gradient = torch.randn(batch, columns)
    update = options(step_mode="row", columns=columns)
    state, plain, intact = tables(rows, columns, torch.float32, torch.float32, "row")
    exact, again = exact_tables(plain), clone(state)
    adam_step(state, index, gradient, 1, 0.1, update)
    adam_step(again, index, gradient, 1, 0.1, update)
    reference_step(plain, index, gradient, 1, 0.1, update)
    reference_step(exact, index, gradient.double(), 1, 0.1, update)
    for actual, same, best, twin in zip(state[:3], plain[:3], exact[:3], again[:3], strict=True):
        assert torch.equal(actual, twin)
        assert_within_budget(actual, same, best)
    assert torch.equal(state[3].cpu(), plain[3])
    assert intact()


def test_levels_of_chunks():
    assert [duplicates.levels(n) for n in (63, 64, 2047, 2048, 65535, 65536)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("unique", [True, False])
def test_rows_outside_the_table_are_left_out(unique):
    state, _, intact = tables(6, 4, torch.float32, torch.float32, "row")
    alone = clone(state)
    index = torch.tensor([2**32 + 1, 5, -1, 6, 0])
    gradient = torch.randn(5, 4)
    update = options(assume_unique=unique, columns=4)
    adam_step(state, index, gradient, 1, 0.1, update)
    adam_step(alone, index[[1, 4]], gradient[[1, 4]], 1, 0.1, update)
    for actual, expected in zip(state, alone, strict=True):
        assert torch.equal(actual, expected)
    assert intact()


def test_non_finite_gradients_and_found_inf():
    state, plain, _ = tables(6, 5, torch.float32, torch.float32, "row")
    index, gradient = torch.tensor([1, 3, 5, 3]), torch.randn(4, 5)
    gradient[0, 2], gradient[3, 4] = math.inf, math.nan
    for found_inf in (1.0, 0.0):
        before = clone(state)
        skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
        update = options(columns=5, skipped=skipped, found_inf=torch.tensor(found_inf))
        adam_step(state, index, gradient, 1, 0.1, update)
        update = {**update, "skipped": torch.zeros((), dtype=torch.int64)}
        reference_step(plain, index, gradient, 1, 0.1, update)
        assert int(skipped) == int(update["skipped"]) == (0 if found_inf else 2)
        for row in (0, 1, 2, 3, 4) if not found_inf else range(6):
            assert all(torch.equal(a[row], b[row]) for a, b in zip(state, before, strict=True))
    assert torch.equal(state[3].cpu(), plain[3])
    assert_within_budget(state[0], plain[0], plain[0])


def test_subnormal_moments_without_eps():
    """√v of a subnormal v is not zero: with ε = 0 a step divides by it."""
    state, plain, _ = tables(6, 8, torch.float32, torch.float32, "row")
    exact = exact_tables(plain)
    update = options(columns=8, eps=0.0, assume_unique=True)
    index, gradient = torch.arange(6), torch.randn(6, 8).sign() * 1e-19
    adam_step(state, index, gradient, 1, 0.1, update)
    reference_step(plain, index, gradient, 1, 0.1, update)
    reference_step(exact, index, gradient.double(), 1, 0.1, update)
    assert_within_budget(state[0], plain[0], exact[0])


@pytest.mark.parametrize("step_mode", ["row", "global", "dense"])
def test_numbers_on_the_device_are_those_on_the_host(step_mode, monkeypatch):
    """lr, step, grad_scale and found_inf by pointer mean what they mean by value."""
    state, _, _ = tables(9, 8, torch.float32, torch.float32, step_mode)
    by_pointer = clone(state)
    update = options(step_mode=step_mode, columns=8, grad_scale=torch.tensor(8.0))
    update.update(found_inf=torch.tensor(0.0), history=learning_rates(5, 0.1), weight_decay=0.1)
    index, gradient = torch.randint(0, 9, (12,)), torch.randn(12, 8)
    host = launch.host_or_device

    def values(tensor):
        return None if tensor is None else host(tensor.cpu())

    for read, tensors in ((values, state), (lambda number: number, by_pointer)):
        monkeypatch.setattr(adam, "host_or_device", read)
        for step in (1, 2, 5):
            arguments = [on_device(value) for value in update.values()]
            _ops.adam_rows_(
                *(*tensors, index.to(DEVICE), gradient.to(DEVICE)),
                *(torch.tensor(step, device=DEVICE), torch.tensor(0.05, device=DEVICE)),
                *(*arguments, "triton"),
            )
    for a, b in zip(state, by_pointer, strict=True):
        if a is not None:
            assert_same_arithmetic(a.float(), b.float())


# the variational step


@st.composite
def gaussians(draw):
    columns, batch = draw(WIDTHS), draw(st.integers(0, 12))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(FLOATS))
    low, high = draw(st.sampled_from([(-30.0, 20.0), (-3.0, 1.0)]))
    high = min(high, 8.0) if dtype == torch.float16 else high
    mean = torch.randn(batch, columns).to(dtype)
    log_variance = torch.empty(batch, columns).uniform_(low, high).to(dtype)
    prior = [
        torch.randn(columns) if draw(st.booleans()) else torch.tensor([0.3]),
        torch.rand(columns) + 0.5 if draw(st.booleans()) else torch.tensor([1.5]),
    ]
    kind = draw(st.sampled_from(["drawn", "given", "mean"]))
    noise = torch.randn(batch, columns).to(dtype) if kind == "given" else None
    seed = torch.tensor(draw(st.sampled_from([3, 2**40 + 1, 2**63 - 1])))
    return mean, log_variance, (*prior, seed, noise, kind != "mean")


def as_given(draw, batch, columns):
    """``draw`` with the noise that the kernels draw: the z of a standard normal is that noise.

    The reference's own is the same to the accuracy of test_normals_are_the_reference_normals.
    """
    if draw[3] is not None or not draw[4] or not batch:
        return draw
    zero = torch.zeros(batch, columns, device=DEVICE)
    noise = _ops.reparameterize_kl(zero, zero, *map(on_device, draw), "triton")[0]
    return (*draw[:3], noise.cpu(), True)


def doubled(draw):
    return tuple(
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in draw
    )


@examples(25)
@given(gaussian=gaussians(), transposed=st.booleans())
def test_reparameterize_within_the_error_budget(gaussian, transposed):
    mean, log_variance, draw = gaussian
    device = [on_device(mean), on_device(log_variance)]
    if transposed:
        device = [tensor.t().contiguous().t() for tensor in device]
    z, kl = _ops.reparameterize_kl(*device, *map(on_device, draw), "triton")
    known = as_given(draw, *mean.shape)
    same = reference.reparameterize_kl(mean, log_variance, *known)
    exact = reference.reparameterize_kl(mean.double(), log_variance.double(), *doubled(known))
    assert z.dtype == mean.dtype
    assert kl.dtype == torch.float32
    assert_within_budget(z, same[0], exact[0])
    assert_within_budget(kl, same[1], exact[1])
    assert bool((kl.cpu() >= -torch.finfo(torch.float32).eps * mean.shape[1]).all())

    grad_z, grad_kl = torch.randn_like(mean), torch.randn(mean.shape[0])
    actual = _ops.reparameterize_kl_backward(
        on_device(grad_z), on_device(grad_kl), *device, *map(on_device, draw), "triton"
    )
    operands = (grad_z, grad_kl, mean, log_variance)
    same = reference.reparameterize_kl_backward(*operands, *known)
    exact = reference.reparameterize_kl_backward(*doubled(operands), *doubled(known))
    assert_within_budget(actual[0], same[0], exact[0])
    assert_within_budget(actual[1], same[1], exact[1])


def test_kl_of_the_prior_is_zero():
    std = torch.rand(33) * 3 + 0.01
    mean, log_variance = torch.randn(33).expand(2, 33), (2 * std.log()).expand(2, 33)
    draw = (mean[0], std, torch.tensor(1), None, False)
    kl = _ops.reparameterize_kl(
        *(on_device(mean.clone()), on_device(log_variance.clone()), *map(on_device, draw), "triton")
    )[1]
    # t is a rounding error of log σ² (at most eps·10), and the KL of one dimension is t²/4
    eps = torch.finfo(torch.float32).eps
    assert bool((kl.abs() <= 33 * eps).all())


def variational_case(batch, rows, columns, dtype, sample=True, noise=False):
    weight = torch.randn(rows, 2 * columns)
    weight[:, columns:] -= 2
    draw = (
        *(torch.tensor([0.1]), torch.rand(columns) + 0.5, torch.tensor(2**50 + 3)),
        torch.randn(batch, columns).to(dtype) if noise else None,
        sample,
    )
    return weight.to(dtype), torch.randint(0, rows, (batch,)), draw


@examples(12)
@given(
    columns=WIDTHS,
    batch=st.integers(0, 20),
    dtype=st.sampled_from(FLOATS),
    sample=st.booleans(),
    noise=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_variational_lookup_is_reparameterize_of_the_rows(
    columns, batch, dtype, sample, noise, index_dtype
):
    weight, index, draw = variational_case(batch, 15, columns, dtype, sample, noise)
    weight, intact = guarded(weight)
    index = index.to(index_dtype).to(DEVICE)
    draw = tuple(map(on_device, draw))
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    z, kl = _ops.variational_gather(weight, index, *draw, count, "triton")
    rows = weight[index.long()].chunk(2, 1)
    expected = _ops.reparameterize_kl(*rows, *draw, "triton")
    assert_same_arithmetic(z, expected[0])
    assert_same_arithmetic(kl, expected[1])
    assert int(count) == 0
    grad_z, grad_kl = torch.randn_like(z), torch.randn(batch, device=DEVICE)
    gradient = _ops.variational_gather_backward(grad_z, grad_kl, weight, index, *draw, "triton")
    expected = _ops.reparameterize_kl_backward(grad_z, grad_kl, *rows, *draw, "triton")
    assert_same_arithmetic(gradient, torch.cat(expected, 1))
    assert intact()


def test_variational_lookup_outside_the_table():
    weight, _, draw = variational_case(3, 5, 6, torch.float32)
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    index = torch.tensor([-1, 4, 5], device=DEVICE)
    draw = tuple(map(on_device, draw))
    z, kl = _ops.variational_gather(weight.to(DEVICE), index, *draw, count, "triton")
    assert int(count) == 2
    assert bool((z[[0, 2]] == 0).all() and (kl[[0, 2]] == 0).all())
    assert bool((z[1] != 0).all())


@examples(20)
@given(
    shape=updates(),
    sample=st.booleans(),
    noise=st.booleans(),
    moment_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_fused_variational_update_within_the_error_budget(shape, sample, noise, moment_dtype):
    columns, rows, batch, update = shape
    torch.manual_seed(batch)
    batch = min(batch, rows) if update["assume_unique"] else batch
    weight, _, draw = variational_case(batch, rows, columns, torch.float32, sample, noise)
    state, plain, intact = tables(
        rows, 2 * columns, torch.float32, moment_dtype, update["step_mode"]
    )
    state[0].copy_(weight)
    plain[0].copy_(weight)
    exact = exact_tables(plain)
    update["history"] = learning_rates(4, update["weight_decay"])
    for step in (1, 2, 4):
        index = torch.randint(0, rows, (batch,))
        if update["assume_unique"]:
            index = torch.randperm(rows)[:batch]
        grads = torch.randn(batch, columns), torch.randn(batch)
        numbers = torch.tensor(step), torch.tensor(float(update["history"][step, 0]))
        _ops.variational_adam_rows_(
            *(*state, index.to(DEVICE), *map(on_device, grads), *map(on_device, draw), *numbers),
            *(*map(on_device, update.values()), "triton"),
        )
        known = as_given(draw, batch, columns)
        reference.variational_adam_rows_(*plain, index, *grads, *known, *numbers, *update.values())
        reference.variational_adam_rows_(
            *(*exact, index, *doubled(grads), *doubled(known), *numbers), *update.values()
        )
    for actual, same, best in zip(state[:3], plain[:3], exact[:3], strict=True):
        assert_within_budget(actual, same, best)
    if plain[3] is not None:
        assert torch.equal(state[3].cpu(), plain[3])
    assert intact()


@pytest.mark.parametrize(("batch", "distinct"), [(31, 1), (64, 1), (70, 2), (2080, 1), (2112, 40)])
@pytest.mark.parametrize(("columns", "noise"), [(4, False), (5, False), (17, True)])
def test_long_runs_of_the_fused_update_are_split_and_deterministic(batch, distinct, columns, noise):
    rows = 50
    weight, _, draw = variational_case(batch, rows, columns, torch.float32, True, noise)
    index = torch.randperm(rows)[:distinct][torch.randint(0, distinct, (batch,))]
    # of one sign, as sums that cancel have a larger relative error
    grads = torch.rand(batch, columns), (0.01 * torch.rand(())).expand(batch)
    state, plain, intact = tables(rows, 2 * columns, torch.float32, torch.float32, "row")
    for table in (state[0], plain[0]):
        table.copy_(weight)
    exact, again = exact_tables(plain), clone(state)
    numbers, update = (torch.tensor(1), torch.tensor(0.1)), options(columns=columns)
    for tensors in (state, again):
        _ops.variational_adam_rows_(
            *(*tensors, index.to(DEVICE), *map(on_device, grads), *map(on_device, draw), *numbers),
            *(*update.values(), "triton"),
        )
    draw = as_given(draw, batch, columns)
    reference.variational_adam_rows_(*plain, index, *grads, *draw, *numbers, *update.values())
    reference.variational_adam_rows_(
        *(*exact, index, *doubled(grads), *doubled(draw), *numbers), *update.values()
    )
    assert all(torch.equal(actual, twin) for actual, twin in zip(state, again, strict=True))
    for actual, same, best in zip(state[:2], plain[:2], exact[:2], strict=True):
        assert_within_budget(actual, same, best)
    # v is the gradient's square, with twice its relative error
    assert_within_budget(state[2].sqrt(), plain[2].sqrt(), exact[2].sqrt())
    assert torch.equal(state[3].cpu(), plain[3])
    assert intact()


@pytest.mark.parametrize("columns", [8, 9, 10, 11, 33])
def test_fused_variational_update_of_a_half_table(columns):
    """The second half's random words start at any column."""
    weight, index, draw = variational_case(9, 12, columns, torch.bfloat16)
    update = options(seed=77, columns=columns, eps=1e-30)
    state = [weight, *(torch.zeros(12, 2 * columns) for _ in range(2))]
    state.append(torch.zeros(12, dtype=torch.int32))
    plain = clone(state)
    state = [on_device(tensor) for tensor in state]
    grads = torch.randn(9, columns).bfloat16(), torch.randn(9)
    numbers = torch.tensor(1), torch.tensor(0.0123)
    _ops.variational_adam_rows_(
        *(*state, index.to(DEVICE), *map(on_device, grads), *map(on_device, draw), *numbers),
        *(*map(on_device, update.values()), "triton"),
    )
    known = as_given(draw, 9, columns)
    reference.variational_adam_rows_(*plain, index, *grads, *known, *numbers, *update.values())
    # both fp32 results are within a few units of 2⁻²⁴ of each other and bf16's unit is 2⁻⁸, so that
    # a common word rounds them apart once in about 2¹⁴ elements, of which there are at most 792
    assert int((state[0].cpu() != plain[0]).sum()) <= 1


def test_fused_update_skips_non_finite_rows_and_found_inf():
    weight, index, draw = variational_case(4, 8, 6, torch.float32)
    index = torch.tensor([0, 2, 4, 2])
    grads = torch.randn(4, 6), torch.tensor([1.0, 1.0, math.nan, 1.0])
    grads[0][0, 5] = math.inf
    state = [weight, torch.zeros(8, 12), torch.zeros(8, 12), torch.zeros(8, dtype=torch.int32)]
    state = [on_device(tensor) for tensor in state]
    for found_inf, moved in ((1.0, []), (0.0, [2])):
        before = clone(state)
        skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
        update = options(columns=6, skipped=skipped, found_inf=torch.tensor(found_inf))
        _ops.variational_adam_rows_(
            *(*state, index.to(DEVICE), *map(on_device, grads), *map(on_device, draw)),
            *(torch.tensor(1), torch.tensor(0.1), *map(on_device, update.values()), "triton"),
        )
        assert int(skipped) == (0 if found_inf else 2)
        changed = [i for i in range(8) if not torch.equal(state[0][i], before[0][i])]
        assert changed == moved
        assert state[3].nonzero().flatten().tolist() == moved


# random numbers

KNOWN_ANSWERS = [
    # Random123's kat_vectors: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit(do_not_specialize=["seed"])
def _philox_kernel(out, counters, seed):
    c0, c1 = tl.load(counters).to(tl.uint32), tl.load(counters + 1).to(tl.uint32)
    c2, c3 = tl.load(counters + 2).to(tl.uint32), tl.load(counters + 3).to(tl.uint32)
    words = numerics.philox(seed, c0, c1, c2, c3)
    for k in tl.static_range(4):
        tl.store(out + k, words[k].to(tl.int64))


@triton.jit(do_not_specialize=["seed"])
def _normal_kernel(
    out,
    seed,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    b = tl.arange(0, ROWS).to(tl.int64) + tl.program_id(0) * ROWS
    values = numerics.row_normals(seed.to(tl.int64), b, 0, COLUMNS, ROWS, BLOCK, HARDWARE)
    column = tl.arange(0, BLOCK)[None, :]
    tl.store(out + b[:, None] * COLUMNS + column, values, mask=column < COLUMNS)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    assert tuple(int(word) for word in reference.philox(seed, counter)) == expected

    words = cpu_philox.philox(np.uint64(seed), *(np.uint64(word) for word in counter))
    assert tuple(int(word) for word in words) == expected
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](out, torch.tensor(counter, device=DEVICE), launch.signed(seed))
    assert tuple(out.tolist()) == expected


native = pytest.mark.skipif(not numerics.IN_HARDWARE, reason="needs an NVIDIA GPU")
hardware_or_not = pytest.mark.parametrize("hardware", [False, pytest.param(True, marks=native)])


@hardware_or_not
@pytest.mark.parametrize("columns", [1, 2, 7, 64, 100])
def test_normals_are_the_reference_normals(columns, hardware):
    seed, rows, programs = 2**61 + 9, 256, 2
    block = max(4, triton.next_power_of_2(columns))
    out = torch.zeros(programs * rows, columns, device=DEVICE)
    _normal_kernel[(programs,)](out, seed, columns, rows, block, hardware)
    expected = reference.normal(seed, programs * rows, columns)
    # 6.7, the largest radius, times the errors of the sine (3.7) and half that of the logarithm
    # and roundings, all in units of 2⁻²⁴; where the radius r is small the uniform's own rounding,
    # 2⁻²⁵/r, dominates, and 512·100 draws have no r below 2⁻¹⁰
    bound, median = 6.7 * 8 * 2.0**-24 + 2.0**-15, 2.0**-22
    if hardware:
        # by the PTX manual the hardware's sine is known to 2^-20.5, and log₂ u near u = 1 to 2⁻²²,
        # so that r² is known to 2^-21.5 and an r of 2⁻¹⁰ to 2^-12.5
        bound, median = 6.7 * 2.0**-20 + 2.0**-12, 2.0**-20
    assert float((out.cpu().double() - expected).abs().max()) <= bound
    assert float((out.cpu().double() - expected).abs().median()) <= median


def assert_standard_normal(values):
    count = values.numel()
    values = values.double().cpu().flatten()
    # five standard deviations of the sample moments; E x⁶ = 15 and E x⁸ = 105
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = abs(float((values**power).mean()) - expected)
        assert error < 5 * math.sqrt(variance / count), (power, error)
    # the Kolmogorov distribution exceeds 1.95 with probability 0.001
    assert stats.kstest(values.numpy(), "norm").statistic * math.sqrt(count) < 1.95


@hardware_or_not
def test_a_million_normals(hardware):
    rows, columns = 64, 16384
    out = torch.zeros(rows, columns, device=DEVICE)
    rows_each = 64 if launch_is_interpreted() else 1
    _normal_kernel[(rows // rows_each,)](out, 20261, columns, rows_each, columns, hardware)
    assert_standard_normal(out)
    assert_standard_normal(reference.normal(20261, rows, columns))


@triton.jit
def _function_kernel(out, x, WHICH: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    if WHICH == 0:
        result = numerics.expm1(value)
    elif WHICH == 1:
        result = numerics.exp(value)
    else:
        result = numerics.log(value)
    tl.store(out + i, result)


@triton.jit
def _fma_kernel(out, x):
    value = tl.load(x)
    tl.store(out, tl.fma(value, value, -value * value))


def fused_multiply_add():
    """Whether tl.fma rounds once, as on every GPU and in the interpreter of newer Tritons."""
    out = torch.zeros(1, device=DEVICE)
    _fma_kernel[(1,)](out, torch.full((1,), 1.0 + 2.0**-20, device=DEVICE))
    return float(out) != 0


@pytest.mark.parametrize(
    ("which", "exact", "low", "high", "units"),
    [
        (0, torch.expm1, -30, 30, 2.1),
        (0, torch.expm1, -0.5, 0.5, 2.1),
        (0, torch.expm1, -86, 88, 2.1),
        (1, torch.exp, -15, 15, 5),
        (1, torch.exp, -86, 88, 5),
        (2, torch.log, 1e-9, 1, 2.2),
        (2, torch.log, 1e-4, 1e4, 2.2),
    ],
)
def test_functions_within_their_stated_error(which, exact, low, high, units):
    if exact is torch.exp and not fused_multiply_add():
        pytest.skip("this Triton's interpreter rounds tl.fma twice")
    x = torch.linspace(low, high, 2**13, dtype=torch.float64).float()
    x = x[x != 0] if which == 0 else x
    x = torch.nn.functional.pad(x, (0, 2**13 - x.numel()), value=0.25)
    out = torch.zeros_like(x, device=DEVICE)
    _function_kernel[(1,)](out, x.to(DEVICE), which, x.numel())
    expected = exact(x.double())
    wanted = expected != 0
    error = ((out.cpu().double() - expected) / expected).abs()[wanted]
    assert float(error.max()) <= units * 2.0**-24


def test_expm1_at_the_edges():
    x = torch.tensor([0.0, 88.7, 89.5, 300.0, -100.0, math.inf, -math.inf, math.nan])
    out = torch.zeros_like(x, device=DEVICE)
    _function_kernel[(1,)](out, x.to(DEVICE), 0, 8)
    expected = torch.expm1(x)
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    torch.testing.assert_close(out.cpu(), expected, rtol=2.0**-22, atol=0, equal_nan=True)


# the boundary to PyTorch


def op_arguments():
    weight, index, draw = variational_case(5, 7, 4, torch.float32)
    update = options(columns=4, history=learning_rates(3, 0.0))
    tensors = [torch.zeros(7, 8), torch.zeros(7, 8), torch.zeros(7, dtype=torch.int32)]
    numbers = (torch.tensor(2), torch.tensor(0.1))
    grads = (torch.randn(5, 4), torch.randn(5))
    gaussian = (torch.randn(5, 4), torch.randn(5, 4))
    narrow = (weight[:, :4].clone(), *(t[:, :4].clone() for t in tensors[:2]), tensors[2])
    rule = (0.9, 0.999, 1e-8, 0.0, "none", 1.0, 4, None)
    return {
        "gather": (weight, index, torch.zeros((), dtype=torch.int64)),
        "adam_rows_": (*narrow, index, grads[0], *numbers, *update.values()),
        "catch_up_": (*narrow, index, numbers[0], update["history"], *rule, False),
        "reparameterize_kl": (*gaussian, *draw),
        "reparameterize_kl_backward": (*grads, *gaussian, *draw),
        "variational_gather": (weight, index, *draw, torch.zeros((), dtype=torch.int64)),
        "variational_gather_backward": (*grads, weight, index, *draw),
        "variational_adam_rows_": (
            *(weight, *tensors, index, *grads, *draw, *numbers),
            *update.values(),
        ),
    }


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("op", list(op_arguments()))
def test_opcheck(op, impl):
    device = DEVICE if impl == "triton" else torch.device("cpu")
    arguments = [
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in op_arguments()[op]
    ]
    torch.library.opcheck(
        getattr(torch.ops.fastlatent, op).default,
        (*arguments, impl),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("dtype", [torch.float64])
def test_what_the_kernels_do_not_take_is_an_error(dtype):
    wide = torch.zeros(4, 6, dtype=dtype, device=DEVICE)
    index = torch.tensor([1], device=DEVICE)
    update = options(columns=6)
    with pytest.raises(TypeError, match="float64"):
        adam_step(
            [wide, wide, wide, None], index, wide[:1], 1, 0.1, {**update, "step_mode": "global"}
        )
    draw = (torch.zeros(1), torch.ones(1), torch.tensor(1), None, True)
    with pytest.raises(TypeError, match="float64"):
        _ops.reparameterize_kl(wide, wide, *map(on_device, draw), "triton")
    with pytest.raises(ValueError, match="contiguous"):
        _ops.gather(wide.t(), index, None, "triton")
    huge = torch.empty(1, 20000, device="meta")
    with pytest.raises(ValueError, match="16384"):
        launch.tile("adam", 20000, huge)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("step_mode", ["row", "global", "dense"])
def test_training_equals_the_reference(in_backward, step_mode):
    """Six whole steps with duplicates and a schedule: the same codes by both implementations."""
    results = []
    for impl, device in (("triton", DEVICE), ("reference", torch.device("cpu"))):
        torch.manual_seed(1)
        table = fl.LatentTable(12, 5).to(device)
        gaussians = fl.VariationalLatentTable(12, 4).to(device)
        optimizers = [
            fl.SparseAdam(
                module.parameters(), lr=0.05, step_mode=step_mode, in_backward=in_backward
            )
            for module in (table, gaussians)
        ]
        torch.manual_seed(2)
        with fl.use_impl(impl):
            for step in range(6):
                index = torch.randint(0, 12, (8,)).to(device)
                z, kl = gaussians(index, generator=torch.Generator().manual_seed(step))
                loss = (torch.cat([table(index), z], 1) - step / 6).square().sum() + kl.sum()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                    for group in optimizer.param_groups:
                        group["lr"] *= 0.9
            for optimizer in optimizers:
                optimizer.flush()
        results.append([table.weight.detach().cpu(), gaussians.weight.detach().cpu()])
    # one step moves a weight by about lr, and its relative error is a few eps; six steps
    for triton_weight, reference_weight in zip(*results, strict=True):
        error = (triton_weight - reference_weight).abs().max()
        assert error <= 6 * 8 * torch.finfo(torch.float32).eps * reference_weight.abs().max()
