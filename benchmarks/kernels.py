# SPDX-License-Identifier: Apache-2.0
"""Each Triton kernel against the PyTorch path it replaces, beside what the device can do at most.

    python -m benchmarks.kernels

Times are medians of CUDA events; the two paths alternate within a round. The roofline is measured in the same
run: a large matrix product in the dtype, and a large copy. Work is counted as the mathematics needs it (the
symmetric half of a Gram once; inputs read and outputs written once), so both paths have the same numerator.

Shapes: B examples, T positions, P outputs, D inputs, of one linear layer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import report
from clipping import Outer, kernels

LAYERS = {
    "gpt2 attention": (768, 2304),
    "gpt2 mlp": (3072, 768),
    "gpt2-medium mlp": (4096, 1024),
    "llama-1b mlp": (8192, 2048),
    "llama-1b kv": (512, 2048),
}
POSITIONS = (512, 1024, 2048)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = 16384
"""B * T: what a device of this size trains on at a time."""


@dataclass(frozen=True)
class Case:
    """One kernel on one layer: what it does, and what that needs."""

    kernel: str
    layer: str
    dtype: str
    positions: int
    flops: float
    bytes: float


@dataclass(frozen=True)
class Timed:
    """Median seconds of both paths."""

    case: Case
    triton: float
    pytorch: float


def medians(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each call; they alternate, after two rounds that do not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for done in range(rounds + 2):
        for i, call in enumerate(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if done >= 2:
                seconds[i].append(start.elapsed_time(end) / 1e3)
    return [statistics.median(some) for some in seconds]


def roofline(rounds: int) -> dict[str, float]:
    """FLOP/s of a large product per dtype, and bytes/s of a large copy."""
    size, peaks = 8192, {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        peaks[name] = 2 * size**3 / medians([lambda a=a, b=b: a @ b], rounds)[0]
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    peaks["bytes"] = 2 * source.nbytes / medians([lambda: target.copy_(source)], rounds)[0]
    return peaks


def _without(call: Callable[[], object]) -> Callable[[], object]:
    def pytorch() -> object:
        with kernels.without():
            return call()

    return pytorch


def layer_cases(layer: str, dtype: str, positions: int, rounds: int) -> list[Timed]:
    """Both norms and the weighted sum of one layer."""
    num_out, num_in = LAYERS[layer]
    num_examples = max(1, TOKENS // positions)
    made = [
        torch.randn(num_examples, 1, positions, width, device="cuda", dtype=DTYPES[dtype])
        for width in (num_out, num_in)
    ]
    grads = Outer(made[0], made[1], torch.Size((num_out, num_in)))
    weights = torch.rand(num_examples, device="cuda")
    into = torch.zeros(num_out, num_in, device="cuda")
    read = made[0].nbytes + made[1].nbytes
    half_gram = num_examples * positions * (positions + 1) * (num_out + num_in)
    product = 2 * num_examples * positions * num_out * num_in
    calls: dict[str, tuple[Callable[[], object], float, float]] = {
        "ghost norm": (lambda: grads._ghost_norms(None), half_gram, read),
        "formed norm": (grads.formed_norms, product, read),
        "weighted sum": (lambda: grads.weighted_sum(weights, into), product, read + 2 * into.nbytes),
    }
    timed = []
    for name, (call, flops, moved) in calls.items():
        fused, plain = medians([call, _without(call)], rounds)
        timed.append(Timed(Case(name, layer, dtype, positions, flops, moved), fused, plain))
    return timed


def noise_case(count: int, rounds: int) -> Timed:
    """Noise on a parameter of `count` elements."""
    from dpopt.mechanisms.gaussian import add_normal as plain_noise
    from dpopt.randomness.philox import add_normal

    values = torch.zeros(count, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    fused, plain = medians(
        [lambda: add_normal(values, 1.0, 1, 0), lambda: plain_noise(values, 1.0, generator)], rounds
    )
    return Timed(Case("noise", f"{count} elements", "fp32", 0, 0.0, 2.0 * values.nbytes), fused, plain)


def markdown(timed: list[Timed], peaks: dict[str, float], device: str, command: str) -> str:
    """The report."""
    lines = []
    for row in timed:
        case = row.case
        lines.append([
            case.kernel, case.layer, case.dtype, str(case.positions or ""), f"{1e3 * row.triton:.3f}",
            f"{1e3 * row.pytorch:.3f}", f"{row.pytorch / row.triton:.2f}", f"{case.flops / row.triton / 1e12:.1f}",
            f"{case.flops / row.triton / peaks[case.dtype]:.0%}", f"{case.bytes / row.triton / 1e9:.0f}",
            f"{case.bytes / row.triton / peaks['bytes']:.0%}",
        ])  # fmt: skip
    header = (
        "kernel", "layer (P, D)", "dtype", "T", "Triton ms", "PyTorch ms", "faster by", "TFLOP/s", "of product",
        "GB/s", "of copy",
    )  # fmt: skip
    roof = ", ".join(f"{name} product {peaks[name] / 1e12:.0f} TFLOP/s" for name in DTYPES)
    return (
        f"# Kernels on {device}\n\n`{command}`\n\n{report.described(report.surroundings())}\n\n"
        f"Roofline measured in this run: {roof}, copy {peaks['bytes'] / 1e9:.0f} GB/s. B * T = {TOKENS}.\n\n"
        + report.table(header, lines)
    )


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds per case")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--positions", nargs="+", type=int, default=list(POSITIONS))
    parser.add_argument("--out", type=Path, help="report; default benchmarks/<device>_kernels_<date>.md")
    return parser.parse_args(words)


def main() -> int:
    """Time everything and write the report; 1 where there is nothing to time."""
    given = arguments()
    if not torch.cuda.is_available() or not kernels.trusted("cuda"):
        print(
            "expected a CUDA device of compute capability 8.0 or more, with triton, on which the kernels agree with "
            f"PyTorch; got none (torch {torch.__version__}); run this on such a machine, pip install 'dpopt[gpu]'",
            file=sys.stderr,
        )
        return 1
    kernels.enable()
    device = torch.cuda.get_device_name()
    timed = [
        row
        for layer in given.layers
        for dtype in given.dtypes
        for positions in given.positions
        for row in layer_cases(layer, dtype, positions, given.rounds)
    ]
    timed += [noise_case(count, given.rounds) for count in (768 * 768, 50257 * 768, 1 << 28)]
    peaks = roofline(given.rounds)
    path = given.out or report.FOLDER / f"{report.slug(device)}_kernels_{report.today()}.md"
    command = report.command_line("benchmarks.kernels", sys.argv[1:])
    figures = {"device": device, "roofline": peaks, "timed": [asdict(row) for row in timed]}
    report.write(path, markdown(timed, peaks, device, command), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
