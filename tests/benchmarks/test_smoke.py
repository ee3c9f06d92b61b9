# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, timeout: float = 600) -> str:
    """The output of a benchmark, which must end well."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def figures(path: Path) -> dict:
    """The JSON beside a report, after checking that neither names this machine."""
    for text in (path.read_text(), path.with_suffix(".json").read_text()):
        assert str(path.parent) not in text
        assert str(ROOT) not in text
        assert os.uname().nodename not in text
    return json.loads(path.with_suffix(".json").read_text())


def test_step_times_and_profiles_a_tiny_model(tmp_path):
    path = tmp_path / "steps.md"
    run(
        "benchmarks.step", "--models", "mlp-tiny", "--variants", "dpopt flat", "--rounds", "2",
        "--no-memory", "--out", str(path),
    )  # fmt: skip
    found = figures(path)["models"]["mlp-tiny"]
    assert set(found["measured"]["timings"]) == {"non-private", "dpopt flat"}
    assert found["measured"]["failures"] == {}
    assert found["phases"]["missing"] == []
    assert {"norms", "weighted sums", "noise", "ledger"} <= set(found["phases"]["dpopt flat"])


@pytest.mark.slow
def test_step_runs_every_variant_and_measures_memory(tmp_path):
    path = tmp_path / "steps.md"
    run("benchmarks.step", "--models", "mlp-tiny", "--rounds", "2", "--out", str(path))
    found = figures(path)["models"]["mlp-tiny"]["measured"]
    assert {"opacus hooks", "opacus ghost", "dpopt per-layer"} <= set(found["timings"])
    assert set(found["peaks"]) == set(found["timings"])


@pytest.mark.slow
def test_a_variant_that_fails_says_why_and_stops_nothing(tmp_path):
    path = tmp_path / "steps.md"
    run(
        "benchmarks.step", "--models", "gpt2-like", "--variants", "opacus hooks", "--rounds", "1",
        "--no-memory", "--no-phases", "--out", str(path),
    )  # fmt: skip
    found = figures(path)["models"]["gpt2-like"]["measured"]
    assert "opacus hooks" in found["failures"]
    assert "opacus hooks, position ids passed in" in found["timings"]


@pytest.mark.slow
def test_utility_compares_the_libraries(tmp_path):
    from dpopt.embedded import model_path

    rows = [{"mr": f"name[The {i}], area[riverside]", "ref": f"The {i} is by the river."} for i in range(80)]
    for name in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    path = tmp_path / "utility.md"
    run(
        "benchmarks.utility", "--model", str(model_path()), "--data", str(tmp_path), "--epsilons", "8",
        "--seeds", "0", "--num-train", "32", "--num-validation", "16", "--batch-size", "8", "--steps", "2",
        "--learning-rates", "1e-3", "--jobs", "1", "--delta", "1e-3", "--out", str(path),
    )  # fmt: skip
    found = figures(path)
    assert found["failures"] == []
    assert {entry["library"] for entry in found["runs"]} == {"dpopt", "opacus", "non-private"}
