# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a causal language model under an (epsilon, delta) budget: `finetune(FinetuneConfig(...))`.

Needs the extra `hf` (transformers, peft, typer, rich, matplotlib).
"""

from accountants import BudgetExhausted
from dpopt.finetune.config import FinetuneConfig
from dpopt.finetune.progress import Listener, StepSeen
from dpopt.finetune.record_files import InputError, RecordFormat, Template
from dpopt.finetune.run import FinetuneResult, finetune
from dpopt.finetune.run_plan import RunPlan
from dpopt.finetune.saving import NotSaved

__all__ = [
    "BudgetExhausted",
    "FinetuneConfig",
    "FinetuneResult",
    "InputError",
    "Listener",
    "NotSaved",
    "RecordFormat",
    "RunPlan",
    "StepSeen",
    "Template",
    "finetune",
]
