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
   the model and to the constants of the graph (weights, labels, masks, gradients that the loop took itself): each must be
   made of one example's own rows. A tensor of an earlier batch is known again at every draw.
3. *Outputs*: `clipping.validators.runtime_probe` sends back one example's outputs at draws 1, 2, 10, 100, ..., and all together.
4. *The model*: `clipping.validators.rehearsal` runs its forward and backward with other examples in the place of some.
5. *Hooks* of the loop on tensors may look at gradients, and not change them (`clipping.recording.altered_gradients`).

What is refused can be given as losses of shape (B,) to `engine.backward(losses)`. There only what was seen to bring
examples together is refused; autograd functions of the loop's own are tried (`clipping.validators.own_functions`).

What cannot be seen
-------------------
- numbers that Python or numpy made from the batch (`.item()`, `.tolist()`, `sklearn`, the size of a selection): a scalar among them is found when
  it changes from batch to batch (from the second draw on; in `engine.backward(losses)`, whole numbers that were counted
  in three batches that are followed); an array with a row for each example, and other constants than single numbers, are
  taken as they are;
- hooks on nodes of the graph between the outputs and the loss;
- in the model's own forward: a statistic that begins between two rehearsals with no other number of operations that record
  gradients; a branch that the rehearsed batches do not take; code that draws another number of random numbers for each
  example; rows that are neither the examples nor a multiple of them;
- weights by place (`linspace(0, 1, B)`), and a user's autograd function that brings examples together only at times, or by
  a statistic that it computes outside of what it saves, inside `engine.backward(losses)`;
- an earlier batch that was copied at a draw which is not followed, in the place of the drawn one;
- a loop that does something else at the draws that are not followed, with the same operations;
- what the collate function or the dataset did before the batch was handed out, such as padding to the longest, and how
  the model's own forward depends on that length;
- a constant that happens to be the number of examples, before a batch of another size is drawn;
- gradients of modules outside the private model, which nothing clips.
"""

from clipping.loss_checks.checks import LossChecks
from clipping.loss_checks.loss_report import LossReport

__all__ = ["LossChecks", "LossReport"]
