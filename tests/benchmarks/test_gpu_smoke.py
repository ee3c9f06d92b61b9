# SPDX-License-Identifier: Apache-2.0
"""The device benchmark on the CPU: every part runs, and a wrong gradient is called wrong."""

import torch

from benchmarks.gpu import correctness
from tests.benchmarks.test_smoke import figures, run


def test_the_device_benchmark_runs_on_the_cpu(tmp_path):
    path = tmp_path / "gpu.md"
    run("benchmarks.gpu", "--tiny", "--out", str(path))
    found = figures(path)
    assert all(verdict["right"] for verdict in found["verdicts"])
    assert len(found["cells"]) == 2
    for cell in found["cells"].values():
        assert {"non-private", "dpopt flat", "dpopt per-layer"} <= set(cell["figures"])


def test_a_gradient_that_is_not_clipped_is_called_wrong(monkeypatch):
    right = correctness.released
    monkeypatch.setattr(correctness, "MODELS", {"mlp": correctness.MODELS["mlp"]})
    monkeypatch.setattr(
        correctness,
        "released",
        lambda task, clip_norm, *, layered: right(task, 1.01 * clip_norm, layered=layered),
    )
    verdicts = correctness.engine_verdicts("cpu")
    assert verdicts
    assert not any(verdict.right for verdict in verdicts if "fp32" in verdict.name)


def test_a_missing_gradient_is_called_wrong():
    assert correctness._error({}, {"w": torch.ones(2)}) == float("inf")
