"""Loops, instruction classes and waits, read from short pieces of recorded assembly."""

import pytest

from dit_accel.kernels.assembly import read_amdgcn, read_sass
from dit_accel.kernels.machine_code import (
    async_copies,
    instruction_class,
    local_stores,
    main_loops,
    matrix_instructions,
)


def sass(*lines: str) -> str:
    """Return lines in the format of cuobjdump, at addresses that are multiples of 16."""
    return "\n".join(
        f"        /*{16 * i:04x}*/                   {line} ;      /* 0x000000041c087fae */\n"
        "                                                                /* 0x000fe2000c921c54 */"
        for i, line in enumerate(lines)
    )


# A loop of sm_80 that waits until at most two groups of copies are under way.
SM_80 = sass(
    "IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]",
    "STL.64 [R1], R4",
    "LDGSTS.E.BYPASS.128 [R8+0x4000], [R28.64], P1",  # before the loop: fills the pipeline
    "DEPBAR.LE SB0, 0x2",  # 0x0030, the loop's first instruction
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "LDSM.16.M88.4 R96, [R96]",
    "HMMA.16816.F32.BF16 R88, R88, R104.reuse, RZ",
    "HMMA.16816.F32.BF16 R100, R100, R104.reuse, RZ",
    "FMNMX.FTZ R5, R5, R6, !PT",
    "SHFL.BFLY PT, R6, R5, 0x2, 0x1f",
    "MUFU.EX2 R7, R7",
    "F2FP.BF16.F32.PACK_AB R8, R9, R8",
    "LDGSTS.E.BYPASS.128 [R8+0x4000], [R28.64], P1",
    "@!P6 LDGSTS.E [R57+0x10000], [R4.64], P1",
    "LDGDEPBAR",
    "UIADD3 UR4, UR4, 0x1, URZ",
    "@P0 BRA 0x30",
    "EXIT",
    "BRA 0x120",  # the endless loop that ends every kernel
    "NOP",
)


def test_loop_of_mma_sync():
    code = read_sass(SM_80)
    (loop,) = main_loops(code)
    assert loop.total == 14
    assert loop.wait == 2
    assert loop.copied == 16 + 4
    assert loop.instructions == {
        "matrix": 2, "wait": 2, "async_copy": 2, "barrier": 1, "shared_load": 1, "fp": 1, "shuffle": 1, "special": 1,
        "convert": 1, "uniform": 1, "control": 1,
    }  # fmt: skip
    assert loop.products == {"HMMA.16816.F32.BF16": 2}
    assert matrix_instructions(code) == {"mma.sync": 2}
    assert async_copies(code) == 3
    assert local_stores(code) == 8


def test_scheduling_hints_are_no_part_of_an_instruction():
    hinted = SM_80.replace(" ;", "            &req={5}    ?WAIT15_END_GROUP ;")
    assert main_loops(read_sass(hinted)) == main_loops(read_sass(SM_80))


def test_smallest_wait_counts():
    body = "HMMA.16816.F32.BF16 R88, R88, R104, RZ"
    code = read_sass(sass("DEPBAR.LE SB0, 0x3", "DEPBAR.LE SB0, 0x0", body, "@P0 BRA 0x0"))
    assert main_loops(code)[0].wait == 0
    # A wait for wgmma, and one for another scoreboard, are none for copies.
    code = read_sass(sass("DEPBAR.LE gsb0, 0x0", "DEPBAR.LE SB1, 0x36", body, "@P0 BRA 0x0"))
    assert main_loops(code)[0].wait is None


def test_bulk_copies_wait_at_barriers():
    code = read_sass(
        sass(
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR60], R4",
            "UTMALDG.2D [UR8], [UR4]",
            "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16].tnspB, R24",
            "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], R88",
            "BRA.U UP0, 0x0",
        )
    )
    (loop,) = main_loops(code)
    assert loop.wait == "mbarrier"
    assert loop.copied is None
    assert loop.products == {
        "HGMMA.64x128x16.F32.BF16": 1,
        "HGMMA.64x64x16.F32.BF16 shared": 1,
    }
    assert matrix_instructions(code) == {"wgmma": 2}


def test_copies_of_other_warps_wait_at_barriers_too():
    wait, product = (
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR60], R4",
        "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], R88",
    )
    (loop,) = main_loops(read_sass(sass("LDG.E R4, [R2.64]", wait, product, "@P0 BRA 0x0")))
    assert (loop.wait, loop.copied) == ("mbarrier", 4)
    # On sm_100 a product signals a barrier as well: that tells nothing of this loop's own loads.
    (loop,) = main_loops(read_sass(sass("LDG.E.128 R4, [R2.64]", wait, product, "@P0 BRA 0x0")))
    assert (loop.wait, loop.copied) == (None, 16)


def test_innermost_loops_only():
    product = "HMMA.16816.F32.BF16 R88, R88, R104, RZ"
    code = read_sass(sass("MOV R1, R2", product, "@P0 BRA 0x10", product, "@P1 BRA 0x0"))
    (loop,) = main_loops(code)
    assert loop.total == 2


def test_code_behind_the_kernel_that_returns_into_a_loop_is_no_loop():
    """sm_100 waits for a barrier out of line; the way back is a backward branch around everything between."""
    code = read_sass(
        sass(
            "DEPBAR.LE SB0, 0x1",
            "@!P1 BRA 0x70",
            "UTCHMMA gdesc[UR4], gdesc[UR18], tmem[UR13], tmem[UR44], idesc[UR45], !UPT",
            "@P1 BRA 0x0",
            "DEPBAR.LE SB0, 0x0",
            "UTCHMMA tmem[UR59], gdesc[UR18], tmem[UR41], tmem[UR26], idesc[UR27], UPT",
            "EXIT",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR60], R4",
            "@!P1 BRA 0x70",
            "BRA 0x20",
        )
    )
    (loop,) = main_loops(code)
    assert loop.total == 4
    assert loop.wait == 1
    assert matrix_instructions(code) == {"tcgen05": 2}


# As LLVM prints it: .LBB0_2 is reached from behind, but nothing leads from it back to there.
GFX942 = """
	.globl	rows_kernel
rows_kernel:                            ; @rows_kernel
.Lfunc_begin0:
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 41 12                         ; backward_rows.py:41:12
	global_load_dwordx4 v[4:7], v[2:3], off
	s_waitcnt vmcnt(0)
	ds_write_b128 v1, v[4:7]
	s_barrier
	ds_read2_b64 v[64:67], v68 offset1:2
	v_mfma_f32_32x32x8_bf16 v[32:47], v[48:49], v[70:71], v[32:47]
	v_exp_f32_e32 v9, v9
	v_pk_mul_f32 v[8:9], v[8:9], v[10:11]
	v_perm_b32 v49, v50, v51, s0
	ds_bpermute_b32 v3, v1, v2
	s_add_i32 s4, s4, 1
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_3
.LBB0_2:
	v_mfma_f32_32x32x8_bf16 v[32:47], v[48:49], v[70:71], v[32:47]
	s_branch .LBB0_4
.LBB0_3:
	s_cbranch_scc0 .LBB0_2
.LBB0_4:
	s_endpgm
.Lfunc_end0:
	.size	rows_kernel, .Lfunc_end0-rows_kernel
"""


def test_loop_of_mfma():
    code = read_amdgcn(GFX942)
    (loop,) = main_loops(code, amd=True)
    assert loop.total == 12
    assert loop.wait is None
    assert loop.copied == 16
    assert loop.instructions == {
        "matrix": 1, "global_load": 1, "wait": 1, "shared_store": 1, "barrier": 1, "shared_load": 1, "special": 1, "fp": 1,
        "int": 1, "shuffle": 1, "uniform": 1, "control": 1,
    }  # fmt: skip
    assert loop.products == {"v_mfma_f32_32x32x8_bf16": 1}
    assert matrix_instructions(code) == {"mfma": 2}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("LDGDEPBAR", "wait"),
        ("LDG.E.128 R4, [R2.64]", "global_load"),
        ("LDS.128 R4, [R2]", "shared_load"),
        ("LDL.LU R0, [R1]", "local"),
        ("LDTM.x32 R4, tmem[UR4]", "tensor_memory"),
        ("WARPGROUP.ARRIVE", "barrier"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "wait"),
        ("FLO.U32 R4, R5", "int"),
        ("FENCE.VIEW.ASYNC.S", "barrier"),
        ("FFMA2 R4, R5, R6, R7", "fp"),
        ("IMAD.MOV.U32 R4, RZ, RZ, R5", "imad"),
        ("ISETP.GE.AND P0, PT, R4, R5, PT", "int"),
        ("QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", "matrix"),
        ("??? R4", "other"),
    ],
)
def test_class_of_sass(text, name):
    assert instruction_class(text) == name
