# SPDX-License-Identifier: Apache-2.0
"""What a machine with a CUDA device must tell us, in one command: `python -m benchmarks.gpu`.

First whether kernels and whole steps are right against float64, then steps per second, peak memory and host
synchronisations of each variant, and how far from the device's own products they are. The table is written after
every setting, so that a run which is stopped keeps what it has; what the minutes do not reach is named.

    python -m benchmarks.gpu --wheels wheels   # a folder of wheels (peers, ours) for a machine without a network
    python -m benchmarks.gpu --tiny            # the same on the CPU in seconds: what the tests run
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="all that the command may take")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels to use, none of which is installed for good"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, on the CPU where there is no device"
    )
    parser.add_argument("--out", type=Path, help="report; default benchmarks/gpu_<device>_<date>.md")
    return parser.parse_args(words)


def use_wheels(folder: Path, into: str) -> None:
    """Unpack the wheels of `folder` into a folder of this run, and import from it."""
    wheels = [str(path) for path in sorted(folder.glob("*.whl"))]
    if not wheels:
        raise SystemExit(f"expected wheels in {folder.name}; got none; see pip download --no-deps")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        into,
        *wheels,
    ]
    subprocess.run(command, check=True)
    sys.path.insert(1, into)


def variants() -> list[tuple[str, object, bool]]:
    """(name, variant, kernels): the non-private step first."""
    from benchmarks.variants import FLOOR, VARIANTS, WORKAROUNDS
    from clipping import kernels

    found: list[tuple[str, object, bool]] = []
    for name, variant in VARIANTS.items():
        named, run = WORKAROUNDS.get(name, (name, variant))
        found.append((named if name != FLOOR else FLOOR, run, False))
        if name.startswith("dpopt") and kernels.available("cuda"):
            found.append((f"{name}, kernels", variant, True))
    return found


def machine(device: str, rounds: int) -> dict[str, float]:
    """What the device does at most: FLOP/s of large products and bytes/s of a copy; empty without one."""
    if device != "cuda":
        return {}
    from benchmarks.kernels import roofline

    return roofline(rounds)


def run(given: argparse.Namespace) -> int:
    """Check, measure, write; 1 where something is wrong."""
    import torch

    from benchmarks.gpu.correctness import engine_verdicts, kernel_verdict
    from benchmarks.gpu.shapes import CELLS, TINY
    from benchmarks.gpu.steps import measure
    from benchmarks.gpu.tables import Findings, markdown
    from benchmarks.report import FOLDER, command_line, slug, surroundings, today, write

    deadline = time.monotonic() + 60 * given.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.tiny:
        print("expected a CUDA device; got none; use --tiny to try the command on the CPU", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    path = given.out or FOLDER / f"gpu_{slug(name)}_{today()}.md"
    command = command_line("benchmarks.gpu", sys.argv[1:])
    kernel = kernel_verdict(device)
    verdicts = ([] if kernel is None else [kernel]) + engine_verdicts(device)
    found = Findings(name, command, surroundings(), verdicts, {} if given.tiny else machine(device, 5))
    for cell in TINY if given.tiny else CELLS:
        if time.monotonic() > deadline:
            found.left_out.append(cell.title)
            continue
        print(f"{cell.title} ...", flush=True)
        found.cells[cell.title] = measure(cell, variants(), device, left=lambda: deadline - time.monotonic())  # pyright: ignore[reportArgumentType]
        write(path, markdown(found), asdict(found))
    print(markdown(found))
    return 0 if all(verdict.right for verdict in verdicts) else 1


def main() -> int:
    """Put the wheels on the path, then run."""
    given = arguments()
    if given.wheels is None:
        return run(given)
    with tempfile.TemporaryDirectory() as folder:
        use_wheels(given.wheels, folder)
        return run(given)


if __name__ == "__main__":
    sys.exit(main())
