# SPDX-License-Identifier: Apache-2.0
"""Opacus' own examples and tutorials with the import line changed: which run, and why the others do not.

    python -m benchmarks.opacus_scripts --opacus CHECKOUT [--only NAME] [--write]

CHECKOUT is a clone of Opacus' repository at the version that is installed. Every script runs three times in a process of
its own, on the stand-ins of `benchmarks.opacus_stand_ins` for its data: as it is, with Opacus, which shows that it runs
here at all; with every `from opacus... import` made `from dpopt.opacus import`; and, where that is refused, with the
edits that are listed below. Epochs are cut to one in all three.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.opacus_stand_ins import write_names

ROOT = Path(__file__).resolve().parent.parent
IMPORT = re.compile(r"^(\s*from )opacus[\w.]*( import)", re.MULTILINE)

Edit = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Script:
    """One example or tutorial: its arguments, what is cut short in it, and edits beyond the import line.

    `why` is the reason of the refusal that these edits answer, or of one that no edit answers. What needs several GPUs or
    packages that are gone does not `run`.
    """

    path: str
    arguments: tuple[str, ...] = ()
    shorter: tuple[Edit, ...] = ()
    edits: tuple[Edit, ...] = ()
    why: str = ""
    run: bool = True

    @property
    def name(self) -> str:
        """The file, with what tells its runs apart."""
        told = [word for word in self.arguments if word in ("gru", "rnn", "--clip_per_layer")]
        return " ".join([Path(self.path).name, *told])


_NAMES = ("--data-root", "names", "--device", "cpu", "--epochs", "1")
_CUT = (("EPOCHS = 20", "EPOCHS = 1"), ("EPOCHS = 3", "EPOCHS = 1"), ("epochs = 50", "epochs = 1"))
_CPU = (('torch.device("cuda:0")', 'torch.device("cpu")'), ("device=device)", "device=device)"))
_GENERATOR = (
    (
        "        output_g = netD(fake)\n",
        "        with privacy_engine.paused():\n         output_g = netD(fake)\n",
    ),
    ("        errG = criterion(output_g, label_g)\n", "         errG = criterion(output_g, label_g)\n"),
    ("        errG.backward()\n", "         errG.backward()\n"),
)
_RANKS = "one process trains: no process groups, DDP or FSDP yet"

SCRIPTS = (
    Script("examples/mnist.py", ("--device", "cpu", "-n", "1", "-r", "2")),
    Script("examples/cifar10.py", ("--epochs", "1", "--batch-size", "40", "-j", "0")),
    Script("examples/cifar10.py", ("--epochs", "1", "--batch-size", "40", "-j", "0", "--clip_per_layer")),
    Script("examples/char-lstm-classification.py", _NAMES),
    Script("examples/char-lstm-classification.py", (*_NAMES, "--mode", "gru")),
    Script("examples/char-lstm-classification.py", (*_NAMES, "--mode", "rnn")),
    Script(
        "examples/dcgan.py",
        ("--data-root", ".", "--device", "cpu", "--epochs", "1", "--workers", "0", "--ndf", "8", "--ngf", "8",
         "--batch-size", "4", "--target-digit", "3"),
        edits=_GENERATOR,
        why="the generator's backward would go through the private discriminator's parameters: paused()",
    ),
    Script(
        "examples/imdb.py",
        ("--device", "cpu", "-n", "1", "-j", "0", "-b", "16"),
        edits=(("            poisson_sampling=False,\n", ""),),
        why="poisson_sampling=False: shuffled batches at the price of Poisson ones",
    ),
    Script(
        "examples/vision_benchmark.py",
        ("--steps", "2", "-b", "8", "--height", "32", "--width", "32", "-j", "0", "--benchmark-data-loader"),
        edits=(("            poisson_sampling=False,\n", ""),),
        why="poisson_sampling=False: shuffled batches at the price of Poisson ones",
    ),
    Script("examples/mnist_lightning.py", ("fit",), run=False, why="written for Lightning before 2.0 and pl_bolts, which are gone"),
    Script("examples/fsdp_example.py", run=False, why=_RANKS),
    Script("examples/fsdp_llama3.py", run=False, why=_RANKS),
    Script("examples/tensor_parallelism_toy.py", run=False, why=_RANKS),
    Script("examples/tensor_parallelism_llama.py", run=False, why=_RANKS),
    Script("tutorials/building_image_classifier.ipynb", shorter=(*_CUT, ("BATCH_SIZE = 512", "BATCH_SIZE = 60"))),
    Script(
        "tutorials/building_lstm_name_classifier.ipynb",
        shorter=(*_CUT, ("for epoch in range(epochs):\n    train(model_nodp, criterion, optimizer_nodp, train_loader, epoch, "
                         "device=device)", "for epoch in range(0):\n    pass")),
        edits=(("delta = 8e-5", "delta = 5e-5"),),
        why="delta 8e-5 is above 1 / 16,059 names",
    ),
    Script(
        "tutorials/building_text_classifier.ipynb",
        shorter=(*_CUT, *_CPU),
        edits=(("DELTA = 1 / len(train_dataloader)", "DELTA = 1 / len(train_dataset)"),),
        why="delta = 1 / number of batches is above 1 / number of records",
    ),
    Script("tutorials/non_wrapping_mode.ipynb", shorter=_CUT),
    Script(
        "tutorials/intro_to_advanced_features.ipynb",
        why="shows the wrappers from inside: p.grad_sample, a DPOptimizer by hand; nothing is wrapped here",
    ),
    Script("tutorials/ddp_tutorial.ipynb", run=False, why=_RANKS),
)  # fmt: skip


def source_of(checkout: Path, script: Script) -> str:
    """The script, or the code cells of the notebook."""
    text = (checkout / script.path).read_text()
    if script.path.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        lines = "\n\n".join("".join(cell["source"]) for cell in cells).splitlines()
        text = "\n".join(line for line in lines if not line.startswith(("%", "!"))) + "\n"
    return edited(text, script.shorter)


def edited(text: str, edits: tuple[Edit, ...]) -> str:
    """`text` with every edit made wherever it fits."""
    for old, new in edits:
        text = text.replace(old, new)
    return text


def changed_lines(before: str, after: str) -> int:
    """How many lines of `before` are not in `after`, or the other way round, whichever is more."""
    old, new = before.splitlines(), after.splitlines()
    return max(len([line for line in old if line not in new]), len([line for line in new if line not in old]))


def attempt(text: str, script: Script, timeout: float) -> str:
    """Run `text` in a folder of its own: "" where it ends well, else its last line."""
    with tempfile.TemporaryDirectory() as folder:
        write_names(Path(folder) / "names")
        (Path(folder) / "script.py").write_text(text)
        command = [sys.executable, "-m", "benchmarks.opacus_stand_ins", "script.py", *script.arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return f"no end in {timeout:.0f} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else lines[-1] if lines else f"exit code {done.returncode}"


def verdict(checkout: Path, script: Script, timeout: float) -> dict[str, str]:
    """One row of the table."""
    row = {
        "script": script.name,
        "Opacus": "not run",
        "changed": "not run",
        "why": script.why,
        "theirs": "",
        "ours": "",
    }
    if not script.run:
        return row
    text = source_of(checkout, script)
    theirs = attempt(text, script, timeout)
    ours = IMPORT.sub(r"\1dpopt.opacus\2", text)
    found = attempt(ours, script, timeout)
    row |= {"Opacus": _told(theirs), "changed": "import only", "theirs": theirs, "ours": found}
    if not found:
        return row | {"why": ""}
    if script.edits:
        again = edited(ours, script.edits)
        found = attempt(again, script, timeout)
        if not found:
            return row | {"changed": f"{changed_lines(ours, again)} more"}
    return row | {"changed": "refused", "why": script.why or found}


def _told(error: str) -> str:
    if not error:
        return "runs"
    in_place = "is a view and is being modified inplace" in error
    return f"fails ({'in-place activation under its hooks' if in_place else error[:80]})"


def table(rows: list[dict[str, str]]) -> str:
    """Markdown."""
    lines = ["| script | with Opacus here | with dpopt: lines changed | because |", "|---|---|---|---|"]
    lines += [f"| {row['script']} | {row['Opacus']} | {row['changed']} | {row['why']} |" for row in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run all, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opacus", type=Path, required=True, help="a clone of Opacus' repository")
    parser.add_argument("--only", default="", help="scripts with this in their name")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--write", action="store_true", help="write benchmarks/opacus_scripts_DATE.md")
    options = parser.parse_args(arguments)
    rows = []
    for script in SCRIPTS:
        if options.only in script.name:
            rows.append(verdict(options.opacus, script, options.timeout))
            print({key: value[:300] for key, value in rows[-1].items()}, file=sys.stderr, flush=True)
    page = f"# Opacus' examples and tutorials with the import line changed\n\n{_PREFACE}\n{table(rows)}\n"
    print(page)
    if options.write:
        (report.FOLDER / f"opacus_scripts_{report.today()}.md").write_text(page)


_PREFACE = """`python -m benchmarks.opacus_scripts --opacus CHECKOUT`: the scripts of Opacus 1.6.0, on small stand-ins for their data
and models, one epoch, on the CPU. *import only*: every `from opacus... import` became `from dpopt.opacus import`, and nothing
else. *n more*: so many lines beside that.
"""

if __name__ == "__main__":
    main()
