# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for one compute capability, without a device: run by test_kernels.py on its own."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clipping.kernels import formed, ghost, totals
from clipping.kernels.blocks import blocks_for, torch
from dpopt.randomness import philox_kernel

POINTERS = {"partial": "*fp32", "weights": "*fp32", "total": "*fp32", "values": "*fp32"}
SCALARS = {"std": "fp32", "factor": "fp32", "seed": "i64", "stream": "i64"}
# What triton sees when widths are multiples of 16 and rows lie densely: the case that must be fast.
ALIGNED = {
    "num_positions",
    "num_out",
    "num_in",
    "left_b",
    "left_k",
    "left_t",
    "right_b",
    "right_k",
    "right_t",
}
ONES = {"left_p": 1, "right_d": 1}


def compiled(kernel, dtype, constants, blocks, capability):
    constants = {**constants, **{name: 1 for name in ONES if name in kernel.arg_names}}
    pointers = {**POINTERS, "left": dtype, "right": dtype}
    kinds = {
        name: "constexpr" if name in constants else pointers.get(name, SCALARS.get(name, "i32"))
        for name in kernel.arg_names
    }
    aligned = [i for i, name in enumerate(kernel.arg_names) if name in ALIGNED or kinds[name].startswith("*")]
    source = ASTSource(kernel, kinds, constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check(capability):
    for dtype, name in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        blocks = blocks_for(dtype, 1000)
        sizes = {"TILE": blocks.tile, "WIDTH": blocks.width}
        for kernel, constants in (
            (ghost.ghost_kernel, {**sizes, "PARTS": 5}),
            (formed.formed_kernel, sizes),
            (totals.total_kernel, {**sizes, "ADD": True}),
        ):
            made = compiled(kernel, name, constants, blocks, capability)
            # Sums of runs outside the tensor core, which the rounding bound needs; and loads ahead of their use.
            assert "math.fma" in made.asm["ttgir"], kernel
            assert "cp.async" in made.asm["ptx"], kernel
            assert ("mma" in made.asm["ptx"]) == (dtype == torch.bfloat16), kernel
            assert "tf32" not in made.asm["ptx"], kernel
            assert made.metadata.shared <= 160 * 1024, kernel
    compiled(
        philox_kernel.normal_kernel,
        "",
        {"HALF": philox_kernel.HALF},
        blocks_for(torch.float32, 64),
        capability,
    )


if __name__ == "__main__":
    check(int(sys.argv[1]))
