# SPDX-License-Identifier: Apache-2.0
"""The ghost norm without its Gram matrices: each program multiplies one pair of tiles and keeps five numbers.

Shapes: B examples, K groups, T positions, P outputs, D inputs; TILE positions per tile, WIDTH terms per run.

Reference: Li et al. (2021), arXiv:2110.05679, section 4 (the norm); the fusion and its bound are ours.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from clipping.kernels.blocks import EPSILON, SUM_EPSILONS, Blocks, blocks_for, current

_PARTS = 5


@triton.jit
def tile_norm(values):
    """Euclidean norm of a tile, scaled by its largest element so that no square overflows or vanishes."""
    largest = tl.max(tl.max(tl.abs(values), axis=1), axis=0)
    scale = tl.where(largest > 0, largest, 1.0)  # pyright: ignore[reportOperatorIssue]
    scaled = values / scale
    return scale * tl.sqrt(tl.sum(tl.sum(scaled * scaled, axis=1), axis=0))


@triton.jit
def gram_tile(
    at, rows, columns, length, width, stride_t, stride_w, TILE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """(TILE, TILE): inner products of positions `rows` with positions `columns` of one (T, width) matrix."""
    offsets = tl.arange(0, WIDTH).to(tl.int64)
    rows_at = at + rows.to(tl.int64)[:, None] * stride_t + offsets[None, :] * stride_w
    columns_at = at + columns.to(tl.int64)[None, :] * stride_t + offsets[:, None] * stride_w
    row_inside, column_inside = (rows < length)[:, None], (columns < length)[None, :]
    # Strides are 32 bits wide where they fit; a run of positions may not be.
    run = tl.full((), WIDTH, dtype=tl.int64)
    gram = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        inside = offsets < width - start
        a = tl.load(rows_at, mask=row_inside & inside[None, :], other=0.0)
        b = tl.load(columns_at, mask=inside[:, None] & column_inside, other=0.0)
        # A plain `+` would be folded into the tensor core's accumulator, which truncates; fma is not.
        gram = tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, gram)
        rows_at += run * stride_w
        columns_at += run * stride_w
    return gram


@triton.jit
def lower_pair(pair):
    """The row and column of the `pair`-th entry of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root is rounded, so the row may be off by one.
    row = tl.where((row * (row + 1)) // 2 > pair, row - 1, row)
    row = tl.where(((row + 1) * (row + 2)) // 2 <= pair, row + 1, row)
    return row, pair - (row * (row + 1)) // 2


@triton.jit(do_not_specialize=["num_pairs", "num_groups"])
def ghost_kernel(
    left, right, partial, num_positions, num_out, num_in, num_groups, num_pairs,
    left_b, left_k, left_t, left_p, right_b, right_k, right_t, right_d,
    PARTS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """partial[program] = sum of product, norms of both Grams, both traces, of one (example, group, tile pair)."""
    program = tl.program_id(0)
    block = program // num_pairs
    example, group = (block // num_groups).to(tl.int64), (block % num_groups).to(tl.int64)
    row, column = lower_pair(program % num_pairs)
    rows, columns = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    left_at = left + example * left_b + group * left_k
    right_at = right + example * right_b + group * right_k
    gram_left = gram_tile(
        left_at, rows, columns, num_positions, num_out, left_t, left_p, TILE, WIDTH
    )  # fmt: skip
    gram_right = gram_tile(
        right_at, rows, columns, num_positions, num_in, right_t, right_d, TILE, WIDTH
    )  # fmt: skip
    product = tl.sum(tl.sum(gram_left * gram_right, axis=1), axis=0)
    own = rows[:, None] == columns[None, :]
    trace_left = tl.sum(tl.sum(tl.where(own, gram_left, 0.0), axis=1), axis=0)
    trace_right = tl.sum(tl.sum(tl.where(own, gram_right, 0.0), axis=1), axis=0)
    # A tile off the diagonal stands for its mirror image too: twice the sum, sqrt(2) times the norm.
    off = row != column
    factor = tl.where(off, 2.0, 1.0)
    root = tl.where(off, 1.4142135623730951, 1.0)
    out = partial + program.to(tl.int64) * PARTS
    tl.store(out, product * factor)
    tl.store(out + 1, tile_norm(gram_left) * root)
    tl.store(out + 2, tile_norm(gram_right) * root)
    tl.store(out + 3, trace_left)
    tl.store(out + 4, trace_right)


def ghost_sq_norm(
    left: Tensor, right: Tensor, blocks: Blocks | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(B,) squared norms of sum_t left_t right_t^T over (B, K, T, P) and (B, K, T, D), and both traces.

    Guarantees
    ----------
    Rounded up, so that it bounds both the true squared norm and that of what `totals.weighted_sum` adds.
    With u the rounding of an inner product (`Blocks.rounding`), |error of (A A^T)_ts| <= u |a_t| |a_s|, hence
    the sum of products errs by at most u (tr A |G G^T| + |A A^T| tr G) + u^2 tr A tr G by Cauchy-Schwarz,
    and the weighted sum moves its squared norm by as much again, since |A^T G|^2 <= |A A^T| |G G^T|. The
    norms |.| are Frobenius norms of the Grams, which the kernel sums as well: where positions do not cancel
    they are far below the traces, and with tr A tr G alone, the margin at T = 1024 would be 3%.
    inf or NaN where an example is not finite. No atomics: the same input gives the same bits.
    """
    num_examples, num_groups, num_positions, num_out = left.shape
    num_in = right.shape[3]
    blocks = blocks or blocks_for(left.dtype, num_positions)
    num_tiles = triton.cdiv(num_positions, blocks.tile)
    num_pairs = num_tiles * (num_tiles + 1) // 2
    programs = num_examples * num_groups * num_pairs
    partial = torch.empty(programs, _PARTS, dtype=torch.float32, device=left.device)
    with current(left.device):
        ghost_kernel[(programs,)](
            left, right, partial, num_positions, num_out, num_in, num_groups, num_pairs,
            *left.stride(), *right.stride(), PARTS=_PARTS, TILE=blocks.tile, WIDTH=blocks.width,
            num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    parts = partial.view(num_examples, num_groups * num_pairs, _PARTS).double()
    return _bounded(parts, blocks.rounding(max(num_positions, num_out, num_in)))


def _bounded(parts: Tensor, rounding: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    product, trace_left, trace_right = (parts[:, :, i].sum(1) for i in (0, 3, 4))
    norm_left, norm_right = (torch.linalg.vector_norm(parts[:, :, i], dim=1) for i in (1, 2))
    error = 2 * rounding * (trace_left * norm_right + norm_left * trace_right)
    error = (
        error + 2 * rounding**2 * trace_left * trace_right + SUM_EPSILONS * EPSILON * norm_left * norm_right
    )
    # -inf + a finite margin would come out as a small norm.
    sq_norm = torch.where(torch.isfinite(product), product.clamp_min(0) + error, torch.inf)
    return sq_norm.float(), (trace_left.float(), trace_right.float())
