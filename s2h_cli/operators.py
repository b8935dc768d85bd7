"""The operators that a file may name: those that our own rules know, and others that capture can leave in a graph.

Each maps tensors to new tensors, or changes a tensor of the graph in place. None can reach a file, another process, memory outside its tensors,
or memory that nobody wrote to: what is not here, `as_strided`, `set_`, `resize_`, `from_file`, `empty`, is refused.
"""

from __future__ import annotations


def _table(text: str) -> frozenset[str]:
    """`relu; add: Tensor Scalar` as `relu.default`, `add.Tensor` and `add.Scalar`."""
    rows = (row.partition(":") for row in " ".join(text.split()).split("; "))
    return frozenset(f"{name}.{overload}" for name, _, overloads in rows for overload in overloads.split() or ["default"])


#: New tensors from tensors, as `operator.overload` of ATen.
FUNCTIONAL = _table("""
    _to_copy; _unsafe_view; _upsample_bicubic2d_aa: default vec; _upsample_bilinear2d_aa: default vec; _upsample_lanczos2d_aa: default vec;
    _upsample_nearest_exact1d: default vec; _upsample_nearest_exact2d: default vec; _upsample_nearest_exact3d:
    default vec; _weight_norm; abs; absolute; acos; acosh; adaptive_avg_pool1d; adaptive_avg_pool2d;
    adaptive_avg_pool3d; adaptive_max_pool1d; adaptive_max_pool2d; adaptive_max_pool3d; add: Tensor Scalar; addbmm;
    addcdiv; addcmul; addmm; addmv; addr; adjoint; affine_grid_generator; all: default dim dims; alpha_dropout;
    amax; amin; aminmax; angle; any: default dim dims; arange: default start start_step; arccos; arccosh; arcsin;
    arcsinh; arctan; arctan2; arctanh; argmax; argmin; argsort: default stable; asin; asinh; atan; atan2; atanh;
    atleast_1d: default Sequence; atleast_2d: default Sequence; atleast_3d: default Sequence; avg_pool1d;
    avg_pool2d; avg_pool3d; baddbmm; batch_norm; bernoulli: default p Tensor; bilinear; bitwise_and: Tensor Scalar
    Scalar_Tensor; bitwise_not; bitwise_or: Tensor Scalar Scalar_Tensor; bitwise_xor: Tensor Scalar Scalar_Tensor;
    block_diag; bmm; broadcast_tensors; broadcast_to; cat; cdist; ceil; celu; channel_shuffle; chunk; clamp: default
    Tensor; clamp_max: default Tensor; clamp_min: default Tensor; clip: default Tensor; clone; col2im; column_stack;
    complex; concat; concatenate; conj_physical; constant_pad_nd; contiguous; conv1d: default padding; conv2d:
    default padding; conv3d: default padding; conv_transpose1d; conv_transpose2d: input; conv_transpose3d: input;
    copy; copysign: Tensor Scalar; cos; cosh; cosine_similarity; count_nonzero: default dim_IntList; cross; cummax;
    cummin; cumprod; cumsum; deg2rad; det; detach; diag; diag_embed; diagflat; diagonal; diagonal_scatter; diff;
    digamma; dist; div: Tensor Scalar Tensor_mode Scalar_mode; divide: Tensor Scalar Tensor_mode Scalar_mode; dot;
    dropout; dsplit: int array; dstack; einsum; elu; embedding; eq: Tensor Scalar; erf; erfc; erfinv; exp; exp2;
    expand; expand_as; expm1; eye: default m; feature_alpha_dropout; feature_dropout; fft_fft; fft_fft2;
    fft_fftfreq; fft_fftn; fft_fftshift; fft_hfft; fft_ifft; fft_ifft2; fft_ifftn; fft_ifftshift; fft_irfft;
    fft_irfft2; fft_irfftn; fft_rfft; fft_rfft2; fft_rfftfreq; fft_rfftn; fill: Scalar Tensor; fix; flatten:
    using_ints; flip; fliplr; flipud; float_power: Tensor_Tensor Tensor_Scalar Scalar; floor; floor_divide: default
    Scalar; fmax; fmin; fmod: Tensor Scalar; frac; frobenius_norm: dim; full; full_like; gather; ge: Tensor Scalar;
    gelu; ger; glu; greater: Tensor Scalar; greater_equal: Tensor Scalar; grid_sampler; grid_sampler_2d;
    grid_sampler_3d; group_norm; gru: input; gt: Tensor Scalar; hamming_window: default periodic periodic_alpha
    periodic_alpha_beta; hann_window: default periodic; hardshrink; hardsigmoid; hardswish; hardtanh; heaviside;
    hsplit: int array; hstack; hypot; im2col; imag; index: Tensor; index_add; index_copy; index_fill: int_Tensor
    int_Scalar; index_put; index_select; inner; instance_norm; inverse; isclose; isfinite;
    isinf; isnan; isneginf; isposinf; kron; kthvalue; layer_norm; ldexp: Tensor; le: Tensor Scalar; leaky_relu;
    lerp: Scalar Tensor; less: Tensor Scalar; less_equal: Tensor Scalar; lgamma; linalg_cross; linalg_det;
    linalg_diagonal; linalg_inv; linalg_matmul; linalg_matrix_exp; linalg_matrix_norm: default str_ord;
    linalg_matrix_power; linalg_multi_dot; linalg_norm: default ord_str; linalg_vecdot; linalg_vector_norm; linear;
    linspace: Tensor_Tensor Tensor_Scalar Scalar_Tensor default; log; log10; log1p; log2; log_sigmoid;
    log_sigmoid_forward; log_softmax: int; logaddexp; logaddexp2; logcumsumexp; logical_and; logical_not;
    logical_or; logical_xor; logit; logspace: Tensor_Tensor Tensor_Scalar Scalar_Tensor default; logsumexp; lstm:
    input; lt: Tensor Scalar; mT; masked_fill: Scalar Tensor; masked_scatter; matmul; matrix_exp;
    matrix_power; max: other default dim; max_pool1d; max_pool1d_with_indices; max_pool2d; max_pool2d_with_indices;
    max_pool3d; max_pool3d_with_indices; max_unpool2d; max_unpool3d; maximum; mean: default dim; median: default
    dim; meshgrid: default indexing; min: other default dim; minimum; mish; mm: default dtype; mode; moveaxis: intlist
    int; movedim: int intlist; msort; mul: Tensor Scalar; multiply: Tensor Scalar; mv; nan_to_num; nanmean;
    nanmedian: default dim; nansum; narrow: default Tensor; native_channel_shuffle; ne: Tensor Scalar; neg; negative; new_full; new_ones;
    new_zeros; norm: Scalar ScalarOpt_dim ScalarOpt_dim_dtype ScalarOpt_dtype; not_equal: Tensor Scalar;
    nuclear_norm: default dim; numpy_T; one_hot; ones; ones_like; outer; pad; pairwise_distance; pdist;
    permute; pixel_shuffle; pixel_unshuffle; polar; positive; pow: Tensor_Tensor Tensor_Scalar Scalar; prelu; prod:
    default dim_int; rad2deg; rand; rand_like; randn; randn_like; ravel; real; reciprocal; reflection_pad1d;
    reflection_pad2d; reflection_pad3d; relu; relu6; remainder: Tensor Scalar Scalar_Tensor; repeat;
    repeat_interleave: self_int; replication_pad1d; replication_pad2d; replication_pad3d; reshape; reshape_as;
    rms_norm; rnn_relu: input; rnn_tanh: input; roll; rot90; round: default decimals; rrelu; rsqrt; rsub: Tensor
    Scalar; scalar_tensor; scaled_dot_product_attention; scatter: value src reduce value_reduce; scatter_add;
    scatter_reduce: two; select: int; select_scatter; selu; sgn; sigmoid; sign; signbit; silu; sin; sinc; sinh;
    slice: Tensor; slice_scatter; softmax: int; softplus; softshrink; sort: default stable; special_entr;
    special_erfcx; special_expit; special_i0; special_log_softmax; special_logit; special_logsumexp; special_ndtr;
    special_sinc; special_softmax; special_xlog1py: default other_scalar self_scalar; split: Tensor sizes;
    split_with_sizes; sqrt; square; squeeze: default dim dims; stack; std: default dim correction; std_mean: default
    dim correction; sub: Tensor Scalar; subtract: Tensor Scalar; sum: dim_IntList default; swapaxes; swapdims; t;
    take_along_dim; tan; tanh; tensor_split: sections indices tensor_indices_or_sections; tensordot; threshold;
    tile; to: device dtype other dtype_layout; topk; trace; transpose: int; trapezoid: x dx; tril; tril_indices; triu; triu_indices;
    true_divide: Tensor Scalar; trunc; type_as; unbind: int; unflatten: int; unfold; unsafe_chunk; unsafe_split:
    Tensor; unsafe_split_with_sizes; unsqueeze; upsample_bicubic2d: default vec; upsample_bilinear2d: default vec;
    upsample_linear1d: default vec; upsample_nearest1d: default vec; upsample_nearest2d: default vec;
    upsample_nearest3d: default vec; upsample_trilinear3d: default vec; vander; var: default dim correction;
    var_mean: default dim correction; view; view_as; view_as_complex; view_as_real; vsplit: int array; vstack;
    where: self ScalarOther ScalarSelf Scalar; xlogy: Tensor Scalar_Other Scalar_Self; zero; zeros; zeros_like""")

#: They write to their first argument.
IN_PLACE = _table("""
    abs_; acos_; add_: Tensor Scalar; addcdiv_; addcmul_; addmm_; alpha_dropout_; asin_; atan_; atan2_; baddbmm_;
    bernoulli_: Tensor float; bitwise_and_: Tensor Scalar; bitwise_not_; bitwise_or_: Tensor Scalar; ceil_; celu_;
    clamp_: default Tensor; clamp_max_: default Tensor; clamp_min_: default Tensor; clip_: default Tensor; copy_;
    cos_; cosh_; cumsum_; div_: Tensor Tensor_mode Scalar Scalar_mode; divide_: Tensor
    Tensor_mode Scalar_mode Scalar; dropout_; elu_; eq_: Scalar Tensor; erf_; exp_; exp2_; expm1_; feature_dropout_;
    fill_: Scalar Tensor; floor_; floor_divide_: Tensor Scalar; fmod_: Tensor Scalar; frac_; ge_: Scalar Tensor;
    gelu_; gt_: Scalar Tensor; hardsigmoid_; hardswish_; hardtanh_; index_add_; index_copy_; index_fill_: int_Tensor
    int_Scalar; index_put_; le_: Scalar Tensor; leaky_relu_; lerp_: Scalar Tensor; log_; log10_; log1p_; log2_;
    logical_and_; logical_not_; logical_or_; lt_: Scalar Tensor; masked_fill_: Scalar Tensor; mish_; mul_: Tensor
    Scalar; multiply_: Tensor Scalar; nan_to_num_; ne_: Scalar Tensor; neg_; normal_; pow_: Scalar Tensor;
    reciprocal_; relu_; relu6_; remainder_: Tensor Scalar; round_: default decimals; rrelu_; rsqrt_; scatter_: src
    value reduce value_reduce; scatter_add_; selu_; sigmoid_; sign_; silu_; sin_; sinh_; sqrt_; square_; sub_:
    Tensor Scalar; subtract_: Tensor Scalar; tan_; tanh_; threshold_; tril_; triu_; true_divide_: Tensor Scalar;
    trunc_; uniform_; zero_""")

#: What makes memory that nobody wrote to, and what a file holds in its place.
FILLED = {"empty.memory_format": "zeros.default", "new_empty.default": "new_zeros.default", "empty_like.default": "zeros_like.default"}

OPERATORS = FUNCTIONAL | IN_PLACE
