"""The variational step of a table: one launch for the lookup and one for the update.

The lookup is ``reparameterize``'s kernel over the rows index[b], each holding μ | log σ². The update
computes (∂μ, ∂log σ²) of a row from ∂z, ∂KL and the row itself and takes its Adam step at once, so
that no gradient is ever stored. Bytes a row of D dimensions: D + 1 and 2·3·D read, 2·3·D written:
13·D values. Where rows may stand in the batch several times, the program of a row sums, in order,
Σ∂z, Σ∂z·ε and ΣεKL over the row's run, all that its gradient needs; such a run is not split.

The definition is ``fastlatent.reference``; the arguments are its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.adam import (
    DENSE,
    GLOBAL,
    NOT_SPECIALIZED,
    ROW,
    _STEP_MODES,
    project,
    replay,
    row_tile,
    rule_arguments,
    scales,
    store_row,
)
from fastlatent.kernels.duplicates import Runs, find_runs
from fastlatent.kernels.gather import load_index
from fastlatent.kernels.launch import (
    Launch,
    alignment,
    check_dtype,
    check_rows,
    host_or_device,
    tile,
)
from fastlatent.kernels.numerics import (
    adam_moments,
    adam_step,
    double,
    row_words,
    scalar,
    variational_gradient,
)
from fastlatent.kernels.reparameterize import (
    NO_NOISE,
    by_rows,
    draw_arguments,
    forward,
    load_noise,
    load_prior,
    plan_backward,
)
