# SPDX-License-Identifier: Apache-2.0
"""What the noise of each tier of randomness costs, per million coordinates: variants alternate, medians of rounds.

python -m benchmarks.noise
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from clipping import ClippedSum
from dpopt.mechanisms import GaussianMechanism, WholeSum, gridded, release_whole
from dpopt.randomness.cipher import CipherKey
from dpopt.randomness.ziggurat import whole_normals

GPT2_SMALL = 124_439_808
KEY = CipherKey(bytes(32))
MECHANISM = GaussianMechanism(1.0)


def variants(size: int) -> Mapping[str, Callable[[], object]]:
    """Each noises `size` float32 coordinates; the first is the floor."""
    total, raw, generator = torch.randn(size), torch.empty(size), torch.Generator()
    words, stream = KEY.stream().words(size), KEY.stream()
    cells = gridded(MECHANISM).cells(ClippedSum({"w": total}, 1.0))
    whole = WholeSum({"w": torch.zeros(size, dtype=torch.int64)}, cells, torch.float32)
    return {
        "normal_ alone": lambda: raw.normal_(generator=generator),
        "fast release": lambda: MECHANISM.release(ClippedSum({"w": total}, 1.0), lambda *_: generator, 8.0),
        "AES-256-CTR alone": lambda: stream.fill(words),
        "whole normals alone": lambda: whole_normals(size, stream),
        "secure release": lambda: gridded(MECHANISM).release(
            ClippedSum({"w": total}, 1.0), lambda *_: KEY, 8.0
        ),
        "secure release, whole sums": lambda: release_whole(whole, lambda *_: KEY, 8.0),
    }


def measured(size: int, rounds: int) -> dict[str, list[float]]:
    """Wall milliseconds per million coordinates, one for each round."""
    calls = variants(size)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            calls[name]()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / size * 1e9)
    return times


def table(times: Mapping[str, list[float]]) -> str:
    """One row for each variant, with its time over the floor's of the same round."""
    floor = next(iter(times.values()))
    lines = ["| noise | ms per 10^6 | x normal_ | s per GPT-2 small |", "|---|---|---|---|"]
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, floor, strict=True))
        middle = statistics.median(values)
        lines.append(f"| {name} | {middle:.2f} | {ratio:.2f} | {middle * GPT2_SMALL / 1e9:.2f} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=4.0, help="coordinates, in millions")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    print(table(measured(int(options.millions * 1e6), options.rounds)))


if __name__ == "__main__":
    main()
