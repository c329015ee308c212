"""Matrix FLOP of a loop's step, read from TTGIR as Triton prints it for each kind of chip."""

import pytest

from dit_accel.kernels.loop_products import loop_flops

DOT = (
    "%s = tt.dot %q, %k, %c, inputPrecision = tf32 : tensor<64x128xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>>"
    " * tensor<128x32xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma, kWidth = 2}>> -> tensor<64x32xf32, #mma> loc(#loc1)"
)
GROUP_DOT = (
    "%s = ttng.warp_group_dot %q, %k, %c {inputPrecision = 0 : i32, isAsync = true} : !ttg.memdesc<64x128xbf16, #shared,"
    " #smem> * !ttg.memdesc<128x32xbf16, #shared2, #smem> -> tensor<64x32xf32, #mma> loc(#loc1)"
)
TENSOR_DOT = (
    "ttng.tc_gen5_mma %q, %k, %s, %false, %true, %b[%true] {is_async} : !ttg.memdesc<64x128xbf16, #shared, #smem>,"
    " !ttg.memdesc<128x32xbf16, #shared2, #smem, mutable>, !ttg.memdesc<64x32xf32, #tmem1, #ttng.tensor_memory, mutable>"
)


@pytest.mark.parametrize("product", [DOT, GROUP_DOT, TENSOR_DOT])
def test_products_of_innermost_loops(product):
    text = f"""
#loc = loc("forward.py":84:0)
module attributes {{"ttg.num-warps" = 4 : i32}} {{
  tt.func public @forward_kernel(%q: !tt.ptr<bf16> {{tt.divisibility = 16 : i32}}) {{
    {product}
    %0 = scf.for %g = %c0 to %n step %c1 iter_args(%a = %b) -> (i32) : i32 {{
      %1:2 = scf.for %t = %c0 to %n step %c1 iter_args(%a = %b) -> (i32) : i32 {{
        %w = ttg.async_wait %x {{num = 2 : i32}} loc(#loc)
        {product}
        %2 = scf.if %p -> (i32) {{
          {product}
          scf.yield %a : i32
        }} else {{
          scf.yield %b : i32
        }} loc(#loc)
        scf.yield %2 : i32 loc(#loc)
      }} {{tt.warp_specialize}} loc(#loc)
      {product}
    }} loc(#loc)
    scf.for %t = %c0 to %n step %c1 : i32 {{
      %y = arith.addi %x, %x : i32
    }} loc(#loc)
    scf.for %t = %c0 to %n step %c1 : i32 {{
      {product}
    }} loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""
    step = 2 * 64 * 128 * 32
    assert loop_flops(text) == (2 * step, step)
