# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of per-example gradients, with the weights applied in registers.

Shapes: B examples, K groups, T positions, P outputs, D inputs; S splits of the batch; TILE x TILE of (P, D)
per program, WIDTH positions per run.

Reference: Bu et al. (2022), arXiv:2210.00038 (one weighted product instead of B gradients).
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from clipping.kernels.blocks import Blocks, blocks_for, current
from clipping.rounding.norms import CHUNK_ELEMENTS

PROGRAMS = 256
"""Programs that fill a large device; fewer tiles than that are split over the batch."""


@triton.jit(do_not_specialize=["num_examples", "num_groups", "per_split", "runs", "tiles_out", "tiles_in"])
def total_kernel(
    left, right, weights, total, num_examples, num_positions, num_out, num_in, num_groups, per_split, runs,
    tiles_out, tiles_in, left_b, left_k, left_t, left_p, right_b, right_k, right_t, right_d,
    ADD: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """total[split, group, tile] (+)= sum over the examples of the split of weight * left^T right."""
    program = tl.program_id(0)
    block, tile = program // (tiles_out * tiles_in), program % (tiles_out * tiles_in)
    split, group = block // num_groups, (block % num_groups).to(tl.int64)
    outs = ((tile % tiles_out) * TILE + tl.arange(0, TILE)).to(tl.int64)
    ins = ((tile // tiles_out) * TILE + tl.arange(0, TILE)).to(tl.int64)
    positions = tl.arange(0, WIDTH)
    left_at = left + group * left_k + outs[:, None] * left_p
    right_at = right + group * right_k + ins[None, :] * right_d
    out_inside, in_inside = (outs < num_out)[:, None], (ins < num_in)[None, :]
    accumulator = tl.zeros((TILE, TILE), dtype=tl.float32)
    last = tl.minimum((split + 1) * per_split, num_examples)
    # One loop over (example, run of positions), so that loads are prefetched across examples.
    for step in range(split * per_split * runs, last * runs):
        example = (step // runs).to(tl.int64)
        at = (step % runs) * WIDTH + positions
        inside = at < num_positions
        weight = tl.load(weights + example)
        a_at = left_at + example * left_b + at.to(tl.int64)[None, :] * left_t
        b_at = right_at + example * right_b + at.to(tl.int64)[:, None] * right_t
        a = tl.load(a_at, mask=out_inside & inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & in_inside, other=0.0)
        run = tl.dot(a, b, input_precision="ieee")
        # Zero times NaN is NaN: what an example of weight 0 contributes is replaced, not multiplied.
        run = tl.where(weight != 0.0, run, 0.0)
        accumulator = tl.fma(run, weight, accumulator)
    out = total + block.to(tl.int64) * num_out * num_in + outs[:, None] * num_in + ins[None, :]
    if ADD:
        accumulator += tl.load(out, mask=out_inside & in_inside, other=0.0)
    tl.store(out, accumulator, mask=out_inside & in_inside)


def weighted_sum(
    left: Tensor, right: Tensor, weights: Tensor, into: Tensor, blocks: Blocks | None = None
) -> Tensor:
    """Add sum_b weights[b] sum_t left[b, :, t] right[b, :, t]^T to the contiguous float32 `into`, in place.

    `into` has K * P * D elements in that order, whatever its shape.

    Guarantees
    ----------
    Weights multiply float32 sums in registers: no scaled copy, and no rounding of weight * value to bfloat16.
    An example of weight exactly 0 contributes exactly nothing, also where it holds NaN or Inf. No atomics: the
    same input gives the same bits.
    """
    num_examples, num_groups, num_positions, num_out = left.shape
    num_in = right.shape[3]
    size = num_groups * num_out * num_in
    if into.dtype != torch.float32 or not into.is_contiguous() or into.numel() != size:
        raise ValueError(
            f"expected a contiguous float32 total of {size} elements; got {into.dtype}, shape {tuple(into.shape)}, "
            f"strides {into.stride()}; pass torch.zeros({size}) or use Outer.weighted_sum"
        )
    blocks = blocks or blocks_for(left.dtype, max(num_out, num_in))
    tiles_out, tiles_in = triton.cdiv(num_out, blocks.tile), triton.cdiv(num_in, blocks.tile)
    tiles = num_groups * tiles_out * tiles_in
    splits = max(1, min(PROGRAMS // tiles, CHUNK_ELEMENTS // size, num_examples))
    per_split = triton.cdiv(num_examples, splits)
    splits = triton.cdiv(num_examples, per_split)
    total = into if splits == 1 else torch.empty(splits, size, dtype=torch.float32, device=into.device)
    weights = weights.to(device=left.device, dtype=torch.float32).contiguous()
    with current(left.device):
        total_kernel[(splits * tiles,)](
            left, right, weights, total, num_examples, num_positions, num_out, num_in, num_groups, per_split,
            triton.cdiv(num_positions, blocks.width), tiles_out, tiles_in, *left.stride(), *right.stride(),
            ADD=splits == 1, TILE=blocks.tile, WIDTH=blocks.width,
            num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    if splits > 1:
        into.view(-1).add_(total.sum(0))
    return into
