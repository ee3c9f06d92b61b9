# SPDX-License-Identifier: Apache-2.0
"""What outsiders can learn from a trained model: membership inference, and extraction of what it has memorised.

| file | what it holds |
|---|---|
| signals, language_signals | what a model says of each record, or of each token, computed once |
| scores, token_scores | attacks: functions from signals to scores, higher for members |
| curves | ROC, AUC, true-positive rates at few false positives, with intervals |
| battery | every attack that the signals allow, and lower bounds on epsilon that pay for all |
| shadow, shadow_training | models trained again on random halves |
| canaries, extraction | inserted secrets, their exposure, and completion word for word |
| files, shadow_files, extraction_files, report | the same from files to reports, for the command line |
"""

from dpopt.attacks.battery import AttackReport, Signals, run_attacks
from dpopt.attacks.curves import auc, roc, tpr_at_fpr
from dpopt.attacks.scores import (
    calibrated_scores,
    info_rmia_scores,
    lira_offline_scores,
    lira_online_scores,
    logit_confidences,
    loss_scores,
    mean_probabilities,
    rmia_scores,
)
from dpopt.attacks.shadow import ShadowPlan, train_shadows
from dpopt.attacks.signals import class_confidences, classifier_logits, example_losses
from dpopt.attacks.token_scores import TokenSignals, min_k_scores, token_info_rmia, token_info_rmia_scores

__all__ = [
    "AttackReport",
    "ShadowPlan",
    "Signals",
    "TokenSignals",
    "auc",
    "calibrated_scores",
    "class_confidences",
    "classifier_logits",
    "example_losses",
    "info_rmia_scores",
    "lira_offline_scores",
    "lira_online_scores",
    "logit_confidences",
    "loss_scores",
    "mean_probabilities",
    "min_k_scores",
    "rmia_scores",
    "roc",
    "run_attacks",
    "token_info_rmia",
    "token_info_rmia_scores",
    "tpr_at_fpr",
    "train_shadows",
]
