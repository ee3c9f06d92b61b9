# SPDX-License-Identifier: Apache-2.0
"""Checks that a scalar loss is a sum of what each example gives by itself.

A backward of `loss` gives row i of every layer the gradient of the *whole* loss in example i's outputs. That is the
gradient of example i's own loss, over B, only where the loss is a mean over the examples, each with a loss of its own.
A mean over the labels that are not ignored, a division by the sum of some weights, a softmax over the batch: with any of
these, one record more or less changes the gradients of all the others before they are clipped, and moves the clipped sum
by many clip norms.

What is checked
---------------
1. *Graph*, before every backward: the graph from the loss down to the model's outputs must consist of operations that
   are known to keep examples apart, then one sum or mean over the examples, then constant factors. What a node saved is
   looked at: a mean of class losses without class weights and without ignored labels (or the same number of them in every
   example). The factors must be the same in every batch: a divisor that the batch decides is not.
2. *Provenance*, at draws 1, 2, 4, 8, ...: the batch is followed, operation by operation, from the loader to the inputs of
   the model and to the constants of the graph (weights, labels, masks): each must be made of one example's own rows.
3. *Outputs*: `clipping.validators.runtime_probe` sends back one example's outputs at draws 1, 2, 10, 100, ...

What is refused can be given as losses of shape (B,) to `engine.backward(losses)`. There only what was seen to bring
examples together is refused.

What cannot be seen
-------------------
- numbers that Python or numpy made from the batch (`.item()`, `.tolist()`, `sklearn`, the size of a selection): a scalar among them is found when
  it changes from batch to batch (from the second draw on, and not in `engine.backward(losses)`); an array with a row for
  each example, and other constants than single numbers, are taken as they are;
- hooks on tensors or nodes between the outputs and the loss, which change gradients and leave no trace in the graph;
- gradients that the loop takes with a backward of its own (of detached outputs, say) and puts into a loss as constants;
- statistics of the batch that the model's own forward takes without a gradient, and state that it carries from batch to
  batch, where its parameters are all in layers that have a rule; a branch in Python on numbers of the batch;
- weights by place (`linspace(0, 1, B)`), and a user's autograd function that brings examples together in its backward,
  inside `engine.backward(losses)`;
- an earlier batch of the same size in the place of the drawn one;
- a loop that does something else at the draws that are not followed, with the same operations;
- what the collate function or the dataset did before the batch was handed out, such as padding to the longest, and how
  the model's own forward depends on that length;
- a constant that happens to be the number of examples, before a batch of another size is drawn;
- gradients of modules outside the private model, which nothing clips.
"""

from clipping.loss_checks.checks import LossChecks
from clipping.loss_checks.loss_report import LossReport

__all__ = ["LossChecks", "LossReport"]
