# SPDX-License-Identifier: Apache-2.0
"""What is published is what was tested: the wheel holds the three packages, the embedded model, and the command."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = folder / "source"  # building leaves folders behind, which have no place in the checkout
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if name.startswith(("accountants/", "clipping/", "dpopt/")) or "/" not in name:
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(copy)], capture_output=True, text=True, check=False, cwd=folder
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_source_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ("accountants", "clipping", "dpopt"):
        for path in (ROOT / package).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in held
    assert any(name.startswith("dpopt/embedded/model/") for name in held)
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in held)


def test_the_installed_wheel_works_elsewhere(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(target), str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    code = (
        "import dpopt, dpopt.embedded, sys; assert dpopt.__file__.startswith(sys.argv[1]), dpopt.__file__;"
        "assert (dpopt.embedded.model_path() / 'model.safetensors').exists();"
        "print(dpopt.epsilon(noise_multiplier=1.0, sampling_rate=0.01, steps=100, delta=1e-5))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < float(done.stdout.split()[-1]) < 2
    asked = subprocess.run(
        [sys.executable, str(target / "bin" / "dpopt"), "--help"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert "finetune" in asked.stdout
