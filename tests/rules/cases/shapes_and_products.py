"""Calls that prove the rules of pointwise operators, views, slices, products, indexing and creation."""

from __future__ import annotations

import torch

from tests.rules.cases import pointwise
from tests.rules.operands import F64, Case, case, mask, real, some, whole

aten = torch.ops.aten

# -- views -----------------------------------------------------------------------------------------

VIEWS = [
    ((4, 6), [24]), ((4, 6), [2, 12]), ((4, 6), [6, 4]), ((24,), [4, -1]), ((2, 3, 35), [2, 3, 5, 7]),
    ((1, 3, 35), [3, 5, 7]), ((1, 3, 35), [1, 3, 5, 7]), ((0, 6), [0, 2, 3]), ((0, 6), [3, 0]),
    ((0, 3, 2), [0]), ((1,), []),
    ((), [1, 1]), ((7, 2, 1, 5), [14, 5]), ((3, 4, 6, 5), [3, 6, 4, 5]), ((3, 4, 6, 5), [12, 3, 10]),
    ((5, 7), [5, 1, 7]), ((2, 3, 5, 7), [2, 3, 35]), ((6, 35), [3, 2, 7, 5]), ((1, 1), [1]),
]  # fmt: skip


def _views() -> list[Case]:
    out = [case(aten.view.default, real(*source), target) for source, target in VIEWS]
    out += [case(op.default, real(2, 6, 5), [12, 5]) for op in (aten._unsafe_view, aten.reshape)]
    out += [case(aten._reshape_alias.default, real(2, 6, 5), [12, 5], [5, 1])]
    out += [case(aten.view.dtype, real(3, 5), t) for t in (torch.int64, torch.int32)]
    return out


def _moved_dims() -> list[Case]:
    x, cube, point = real(3, 1, 2), real(7, 2, 5), real()
    out = [case(aten.squeeze.default, t) for t in (x, real(3, 2), real(1, 1), point)]
    out += [case(aten.squeeze.dim, t, d) for t, d in ((x, 1), (x, 0), (x, -1), (point, 0))]
    out += [case(aten.squeeze.dims, x, d) for d in ([0, 1], [], [-2])]
    out += [case(aten.permute.default, cube, [2, 0, -2]), case(aten.permute.default, point, [])]
    out += [case(aten.transpose.int, cube, -1, 0), case(aten.transpose.int, point, -1, 0)]
    out += [case(aten.t.default, t) for t in (cube[0], cube[0, 0], point)]
    out += [case(aten.unsqueeze.default, t, d) for t, d in ((cube, -1), (cube, 1), (point, 0))]
    out += [case(aten.expand.default, real(3, 1), s) for s in ([5, -1, 7], [3, 2])]
    out += [case(aten.expand.default, point, [5]), case(aten.expand.default, real(1, 7), [1, -1])]
    out += [case(aten.repeat.default, x, r) for r in ([2, 1, 3, 1], [1, 1, 1], [0, 2, 2])]
    return [*out, case(aten.repeat.default, point, [3]), case(aten.repeat.default, real(5), [2])]


def _patterns() -> list[Case]:
    x = real(3, 4, 5)
    out = [case(aten.as_strided.default, real(3, 4), [2, 2], [1, 2], 1)]
    out += [case(aten.unfold.default, real(3, 8), 1, 3, 2), case(aten.unfold.default, real(), 0, 1, 1)]
    out += [case(aten.unfold_backward.default, real(3, 3, 3), [3, 8], 1, 3, 2)]
    out += [case(aten.diagonal.default, x, 1, 0, -1), case(aten.diagonal.default, real(3, 3))]
    out += [case(aten.diagonal_backward.default, real(5, 3), [3, 5, 4], 0, 0, 2)]
    out += [case(aten.diagonal_scatter.default, x, real(4, 3), 0, 0, -1)]
    out += [case(aten.diag_embed.default, real(3, 4), *at) for at in ((), (1, 0, 2), (1, -1, 0))]
    out += [case(op.default, real(2, 7, 5), d) for op in (aten.tril, aten.triu) for d in (0, -2, 3)]
    out += [case(aten.pixel_shuffle.default, real(3, 12, 2, 3), 2)]
    out += [
        case(aten.pixel_unshuffle.default, real(2, 3, 4, 6), 2),
        case(aten.pixel_unshuffle.default, x[:, 1:, 2:], 3),
    ]
    return [*out, case(aten.channel_shuffle.default, real(2, 6, 5, 3), 2)]


# -- slices ----------------------------------------------------------------------------------------

SLICES = [
    (0,), (1,), (1, 2, 5), (1, 0, 4), (1, 4, 12), (1, 0, -4), (1, -8), (1, 0, 2**63 - 1, 2), (1, 1, None, 2),
    (1, 1, None, 3), (1, 2, 8, 2), (1, 5, 5), (1, 4, 4), (1, 0, 12, 13), (0, 1, 4), (1, 2, None, 3),
    (-1, 0, 11, 3),
]  # fmt: skip


def _slices() -> list[Case]:
    out, x = [], real(5, 12)
    for dim, *bounds in SLICES:
        start, end, step = (*bounds, None, None, None)[:3]
        part = aten.slice.Tensor(x, dim, start, end, step or 1)
        plain = (start or 0, 2**63 - 1 if end is None else end, step or 1)
        out += [case(aten.slice.Tensor, x, dim, *bounds)]
        out += [case(aten.slice_backward.default, part * 2, [5, 12], dim, *plain)]
        out += [case(aten.slice_scatter.default, x, part * 2, dim, *plain)]
    out += [case(aten.slice.Tensor, real(0, 5), 0, 1, 3), case(aten.slice.Tensor, real(1, 5))]
    out += [case(aten.select.int, x, 1, -2), case(aten.select_backward.default, real(5), [5, 12], 1, -2)]
    return [*out, case(aten.select_scatter.default, x, real(12), 0, 1)]


def _pieces() -> list[Case]:
    x = real(3, 14)
    out = [case(aten.split.Tensor, real(3, 12), n, d) for n, d in ((4, 1), (5, 1), (12, -1), (1, 0), (2, 0))]
    out += [case(aten.split_with_sizes.default, x, s, 1) for s in ([4, 4, 6], [4, 10, 0], [14], [1, 13])]
    out += [
        case(aten.unsafe_split.Tensor, x, 7, 1),
        case(aten.unsafe_split_with_sizes.default, x, [7, 7], -1),
    ]
    out += [case(aten.unbind.int, x), case(aten.unbind.int, real(3, 5), -1)]
    stacks = [((3, 5), -1, 2), ((3, 5), 1, 3), ((), 0, 1)]
    out += [case(aten.stack.default, [real(*s) + i for i in range(n)], d) for s, d, n in stacks]
    cats = [
        (-1, [(3, 5), (3, 5)]), (0, [(3, 5), (6, 5)]), (0, [(3, 5), (2, 5)]), (0, [(3, 5), (0,)]),
        (0, [(3, 5), (0, 5), (3, 5)]), (0, [(3,), (0,), (5,)]), (0, [(3,)]), (0, [(0,), (0,)]),
        (0, [(1, 5), (1, 5)]),
        (1, [(2, 0), (2, 4), (2, 6)]), (1, [(2, 0), (2, 3)]), (1, [(2, 7)] * 3), (0, [(0,), (4, 2), (6, 2)]),
    ]  # fmt: skip
    out += [case(aten.cat.default, [real(*s) + i for i, s in enumerate(shapes)], d) for d, shapes in cats]
    return out


def _turned() -> list[Case]:
    x = real(3, 5, 2)
    out = [case(aten.flip.default, x, d) for d in ([0, -1], [])]
    out += [
        case(aten.roll.default, x, [1], [0]),
        case(aten.roll.default, x[0], [1]),
        *(
            case(aten.roll.default, y, [k], [d])
            for y in (real(7, 2), real(1, 5))
            for d in (0, 1)
            for k in (-3, 0, 5, 9)
        ),
        case(aten.roll.default, real(5, 3), [1, 2, -1], [0, 1, -2]),
        case(aten.flip.default, real(0, 3), [0]),
        case(aten.roll.default, x, [1, 1], [0, -1]),
    ]
    out += [case(aten.rot90.default, x, 1, [0, 2]), case(aten.rot90.default, x, 2, [0, 1])]
    pads = [([1, 2], 0), ([0, 0, 1, -1], 1.5), ([1, 1, 0, 0, 1, 1], 0.0)]
    return out + [case(aten.constant_pad_nd.default, x, pad, v) for pad, v in pads]


# -- products --------------------------------------------------------------------------------------


def _products() -> list[Case]:
    a, b, v, u = real(3, 5), real(5, 7), real(5), real(3)
    a3, b3, c = real(2, 3, 5), real(2, 5, 7), torch.complex(real(5), real(5).flip(0))
    small = [whole(9, *s).to(torch.int8) for s in ((17, 16), (16, 8))]
    out = [
        case(aten.mm.default, a, b),
        case(aten.mm.default, real(1, 2), real(2, 1)),
        case(aten.bmm.default, a3, b3),
    ]
    out += [
        case(aten.mv.default, a, v),
        case(aten.dot.default, v, v.flip(0)),
        case(aten.vdot.default, c, c.flip(0)),
    ]
    out += [
        case(aten.ger.default, u, v),
        case(aten._int_mm.default, *small),
        case(aten.bmm.default, real(7, 1, 2), real(7, 2, 3)),
    ]
    out += [case(aten.addmm.default, t, a, b) for t in (real(7), real(3, 7), real(1, 7), real())]
    out += [case(aten.addmm.default, real(3, 1), a, b, beta=2, alpha=3)]
    out += [case(aten.addmv.default, t, a, v) for t in (u, real(), real(1))]
    out += [case(aten.addr.default, t, u, v) for t in (a, real(1, 5), real(3, 1))]
    out += [case(aten.baddbmm.default, t, a3, b3, beta=0.5) for t in (real(2, 1, 7), real(3, 7), real(2, 3, 7))]
    out += [case(aten.addbmm.default, t, a3, b3) for t in (real(1, 7), real(3, 7))]
    out += [case(aten.linalg_cross.default, real(5, 3), real(5, 3).flip(0))]
    out += [case(aten.linalg_cross.default, real(5, 3, 2), real(1, 3, 2) + 1, dim=1)]
    cdists = [((2, 5, 3), (2, 7, 3), 2.0), ((5, 3), (7, 3), 1.0), ((1, 5, 3), (2, 7, 3), 1.0)]
    return out + [case(aten._cdist_forward.default, real(*s), real(*t), p, None) for s, t, p in cdists]


# -- indexing --------------------------------------------------------------------------------------


def _along_a_dim() -> list[Case]:
    x, places, rest = real(3, 5), some(5, 3).t(), real(3, 7)
    out = [case(aten.gather.default, x, 1, whole(5, 3, 2)), case(aten.gather.default, x, 0, whole(3, 7, 2))]
    out += [
        case(aten.gather.default, real(3, 5, 2), -1, whole(2, 3, 5, 7)),
        case(aten.gather.default, real(), 0, whole(1)),
    ]
    out += [
        case(aten.gather.default, x > 0, 1, whole(5, 3, 2)),
        case(aten.gather.default, whole(9, 3, 5), 0, whole(3, 2, 5)),
    ]
    adds = [
        (1, (3, 7), (3, 7)),
        (0, (2, 5), (2, 5)),
        (0, (2, 4), (2, 4)),
        (0, (2, 4), (7, 5)),
        (-1, (3, 1), (3, 1)),
    ]
    out += [case(aten.scatter_add.default, x, d, whole(x.shape[d], *i), real(*s)) for d, i, s in adds]
    out += [case(aten.scatter_add.default, real(), 0, whole(1), real())]
    out += [case(aten.scatter.src, x, 1, places, x * 2), case(aten.scatter.value, x, 1, whole(5, 3, 2), 1.5)]
    out += [case(aten.scatter.reduce, x, 1, whole(5, 3, 7), rest, reduce="add")]
    out += [case(aten.scatter.value_reduce, x, 1, whole(5, 3, 7), 2.0, reduce="multiply")]
    out += [case(aten.scatter_reduce.two, x, 1, whole(5, 3, 7), rest, "amax", include_self=False)]
    out += [case(aten.scatter_reduce.two, real(), 0, whole(1, 1), real(1), "sum")]
    out += [
        case(aten.index_add.default, x, 1, whole(5, 7), rest, alpha=2),
        case(aten.index_copy.default, x, 1, places[0], x * 2),
    ]
    out += [
        case(aten.index_fill.int_Tensor, x, -1, whole(5, 2), real()),
        case(aten.index_fill.int_Scalar, x, 1, whole(5, 2), 2.0),
    ]
    out += [
        case(aten.index_reduce.default, x, 1, whole(5, 7), rest, "amin"),
        case(aten.index_add.default, real(), 0, whole(1, 1), real()),
    ]
    out += [
        case(aten.index_select.default, x, 1, whole(5, 7)),
        case(aten.index_select.default, x, 0, whole(3)),
    ]
    return [*out, case(aten.take.default, x, whole(15, 7, 2))]


def _advanced() -> list[Case]:
    x, y, i = real(5, 7, 3), real(2, 5, 7, 3), whole
    lists = [
        (x, [i(5, 2, 3)]), (x, [None, i(7, 2, 3)]), (x, [i(5, 2, 1), i(7, 3)]), (x, [i(5, 2), None, i(3, 2)]),
        (y, [None, i(5, 2), None, i(3, 2)]), (y, [None, i(5), i(7, 2)]), (x, [mask(5)]),
        (y, [None, None, i(7, 5)]),
    ]  # fmt: skip
    out = [case(aten.index.Tensor, t, indices) for t, indices in lists]
    out += [case(aten._unsafe_index.Tensor, real(5, 3), [None, i(3, 1)])]
    puts = [
        (x, [i(5, 2, 3)], (2, 3, 7, 3), True), (x, [None, some(7)], (7, 3), False),
        (x, [i(5, 2, 1), i(7, 3)], (3,), True), (x, [mask(5)], (3, 7, 3), False),
        (x[:, :3, 0], [mask(5, 3)], (), False), (x[:, :3, 0], [mask(5)], (1,), False),
        (y, [None, i(5, 2), None, i(3, 2)], (2, 2, 7), True),
        (y, [None, i(5, 2), None, i(3, 2)], (2, 1, 1), True),
    ]  # fmt: skip
    out += [
        case(aten.index_put.default, t, at, real(*s) if s != (3, 7, 3) else t[at[0]] * 2, add) for t, at, s, add in puts
    ]
    return [*out, case(aten._unsafe_index_put.default, x, [some(5)], x * 2)]


def _searched() -> list[Case]:
    x, row = real(3, 5), real(7).sort()[0]
    out = [case(aten.bucketize.Tensor, x, row), case(aten.isin.Tensor_Scalar, whole(3, 5, 2), 1)]
    out += [
        case(aten.isin.Tensor_Tensor, whole(9, 5, 2), whole(9, 3)),
        case(aten.searchsorted.Tensor, row, x),
    ]
    out += [case(aten.searchsorted.Tensor, real(3, 7).sort()[0], x)]
    return [*out, case(aten.searchsorted.Tensor, real(3, 7), x, sorter=real(3, 7).argsort())]


# -- creation --------------------------------------------------------------------------------------


def _created() -> list[Case]:
    x = real(3, 5)
    out = [case(aten.full.default, s, 1.5) for s in ([3, 5], [], [7])]
    out += [case(op, [3, 5]) for op in (aten.zeros.default, aten.ones.default, aten.empty.memory_format)]
    for name, value in (("zeros", ()), ("ones", ()), ("empty", ()), ("full", (2.5,))):
        out += [case(getattr(aten, f"{name}_like").default, x, *value)]
        out += [case(getattr(aten, f"new_{name}").default, x, s, *value) for s in ([3, 5], [7, 2])]
    out += [case(aten._efficientzerotensor.default, [3, 5])]
    out += [
        case(aten.arange.default, 7),
        case(aten.arange.start, 2, 7, dtype=F64),
        case(aten.arange.default, 5.0),
    ]
    out += [case(aten.arange.start_step, *b) for b in ((9, 2, -2), (0, 1, 0.25))]
    out += [case(aten.arange.default, 300, dtype=torch.bfloat16), case(aten.scalar_tensor.default, 2.0)]
    out += [case(aten.eye.default, 3), case(aten.eye.m, 3, 5), case(aten.linspace.default, 0, 1, 5)]
    out += [
        case(aten.logspace.default, 0, 1, 5),
        case(aten.range.default, 0, 3),
        case(aten.range.step, 0, 5, 2),
    ]
    out += [case(op.default, 3, 5, 1) for op in (aten.tril_indices, aten.triu_indices)]
    out += [
        case(aten.empty_strided.default, [3, 5], [5, 1]),
        case(aten.empty_permuted.default, [3, 5], [1, 0]),
    ]
    return [*out, case(aten.new_empty_strided.default, x, [3, 5], [1, 3])]


CASES: list[Case] = [
    *pointwise.CASES,
    *_views(), *_moved_dims(), *_patterns(),
    *_slices(), *_pieces(), *_turned(),
    *_products(),
    *_along_a_dim(), *_advanced(), *_searched(),
    *_created(),
]  # fmt: skip
