"""What the GPU kernels compile to, looked at without a GPU.

``python -m benchmarks.codegen [--json FILE]`` compiles every kernel ahead of time, in the
configurations that the launchers use and for the specialisations that a launch would ask for, and
prints for each: registers, local memory and stack, 128-bit and narrower global accesses,
instructions per element by kind, and from these and the bytes of the design which one bounds it on
an A100, an H100 and an H200. Nothing here is measured on a GPU: the bandwidths and rates that the
prediction uses stand in ``DEVICES``.

The counts are static. Loops count apart: the one over a run of duplicates passes at least once, the
one over missed dense steps not at all for a row that is up to date, and so the prediction takes it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastlatent.kernels import adam, duplicates, gather, reparameterize, variational
from fastlatent.kernels.launch import OPTIONS, Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a GPU does in a second.

    Attributes:
        target: whose code it runs.
        copy: bytes read and written by a device-to-device copy.
        lanes: multiprocessors times clock, Hz.
        rates: results per multiprocessor and clock of each kind of instruction, after the
            throughput table of NVIDIA's CUDA C++ programming guide; ``issue``: of all together.
    """

    target: str
    copy: float
    lanes: float
    rates: dict[str, int]


_AMPERE = {"floating": 64, "integer": 64, "special": 16, "double": 32, "issue": 128}
_HOPPER = {"floating": 128, "integer": 64, "special": 16, "double": 64, "issue": 128}
# the copies of the H100 and H200 were measured; the A100's is 88 % of its data sheet's 2.04 TB/s
DEVICES = {
    "A100": Device("sm_80", 1.8e12, 108 * 1.41e9, _AMPERE),
    "H100": Device("sm_90", 3.0e12, 132 * 1.98e9, _HOPPER),
    "H200": Device("sm_90", 4.3e12, 132 * 1.98e9, _HOPPER),
}

_KINDS = {
    "floating": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2"),
    "special": ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO"),
    "double": ("DADD", "DMUL", "DFMA", "DSETP"),
    "memory": ("LD", "ST", "ATOM", "RED", "SHFL", "CCTL", "MEMBAR"),
    "control": ("BRA", "EXIT", "BAR", "BSSY", "BSYNC", "CALL", "RET", "WARPSYNC", "ERRBAR"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch, the bytes of a row by the design, the passes of its loops, and its rows.

    ``rows``: what a program works on; by default the ROWS of its tile.
    """

    kernel: str
    options: str
    columns: int
    dtype: str
    launch: Launch
    row_bytes: int
    passes: int = 0
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What one case compiles to on one target; the counts are of one thread."""

    kernel: str
    options: str
    columns: int
    dtype: str
    target: str
    registers: int
    local_bytes: int
    stack_bytes: int
    wide_accesses: int
    narrow_accesses: int
    wide_bytes: int
    instructions: dict[str, int]
    loop_instructions: dict[str, int]
    passes: int
    elements: float
    row_bytes: int

    def per_element(self, kind: str) -> float:
        inside = self.passes * self.loop_instructions.get(kind, 0)
        return (self.instructions.get(kind, 0) + inside) / self.elements

    def seconds(self, device: Device) -> tuple[float, float]:
        """Time of one element under the memory's and under the arithmetic's bound alone."""
        memory = self.row_bytes / self.columns / device.copy
        cycles = max(self.per_element(kind) / rate for kind, rate in device.rates.items())
        return memory, cycles / device.lanes

    def arithmetic_share(self, device: Device) -> float:
        """The arithmetic's time over the memory's: above one, the kernel is arithmetic-bound."""
        memory, arithmetic = self.seconds(device)
        return arithmetic / memory

    def bound(self, device: Device) -> str:
        return "memory" if self.arithmetic_share(device) <= 1 else "arithmetic"


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """The kernel as this launch would compile it, on a machine without that device."""
    backend = make_backend(target)
    kernel, arguments = launch.kernel, dict(launch.arguments)
    if "HARDWARE" in arguments:
        arguments["HARDWARE"] = target.backend == "cuda"
    options = {"num_warps": launch.warps, "debug": False, **OPTIONS}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(**arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, given
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _kind(opcode: str) -> str:
    base = opcode.split(".")[0]
    if opcode.startswith(("F2F.", "I2F.F64", "F2I.F64")):
        return "special"
    for kind, names in _KINDS.items():
        prefix = kind in ("memory", "special")
        if base in names or (prefix and base.startswith(names) and base != "I2FP"):
            return kind
    return "uniform" if base.startswith("U") or base in ("R2UR", "S2UR") else "integer"


def _opcodes(sass: str) -> list[tuple[str, bool]]:
    """Every instruction's opcode, and whether a backward branch leads over it."""
    codes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"(\w+):$", line.strip()):
            labels[label[1]] = len(codes)
        elif code := re.match(r"\S+\t(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)", line):
            target = re.search(r"(\w+);?$", code[2].strip())
            if code[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(codes)))
            codes.append(code[1])
    # the padding behind a kernel's end branches to itself
    loops = [(first, last) for first, last in loops if last > first]
    return [(code, any(a <= i <= b for a, b in loops)) for i, code in enumerate(codes)]


def inspect(case: Case, target: str) -> Report:
    """Compiles ``case`` for an NVIDIA target and reads its machine code."""
    compiled = compile_launch(case.launch, TARGETS[target])
    usage = _resources(compiled.asm["cubin"])
    opcodes = [(code, loop) for code, loop in _opcodes(compiled.asm["sass"]) if code != "NOP"]
    counts = [
        collections.Counter(_kind(code) for code, loop in opcodes if loop == inside)
        for inside in (False, True)
    ]
    accesses = [code for code, _ in opcodes if code.startswith(("LDG", "STG"))]
    wide = sum(".128" in code for code in accesses)
    threads = 32 * case.launch.warps
    rows = case.rows or case.launch.arguments["ROWS"]
    return Report(
        *(case.kernel, case.options, case.columns, case.dtype, target),
        *(usage["REG"], usage["LOCAL"], usage["STACK"], wide, len(accesses) - wide),
        16 * wide * threads,
        *({**count, "issue": sum(count.values())} for count in counts),
        *(case.passes, rows * case.columns / threads, case.row_bytes),
    )


_ROWS, _BATCH = 10**6, 4096
_INT64 = torch.int64


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _number(value: float, on_device: bool) -> Tensor:
    dtype = _INT64 if isinstance(value, int) else torch.float32
    return _meta(dtype=dtype) if on_device else torch.tensor(value, dtype=dtype)


def _runs() -> duplicates.Runs:
    return duplicates.Runs(
        _meta(_BATCH, dtype=torch.int32),
        _meta(_BATCH, dtype=_INT64),
        _meta(_BATCH + 1, dtype=torch.int32),
        _meta(dtype=torch.int32),
    )


# what each kernel's launcher can be asked for, the default first: name, then the choices
_UPDATES: dict[str, dict[str, Any]] = {
    "row": {},
    "global": {"step_mode": "global"},
    "dense": {"step_mode": "dense"},
    "ball": {"projection": "ball"},
    "sphere": {"projection": "sphere"},
    "amp": {"amp": True},
    "on device": {"step_mode": "global", "on_device": True},
    "bf16 moments": {"moments": torch.bfloat16},
    "stochastic": {"seed": 1},
    "duplicates": {"runs": True},
}
_DRAWS: dict[str, dict[str, Any]] = {
    "scalar prior": {},
    "prior [D]": {"per_dimension": True},
    "given noise": {"given": True},
    "mean only": {"sample": False},
}


def _rule(columns: int, choice: dict[str, Any]) -> tuple[Any, ...]:
    on_device, amp = choice.get("on_device", False), choice.get("amp", False)
    mode = choice.get("step_mode", "row")
    return (
        *(_number(3, on_device), _number(0.1, on_device)),
        _meta(100, 2, dtype=torch.float64) if mode == "dense" else None,
        *((_meta(), _meta(), _meta(dtype=_INT64)) if amp else (None, None, None)),
        *(0.9, 0.999, 1e-8, 0.1, False, mode, choice.get("projection", "none"), 1.0, columns),
        choice.get("seed"),
    )


def _tables(columns: int, dtype: torch.dtype, choice: dict[str, Any]) -> tuple[Any, ...]:
    moments = choice.get("moments", torch.float32)
    counted = choice.get("step_mode", "row") != "global"
    return (
        _meta(_ROWS, columns, dtype=dtype),
        *(_meta(_ROWS, columns, dtype=moments) for _ in range(2)),
        _meta(_ROWS, dtype=torch.int32) if counted else None,
    )


def _draw(columns: int, dtype: torch.dtype, choice: dict[str, Any]) -> tuple[Any, ...]:
    size = columns if choice.get("per_dimension") else 1
    noise = _meta(_BATCH, columns, dtype=dtype) if choice.get("given") else None
    return _meta(size), _meta(size), torch.tensor(2**40), noise, choice.get("sample", True)


def cases(columns: int, dtype: torch.dtype, every_option: bool) -> Iterator[Case]:
    """The launches of every kernel for tables of ``columns`` columns, or D for variational ones."""
    size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
    index = _meta(_BATCH, dtype=_INT64)
    gradient = _meta(_BATCH, columns, dtype=dtype)
    grad_kl = _meta(_BATCH)
    counter = _meta(dtype=_INT64)
    table = _meta(_ROWS, columns, dtype=dtype)
    pair = _meta(_ROWS, 2 * columns, dtype=dtype)
    gradients = _meta(_BATCH, 2 * columns, dtype=dtype)

    def case(kernel: str, options: str, launch: Launch, row_bytes: int, *more: int) -> Case:
        return Case(kernel, options, columns, name, launch, row_bytes, *more)

    launch = gather.plan(gradient, table, index, counter)
    yield case("gather", "", launch, 2 * columns * size)
    for options, choice in _UPDATES.items():
        if options == "stochastic" and dtype == torch.float32:
            continue
        moment = choice.get("moments", torch.float32).itemsize
        runs = _runs() if choice.get("runs") else None
        chunks = None if runs is None else _meta(_BATCH, columns)
        passes = int(runs is not None)
        tables, rule = _tables(columns, dtype, choice), _rule(columns, choice)
        launch = adam.plan(*tables, index, gradient, runs, chunks, *rule)
        yield case("adam", options, launch, columns * (3 * size + 4 * moment), passes)
        tables = _tables(2 * columns, dtype, choice)
        draw = _draw(columns, dtype, {})
        sums = None if runs is None else _meta(_BATCH, 2 * columns + 4)
        launch = variational.plan(*tables, index, gradient, grad_kl, runs, sums, *draw, *rule)
        yield case("update", options, launch, columns * (5 * size + 8 * moment), passes)
        if runs is not None:
            launch = variational.plan_level_one(runs, sums, gradient, grad_kl, *draw)
            fan_in = duplicates.FAN_IN
            parts = fan_in // launch.arguments["ROWS"]
            yield case("chunks", "of the update", launch, columns * size, parts, fan_in)
            for level, launch in enumerate(duplicates.plan_chunks(runs, gradient, chunks)):
                options = f"level {level + 1}"
                yield case("chunks", options, launch, columns * size, 0, fan_in)
        if options == "dense":
            for kind, runs in (("unique", None), ("duplicates", _runs())):
                launch = adam.plan_catch_up(
                    *(*_tables(columns, dtype, choice), index, runs, rule[0], rule[2]),
                    *(*rule[6:10], *rule[12:]),
                )
                yield case("catch up", kind, launch, columns * (2 * size + 4 * moment))
        if not every_option:
            break
    for options, choice in _DRAWS.items():
        draw = _draw(columns, dtype, choice)
        noise = columns * size if choice.get("given") else 0
        for kind, rows, where in (
            ("", (gradient, gradient), None),
            ("table, ", (pair, None), index),
        ):
            launch = reparameterize.plan_forward(
                gradient, grad_kl, *rows, where, None if where is None else counter, *draw
            )
            yield case("forward", kind + options, launch, 3 * columns * size + noise)
            launch = reparameterize.plan_backward(
                gradients, None, gradient, grad_kl, *rows, where, *draw
            )
            yield case("backward", kind + options, launch, 5 * columns * size + noise)
        launch = variational.plan(
            *_tables(2 * columns, dtype, {}),
            *(index, gradient, grad_kl, None, None, *draw, *_rule(columns, {})),
        )
        if choice:
            yield case("update", options, launch, columns * (5 * size + 8 * 4) + noise)
        if not every_option:
            break


# the widths and dtypes that the command looks at; every option is compiled at one of them
_WIDTHS, _DTYPES, _EVERY = (32, 33, 64, 100, 128, 256, 1024), ("float32", "bfloat16"), 64


def _look(unit: tuple[str, int]) -> list[dict[str, Any]]:
    """All kernels at one dtype and width, on all targets."""
    dtype, columns = unit
    rows = []
    for case in cases(columns, getattr(torch, dtype), every_option=columns == _EVERY):
        for target in TARGETS:
            if target.startswith("gfx"):
                compile_launch(case.launch, TARGETS[target])
            else:
                rows.append(as_row(inspect(case, target)))
    return rows


def as_row(report: Report) -> dict[str, Any]:
    """A report as plain data, with the prediction for the devices of its target."""
    return {
        **dataclasses.asdict(report),
        "per_element": {
            kind: report.per_element(kind)
            for kind in ("floating", "integer", "special", "double", "memory", "issue")
        },
        "bound": {
            name: {"by": report.bound(device), "share": report.arithmetic_share(device)}
            for name, device in DEVICES.items()
            if device.target == report.target
        },
    }


_HEADER = (
    f"{'kernel':9} {'options':20} {'D':>5} {'dtype':9} {'target':7} {'regs':>4} {'local':>5} "
    f"{'stack':>5} {'128b':>4} {'less':>4} {'float':>6} {'int':>6} {'special':>7} {'all':>6}  bound"
)


def _line(row: dict[str, Any]) -> str:
    each = row["per_element"]
    bounds = ", ".join(
        f"{name}: {bound['by']} ({bound['share']:.2f})" for name, bound in row["bound"].items()
    )
    return (
        f"{row['kernel']:9} {row['options']:20} {row['columns']:5} {row['dtype']:9} "
        f"{row['target']:7} {row['registers']:4} {row['local_bytes']:5} {row['stack_bytes']:5} "
        f"{row['wide_accesses']:4} {row['narrow_accesses']:4} {each['floating']:6.1f} "
        f"{each['integer']:6.1f} {each['special']:7.1f} {each['issue']:6.1f}  {bounds}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    print("Instructions are per element; a bound's share is arithmetic time over memory time.")
    print("Not measured on a GPU: compiled ahead of time, bounds predicted.\n")
    print(_HEADER)
    rows = []
    units = [(dtype, columns) for dtype in _DTYPES for columns in _WIDTHS]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(_look, units):
            rows += found
            print("\n".join(map(_line, found)), flush=True)
    print(f"\nEvery case compiled for {', '.join(TARGETS)}.")
    if options.json:
        document = {
            "measured": False,
            "triton": triton.__version__,
            "devices": {name: dataclasses.asdict(device) for name, device in DEVICES.items()},
            "rows": rows,
        }
        partial = options.json.with_name(options.json.name + ".part")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(options.json)


if __name__ == "__main__":
    main()
