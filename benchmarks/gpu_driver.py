"""Every kernel once, at odd sizes: the program that ``compute-sanitizer`` watches.

``python -m benchmarks.gpu_driver`` needs a GPU, or TRITON_INTERPRET=1 for a rehearsal without one.
Odd column counts leave masked lanes in every tile, an index outside the table and a row that stands
in the batch very often are in it, and the batch is long enough for sums in two levels of chunks.
"""

from __future__ import annotations

import importlib
import os
import pkgutil

import torch

import fastlatent as fl

STEPS = 2


def _all_kernels() -> set[str]:
    from fastlatent import kernels

    names = [module.name for module in pkgutil.iter_modules(kernels.__path__) if not module.ispkg]
    modules = [importlib.import_module(f"fastlatent.kernels.{name}") for name in names]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def _indices(rows: int, batch: int, device: str) -> torch.Tensor:
    index = torch.randint(rows, (batch,), device=device)
    index[: batch // 2] = 3
    index[-1], index[-2] = rows, -1
    return index


def _train(table: fl.LatentTable, index: torch.Tensor, **options: object) -> None:
    optimizer = fl.SparseAdam(table.parameters(), lr=0.01, **options)  # type: ignore[arg-type]
    for _ in range(STEPS):
        output = table(index)
        outputs = output if isinstance(output, tuple) else (output,)
        torch.autograd.backward(outputs, [torch.randn_like(part) for part in outputs])
        optimizer.step()
        optimizer.zero_grad()
    table.flush()
    for name, value in (("weight", table.weight), *optimizer.state[table.weight].items()):
        if isinstance(value, torch.Tensor) and not bool(value.isfinite().all()):
            raise SystemExit(f"{type(table).__name__}, {options}: {name} is not finite")


def main() -> None:
    torch.manual_seed(0)
    native = torch.cuda.is_available()
    device = "cuda" if native else "cpu"
    if not native and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("benchmarks.gpu_driver needs a CUDA device, or TRITON_INTERPRET=1")
    from fastlatent.kernels.launch import Launch

    run, launched = Launch.run, set()

    def recorded(launch: Launch) -> None:
        launched.add(launch.kernel.__name__)
        run(launch)

    Launch.run = recorded  # type: ignore[method-assign]
    batch = 2051 if native else 67
    rows = 211
    with fl.use_impl("triton"):
        index = _indices(rows, batch, device)
        unique = torch.randperm(rows, device=device)[:101]
        plain = fl.LatentTable(rows, 33, device=device)
        small = fl.LatentTable(rows, 7, device=device)
        half = fl.LatentTable(rows, 100, device=device, dtype=torch.bfloat16)
        gaussian = fl.VariationalLatentTable(rows, 33, device=device)
        _train(plain, unique, step_mode="row", assume_unique=True)
        _train(plain, index)
        _train(small, index[: batch // 2 + 5], step_mode="dense", weight_decay=0.1)
        _train(
            half,
            unique.int(),
            step_mode="row",
            assume_unique=True,
            stochastic_rounding=True,
            projection="ball",
            skip_nonfinite=True,
        )
        _train(gaussian, unique, step_mode="row", assume_unique=True, in_backward=True)
        _train(gaussian, index, step_mode="row", in_backward=True)
        _train(gaussian, index, step_mode="row")
        mean, log_variance = (torch.randn(45, 7, device=device).requires_grad_() for _ in "12")
        z, kl = fl.reparameterize_kl(mean, log_variance, torch.zeros(7), 0.5)
        (z.square().sum() + kl.sum()).backward()
        outside = sum(
            int(table.out_of_range)
            for table in (plain, small, half, gaussian)
            if table.out_of_range is not None
        )
        if native:
            torch.cuda.synchronize()
    if missing := _all_kernels() - launched:
        raise SystemExit(f"these kernels did not run: {', '.join(sorted(missing))}")
    print(
        f"{', '.join(sorted(launched))} ran on {device}; {outside} indices were outside their table"
    )


if __name__ == "__main__":
    main()
