# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with canaries among the records: end to end, of every kind, and what is refused."""

import json
import stat

import pytest
from transformers import AutoModelForCausalLM

from dpopt.audit import read_evidence
from dpopt.audit.canaries.coins import about
from dpopt.audit.canaries.named import KINDS, parsed
from dpopt.finetune import InputError, finetune

LEDGER = "privacy.ledger.jsonl"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_canary_is_trained_and_scored(config, tiny_model, kind):
    result = finetune(config(audit=f"canaries=40,kind={kind}", steps=3))
    evidence = read_evidence(result.out / LEDGER)
    assert evidence[0].num_records == 40 and 0 < evidence[0].num_included < 40
    assert evidence[0].kind.startswith(kind.replace("-", " ")) or kind.startswith("dirac")
    assert evidence[0].independent == (kind == "dirac")
    for name in ("audit-coins.json", "audit-scores.json"):
        assert stat.S_IMODE((result.out / name).stat().st_mode) == 0o600
    # What was added for the audit is not in the model that is saved.
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = AutoModelForCausalLM.from_pretrained(result.saved_as)
    assert {n: p.shape for n, p in loaded.state_dict().items()} == {
        n: p.shape for n, p in base.state_dict().items()
    }
    told = json.loads((result.out / "report.json").read_text())
    assert told["audit"] == f"40 canaries ({kind})"
    assert "dpopt audit" in (result.out / "report.md").read_text()


@pytest.mark.parametrize("sampler, relation", [("poisson", "add-or-remove-one"), ("fixed-size", "replace-one"),
                                               ("balls-in-bins", "add-or-remove-one"), ("cyclic", "zero-out-one"),
                                               ("truncated-poisson", "add-or-remove-one")])  # fmt: skip
def test_the_claim_is_what_was_planned_with_canaries(config, sampler, relation):
    result = finetune(
        config(audit="canaries=30", sampler=sampler, relation=relation, epsilon=8.0, accountant="pld")
    )
    assert result.report.epsilon <= 8.0
    assert read_evidence(result.out / LEDGER)[0].num_records == 30


def test_new_tokens_need_a_trained_embedding(config):
    with pytest.raises(InputError, match="pass kind=random-tokens, or --lora-rank 0"):
        finetune(config(audit="canaries=30,kind=new-tokens", lora_rank=2))


@pytest.mark.parametrize(
    "text",
    ["1000", "canaries=1", "canaries=many", "canaries=10,kind=loud", "kind=dirac", "canaries=9,canaries=8"],
)
def test_an_audit_that_cannot_be_read_is_refused(config, text):
    with pytest.raises(InputError, match=r"expected .*canaries.*; got .*; "):
        config(audit=text)
    with pytest.raises(ValueError):
        parsed(text)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # raised by peft
@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"estimator": "per_layer"}, {"estimator": "median"}, {"secure": True},
                                     {"averaging": 0.9}, {"optimizer": "adam-bc"}])  # fmt: skip
def test_an_audit_goes_with_every_way_to_tune(config, options):
    if "secure" in options:
        pytest.importorskip("cryptography")
    result = finetune(config(audit="canaries=40", **options))
    assert read_evidence(result.out / LEDGER)[0].num_records == 40
    assert not hasattr(result.model, "audit_canaries")


def test_a_resumed_run_has_coins_of_its_own_and_the_claim_of_the_whole_ledger(config):
    first = finetune(config(audit="canaries=40", noise_multiplier=1.0))
    before = read_evidence(first.out / LEDGER)[0]
    second = finetune(config(audit="canaries=40", resume=True, overwrite=True))
    after = read_evidence(second.out / LEDGER)[0]
    assert before.to_json() != after.to_json()
    assert about(second.out / LEDGER)["charges_before"] == 4 and second.report.ledger_charges == 8
    assert second.report.epsilon > first.report.epsilon


def test_an_audit_looks_at_what_finetune_left(config):
    from dpopt.audit.reports.audit_run import audit_runs

    result = finetune(config(audit="canaries=100", epsilon=8.0))
    report = audit_runs([result.out])
    assert 0 < report.claim.epsilon <= result.report.epsilon * (1 + 1e-9)
    assert report.verdict.exit_code in (0, 3)
