# SPDX-License-Identifier: Apache-2.0
"""A run from records to a saved model and a report; what goes wrong on the way loses nothing."""

import errno
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpopt
from accountants import read, verify
from dpopt.embedded import Records
from dpopt.finetune import BudgetExhausted, FinetuneConfig, InputError, NotSaved, finetune
from dpopt.finetune import saving as saving_module
from dpopt.reports.report import Report, rounded_up
from dpopt.training import PrivateTraining


def charges(ledger: Path) -> int:
    return sum(record.kind == "charge" for record in read(ledger).records)


def told(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_the_tuned_model_is_saved_and_loads(config, tiny_model: Path, validation_file: Path) -> None:
    result = finetune(config(validation=(validation_file,), validation_is_public=True))
    assert {path.name for path in result.out.iterdir()} == {
        "model",
        "report.json",
        "report.md",
        "report.html",
        "curves.png",
        "privacy.ledger.jsonl",
    }
    loaded = AutoModelForCausalLM.from_pretrained(result.saved_as)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, result.model.state_dict()[name])
    assert not torch.equal(loaded.lm_head.weight, base.lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(result.saved_as)) == len(result.tokenizer)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # raised by peft
def test_an_adapter_is_saved_and_loads(config, tiny_model: Path) -> None:
    result = finetune(config(lora_rank=2))
    assert result.saved_as.name == "adapter"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), result.saved_as)
    trained = {n: p for n, p in loaded.named_parameters() if "lora_B" in n}
    assert trained
    assert all(p.abs().sum() > 0 for p in trained.values())


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # raised by peft
@pytest.mark.parametrize(("estimator", "rank"), [("automatic", 0), ("per_layer:psac", 0), ("per_adapter", 2)])
def test_a_run_clips_as_it_was_asked_to(config, tmp_path: Path, estimator: str, rank: int) -> None:
    report = finetune(config(estimator=estimator, lora_rank=rank, clip_norm=0.5)).report
    assert (report.estimator, report.clip_norm) == (estimator, 0.5)
    flat = finetune(config(lora_rank=rank, out=tmp_path / "flat")).report
    assert report.epsilon == flat.epsilon
    assert f"{estimator}: each step is the Gaussian" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("optimizer", ["adam-bc", "sgd"])
def test_a_run_tunes_as_it_was_asked_to(config, tmp_path: Path, optimizer: str) -> None:
    found = finetune(config(optimizer=optimizer, insecure_seed=1))
    usual = finetune(config(insecure_seed=1, out=tmp_path / "usual"))
    assert found.report.optimizer == optimizer and usual.report.optimizer == "adamw"
    pairs = zip(found.model.parameters(), usual.model.parameters(), strict=True)
    assert any(not torch.allclose(a, b) for a, b in pairs)


def test_the_saved_weights_are_the_average_where_one_is_wanted(config, tmp_path: Path) -> None:
    last = finetune(config(insecure_seed=1, steps=1, out=tmp_path / "last"))
    mean = finetune(config(insecure_seed=1, steps=1, averaging=0.9))
    assert "moving average of the weights, of decay 0.9" in told(mean.out)["optimizer"]
    start = AutoModelForCausalLM.from_pretrained(config().model)
    for a, b, c in zip(start.parameters(), mean.model.parameters(), last.model.parameters(), strict=True):
        # The first decay is (1 + 0) / (10 + 0): the average holds a tenth of the initial weights.
        torch.testing.assert_close(b, 0.1 * a + 0.9 * c, rtol=1e-4, atol=1e-6)
    saved = AutoModelForCausalLM.from_pretrained(mean.out / "model")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), mean.model.parameters(), strict=True))


def test_the_report_equals_the_ledger(config, validation_file: Path) -> None:
    result = finetune(config(validation=(validation_file,), validation_is_public=True, eval_every=2))
    report, ledger = told(result.out), result.out / "privacy.ledger.jsonl"
    assert set(report) == {field.name for field in fields(Report)}
    assert report["ledger_head"] == verify(ledger)
    assert report["ledger_charges"] == charges(ledger) == report["steps"] == 4
    assert report["epsilon"] == dpopt.epsilon(
        noise_multiplier=report["noise_multiplier"],
        sampling_rate=12 / 60,
        steps=4,
        delta=report["delta"],
        accountant="rdp",
    )
    assert report["epsilon"] <= report["budget"] == 8
    assert report["delta"] == 1e-3 < 1 / report["num_records"]
    assert [step for step, _, loss in report["curve"] if loss is not None] == [0, 2, 4]
    assert report["loss_after"] == report["curve"][-1][2]
    assert {"dpopt", "torch", "transformers", "prv-accountant", "python"} <= set(report["versions"])
    assert report["randomness"].startswith("keyed by 256 secret bits")


def test_reports_for_people_hold_the_claim(config, validation_file: Path) -> None:
    out = finetune(config(validation=(validation_file,), validation_is_public=True, unit="one note")).out
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    epsilon = rounded_up(told(out)["epsilon"])
    for expected in (
        f"epsilon {epsilon} at delta 0.001",
        "One record is: one note",
        "loss per token went from",
    ):
        assert expected in text
        assert expected in page
    assert "data:image/png;base64," in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_no_loss_is_told_unless_validation_is_public(config, validation_file: Path) -> None:
    for changes in ({}, {"validation": (validation_file,)}):
        out = finetune(config(**changes, out=Path(config().out) / str(len(changes)))).out
        report = told(out)
        assert report["loss_before"] is report["loss_after"] is None
        assert all(loss is None for _, _, loss in report["curve"])
        assert "loss per token" not in (out / "report.md").read_text()
    assert "not used" in report["validation"]


def test_a_continued_ledger_counts_both_runs(config, tmp_path: Path) -> None:
    shared = {"ledger": tmp_path / "both.jsonl", "epsilon": None, "noise_multiplier": 1.0}
    first = finetune(config(**shared, out=tmp_path / "a")).report
    second = finetune(config(**shared, out=tmp_path / "b")).report
    assert (second.ledger_charges_before, second.ledger_charges) == (4, 8)
    assert second.epsilon == dpopt.epsilon(
        noise_multiplier=1.0, sampling_rate=0.2, steps=8, delta=1e-3, accountant="rdp"
    )
    assert second.epsilon > first.epsilon
    assert any("4 charges before" in limitation for limitation in second.limitations)
    with pytest.raises(BudgetExhausted, match="spent already on the ledger"):
        finetune(config(ledger=shared["ledger"], epsilon=1.0, out=tmp_path / "c"))


def test_an_overwritten_run_keeps_its_ledger(config) -> None:
    out = finetune(config(epsilon=3.0)).out
    with pytest.raises(InputError, match=r"expected an empty or new folder as --out; .*never replaced"):
        finetune(config(epsilon=3.0))
    report = finetune(config(epsilon=6.0, overwrite=True)).report
    assert charges(out / "privacy.ledger.jsonl") == report.ledger_charges == 8
    assert report.epsilon <= 6.0
    assert told(out)["ledger_head"] == verify(out / "privacy.ledger.jsonl")


def test_a_foreign_folder_is_not_overwritten(config, tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"expected a folder that dpopt made as --out"):
        finetune(config(overwrite=True))


def test_without_noise_the_report_says_so(config) -> None:
    out = finetune(config(noise_multiplier=0.0)).out
    assert told(out)["epsilon"] == "infinity"
    assert math.isinf(float(told(out)["epsilon"]))
    assert "This run is not private" in (out / "report.md").read_text()


def test_an_insecure_seed_repeats_the_run_and_is_stamped(config, tmp_path: Path) -> None:
    first, second = (finetune(config(insecure_seed=7, out=tmp_path / name)) for name in "ab")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.report.insecure_seed == 7
    assert "**This run is not private.**" in (tmp_path / "a" / "report.md").read_text()
    third = finetune(config(out=tmp_path / "c"))
    assert any(
        not torch.equal(a, b) for a, b in zip(first.model.parameters(), third.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_stops_saves_what_it_has(config, monkeypatch: pytest.MonkeyPatch, error) -> None:
    release = PrivateTraining.release

    def failing(self: PrivateTraining) -> None:
        if self.steps == 2:
            raise error
        release(self)

    monkeypatch.setattr(PrivateTraining, "release", failing)
    with pytest.raises(type(error)) as caught:
        finetune(config())
    out = config().out
    assert "after 2 steps" in caught.value.__notes__[0]
    AutoModelForCausalLM.from_pretrained(out / "model")
    report = told(out)
    assert (report["steps"], report["steps_planned"]) == (2, 4)
    assert report["stopped"] == type(error).__name__
    assert charges(out / "privacy.ledger.jsonl") == 2
    assert any("that of all planned steps" in limitation for limitation in report["limitations"])


def test_a_full_disk_loses_neither_ledger_nor_model(
    config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = saving_module.save

    def full(model, tokenizer, folder: Path) -> None:
        if folder.parent == config().out:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(model, tokenizer, folder)

    monkeypatch.setattr(saving_module, "save", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        NotSaved, match=r"got 'No space left on device'; it was saved in .* instead, with its report"
    ):
        finetune(config())
    (rescued,) = tmp_path.glob("dpopt-rescued-*/model")
    AutoModelForCausalLM.from_pretrained(rescued)
    assert told(rescued.parent)["steps"] == 4
    assert charges(config().out / "privacy.ledger.jsonl") == 4


def test_a_disk_that_fills_while_saving_leaves_no_remains(
    config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(NotSaved, match=r"what was trained is lost, and the ledger .* holds every release"):
        finetune(config())
    assert [path.name for path in config().out.iterdir()] == ["privacy.ledger.jsonl"]


def test_a_report_that_does_not_fit_leaves_the_model(config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving_module, "write_file", full)
    with pytest.raises(
        NotSaved, match=r"expected room for the report in .*are complete; free the disk \(epsilon"
    ):
        finetune(config())
    AutoModelForCausalLM.from_pretrained(config().out / "model")


def test_too_little_room_is_refused_before_a_charge(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpopt.finetune.saving._ROOM_BESIDE_MODEL", 10**18)
    with pytest.raises(OSError, match=r"expected .* MB free for the model .*\(nothing was charged\)"):
        finetune(config())
    assert not (config().out / "privacy.ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"expected a steps above 0; got 0"),
        ({"epochs": 1.0}, r"expected steps or epochs; got both"),
        ({"lora_rank": -1}, r"expected a LoRA rank >= 0; got -1"),
        (
            {"estimator": "per_adapter"},
            r"LoRA adapters to clip per adapter; got LoRA rank 0, .*; pass --lora-rank 8",
        ),
        ({"estimator": "adaptive"}, r"out of flat, automatic, .*; got 'adaptive'; flat is usual"),
        ({"optimizer": "adam"}, r"an optimizer out of adamw, adam-bc, sgd; got 'adam'"),
        (
            {"optimizer": "adam-bc", "estimator": "median:rate=1"},
            r"noise of one release .*; got median:rate=1",
        ),
        ({"averaging": 1.0}, r"expected 0 < averaging < 1; got 1"),
        ({"epsilon": math.inf}, r"expected a finite epsilon > 0; got inf; .*--noise-multiplier 0"),
        ({"epsilon": 0.0}, r"expected a finite epsilon > 0; got 0"),
        ({"delta": 1.0}, r"expected 0 < delta < 1; got 1"),
        ({"noise_multiplier": -1.0}, r"expected a finite noise multiplier >= 0; got -1"),
        ({"accountant": "gdp"}, r"expected an accountant out of \[.*'prv'.*\]; got 'gdp'"),
        ({"max_tokens": 1}, r"expected at least 2 tokens a record; got 1"),
        ({"train": (), "validation": (Path("x.txt"),)}, r"expected training files beside validation files"),
        ({"validation_is_public": True}, r"expected validation files to declare public; got none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 61}, r"expected a batch size of at most 60, the number of records; got 61"),
        ({"max_tokens": 33}, r"expected at most 32 tokens a record, which is what the model takes; got 33"),
        ({"device": "abacus"}, r"expected a device that torch has here; got 'abacus'"),
    ],
)
def test_refused_inputs_write_nothing(config, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        finetune(config(**changes))
    assert not config().out.exists()


def test_the_default_folder_is_free(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outs = [finetune(config(out=None, steps=1)).out for _ in range(2)]
    assert [str(out) for out in outs] == ["runs/finetune-0001", "runs/finetune-0002"]


def test_a_configuration_names_no_unknown_option() -> None:
    with pytest.raises(TypeError, match="epsilonn"):
        FinetuneConfig(epsilonn=1.0)  # pyright: ignore[reportCallIssue]


def test_without_files_the_embedded_model_and_records_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tuple(f"add(a{i}, b)\n\nReturn the sum of a{i} and b." for i in range(12))
    records = Records(texts[:10], texts[10:], (("numpy", "2.0"),))
    monkeypatch.setattr("dpopt.embedded.private_records", lambda: records)
    quick = {"batch_size": 4, "steps": 1, "noise_multiplier": 1.0, "accountant": "rdp", "max_tokens": 16}
    report = finetune(FinetuneConfig(**quick, out=tmp_path / "out")).report
    assert report.unit == records.unit
    assert (report.num_records, report.num_validation) == (10, 2)
    assert "declared public by dpopt" in report.validation
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert "numpy 2.0" in report.data
