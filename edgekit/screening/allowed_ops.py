"""The operators that TorchScript and `.pt2` files may ask for, one by one; everything else is refused by its name.

They are those that networks are made of: torch's core, pointwise and nn operators, and what TorchScript does with its
lists and strings. Left out are operators that touch files, processes or the memory behind a tensor (`save`, `set_`,
`resize_`), sparse and nested tensors, packed weights, and those of other devices. Being here does not make an operator
safe for every argument: files are tried in a process of their own besides (see `edgekit.screening.watchdog`).
"""

from __future__ import annotations

import re


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# An operator in place (`relu_`) is allowed where its plain form is.
ATEN = _names("""
    Bool Complex ComplexImplicit Delete Float FloatImplicit Int IntImplicit ScalarImplicit Size __and__ __contains__
    __derive_index __getitem__ __iand__ __ilshift__ __interpolate __ior__ __irshift__ __is__ __isnot__ __ixor__
    __lshift__ __not__ __or__ __range_length __round_to_zero_floordiv __rshift__ __upsample __upsample_bilinear
    __upsample_nearest __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _addmm_activation _aminmax _assert_async
    _assert_scalar _assert_tensor_metadata _autocast_to_full_precision _autocast_to_reduced_precision
    _batch_norm_impl_index _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short
    _cdist_forward _conj _conj_physical _conv_depthwise2d _convolution _convolution_mode _cummax_helper _cummin_helper
    _dim_arange _embedding_bag _embedding_bag_forward_only _euclidean_dist _fft_c2c _fft_c2r _fft_r2c
    _functional_assert_async _functional_assert_scalar _functional_sym_constrain_range
    _functional_sym_constrain_range_for_size _fused_rms_norm _grad_sum_to_size _infer_size _int_mm _is_all_true
    _is_any_true _linalg_det _linalg_eigh _linalg_eigvals _linalg_slogdet _linalg_solve_ex _linalg_svd _list_to_tensor
    _local_scalar_dense _log_softmax _logcumsumexp _masked_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _native_multi_head_attention _neg_view _neg_view_copy _nested_tensor_from_mask
    _nested_tensor_from_mask_left_aligned _pad_circular _pdist_forward _prelu_kernel _reshape_copy _safe_softmax
    _scaled_dot_product_attention_math _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _set_item _shape_as_tensor _size_if_not_equal _slow_conv2d_forward
    _softmax _stack _tensor_to_list _to_copy _transform_bias_rescale_qkv _transformer_encoder_layer_fwd _trilinear
    _unique _unique2 _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_view _unwrap_optional
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm _weight_norm_interface abs absolute acos acosh
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv addr adjoint affine_grid_generator alias alias_copy all
    allclose alpha_dropout amax amin aminmax angle any append arange arccos arccosh arcsin arcsinh arctan arctan2
    arctanh argmax argmin argsort argwhere as_strided as_strided_copy as_strided_scatter as_tensor asin asinh atan atan2
    atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm bartlett_window batch_norm bernoulli
    bilinear bin binary_cross_entropy binary_cross_entropy_with_logits bincount bitwise_and bitwise_left_shift
    bitwise_not bitwise_or bitwise_right_shift bitwise_xor blackman_window block_diag bmm broadcast_shapes
    broadcast_tensors broadcast_to bucketize capitalize cartesian_prod cat cauchy cdist ceil celu center chain_matmul
    chalf channel_shuffle cholesky cholesky_inverse cholesky_solve chr chunk clamp clamp_max clamp_min clear clip clone
    coalesce col2im column_stack combinations complex concat concatenate conj conj_physical constant_pad_nd contiguous
    conv1d conv2d conv3d conv_depthwise3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution copy
    copysign corrcoef cos cosh cosine_embedding_loss cosine_similarity count count_nonzero cov cpu cross
    cross_entropy_loss cuda cummax cummin cumprod cumsum cumulative_trapezoid data deg2rad degrees dequantize det detach
    detach_copy device diag diag_embed diagflat diagonal diagonal_copy diagonal_scatter dict diff digamma dim dist div
    divide divmod dot dropout dsplit dstack einsum element_size elu embedding embedding_bag empty empty_like
    empty_permuted empty_strided endswith eq equal erf erfc erfinv exp exp2 expand expand_as expand_copy expandtabs
    expm1 exponential extend eye fabs factorial fake_quantize_per_channel_affine
    fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask
    feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2
    fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill
    fill_diagonal find fix flatten flip fliplr flipud float_power floor floor_divide floordiv fmax fmin fmod format frac
    fractional_max_pool2d fractional_max_pool3d frexp frobenius_norm full full_like gamma gather gcd ge gelu geometric
    ger get get_device glu gradient greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru
    gru_cell gt hamming_window hann_window hardshrink hardsigmoid hardswish hardtanh has_torch_function hash heaviside
    hex hinge_embedding_loss histc hsplit hstack huber_loss hypot i0 igamma igammac im2col imag index index_add
    index_copy index_fill index_put index_reduce index_select indices inner insert instance_norm inverse
    is_autocast_cpu_enabled is_autocast_enabled is_coalesced is_complex is_conj is_contiguous is_floating_point
    is_grad_enabled is_inference is_leaf is_neg is_non_overlapping_and_dense is_nonzero is_pinned is_same_size
    is_scripting is_signed is_strides_like_format isalnum isalpha isclose isdecimal isdigit isfinite isidentifier isin
    isinf islower isnan isneginf isnumeric isposinf isprintable isreal isspace istft istitle isupper item items join
    kaiser_window keys kl_div kron kthvalue l1_loss layer_norm lcm ldexp le leaky_relu len lerp less less_equal lgamma
    lift_fresh lift_fresh_copy linalg__powsum linalg_cholesky linalg_cholesky_ex linalg_cond linalg_cross linalg_det
    linalg_diagonal linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh linalg_householder_product linalg_inv
    linalg_inv_ex linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_matmul linalg_matrix_exp
    linalg_matrix_norm linalg_matrix_power linalg_matrix_rank linalg_multi_dot linalg_norm linalg_pinv linalg_qr
    linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv
    linalg_tensorsolve linalg_vander linalg_vecdot linalg_vector_norm linear linspace list ljust log log10 log1p log2
    log_normal log_sigmoid log_sigmoid_forward log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and
    logical_not logical_or logical_xor logit logspace logsumexp lower lstm lstm_cell lstrip lt mH mT margin_ranking_loss
    masked_fill masked_scatter masked_select mathremainder matmul matrix_H matrix_exp matrix_power max max_pool1d
    max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d
    max_unpool3d maximum mean median meshgrid min minimum mish mkldnn_rnn_layer mm mode modf moveaxis movedim mse_loss
    msort mul multi_margin_loss multilabel_margin_loss multilabel_margin_loss_forward multinomial multiply mv mvlgamma
    nan_to_num nanmean nanmedian nanquantile nansum narrow narrow_copy native_batch_norm native_channel_shuffle
    native_dropout native_group_norm native_layer_norm native_norm ne neg negative new_empty new_empty_strided new_full
    new_ones new_zeros nextafter nll_loss nll_loss2d nll_loss2d_forward nll_loss_forward nll_loss_nd nonzero
    nonzero_static norm norm_except_dim normal normal_functional not_equal nuclear_norm numel numpy_T oct one_hot ones
    ones_like ord outer pad pad_sequence pairwise_distance partition pdist percentFormat permute permute_copy pinverse
    pixel_shuffle pixel_unshuffle poisson poisson_nll_loss polar polygamma pop popitem positive pow prelu prod
    promote_types put qr quantile rad2deg radians rand rand_like randint randint_like randn randn_like random randperm
    range ravel real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder remove renorm
    repeat repeat_interleave replace replication_pad1d replication_pad2d replication_pad3d requires_grad reshape
    reshape_as resolve_conj resolve_neg result_type retains_grad reverse rfind rindex rjust rms_norm rnn_relu
    rnn_relu_cell rnn_tanh rnn_tanh_cell roll rot90 round row_stack rpartition rrelu rrelu_with_noise
    rrelu_with_noise_functional rsplit rsqrt rstrip rsub scalar_tensor scaled_dot_product_attention scatter scatter_add
    scatter_reduce searchsorted select select_copy select_scatter selu set_grad_enabled setdefault sgn sigmoid sign
    signbit silu sin sinc sinh size slice slice_copy slice_scatter slogdet slow_conv3d slow_conv3d_forward
    slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d smooth_l1_loss soft_margin_loss
    softmax softplus softshrink sort sorted special_digamma special_entr special_erf special_erfc special_erfcx
    special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln
    special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_log_softmax special_logit
    special_logsumexp special_multigammaln special_ndtr special_ndtri special_polygamma special_psi special_round
    special_sinc special_softmax special_xlog1py special_xlogy special_zeta split split_copy split_with_sizes
    split_with_sizes_copy splitlines sqrt square squeeze squeeze_copy stack startswith std std_mean stft storage_offset
    str stride strip sub subtract sum sum_to_size svd swapaxes swapdims sym_constrain_range sym_constrain_range_for_size
    sym_numel sym_size sym_storage_offset sym_stride t t_copy take take_along_dim tan tanh tensor tensor_split tensordot
    thnn_conv2d threshold tile title to to_padded_tensor topk trace transpose transpose_copy trapezoid trapz
    triangular_solve tril tril_indices triplet_margin_loss triu triu_indices true_divide trunc type_as unbind
    unbind_copy unflatten unfold unfold_copy uniform unique_consecutive unique_dim unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze unsqueeze_copy update upper upsample_bicubic2d upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d values vander var
    var_mean vdot view view_as view_as_complex view_as_complex_copy view_as_real view_as_real_copy view_copy vsplit
    vstack warn where xlogy zero zeros zeros_like zfill
    """)
# TorchScript's own, in its source (ops.prim.NumToTensor) and as nodes of its graphs.
PRIM = _names("""
    CallFunction CallMethod Constant ConstantChunk CreateObject DictConstruct Enter EnumName EnumValue Exit GetAttr If
    ListConstruct ListUnpack Load Loop ModuleContainerIndex NumToTensor Param Print RaiseException Return SetAttr Store
    StringIndex TupleConstruct TupleIndex TupleSlice TupleUnpack Uninitialized abs data device dtype grad id index
    is_cpu is_cuda is_ipu is_maia is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse is_sparse_csr
    is_vulkan is_xla is_xpu isinstance itemsize layout max min name nbytes rangelist requires_grad tolist type
    unchecked_cast unchecked_unwrap_optional
    """)
# Operators of `.pt2` files outside aten: what quantized and traced programs hold.
OTHERS = {
    "prims": _names("convert_element_type device_put iota view_of"),
    "quantized_decomposed": _names(
        "quantize_per_tensor dequantize_per_tensor quantize_per_channel dequantize_per_channel choose_qparams"
    ),
    "torchao": _names("quantize_affine dequantize_affine choose_qparams_affine"),
    "torchvision": _names("nms roi_align roi_pool ps_roi_align deform_conv2d"),
}
HIGHER_ORDER = _names("cond while_loop map_impl scan associative_scan wrap_with_set_grad_enabled wrap_with_autocast")
MATH = _names(
    "acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf exp fabs floor fmod isinf isnan log log10 log1p "
    "log2 pow sin sinh sqrt tan tanh trunc"
)
SYMBOLIC = _names(
    "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum sym_sqrt sym_and sym_or sym_eq sym_ne sym_is_contiguous "
    "check_is_size sym_constrain_range sym_constrain_range_for_size"
)
OPERATORS = _names(
    "abs add and_ eq floordiv ge getitem gt le lshift lt mod mul ne neg not_ or_ pos pow rshift sub truediv"
)
# Overloads with sizes of their own that nothing checks, and those that write into a tensor that is given.
OVERLOADS = re.compile(r"(?!.*out)(?!data$)\w+")


def is_aten(name: str) -> bool:
    """Whether `name` is an allowed operator of aten, in place or not."""
    return name in ATEN or (name.endswith("_") and name[:-1] in ATEN)


def is_target(target: str) -> bool:
    """Whether a node of an exported program may call `target`, such as torch.ops.aten.add.Tensor or _operator.add."""
    parts = target.split(".")
    if parts[:2] == ["torch", "ops"] and len(parts) == 5:
        _, _, space, name, overload = parts
        named = is_aten(name) if space == "aten" else name in OTHERS.get(space, ())
        return named and OVERLOADS.fullmatch(overload) is not None
    if parts[:3] == ["torch", "ops", "higher_order"] and len(parts) == 4:
        return parts[3] in HIGHER_ORDER
    if len(parts) == 2:
        names = {"_operator": OPERATORS, "math": MATH, "torch": SYMBOLIC}.get(parts[0], frozenset())
        return parts[1] in names or (parts[0] == "torch" and parts[1].removeprefix("_") in SYMBOLIC)
    return False
