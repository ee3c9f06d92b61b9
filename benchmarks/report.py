# SPDX-License-Identifier: Apache-2.0
"""Reports: markdown for people and JSON beside it, named by processor and date.

The law of this file: no report names a host or a path of the machine it was made on.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "opacus",
    "fastDP",
    "dp-accounting",
    "prv-accountant",
    "numpy",
    "scipy",
)


def processor() -> str:
    """The marketing name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def today() -> str:
    """ISO date."""
    return datetime.date.today().isoformat()


def default_path(prefix: str = "") -> Path:
    """benchmarks/results/[prefix_]<processor>_<date>.md."""
    return FOLDER / f"{prefix + '_' if prefix else ''}{slug(processor())}_{today()}.md"


def surroundings() -> dict[str, object]:
    """What a reader needs to place the figures: hardware, load, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_end": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
        "date": today(),
    }


def described(around: dict[str, object]) -> str:
    """One line of `surroundings`."""
    versions = around["versions"]
    assert isinstance(versions, dict)
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{around['processor']}, {around['cores']} cores, {around['threads']} thread(s) used, load at the end "
        f"{around['load_at_end']}; Python {around['python']}, {named}; {around['date']}."
    )


def command_line(module: str, arguments: Iterable[str]) -> str:
    """The command, with absolute paths cut to their last part."""
    shown = (Path(word).name if os.path.isabs(word) else word for word in arguments)
    return shlex.join(["python", "-m", module, *shown])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def write(path: Path, markdown: str, figures: dict[str, object]) -> None:
    """Write `path` and its `.json` neighbour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown.rstrip() + "\n")
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"wrote {path.name} and {path.with_suffix('.json').name}")
