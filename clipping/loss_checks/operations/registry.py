# SPDX-License-Identifier: Apache-2.0
"""Which rule serves which operation, by its name in torch's schema without underscores.

One table serves the nodes of a graph and the calls that are followed as they run. An operation that is not here is
not known to keep examples apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from clipping.loss_checks.operations import arithmetic, indexing, loss_functions, moving, reductions
from clipping.loss_checks.operations.state import Facts, Operation, Rule, State, Unproven, unproven

_ELEMENTWISE = """
abs acos acosh addcdiv addcmul angle asin asinh atan atan2 atanh bernoulli bitwise_and bitwise_not bitwise_or ceil celu
clamp clamp_max clamp_min copysign cos cosh deg2rad digamma dropout elu eq erf erfc erfinv exp exp2 expm1 float_power
floor fmax fmin fmod frac ge gelu glu_jvp gt hardshrink hardsigmoid hardswish hardtanh heaviside huber hypot isfinite
isinf isnan i0 ldexp le leaky_relu lerp lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not
logical_or logical_xor logit log_sigmoid log_sigmoid_forward lt masked_fill maximum minimum mish mvlgamma nan_to_num
native_dropout ne nextafter polygamma pow rad2deg reciprocal relu relu6 remainder round rrelu_with_noise rsqrt selu
sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_entr special_erfcx special_log_ndtr sqrt
square tan tanh threshold trunc where xlogy special_xlog1py prelu prelu_kernel softsign
""".split()

_WITHIN = """
all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum kthvalue linalg_vector_norm
log_softmax logcumsumexp logsumexp max median min mode nanmedian nansum norm prod safe_softmax softmax sort std std_mean
topk var var_mean fft_r2c fft_c2r fft_c2c
""".split()

_VIEWED = "view unsafe_view reshape_alias reshape unsqueeze squeeze flatten unflatten view_as".split()

_MATRICES = """
cholesky cholesky_inverse cholesky_solve linalg_cholesky_ex linalg_det linalg_eigh linalg_inv_ex
linalg_matrix_exp linalg_qr linalg_slogdet linalg_solve_ex linalg_solve_triangular linalg_svd tril triu triangular_solve
""".split()

_BATCH_FIRST = """
convolution convolution_overrideable mkldnn_convolution cudnn_convolution max_pool2d_with_indices max_pool3d_with_indices
avg_pool2d avg_pool3d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d native_group_norm
native_batch_norm native_batch_norm_legit native_batch_norm_legit_no_training cudnn_batch_norm
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
upsample_trilinear3d upsample_bilinear2d_aa upsample_bicubic2d_aa pixel_shuffle
pixel_unshuffle channel_shuffle reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d col2im im2col
""".split()

_PAIRED = """
grid_sampler_2d grid_sampler_3d scaled_dot_product_flash_attention scaled_dot_product_flash_attention_for_cpu scaled_dot_product_efficient_attention
scaled_dot_product_cudnn_attention scaled_dot_product_fused_attention_overrideable
""".split()

_FRESH = """
zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
new_empty_strided zero normal uniform exponential random
""".split()


_COLLECTED = "bincount histc histogram unique unique2 unique_dim unique_consecutive".split()


def _independent(_: Facts, __: Operation) -> State:
    return None


def _collected(_: Facts, operation: Operation) -> State:
    mixed = next((s for s in operation.states if isinstance(s, Unproven)), None)
    return mixed or unproven(operation, "a count over the examples of the batch")


def _key(name: str) -> str:
    return name.replace("_", "").lower()


_GROUPS: tuple[tuple[Rule, Sequence[str]], ...] = (
    (arithmetic.elementwise, _ELEMENTWISE),
    (reductions.within, _WITHIN),
    (moving.viewed_as, _VIEWED),
    (reductions.of_matrices, _MATRICES),
    (loss_functions.layer, _BATCH_FIRST),
    (loss_functions.batch_first, _PAIRED),
    (_independent, _FRESH),
    (_collected, _COLLECTED),
    (
        arithmetic.unchanged,
        "clone to_copy to alias detach lift_fresh lift contiguous positive conj_physical real".split(),
    ),
    (arithmetic.negated, ["neg"]),
    (arithmetic.added, "add sub rsub".split()),
    (arithmetic.multiplied, ["mul"]),
    (arithmetic.divided, ["div"]),
    (arithmetic.replaced, ["copy", "copys", "fill"]),
    (reductions.summed, ["sum"]),
    (reductions.averaged, ["mean"]),
    (moving.permuted_by, "permute transpose t numpy_t swapaxes".split()),
    (moving.expanded, ["expand", "broadcast_to"]),
    (moving.repeated, ["repeat"]),
    (moving.part_of, "select slice split split_with_sizes unsafe_split unbind narrow".split()),
    (moving.concatenated, ["cat", "stack"]),
    (moving.padded, ["constant_pad_nd"]),
    (moving.windows, ["unfold"]),
    (moving.moved, ["flip", "roll"]),
    (moving.gathered, ["gather"]),
    (moving.scattered, ["scatter", "scatter_add", "index_add"]),
    (moving.diagonal, ["diagonal", "diagonal_copy"]),
    (indexing.indexed, ["index", "index_select"]),
    (indexing.masked, ["masked_select"]),
    (indexing.assigned, ["index_put"]),
    (indexing.looked_up, ["embedding"]),
    (indexing.distances, ["cdist", "cdist_forward", "euclidean_dist"]),
    (indexing.matrix_product, "mm bmm mv dot addmm baddbmm addmv".split()),
    (
        loss_functions.reduced_elementwise,
        "mse_loss binary_cross_entropy binary_cross_entropy_with_logits smooth_l1_loss huber_loss soft_margin_loss".split(),
    ),
    (
        loss_functions.row_losses,
        ["multi_margin_loss", "multilabel_margin_loss", "multilabel_margin_loss_forward"],
    ),
    (
        loss_functions.class_losses,
        "nll_loss nll_loss2d nll_loss2_d nll_loss_forward nll_loss2d_forward".split(),
    ),
    (loss_functions.connectionist, ["ctc_loss"]),
    (loss_functions.layer_normalised, ["native_layer_norm"]),
)

RULES: dict[str, tuple[str, Rule]] = {_key(name): (name, rule) for rule, names in _GROUPS for name in names}


def rule_of(name: str) -> tuple[str, Rule] | None:
    """(name in the schema, rule) of an operation, None where it is not known."""
    return RULES.get(_key(name))
