"""DeepSDF's reconstruction of unseen shapes: all at once, beside one shape after the other.

The decoder has the published shape (Park et al. 2019: 8 layers, code and point fed in again at the
fifth) and drawn weights, as a time does not depend on them; the targets are its own distances of
other codes, so that a loss says whether a fit went anywhere.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import fastlatent as fl
from benchmarks import gpu_measure as measure
from benchmarks.faithful_loop import START_STD, fit_all
from benchmarks.gpu_context import Context, SectionFailed
from fastlatent.losses import clamped_sdf

LAYERS, AGAIN = 8, 4
LR = 5e-3


class DeepSDF(nn.Module):
    """(code [B, D], points [B, P, 3]) -> distances [B, P]."""

    def __init__(self, latent_dim: int, width: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        inputs = latent_dim + 3
        sizes = [inputs] + [width] * LAYERS
        # the layer before the one that gets the input again makes room for it
        narrow = width - inputs if width > inputs else width
        self.layers = nn.ModuleList(
            nn.Linear(
                narrow + inputs if number == AGAIN else size,
                narrow if number == AGAIN - 1 else width,
            )
            for number, size in enumerate(sizes[:-1])
        )
        self.last = nn.Linear(width, 1)
        # distances of the size that the loss does not clamp, and that depend on the code
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.last.weight, std=0.05 / width**0.5)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, points: Tensor) -> Tensor:
        inputs = torch.cat([z[:, None].expand(-1, points.shape[1], -1), points], dim=2)
        h = inputs
        for number, layer in enumerate(self.layers):
            h = layer(torch.cat([h, inputs], dim=2) if number == AGAIN else h).relu()
        return self.last(h)[..., 0].tanh()


def shapes(context: Context) -> None:
    """Shapes per second: `infer` with all shapes in flight, and the loop of the reference script.

    Both take every step from the same start. "infer, no graph" runs the steps without capture.
    """
    sizes, device = context.sizes, context.device
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    decoder = DeepSDF(sizes.shape_dim, sizes.shape_width).to(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    points = draw(sizes.shapes, sizes.shape_points, 3).clamp(-1, 1)
    with torch.no_grad():
        target = torch.cat(
            [decoder(draw(1, sizes.shape_dim), points[i : i + 1]) for i in range(sizes.shapes)]
        )
    start = START_STD * draw(sizes.shapes, sizes.shape_dim)
    options = {
        "init": start, "loss": "clamped_sdf", "steps": sizes.shape_steps, "lr": LR, "tol": -1.0,
        "gradient_tol": -1.0, "max_memory": max(2**30, measure.available_bytes(device) // 2),
    }  # fmt: skip

    def ours(graph: bool, steps: int) -> fl.Fit:
        some = {**options, "steps": steps, "cuda_graph": graph}
        return fl.infer(decoder, target, context=points, **some)

    def loop(steps: int) -> Tensor:
        rows = slice(0, sizes.shapes_looped)
        fitted = fit_all(
            decoder, target[rows], start[rows], clamped_sdf, steps=steps, lr=LR,
            context=(points[rows],),
        )  # fmt: skip
        return fitted[1]

    result = context.result
    result.update(
        shapes=sizes.shapes, points=sizes.shape_points, steps=sizes.shape_steps,
        latent_dim=sizes.shape_dim, width=sizes.shape_width,
        first_loss=clamped_sdf(*_decoded(decoder, start, points), target).mean().item(),
    )  # fmt: skip
    runs = {
        "infer": (functools.partial(ours, True), sizes.shapes),
        "infer, no graph": (functools.partial(ours, False), sizes.shapes),
        "loop": (loop, sizes.shapes_looped),
    }
    losses = {}
    for name, (run, count) in runs.items():
        run(2 * 10)
        found: list[fl.Fit | Tensor] = []
        seconds = measure.elapsed(lambda r=run, f=found: f.append(r(sizes.shape_steps)), device)()
        loss = found[0].loss if isinstance(found[0], fl.Fit) else found[0]
        losses[name] = loss[: sizes.shapes_looped].mean().item()
        context.add(
            "entries",
            {"provider": name, "shapes_a_second": 1e3 * count / seconds, "loss": losses[name]},
        )
    speed = {entry["provider"]: entry["shapes_a_second"] for entry in result["entries"]}
    result["times_the_loop"] = speed["infer"] / speed["loop"]
    context.save()
    if not losses["infer"] < result["first_loss"]:
        raise SectionFailed(f"the fit went nowhere: {losses}, at first {result['first_loss']}")


@torch.no_grad()
def _decoded(decoder: nn.Module, z: Tensor, points: Tensor) -> tuple[Tensor]:
    return (torch.cat([decoder(z[i : i + 1], points[i : i + 1]) for i in range(len(z))]),)
