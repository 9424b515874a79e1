"""The operators of PyTorch that a program may call, in one table: those that captured models are made of.

Their results depend on their arguments alone. None of them draws random numbers, reads or writes files, measures time,
or writes to its arguments. A program that was read from a file cannot name other operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

# All overloads of a name, except those that write to an argument. One text, since a list would take 400 lines.
LEGAL_OPERATORS = frozenset(
    """
    _adaptive_avg_pool2d _conj _log_softmax _native_batch_norm_legit_no_training _prelu_kernel _softmax _to_copy
    _unsafe_index _unsafe_view _weight_norm abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool2d add addbmm addcdiv addcmul addmm addmv addr alias all amax amin
    aminmax angle any arange argmax argmin argsort asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d
    avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor block_diag bmm broadcast_tensors broadcast_to bucketize
    cartesian_prod cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clip clone column_stack
    combinations complex concat concatenate conj conj_physical constant_pad_nd contiguous conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d copy copysign cos cosh cosine_similarity count_nonzero
    cross cummax cummin cumprod cumsum deg2rad detach diag diag_embed diagonal diagonal_scatter diff dist div
    divide dot dsplit dstack einsum elu embedding eq erf erfc erfinv exp exp2 expand expand_as expand_copy expm1
    eye fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2
    fft_rfft fft_rfft2 fill flatten flip fliplr flipud floor floor_divide fmax fmin fmod frac frobenius_norm
    full full_like gather ge gelu glu greater greater_equal group_norm gt hamming_window hann_window hardshrink
    hardsigmoid hardswish hardtanh heaviside hsplit hstack huber_loss hypot im2col imag index index_add
    index_copy index_fill index_put index_select inner instance_norm inverse isclose isfinite isinf isnan
    isneginf isposinf isreal kron layer_norm le leaky_relu lerp less less_equal lgamma lift lift_fresh
    lift_fresh_copy linalg_cross linalg_det linalg_inv linalg_matmul linalg_matrix_norm linalg_multi_dot
    linalg_norm linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp
    logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit logspace logsumexp lt
    masked_fill masked_scatter matmul matrix_power max max_pool1d max_pool2d max_pool3d maximum mean median
    meshgrid min minimum mish mm moveaxis movedim msort mul multiply mv nan_to_num nanmean nansum narrow
    native_group_norm native_layer_norm ne neg negative new_full new_ones new_zeros norm not_equal nuclear_norm
    numpy_T one_hot ones ones_like outer pad permute permute_copy pixel_shuffle pixel_unshuffle polar positive
    pow prelu prod rad2deg ravel real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6
    remainder renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape
    resolve_conj resolve_neg rms_norm roll rot90 round rsqrt rsub scalar_tensor scaled_dot_product_attention
    scatter scatter_add scatter_reduce searchsorted select select_copy select_scatter selu sgn sigmoid sign
    signbit silu sin sinc sinh slice slice_copy slice_scatter softmax softplus softshrink sort special_erf
    special_exp2 special_expit special_expm1 special_log1p special_log_softmax special_logit special_logsumexp
    special_sinc special_softmax split split_copy split_with_sizes split_with_sizes_copy sqrt square squeeze
    squeeze_copy stack std std_mean sub subtract sum sum_to_size swapaxes swapdims sym_numel sym_size t t_copy
    take take_along_dim tan tanh tensor_split tensordot threshold tile to topk trace transpose transpose_copy
    trapezoid tril tril_indices triu triu_indices true_divide trunc type_as unbind unflatten unfold unfold_copy
    unsafe_chunk unsafe_split unsqueeze unsqueeze_copy upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d vander var var_mean vdot view
    view_as view_as_complex view_as_real view_copy vsplit vstack where zero zeros zeros_like
    """.split()  # noqa: SIM905
)

# For each op that may draw random numbers or keep state: the argument that decides it, and the value that prevents it.
_QUIET: dict[str, tuple[str, Any]] = {
    "scaled_dot_product_attention": ("dropout_p", 0.0),
    "batch_norm": ("training", False),
    "instance_norm": ("running_mean", None),
}


def is_legal_operator(target: torch._ops.OpOverload) -> bool:
    """Tell whether a program may call an operator of PyTorch."""
    return name_of(target) in LEGAL_OPERATORS


def name_of(target: torch._ops.OpOverload) -> str:
    """Return the name of an operator without its namespace and overload."""
    return str(target._schema.name.split("::")[-1])


def is_quiet(node: fx.Node) -> bool:
    """Tell whether the arguments of a legal operator keep it from drawing random numbers and from keeping state."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    name, quiet = _QUIET.get(name_of(node.target), ("", None))
    if not name:
        return True
    names = [argument.name for argument in node.target._schema.arguments]
    position = names.index(name)
    given = node.args[position] if position < len(node.args) else node.kwargs.get(name, quiet)
    return bool(given == quiet)
