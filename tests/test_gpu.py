"""What only a GPU can show: CUDA graphs, streams, synchronisation, launches, large tables.

The tests with a device skip without one. The last ones need none: they run a step on fake CUDA
tensors and look at what it asks of the device.
"""

import functools

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastlatent as fl

TABLES = (fl.LatentTable, fl.VariationalLatentTable)
N, D, B = 1000, 24, 96
EPS = torch.finfo(torch.float32).eps

absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def native(test):
    return pytest.mark.gpu(absent(test))


def cases(**axes):
    """Parametrises a test over the product of ``axes``."""

    def apply(test):
        for name, values in axes.items():
            test = pytest.mark.parametrize(name, values)(test)
        return test

    return apply


class Training:
    """A table and one scale for each dimension, fitted to data; all on the GPU.

    The batch lies in buffers that a captured graph reads. Everything is elementwise or summed in a
    fixed order, so that equal steps give equal bits.
    """

    def __init__(self, kind, *, noise=True, lr=0.05, on_device=True, network=True, **options):
        torch.manual_seed(0)
        self.table = kind(N, D, device="cuda")
        self.lr = torch.tensor(lr, device="cuda") if on_device else lr
        self.codes = fl.SparseAdam(
            self.table.parameters(), lr=self.lr, capturable=on_device, seed=0, **options
        )
        self.scale = torch.linspace(0.5, 1.5, D, device="cuda")
        self.network = None
        if network:
            self.scale = nn.Parameter(self.scale)
            self.network = torch.optim.Adam([self.scale], lr=0.01, capturable=True)
        self.index = torch.zeros(B, dtype=torch.int64, device="cuda")
        self.x = torch.zeros(B, D, device="cuda")
        self.noise = torch.zeros(B, D, device="cuda") if noise else None

    def load(self, batch):
        index, x, noise = batch
        self.index.copy_(index)
        self.x.copy_(x)
        if self.noise is not None:
            self.noise.copy_(noise)

    def loss(self):
        if isinstance(self.table, fl.VariationalLatentTable):
            z, kl = self.table(self.index, self.noise)
        else:
            z = self.table(self.index)
            kl = z.new_zeros(B)
        return (z * self.scale - self.x).square().sum() + kl.sum()

    def forget(self):
        for optimizer in (self.codes, self.network):
            if optimizer is not None:
                optimizer.zero_grad()

    def step(self):
        self.forget()
        loss = self.loss()
        loss.backward()
        for optimizer in (self.codes, self.network):
            if optimizer is not None:
                optimizer.step()
        return loss.detach()

    def tensors(self):
        state = self.codes.state[self.table.weight]
        kept = [value for value in state.values() if isinstance(value, torch.Tensor)]
        return [value.detach().clone() for value in (self.table.weight, self.scale, *kept)]


def batches(count, unique):
    generator = torch.Generator("cuda").manual_seed(1)
    random = functools.partial(torch.randn, B, D, device="cuda", generator=generator)
    for _ in range(count):
        if unique:
            index = torch.randperm(N, device="cuda", generator=generator)[:B]
        else:
            index = torch.randint(N // 20, (B,), device="cuda", generator=generator)
        yield index, random(), random()


def on_side_stream(run, times):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)


# CUDA graphs


@native
@cases(kind=TABLES, in_backward=[False, True], step_mode=["row", "global"], unique=[False, True])
def test_replayed_steps_equal_eager_ones(kind, in_backward, step_mode, unique):
    """The whole training step, with the index, the data and the learning rate changing."""
    options = {"in_backward": in_backward, "step_mode": step_mode, "assume_unique": unique}
    data = list(batches(6, unique))
    results = []
    for captured in (False, True):
        training = Training(kind, **options)
        training.load(data[0])
        on_side_stream(training.step, 3)
        if captured:
            training.forget()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = training.step()
        losses = []
        for number, batch in enumerate(data):
            training.load(batch)
            training.lr.fill_(0.05 * 0.7**number)
            if captured:
                graph.replay()
                losses.append(output.clone())
            else:
                losses.append(training.step())
        results.append([*losses, *training.tensors()])
    assert results[0][0] != results[0][5]
    assert all(torch.equal(eager, replayed) for eager, replayed in zip(*results, strict=True))


@native
def test_every_replay_draws_its_own_noise():
    table = fl.VariationalLatentTable(N, D, device="cuda")
    index = torch.arange(B, device="cuda")
    on_side_stream(lambda: table(index), 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        z, _ = table(index)
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(z.clone())
    assert not torch.equal(*drawn)


# synchronisation and streams


class NoSynchronisation:
    """Whatever waits for the device raises, in every thread."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


# step mode, and whether the learning rate and the step count are on the device
MODES = [("row", True), ("row", False), ("global", True), ("global", False), ("dense", False)]


@native
@pytest.mark.parametrize(("step_mode", "on_device"), MODES)
@cases(kind=TABLES, in_backward=[False, True], unique=[False, True])
def test_a_step_does_not_wait_for_the_device(kind, in_backward, step_mode, on_device, unique):
    training = Training(
        kind,
        noise=False,
        on_device=on_device,
        step_mode=step_mode,
        in_backward=in_backward,
        assume_unique=unique,
        skip_nonfinite=True,
    )
    data = list(batches(5, unique))
    for batch in data[:2]:
        training.load(batch)
        training.step()
    with NoSynchronisation():
        for batch in data[2:]:
            training.load(batch)
            training.step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            training.index.cpu()


@native
@pytest.mark.parametrize("step_mode", ["row", "global"])
def test_grad_scaler(step_mode):
    """Steps with a GradScaler: nothing waits, a scale of 2ᵏ changes no bit, inf takes no step."""
    options = {"step_mode": step_mode, "network": False, "on_device": False}
    plain, scaled = Training(fl.LatentTable, **options), Training(fl.LatentTable, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)

    def scaled_step(factor=1.0):
        scaled.forget()
        scaler.scale(scaled.loss() * factor).backward()
        scaler.step(scaled.codes)

    data = list(batches(6, unique=False))
    for number, batch in enumerate(data):
        plain.load(batch)
        scaled.load(batch)
        plain.step()
        if number < 2:
            scaled_step()
        else:
            with NoSynchronisation():
                scaled_step()
        scaler.update()
    before = scaled.tensors()
    expected = plain.tensors()
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(before, expected, strict=True))
    scaled_step(torch.tensor(torch.inf, device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.tensors(), strict=True))


@native
@cases(kind=TABLES, in_backward=[False, True], everything=[False, True])
def test_streams_are_respected(kind, in_backward, everything):
    """A lookup on a stream that lags behind: the update, wherever it runs, comes after it."""
    options = {"step_mode": "row", "network": False, "in_backward": in_backward}
    (batch,) = batches(1, unique=False)
    results = []
    for aside in (False, True):
        training = Training(kind, **options)
        training.load(batch)
        training.step()
        training.forget()
        torch.cuda.synchronize()
        side = torch.cuda.Stream() if aside else torch.cuda.current_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            loss = training.loss()
            if everything:
                loss.backward()
                training.codes.step()
        if everything:
            torch.cuda.current_stream().wait_stream(side)
        else:
            loss.backward()
            training.codes.step()
        results.append(training.tensors())
        torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# right answers


def within_budget(run):
    """``run(device, dtype)`` on the GPU against the CPU's reference, in fp32 and in float64."""
    ours = run("cuda", torch.float32)
    with fl.use_impl("reference"):
        same, exact = run("cpu", torch.float32), run("cpu", torch.float64)
    for a, b, truth in zip(ours, same, exact, strict=True):
        truth = truth.double()
        budget = 2 * ((b.double() - truth).abs().max() + EPS * truth.abs().max())
        assert (a.cpu().double() - truth).abs().max() <= budget


@native
@cases(kind=TABLES, in_backward=[False, True], step_mode=["row", "global", "dense"])
@pytest.mark.parametrize("number", [1, 2])
def test_two_tables_and_two_lookups(kind, in_backward, step_mode, number):
    """Two tables in one optimizer, each looked up ``number`` times in a step, rows in common."""

    def run(device, dtype):
        torch.manual_seed(0)
        tables = [kind(N, D) for _ in "ab"]
        tables = [table.to(device=device, dtype=dtype) for table in tables]
        weights = [weight for table in tables for weight in table.parameters()]
        # a large eps keeps an update from blowing up the rounding of a small gradient
        optimizer = fl.SparseAdam(
            weights, lr=0.05, eps=0.1, step_mode=step_mode, in_backward=in_backward
        )
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.zeros((), device=device, dtype=dtype)
            for table in tables:
                for _ in range(number):
                    index = torch.randint(40, (B,)).to(device)
                    target, noise = (torch.randn(B, D).to(device, dtype) for _ in "xy")
                    if kind is fl.LatentTable:
                        loss = loss + (table(index) - target).square().sum()
                    else:
                        z, kl = table(index, noise)
                        loss = loss + (z - target).square().sum() + kl.sum()
            loss.backward()
            optimizer.step()
        for table in tables:
            table.flush()
        return [table.weight.detach() for table in tables]

    within_budget(run)


@native
@cases(kind=TABLES, in_backward=[False, True], unique=[False, True])
def test_rows_outside_the_table(kind, in_backward, unique):
    """They are counted and give zeros; nothing is written for them, and the next check raises."""
    guard = 77.0
    index = torch.tensor([3, N, 5, -1, 7, 2**40], device="cuda")
    inside = torch.tensor([0, 2, 4], device="cuda")
    results = []
    for chosen in (index, index[inside]):
        torch.manual_seed(0)
        table = kind(N, D, device="cuda")
        buffer = torch.full((N + 2, table.weight.shape[1]), guard, device="cuda")
        buffer[1:-1] = table.weight.detach()
        table.weight = nn.Parameter(buffer[1:-1])
        optimizer = fl.SparseAdam(
            table.parameters(),
            lr=0.1,
            step_mode="row",
            in_backward=in_backward,
            assume_unique=unique,
        )
        noise = torch.ones(6, D, device="cuda")[: len(chosen)]
        output = table(chosen, noise) if kind is not fl.LatentTable else table(chosen)
        outputs = output if isinstance(output, tuple) else (output,)
        torch.autograd.backward(outputs, [torch.ones_like(part) for part in outputs])
        optimizer.step()
        state = optimizer.state[table.weight]
        results.append([table.weight.detach(), *(state[k] for k in ("exp_avg", "row_step"))])
        assert bool((buffer[[0, -1]] == guard).all())
        if chosen is index:
            outside = [part[[1, 3, 5]] for part in outputs]
            assert not any(bool(part.any()) for part in outside)
            for ask in (table.check, table.state_dict):
                with pytest.raises(IndexError, match="3 indices were out of range"):
                    ask()
        else:
            table.check()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@native
@pytest.mark.filterwarnings("ignore")
@cases(kind=TABLES, in_backward=[False, True], step_mode=["row", "global"])
def test_compiled_by_inductor_equals_eager(kind, in_backward, step_mode):
    eps, lr, steps = 0.1, 0.05, 4
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        table = kind(N, D, device="cuda")
        rate = torch.tensor(lr)
        optimizer = fl.SparseAdam(
            table.parameters(), lr=rate, eps=eps, step_mode=step_mode, in_backward=in_backward
        )

        def loss(index, x, table=table):
            z = table(index)
            z, kl = z if isinstance(z, tuple) else (z, z.new_zeros(()))
            return (z - x).square().sum() + kl.sum()

        graphs = torch._dynamo.testing.CompileCounterWithBackend("inductor")
        step = torch.compile(loss, fullgraph=True, backend=graphs) if compiled else loss
        for number, (index, x, _) in enumerate(batches(steps, unique=False)):
            optimizer.zero_grad()
            torch.manual_seed(number)
            # so that a compiled step draws its seed as an eager one does
            with torch._inductor.config.patch(fallback_random=True):
                step(index, x).backward()
            optimizer.step()
            rate.mul_(0.7)
        table.check()
        results.append(table.weight.detach())
        assert graphs.frame_count == compiled
    # a gradient, a sum of about ten terms below 20, may differ by 16 roundings of it; a step passes
    # on lr/eps of that
    tolerance = steps * lr / eps * 16 * EPS * 20 * 10
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=tolerance)
    assert (results[0] - kind_start(kind)).abs().max() > 100 * tolerance


def kind_start(kind):
    torch.manual_seed(0)
    return kind(N, D, device="cuda").weight.detach()


@native
@cases(kind=TABLES, in_backward=[False, True])
def test_tables_of_more_than_2_to_the_31_elements(kind, in_backward):
    width = 64
    rows = 2**31 // width + 3
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    chosen = torch.tensor([rows - 1, 0, rows - 2, 2**31 // width], device="cuda")
    results = []
    for count, index in ((4, torch.arange(4, device="cuda")), (rows, chosen)):
        dim = width if kind is fl.LatentTable else width // 2
        table = kind(count, dim, device="cuda", dtype=torch.bfloat16)
        generator = torch.Generator("cuda").manual_seed(0)
        values = torch.randn(4, width, device="cuda", generator=generator).bfloat16()
        table.weight.data[index] = values
        optimizer = fl.SparseAdam(
            table.parameters(),
            lr=0.1,
            step_mode="row",
            in_backward=in_backward,
            moment_dtype=torch.bfloat16,
        )
        noise = torch.ones(4, dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(2):
            optimizer.zero_grad()
            output = table(index) if kind is fl.LatentTable else table(index, noise)
            outputs = output if isinstance(output, tuple) else (output,)
            torch.autograd.backward(outputs, [torch.ones_like(part) for part in outputs])
            optimizer.step()
        state = optimizer.state[table.weight]
        kept = [value[index] for value in (table.weight.detach(), *state.values())]
        results.append([*kept, *(part.detach() for part in outputs)])
        del table, optimizer, state, output, outputs
    assert not torch.equal(results[0][0], values)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@native
def test_lookups_of_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    table = fl.LatentTable(50, 64, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(50, (2**31 // 64 + 5,), device="cuda")
    with torch.no_grad():
        out = table(index)
    for part in (slice(0, 1000), slice(-1000, None)):
        assert torch.equal(out[part], table.weight[index[part]])


# kernels launched


@native
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("step_mode", ["row", "global"])
def test_a_fused_step_launches_two_kernels(kind, step_mode):
    batch = 4096
    table = kind(20_000, 64, device="cuda")
    optimizer = fl.SparseAdam(
        table.parameters(), lr=0.01, step_mode=step_mode, in_backward=True, assume_unique=True
    )
    index = torch.randperm(20_000, device="cuda")[:batch]
    gradients = (torch.randn(batch, 64, device="cuda"), torch.rand(batch, device="cuda"))

    def step():
        output = table(index)
        outputs = output if isinstance(output, tuple) else (output,)
        torch.autograd.backward(outputs, gradients[: len(outputs)])
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as recorded:
        step()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    assert 1 <= len(names) <= 2, names


# without a GPU: a step on fake CUDA tensors

# ops that make or read a tensor's description and launch nothing
NO_KERNEL = {
    "prim.device.default",
    "aten.detach.default",
    "aten.lift_fresh.default",
    "aten.sparse_dim.default",
    "aten._indices.default",
    "aten._values.default",
    "aten._sparse_coo_tensor_with_dims_and_tensors.default",
}


class Requests(TorchDispatchMode):
    """Notes the ops that put work on the device, and those that copy between it and the host."""

    def __init__(self):
        super().__init__()
        self.launched, self.copied = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = (self.devices(tree) for tree in ((args, kwargs), result))
        if {"cuda", "cpu"} <= given | made and function.namespace == "aten":
            self.copied.append(str(function))
        if "cuda" in given | made and str(function) not in NO_KERNEL and not function.is_view:
            self.launched.append(str(function).removesuffix(".default"))
        return result

    @staticmethod
    def devices(tree):
        leaves = torch.utils._pytree.tree_leaves(tree)
        return {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}


def requests_of_a_step(kind, **options):
    """What the third step asks for. Reading a fake tensor's value raises."""
    with FakeTensorMode():
        table = kind(N, D, device="cuda")
        optimizer = fl.SparseAdam(
            table.parameters(), lr=torch.full((), 0.1, device="cuda"), seed=0, **options
        )
        index = torch.arange(B, device="cuda")
        gradients = (torch.empty(B, D, device="cuda"), torch.empty(B, device="cuda"))
        for _ in range(3):
            requests = Requests()
            with requests:
                output = table(index)
                outputs = output if isinstance(output, tuple) else (output,)
                node = outputs[0].grad_fn
                while hasattr(node, "_saved_self_sym_sizes"):  # the view to the index's shape
                    node = node.next_functions[0][0]
                # autograd's engine would want a device
                with torch.no_grad():
                    gradient = node.apply(*gradients[: len(outputs)])[0]
                if gradient is not None:
                    table.weight.grad = gradient
                optimizer.step()
                optimizer.zero_grad()
    return requests


LOOKUP = {
    fl.LatentTable: "fastlatent.gather",
    fl.VariationalLatentTable: "fastlatent.variational_gather",
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("step_mode", ["row", "global"])
def test_a_fused_step_asks_for_two_kernels(kind, step_mode):
    update = {
        fl.LatentTable: "fastlatent.adam_rows_",
        fl.VariationalLatentTable: "fastlatent.variational_adam_rows_",
    }
    requests = requests_of_a_step(kind, step_mode=step_mode, in_backward=True, assume_unique=True)
    assert requests.launched == [LOOKUP[kind], update[kind]]
    assert not requests.copied


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("step_mode", ["row", "global"])
def test_a_step_with_a_gradient_asks_for_no_more(kind, capturable, step_mode):
    requests = requests_of_a_step(kind, step_mode=step_mode, capturable=capturable)
    backward = ["fastlatent.variational_gather_backward"]
    counted = ["aten.add_.Tensor"] if capturable and step_mode == "global" else []
    expected = [LOOKUP[kind], *backward[: kind is not fl.LatentTable], *counted]
    assert requests.launched == [*expected, "fastlatent.adam_rows_"]
    assert not requests.copied
