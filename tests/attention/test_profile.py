"""Names of kernels out of a profile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from varlen_attn.attention import profile as _profile
from varlen_attn.attention.profile import kernel_ran, pick_kernel


def test_the_profiler_names_the_kernel(capfd: pytest.CaptureFixture[str]) -> None:
    q = torch.randn(1, 2, 8, 16)
    assert kernel_ran(lambda: F.scaled_dot_product_attention(q, q, q)) == "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert kernel_ran(lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)) == "aten::_scaled_dot_product_attention_math"
    assert kernel_ran(lambda: (q @ q.mT).softmax(-1) @ q) == "explicit scores, aten::_softmax"
    assert kernel_ran(lambda: q + 1) == "none known"
    assert not capfd.readouterr().err


def test_cuda_kernels_are_named_without_their_template() -> None:
    names = ["void cutlass::gemm<float>(int)", "void pytorch_flash::flash_fwd_kernel<Traits, true>(Params)", "flash_bwd_backward"]
    assert pick_kernel(names, _profile._CUDA_KERNELS) == "pytorch_flash::flash_fwd_kernel"
    hopper = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<Main, Epilogue>>>(Params)"
    assert pick_kernel([hopper.replace("Fwd", "Bwd"), hopper], _profile._CUDA_KERNELS) == "FlashAttnFwdSm90"
    # In a step of training the backward takes the most time, and says less: what it is called with decides it.
    for backward, forward in (
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Traits>(Params)", "flash_fwd_kernel"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_knob_1", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_knob_7"),
    ):
        assert pick_kernel([backward, forward], _profile._CUDA_KERNELS) == forward
    assert pick_kernel(["void softmax_warp_forward<float>(x)"], _profile._CUDA_KERNELS) == "explicit scores, softmax_warp_forward"
