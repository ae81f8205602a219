"""All overlapping patches of photographs, read through a view: a large data set without a download.

scikit-learn brings two photographs of 427 x 640 pixels, a temple and a flower. Their 8 x 8 patches,
with those of their horizontal and vertical mirror images, are more than a million real samples that
take no more memory than the photographs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIDE = 8
# (top, left) of the squares that are held out of each photograph, and their side in pixels
_SQUARES = ((64, 64), (64, 288), (64, 512), (299, 64), (299, 288), (299, 512))
_SQUARE_SIDE = 64


class PatchSamples:
    """Patches of uint8 photographs as float32 [3, side, side], divided by 255.

    Rows 0 .. training - 1 are the training patches: those of the photographs, of their horizontal
    (left and right exchanged) and of their vertical mirror images that share no pixel with a
    held-out square or its mirror image. The rows from `training` on are the patches of the
    photographs themselves that lie in a held-out square.

    Args:
        photographs: uint8 [P, H, W, 3].
        squares: (top, left) of each held-out square, the same in every photograph.
        square_side: of the squares, in pixels.
        side: of a patch, in pixels.
    """

    value_range = (0.0, 1.0)

    def __init__(
        self,
        photographs: np.ndarray,
        squares: Sequence[tuple[int, int]] = _SQUARES,
        square_side: int = _SQUARE_SIDE,
        side: int = SIDE,
    ) -> None:
        self.shape = (3, side, side)
        reserved = np.zeros(photographs.shape[:3], bool)
        for top, left in squares:
            reserved[:, top : top + square_side, left : left + square_side] = True
        self._count, self._side = len(photographs), side
        self._pixels = _with_mirror_images(photographs)
        patches = _windows(_with_mirror_images(reserved), side)
        held_out = patches[: self._count].all((3, 4))
        training = np.flatnonzero(~patches.any((3, 4)))
        self.training = len(training)
        self._places = np.concatenate([training, np.flatnonzero(held_out)]).astype(np.int32)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, rows: np.ndarray) -> np.ndarray:
        windows = _windows(self._pixels, self._side)
        picked = windows[np.unravel_index(self._places[rows], windows.shape[:3])]
        return np.divide(picked, np.float32(255), dtype=np.float32, order="C")

    def photograph(self) -> np.ndarray:
        """The number of the photograph that each row comes from, int64 [N]."""
        shape = _windows(self._pixels, self._side).shape[:3]
        return np.unravel_index(self._places, shape)[0] % self._count


def sample_photographs() -> np.ndarray:
    """scikit-learn's photographs, uint8 [2, 427, 640, 3]: china.jpg and flower.jpg."""
    from sklearn.datasets import load_sample_images

    return np.stack(load_sample_images().images)


def _with_mirror_images(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, pixels[:, :, ::-1], pixels[:, ::-1]])


def _windows(pixels: np.ndarray, side: int) -> np.ndarray:
    """Every patch, a view [P, H - side + 1, W - side + 1, ..., side, side] of [P, H, W, ...]."""
    return np.lib.stride_tricks.sliding_window_view(pixels, (side, side), axis=(1, 2))
