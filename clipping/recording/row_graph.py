# SPDX-License-Identifier: Apache-2.0
"""The graph between the losses and the layers: where rows are handed over, and whether data decide which.

Shapes: N rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from clipping.modules.children_with_rules import Arrivals
from clipping.recording.tap import Call, Point

_SHAPED = frozenset(
    "view reshapealias unsafeview transpose t permute squeeze unsqueeze expand repeat alias clone copy tocopy slice select "
    "split unsafesplit splitwithsizes unbind cat stack constantpadnd flip roll unfold asstrided copyslices movedim "
    "add sub rsub mul div neg abs pow sqrt rsqrt exp log log1p expm1 erf sigmoid tanh softplus softmax logsoftmax relu gelu "
    "silu elu celu selu leakyrelu hardtanh hardswish hardsigmoid mish sin cos clamp clampmin clampmax maximum minimum "
    "maskedfill where reciprocal addcmul addcdiv lerp tril triu logsigmoid "
    "sum mean var std norm linalgvectornorm logsumexp amax amin prod cumsum mm addmm bmm baddbmm linear mv dot "
    "nativelayernorm nativegroupnorm nativebatchnorm fusedrmsnorm nativedropout embedding convolution "
    "mkldnnconvolution maxpool1dwithindices maxpool2dwithindices maxpool3dwithindices avgpool2d avgpool3d "
    "adaptiveavgpool2d adaptiveavgpool3d upsamplebilinear2d upsamplebicubic2d upsamplenearest2d upsamplelinear1d "
    "scaleddotproductflashattentionforcpu scaleddotproductflashattention scaleddotproductefficientattention "
    "scaleddotproductcudnnattention scaleddotproductfusedattentionoverrideable "
    "nllloss nllloss2d softmarginloss binarycrossentropy mseloss smoothl1loss huberloss kldiv complex real "
    "binarycrossentropywithlogits tap met split valve accumulategrad".split()
)
"""Operations whose results' rows depend on shapes alone, by the names of their nodes in lower case."""

_CHOOSING = frozenset("gather max min topk sort indexselect cummax kthvalue median mode".split())
"""Operations in which data choose, along one dimension."""

_MOVING = ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1", "_saved_shifts")
"""What nodes say of how they move elements, whatever the sizes."""

_WRAPPED = 1 << 64
"""What nodes add to dimensions below 0."""


class Found(NamedTuple):
    """A point in the graph of the losses: its node, the dimensions of its outputs with the rows, and their shapes.

    `dynamic` says that data decide what lies between, `path` tells the operations there from others.
    """

    node: Any
    dims: tuple[int, ...]
    shapes: tuple[Sequence[int], ...]
    dynamic: bool
    path: int

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The dimensions of which each place may be a row: (N,) or (N, L)."""
        if len(self.shapes) == 1 and len(self.shapes[0]) > 2 and self.dims[0] == 0:
            return tuple(self.shapes[0][:2])
        return (self.shapes[0][self.dims[0]],)


def _is_dynamic(node: Any) -> bool:
    """Whether data may decide which rows of its arguments the rows of a result are made of."""
    if _is_foreign(node):
        return True  # a function of the model's own may have any name
    name = node.name().rstrip("0123456789").removesuffix("Backward").lower().rpartition("::")[2]
    if name in _CHOOSING:
        dim = getattr(node, "_saved_dim", 0)
        dim = dim - _WRAPPED if dim >= _WRAPPED // 2 else dim
        return dim == 0 or -dim >= len(node._input_metadata[0].shape)
    if name == "index":
        first = node._saved_indices[0]
        return first is not None and not _counts(first)
    if name in ("mm", "addmm"):
        # A gradient of the second factor: its rows are summed, with weights that data may have made.
        edges = node.next_functions
        return edges[-1][0] is not None and not edges[-1][0].name().endswith("AccumulateGrad")
    return name not in _SHAPED


def _is_foreign(node: Any) -> bool:
    """Whether it is of a Python function that is not ours."""
    kind: Any = type(node)
    if not issubclass(kind, BackwardCFunction):
        return False
    function: Any = getattr(kind, "_forward_cls", None)
    return not getattr(function, "__module__", "").startswith("clipping.")


def _operation(node: Any) -> tuple[object, ...]:
    """The name of an operation, and along which dimensions and how far it moves elements."""
    moves = (node.name(), *(str(getattr(node, name, None)) for name in _MOVING))
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    if not sizes or getattr(node, "_saved_dim", None) != 0:
        return moves
    parts = (getattr(node, f"_saved_{name}", 0) for name in ("start", "end", "index"))
    return (*moves, *(min(part, sizes[0]) / max(1, sizes[0]) for part in parts if isinstance(part, int)))


def _counts(index: Tensor) -> bool:
    """Whether an index of rows takes all from the first on, in their order."""
    return index.dim() == 1 and torch.equal(index, torch.arange(len(index), device=index.device))


def points(node: Any) -> Sequence[Point]:
    """What delivers at a node of the graph: a call of a layer, or meetings."""
    name = node.name()
    if name == "TapBackward":
        waits = getattr(node.call.deliver, "__self__", None)
        return (waits.call if isinstance(waits, Arrivals) else node.call,)
    return node.meetings if name in ("MetBackward", "SplitBackward") and hasattr(node, "meetings") else ()


def tape_of(point: Point) -> Any:
    """The tape that gets what `point` delivers."""
    deliver: Any = point.deliver
    return deliver.__self__.tape


def walk(gates: Sequence[Any]) -> dict[Point, Found]:
    """The points of the graph below `gates`, in the order of a backward."""
    found: dict[Point, Found] = {}
    flags: dict[Any, bool] = {}
    paths: dict[Any, int] = {}
    heap: list[tuple[int, int, Any]] = []  # by age: what was made later lies above
    number = count()

    def reach(node: Any, dynamic: bool, path: int) -> None:
        if node is None:
            return
        paths[node] = paths.get(node, 0) + path  # in any order of those above
        if node not in flags or (dynamic and not flags[node]):
            heapq.heappush(heap, (-node._sequence_nr(), next(number), node))
        flags[node] = flags.get(node, False) or dynamic

    for place, gate in enumerate(gates):
        node = gate.grad_fn if isinstance(gate, Tensor) else gate.node
        reach(node, False, hash((place, gate.output_nr)))
    while heap:
        node = heapq.heappop(heap)[2]
        dynamic = flags[node]
        for point in points(node):
            outputs = len(node._input_metadata)
            known = point.dims if isinstance(point, Call) else None
            dims = (0,) * outputs if known is None else known.outputs
            shapes = tuple(tuple(x.shape) for x in node._input_metadata)
            found[point] = Found(node, tuple(dim or 0 for dim in dims), shapes, dynamic, paths[node])
        below = dynamic or _is_dynamic(node)
        path = hash((paths[node], _operation(node)))
        for place, (following, output) in enumerate(node.next_functions):
            reach(following, below, hash((path, place, output)))
    return found


def losses_below(roots: Sequence[Any], num_examples: int) -> GradientEdge | None:
    """The losses (B,) of which a root is the mean or sum, times a number; None where its graph does not show them."""
    if len(roots) != 1:
        return None
    (root,) = roots
    edge: tuple[Any, int] = (root.grad_fn if isinstance(root, Tensor) else root.node, root.output_nr)
    while edge[0] is not None:
        node, number = edge
        shape = tuple(node._input_metadata[number].shape)
        if shape == (num_examples,) and num_examples > 1:
            return GradientEdge(node, number)
        given = [following for following in node.next_functions if following[0] is not None]
        if any(size != 1 for size in shape) or len(given) != 1:
            return None
        edge = given[0]
    return None
