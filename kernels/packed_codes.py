# ruff: noqa: ANN001, ANN201 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Codes of keys become fp16 numbers two at a time, without a conversion of integers to floats.

    bits(0x6400 | c) as fp16 = 1024 + c exactly, for c < 1024;    x = (1024 + c - 1024) * scale + zero

A byte is put beside 0x64 by one permutation of bytes; the rest are instructions on pairs of fp16. A key is rounded once
to 11 bits of mantissa. Elsewhere than on NVIDIA's GPUs, and in the interpreter, the same is computed plainly.

Source: the fast conversion of FasterTransformer and AWQ, arXiv 2306.00978 (there 4 bits alone).
"""

from __future__ import annotations

from ragkit.kernels.backend import jit, tl


@jit
def halves_of_nibbles(packed, low_scale, low_zero, high_scale, high_zero, IN_PAIRS: tl.constexpr):
    """Return the numbers fp16 of the low and of the high four bits of bytes.

    Args:
        packed: uint8.
        low_scale, low_zero, high_scale, high_zero: fp16, which broadcast to `packed`.
        IN_PAIRS: by instructions of NVIDIA's GPUs.
    """
    if IN_PAIRS:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 even, odd, fill, much, part, less, a, b, c, d;
            mov.b32 fill, 0x64646464;
            mov.b32 much, 0x64006400;
            mov.b32 part, 0x2C002C00;
            mov.b32 less, 0xD400D400;
            prmt.b32 even, $4, fill, 0x5150;
            prmt.b32 odd, $4, fill, 0x5352;
            and.b32 a, even, 0x640f640f;
            and.b32 b, odd, 0x640f640f;
            and.b32 c, even, 0x64f064f0;
            and.b32 d, odd, 0x64f064f0;
            sub.rn.f16x2 a, a, much;
            sub.rn.f16x2 b, b, much;
            fma.rn.f16x2 c, c, part, less;
            fma.rn.f16x2 d, d, part, less;
            fma.rn.f16x2 $0, a, $5, $7;
            fma.rn.f16x2 $1, b, $6, $8;
            fma.rn.f16x2 $2, c, $9, $11;
            fma.rn.f16x2 $3, d, $10, $12;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [packed, low_scale, low_zero, high_scale, high_zero],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 15).to(tl.float32) * low_scale.to(tl.float32) + low_zero.to(tl.float32)).to(tl.float16)
        high = ((packed >> 4).to(tl.float32) * high_scale.to(tl.float32) + high_zero.to(tl.float32)).to(tl.float16)
    return low, high


@jit
def halves_of_bytes(codes, scale, zero, IN_PAIRS: tl.constexpr):
    """Return the numbers fp16 of codes uint8; the others are as `halves_of_nibbles` takes them."""
    if IN_PAIRS:
        numbers = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 even, odd, fill, much;
            mov.b32 fill, 0x64646464;
            mov.b32 much, 0x64006400;
            prmt.b32 even, $2, fill, 0x5150;
            prmt.b32 odd, $2, fill, 0x5352;
            sub.rn.f16x2 even, even, much;
            sub.rn.f16x2 odd, odd, much;
            fma.rn.f16x2 $0, even, $3, $5;
            fma.rn.f16x2 $1, odd, $4, $6;
            }
            """,
            "=&r,=&r,r,r,r,r,r",
            [codes, scale, zero],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        numbers = (codes.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)).to(tl.float16)
    return numbers
