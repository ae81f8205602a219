"""What the kernels compile to, ahead of time: no spills, wide accesses, and bound by memory.

The compiler and Triton's interpreter exclude each other in one process, so that everything is
compiled once in another one, which hands its table over as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, sys, torch
from benchmarks import codegen

rows = []
def look(columns, dtype, targets, every_option=False, only=None):
    for case in codegen.cases(columns, dtype, every_option):
        if only and case.options not in only:
            continue
        for target in targets:
            if target.startswith("gfx"):
                binary = codegen.compile_launch(case.launch, codegen.TARGETS[target]).asm["hsaco"]
                rows.append({"target": target, "kernel": case.kernel, "bytes": len(binary)})
                continue
            row = codegen.as_row(codegen.inspect(case, target))
            arguments = case.launch.arguments
            # what a program's threads load, idle ones and those past a row's end included
            row["padding"] = 1.0
            if "LANES" not in arguments:
                width = arguments.get("PARTS", 1) * arguments["BLOCK"]
                row["padding"] = width / arguments["COLUMNS"]
            row["tile_rows"] = arguments["ROWS"]
            rows.append(row)

look(32, torch.float32, ["sm_90"], every_option=True)
look(64, torch.float32, ["sm_80", "sm_100", "gfx942"])
look(256, torch.float32, ["sm_90"])
for columns in (33, 48, 100, 160, 200, 300):
    look(columns, torch.float32, ["sm_90"], only=["table, scalar prior"])
runs = ["", "row", "duplicates", "level 1", "of the update"]
for columns in (33, 36, 100):
    look(columns, torch.float32, ["sm_90"], every_option=True, only=runs)
# where an earlier tile spilled
look(32, torch.bfloat16, ["sm_80"], every_option=True, only=["prior [D]"])
some = ["row", "stochastic", "bf16 moments", "on device", "table, scalar prior"]
look(64, torch.bfloat16, ["sm_90"], every_option=True, only=some)
json.dump(rows, sys.stdout)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def nvidia(rows, **wanted):
    chosen = [
        row
        for row in rows
        if row["target"].startswith("sm_")
        and all(row[name] == value for name, value in wanted.items())
    ]
    assert chosen
    return chosen


def name(row):
    return f"{row['kernel']} ({row['options']}) D={row['columns']} {row['dtype']} {row['target']}"


def test_every_kernel_compiles_everywhere(rows):
    kernels = {"gather", "adam", "update", "catch up", "chunks", "forward", "backward"}
    assert {row["kernel"] for row in nvidia(rows, target="sm_90")} == kernels
    for target in ("sm_80", "sm_100", "gfx942"):
        seen = {row["kernel"] for row in rows if row["target"] == target}
        assert seen >= {"gather", "adam", "update", "forward", "backward"}
    assert all(row["bytes"] > 0 for row in rows if row["target"] == "gfx942")


def test_no_local_memory_and_no_stack(rows):
    spilled = [name(row) for row in nvidia(rows) if row["local_bytes"] or row["stack_bytes"]]
    assert spilled == []


def test_tables_moments_and_gradients_move_in_128_bits(rows):
    """The wide accesses alone carry every byte that the design counts, padding included."""
    for row in nvidia(rows):
        if row["columns"] * (2 if row["dtype"] == "bfloat16" else 4) % 16:
            continue
        designed = row["row_bytes"] * row["tile_rows"] * row["padding"]
        assert row["wide_bytes"] >= designed, name(row)


def test_no_fp32_kernel_is_arithmetic_bound_on_an_h200(rows):
    """Whatever the width from 32 on: powers of two, multiples of four, of two, odd numbers.

    Not so the sums over chunks of a hot row in the fused update, which draw a normal for every four
    bytes that they read; only rows that stand 32 times in a batch have such chunks.
    """
    bound = [
        f"{name(row)}: {row['bound']['H200']['share']:.2f}"
        for row in nvidia(rows, target="sm_90", dtype="float32")
        if row["bound"]["H200"]["by"] != "memory" and row["options"] != "of the update"
    ]
    assert bound == []


def test_the_counts_are_those_of_the_machine_code(rows):
    """A copy does no floating-point arithmetic; a draw of noise needs the special functions."""
    (copy,) = nvidia(rows, kernel="gather", columns=256)
    assert copy["per_element"]["floating"] == 0
    assert copy["wide_accesses"] > 0
    (forward,) = (
        row
        for row in nvidia(rows, kernel="forward", columns=256)
        if row["options"] == "table, scalar prior"
    )
    # Philox: at least two wide multiplications a round, ten rounds for four normals
    assert forward["per_element"]["integer"] > 5
    assert forward["per_element"]["special"] >= 1
    assert forward["registers"] > 16
