"""Compiles every kernel for a GPU, which takes none, and prints how many fused multiply-adds each one has."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_pruner_eval.kernels import bss_kernel, coverage_kernel, determinant_kernel, max_min_kernel

TYPES = {"distance": "*fp32", "similarity": "*fp32", "coords": "*fp32", "running": "*fp32", "rules": "*fp64", "found": "*fp64"}
TYPES |= {"first": "*i64", "counts": "*i64", "order": "*i64", "ranked": "*i32", "repeats": "*i32"}
TYPES |= {"relevance": "*fp32", "weight": "*fp32", "cover": "*fp32", "share": "*fp64", "factor": "*fp64", "clear": "*i64", "idle": "*i32"}
SIZES = {"LANES": 64, "BLOCK": 16, "ROWS": 8, "STOP": False, "ADDED": False, "ROUNDING": 1e-5}
KERNELS = (bss_kernel._grow, max_min_kernel._max_min, determinant_kernel._determinant, coverage_kernel._coverage)


def main() -> None:
    for kernel in KERNELS:
        signature = {name: "constexpr" if name in SIZES else TYPES.get(name, "i32") for name in kernel.arg_names}
        sizes = {name: value for name, value in SIZES.items() if name in signature}
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": False})
        print(kernel.fn.__name__, compiled.asm["ptx"].count("fma.rn"))


if __name__ == "__main__":
    main()
