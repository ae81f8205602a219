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
) -> Tensor:
    """The `count` training codes whose decodings fit each sample's observed part best.

    Args:
        problem: all samples [B] (tensors on the compute device).
        codes: [M, D], on any device; decoded once each where the decoder takes no context.
        count: codes per sample, at most M.
        rows: decodings, or pairs of code and sample, held at a time.
        report: called with the number of codes searched since the last call.

    Returns:
        [B, count, D], the best code first.
    """
    squared = problem.loss is squared_error and not problem.context
    candidates = min(count + _EXTRA_CANDIDATES, len(codes)) if squared else count
    device, dtype = problem.target.device, problem.prior.mean.dtype
    best = torch.full((len(problem), candidates), torch.inf, dtype=dtype, device=device)
    index = torch.zeros((len(problem), candidates), dtype=torch.int64, device=device)
    centre = None
    for first in range(0, len(codes), rows):
        chunk = codes[first : first + rows].to(device, dtype)
        decoded = None if problem.context else problem.decode(chunk)
        if squared and centre is None:
            # distances of centred vectors lose fewer digits to cancellation
            centre = decoded.mean(0).nan_to_num()
        # the scores of `step` samples take no more memory than the decodings
        step = rows * (max(1, centre.numel()) if squared else 1) // len(chunk)
        for part in torch.arange(len(problem), device=device).split(max(1, min(step, rows))):
            some = problem.take(part)
            if squared:
                scores = _squared_scores(some, decoded, centre)
            else:
                scores = _pair_scores(some, chunk, decoded)
            found = torch.arange(first, first + len(chunk), device=device).expand_as(scores)
            scores = torch.cat([best[part], scores.nan_to_num(nan=torch.inf)], dim=1)
            found = torch.cat([index[part], found], dim=1)
            best[part], order = scores.topk(candidates, largest=False)
            index[part] = found.gather(1, order)
        report(len(chunk))
    if squared:
        index = index.gather(1, best_first(problem, codes[index.to(codes.device)], rows, count))
    return codes[index.to(codes.device)].to(device, dtype)


def _squared_scores(problem: Problem, decoded: Tensor, centre: Tensor) -> Tensor:
    """Squared distances [n, m] over the observed part, less a constant of each sample."""
    decoded = (decoded - centre).reshape(len(decoded), -1)
    target = (problem.target - centre).reshape(len(problem), -1)
    if problem.observed is None:
        return decoded.square().sum(1) - 2 * (target @ decoded.T)
    seen = problem.observed.reshape(len(problem), -1).to(target.dtype)
    return seen @ decoded.square().T - 2 * ((seen * target) @ decoded.T)


def _pair_scores(problem: Problem, codes: Tensor, decoded: Tensor | None) -> Tensor:
    """Losses [n, m] of every code for every sample."""
    n, m = len(problem), len(codes)
    pairs = problem.take(torch.arange(n, device=codes.device).repeat_interleave(m))
    if decoded is None:
        return pairs.data_loss(codes.repeat(n, 1)).reshape(n, m)
    prediction = decoded.expand(n, *decoded.shape).flatten(0, 1)
    loss = pairs.loss(prediction, pairs.target, pairs.observed)
    return loss.reshape(n, m).to(codes.dtype)


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
