"""Where inference starts: the first codes of every sample, [B, restarts, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlatent._solvers import Problem
from fastlatent.losses import squared_error

# a squared distance by expansion rounds like the squares, not like the distance: some more
# candidates than asked for are ranked again, exactly
_EXTRA_CANDIDATES = 4


def nearest(
    problem: Problem,
    codes: Tensor,
    count: int,
    rows: int,
    report: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """The `count` training codes whose decodings fit each sample's observed part best.

    Args:
        problem: all samples [B] (tensors on the compute device).
        codes: [M, D], on any device; decoded once each where the decoder takes no context.
        count: codes per sample, at most M.
        rows: decodings, or pairs of code and sample, held at a time.
        report: called with the number of codes searched since the last call.

    Returns:
        The codes [B, count, D], the best one first, and their positions, int64 [B, count].
    """
    squared = problem.loss is squared_error and not problem.context
    # exact losses are computed for a code and a sample, expanded distances for all pairs at once
    ranked = count + _EXTRA_CANDIDATES if squared else len(codes)
    count = min(count, len(codes))
    device, dtype = problem.target.device, problem.prior.mean.dtype
    best = torch.full((len(problem), count), torch.inf, dtype=dtype, device=device)
    index = torch.zeros((len(problem), count), dtype=torch.int64, device=device)
    centre = None
    for first in range(0, len(codes), rows):
        chunk = codes[first : first + rows].to(device, dtype)
        decoded = None if problem.context else problem.decode(chunk)
        if squared and centre is None:
            # distances of centred vectors lose fewer digits to cancellation
            centre = decoded.mean(0).nan_to_num()
        picks = min(ranked, len(chunk))
        # neither the decodings of the picks nor the distances take more than `rows` decodings
        step = rows // picks
        if squared:
            step = min(step, rows * max(1, centre.numel()) // len(chunk))
        for part in torch.arange(len(problem), device=device).split(max(1, step)):
            some = problem.take(part)
            found = torch.arange(len(chunk), device=device).expand(len(part), -1)
            if picks < len(chunk):
                found = _squared_scores(some, decoded, centre).topk(picks, largest=False).indices
            losses = _losses(some, chunk, decoded, found)
            losses = torch.cat([best[part], losses.nan_to_num(nan=torch.inf)], dim=1)
            found = torch.cat([index[part], first + found], dim=1)
            best[part], order = losses.topk(count, largest=False)
            index[part] = found.gather(1, order)
        report(len(chunk))
    return codes[index.to(codes.device)].to(device, dtype), index


def _squared_scores(problem: Problem, decoded: Tensor, centre: Tensor) -> Tensor:
    """Squared distances [n, m] over the observed part, less a constant of each sample."""
    decoded = (decoded - centre).reshape(len(decoded), -1)
    target = (problem.target - centre).reshape(len(problem), -1)
    if problem.observed is None:
        return torch.addmm(decoded.square().sum(1), target, decoded.T, alpha=-2)
    seen = problem.observed.reshape(len(problem), -1).to(target.dtype)
    return torch.addmm(seen @ decoded.square().T, seen * target, decoded.T, alpha=-2)


def _losses(problem: Problem, codes: Tensor, decoded: Tensor | None, found: Tensor) -> Tensor:
    """Losses [n, k] of the codes at the positions `found` [n, k]; `decoded` are their decodings."""
    n, k = found.shape
    pairs = problem.take(torch.arange(n, device=found.device).repeat_interleave(k))
    if decoded is None:
        return pairs.data_loss(codes[found].flatten(0, 1)).reshape(n, k)
    loss = pairs.loss(decoded[found].flatten(0, 1), pairs.target, pairs.observed)
    return loss.reshape(n, k).to(codes.dtype)


def best_first(problem: Problem, codes: Tensor, rows: int, count: int) -> Tensor:
    """Positions [B, count] of each sample's best codes among its [B, k], by loss."""
    order = []
    k = codes.shape[1]
    for part in torch.arange(len(codes), device=problem.target.device).split(max(1, rows // k)):
        some = codes[part.to(codes.device)].flatten(0, 1).to(problem.target)
        losses = problem.take(part.repeat_interleave(k)).data_loss(some)
        losses = losses.nan_to_num(nan=torch.inf).reshape(-1, k)
        order.append(losses.argsort(dim=1, stable=True)[:, :count])
    return torch.cat(order)
