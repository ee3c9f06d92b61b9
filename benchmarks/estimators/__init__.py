# SPDX-License-Identifier: Apache-2.0
"""Gradient estimators beside plain clipping: utility at one budget, and step time: `python -m benchmarks.estimators`.

| file | what it holds |
|---|---|
| tasks | the tasks by name: public numbers, data drawn by a seed, model, losses, scores |
| regression, images, language | the data and models of the tasks |
| runs | one private run, and a file of finished ones |
| tuning | the grid of clip norms and learning rates, and the choice |
| stepping | step times, interleaved |
| report, chart | tables and the picture |
"""
