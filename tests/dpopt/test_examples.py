# SPDX-License-Identifier: Apache-2.0
"""Each example runs offline, with tiny settings, and prints an epsilon within its target."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples"
TINY = {
    "01_privacy_engine": ["--records", "200", "--epochs", "1", "--batch-size", "50"],
    "02_char_lstm": ["--names", "60", "--epochs", "1", "--batch-size", "50", "--width", "8"],
    "03_text_classifier": ["--texts", "40", "--epochs", "1", "--batch-size", "20", "--buckets", "50"],
    "05_gan": ["--records", "200", "--epochs", "1", "--batch-size", "50", "--width", "8"],
    "04_private_training": ["--records", "20", "--validation", "4", "--steps", "2", "--batch-size", "8",
                         "--micro-batch", "4", "--tokens", "12"],
    "06_estimators": ["--records", "30", "--steps", "2"],
    "07_audit": ["--texts", "20", "--steps", "10", "--canaries", "50"],
}  # fmt: skip


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, capsys, name, *more):
    monkeypatch.setattr(sys, "argv", [name, *TINY[name], *more])
    load(name).main()
    printed = capsys.readouterr().out
    epsilons = [float(found) for found in re.findall(r"epsilon (\d+\.\d+)", printed)]
    assert epsilons and all(0 < epsilon <= 8 for epsilon in epsilons), printed
    assert re.search(r"(accuracy|loss) \d", printed)
    return printed


def test_every_example_is_run_here_and_stays_short():
    assert sorted(TINY) == sorted(path.stem for path in FOLDER.glob("*.py"))
    assert all(len(path.read_text().splitlines()) <= 300 for path in FOLDER.glob("*.py"))


# The examples read the sources of whole packages; the test takes small ones.
@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_example_runs(name, monkeypatch, capsys):
    if name == "04_private_training":
        import dpopt.embedded as embedded

        records = embedded.Records(
            train=tuple(f"Return the number {i} of the list." for i in range(20)),
            validation=("Return the sum.",) * 4,
            sources=(),
        )
        monkeypatch.setattr(embedded, "private_records", lambda **_: records)
    if name == "02_char_lstm":
        monkeypatch.setattr(Path, "rglob", lambda self, _: self.glob("*.py"))
    if name == "03_text_classifier":
        import dpopt.embedded.docstrings as docstrings

        original = docstrings.package_folder
        monkeypatch.setattr(docstrings, "package_folder", lambda package: original(package) / SMALL[package])
    run(monkeypatch, capsys, name)


SMALL = {"networkx": "classes", "sympy": "sets", "scipy": "cluster"}


def test_the_first_example_reads_mnist(monkeypatch, capsys, tmp_path):
    source = np.random.default_rng(0)
    arrays = {}
    for part, size in (("train", 60), ("test", 10)):
        arrays[f"x_{part}"] = source.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = source.integers(0, 10, size, dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    assert "60 images" in run(monkeypatch, capsys, "01_privacy_engine", "--data", str(tmp_path / "mnist.npz"))
