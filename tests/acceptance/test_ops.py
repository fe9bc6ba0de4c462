"""Operators with operands split in several ways, where stock torch is wrong or gathers: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from shardc import Mesh
from tests.agree import Calls, Once, agrees, draw

pytestmark = pytest.mark.filterwarnings("ignore:.*plan is empty")


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "vector @ matrix": (torch.matmul, (draw(5), draw(5, 3))),
    "matrix @ vector": (torch.matmul, (draw(3, 5), draw(5))),
    "a bias of rows": (torch.addmm, (draw(3, 1), draw(3, 4), draw(4, 2))),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->kb", a, b), (draw(2, 3, 4), draw(2, 4, 2))),
    "a norm of a sum": (lambda a, b: torch.linalg.vector_norm(a @ b, dim=1), (draw(3, 4), draw(4, 2))),
    "convolution": (lambda x, w: F.conv1d(x, w, None, 2, 1), (draw(2, 2, 5), draw(4, 2, 3))),
    "transposed convolution": (lambda x, w: F.conv_transpose1d(x, w, None, 2), (draw(2, 2, 3), draw(2, 4, 3))),
}
LOSSES = (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss, F.binary_cross_entropy)
for _loss in LOSSES:

    def _of(x: Tensor, y: Tensor, loss: Any = _loss) -> Tensor:
        return loss(x.sigmoid(), y.detach().sigmoid(), reduction="mean") + loss(
            x.sigmoid(), y.detach().sigmoid(), reduction="none"
        )

    CASES[_loss.__name__] = _of, (draw(5, 2), draw(5, 2))


@pytest.mark.parametrize("name", CASES)
def test_is_right_however_its_operands_are_split(name: str):
    function, given = CASES[name]
    first = (Shard(0), *[Replicate() for _ in given[1:]])
    rows, columns = (tuple(Shard(d if x.dim() > 1 else 0) for x in given) for d in (0, 1))
    crossed = tuple(Shard((i + 1) % x.dim()) for i, x in enumerate(given))
    once = Once()
    for layout in dict.fromkeys([first, rows, columns, crossed]):
        agrees(Calls(function), given, Mesh(tp=2), None, {"inputs": layout}, once)
