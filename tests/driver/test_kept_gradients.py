"""compiler/kept.py: what is kept back comes out once, in one layout, in the same order on every rank."""

from __future__ import annotations

import pytest
import torch

from shardc.compiler.driver.kept_gradients import Kept
from shardc.compiler.errors import ShardingError
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec

MESH = Mesh(dp=2, tp=2)
WHOLE = Spec.whole((4,))
PENDING = WHOLE.with_pending({"dp": "sum"}, MESH)


def test_gradients_add_up_until_they_are_taken():
    kept = Kept()
    kept.expect({"w": PENDING, "b": PENDING})
    for _ in range(2):
        kept.keep("w", torch.ones(4))
    assert kept.layouts() == (("b", PENDING), ("w", PENDING))
    taken = kept.take("w")
    assert taken is not None and taken.tolist() == [2.0] * 4
    assert kept.layouts() == (("b", PENDING),) and kept.take("b") is None and kept.layouts() == ()


def test_what_is_kept_in_one_layout_is_not_added_to_in_another():
    kept, other = Kept(), PENDING.split(0, "tp", MESH)
    kept.expect({"w": PENDING})
    kept.keep("w", torch.ones(4))
    with pytest.raises(ShardingError, match="kept back as"):
        kept.expect({"w": other})
    assert kept.layouts() == (("w", PENDING),)
    kept.take("w")
    kept.expect({"w": other})
    assert kept.layouts() == (("w", other),)
