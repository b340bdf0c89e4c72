"""The kernel report: what it says of our kernels, and that it fails where it should."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import kernel_report as report  # noqa: E402
from kernel_report import Access, accesses_and_spills, faults_of  # noqa: E402

sys.path.pop(0)

# A loop as compilers write it: a coefficient, a wide load and store along the row, a spill.
SASS = """
\t\tFunction : a_kernel
        /*0000*/                   S2R R0, SR_TID.X ;   /* 0x0000000000007919 */
        /*0010*/                   S2R R4, SR_CTAID.X ;
        /*0020*/                   IMAD.WIDE.U32 R2, R0, 0x10, R8 ;
        /*0030*/                   IMAD.WIDE R6, R4, 0x14, R10 ;
        /*0040*/                   LDG.E R5, desc[UR4][R6.64+0x4] ;
        /*0050*/              @!P0 LDG.E.128 R12, desc[UR4][R2.64] ;
        /*0060*/                   STL [R1], R13 ;
        /*0070*/                   LDL.LU R13, [R1] ;
        /*0080*/              @!P0 STG.E.128 desc[UR4][R2.64+0x800], R12 ;
        /*0090*/                   LDG.E.U16.CONSTANT R0, desc[UR4][R2.64] ;
        /*00a0*/                   MOV R2, R4 ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R0 ;
        /*00c0*/                   MOV R3, R4 ;
        /*00d0*/                   STG.E.64 desc[UR4][R2.64], R0 ;
"""


def needs_triton() -> None:
    pytest.importorskip("triton", reason="Triton, which brings the tools, is not installed")


def test_accesses_and_spills_of_a_listing() -> None:
    ((name, arch), lines), *others = report.functions(SASS).items()
    assert arch == "" and not others
    accesses, spills = accesses_and_spills(lines)
    assert name == "a_kernel" and spills == 2
    assert accesses == [
        Access(False, 4, False), Access(False, 16, True), Access(True, 16, True),
        Access(False, 2, True, constant=True), Access(True, 4, True), Access(True, 8, False),
    ]  # fmt: skip
    assert report.widths(accesses, store=False) == "16/2"
    assert report.widths(accesses, store=True) == "16/4"


def test_what_is_a_fault() -> None:
    wide, coefficient = [Access(False, 16, True), Access(True, 16, True)], Access(False, 4, False)
    assert faults_of("step_mean_kernel", [*wide, coefficient], 0) == ()
    assert "spilled" in faults_of("step_mean_kernel", wide, 2)[0]
    assert "spilled" in faults_of("finish_log_prob_kernel", [], 1)[0]
    narrow = Access(False, 4, True)
    assert "loads of 4 bytes" in faults_of("step_mean_kernel", [*wide, narrow], 0)[0]
    assert "loads of 8 bytes" in faults_of("ode_step_kernel", [*wide, Access(False, 8, True)], 0)[0]
    assert faults_of("normal_kernel", [*wide, Access(False, 8, True)], 0) == ()  # seeds
    assert faults_of("finish_log_prob_kernel", [narrow], 0) == ()
    sums = Access(True, 4, True)
    assert faults_of("sde_step_kernel", [*wide, sums], 0) == ()
    assert "stores" in faults_of("sde_step_kernel", [*wide, *[sums] * 4], 0)[0]
    assert "stores" in faults_of("step_mean_kernel", [wide[0], sums], 0)[0]


def test_what_is_a_fault_of_arrays_in_pieces_of_eight_elements() -> None:
    loads, codes = [Access(False, 16, True)] * 2, [Access(False, 8, True)] * 2
    stores = [Access(True, 16, True), Access(True, 8, True), Access(True, 8, True)]
    one_by_one = [Access(False, 1, True), Access(True, 2, True)]
    good = [*loads, *codes, *stores, *one_by_one]
    assert faults_of("adamw8bit_kernel", good, 0) == ()
    assert "spilled" in faults_of("adamw8bit_kernel", good, 1)[0]
    table = Access(False, 16, True, constant=True)
    lacking = [*loads[1:], *codes, *stores, table]
    (fault,) = faults_of("adamw8bit_kernel", lacking, 0)
    assert fault == "1 loads of 16 bytes of 8 elements; expected 2 or more"
    (fault,) = faults_of("adamw8bit_kernel", [*loads, *codes, *stores[1:]], 0)
    assert fault == "0 stores of 16 bytes of 8 elements; expected 1 or more"


def test_a_kernel_that_spills_is_found(tmp_path: Path) -> None:
    """Our own noise, compiled with a third of the registers it needs."""
    needs_triton()
    from g2rpo_kernels.triton import ahead_of_time

    launch = next(x for _, x in ahead_of_time.launches() if x.kernel.__name__ == "sde_step_kernel")
    ptx, cubin = tmp_path / "k.ptx", tmp_path / "k.cubin"
    text = ahead_of_time.compile_launch(launch, 80).asm["ptx"]
    text, replaced = re.subn(r"\.(?:reqntid|maxntid) [\d, ]+", ".maxnreg 32\n", text)
    assert replaced == 1
    ptx.write_text(text)
    report.output_of(report.find_tool("ptxas"), "-arch=sm_80", ptx, "-o", cubin)
    (row,) = report.cuda_rows(cubin)
    assert row.spills > 0 and row.stack > 0 and row.registers <= 32
    assert any("spilled" in fault for fault in row.faults)


def test_narrow_accesses_are_found(tmp_path: Path) -> None:
    """Rows of 4099 elements cannot be read 16 bytes at a time; the kernels of design can."""
    needs_triton()
    from g2rpo_kernels.triton import ahead_of_time

    checked = 0
    for _, launch in ahead_of_time.launches((torch.float32,), (4099,)):
        name = launch.kernel.__name__
        if name not in ("step_mean_kernel", "log_prob_backward_kernel", "branch_log_prob_kernel"):
            continue
        cubin = tmp_path / "k.cubin"
        cubin.write_bytes(ahead_of_time.compile_launch(launch, 90).asm["cubin"])
        (row,) = report.cuda_rows(cubin)
        assert row.kernel == name and row.load == "4/4"
        assert any("loads of 4 bytes along a row" in fault for fault in row.faults)
        checked += 1
    assert checked == 5


def test_the_report_of_our_kernels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    needs_triton()
    file = tmp_path / "report.json"
    status = report.main(["--arch", "90", "--json", str(file)])
    said = capsys.readouterr().out
    assert status == 0, said
    rows = json.loads(file.read_text())["rows"]
    aligned = [r for r in rows if r["kernel"] == "step_mean_kernel" and r["variant"] != "false"]
    assert aligned and all(r["load"] == "16/16" and r["store"] == "16/16" for r in aligned)
    assert all(r["spills"] == 0 and r["registers"] > 0 for r in rows)
    if not any(r["backend"] == "cuda" for r in rows):
        assert "NOT CHECKED: CUDA kernels" in said


def test_cuda_kernels_are_read_out_of_the_extension() -> None:
    binary = report.extension()
    if binary is None or report.find_tool("cuobjdump") is None:
        pytest.skip("the extension g2rpo_kernels._C or cuobjdump is not here")
    rows = list(report.cuda_rows(binary))
    if not rows:
        pytest.skip("g2rpo_kernels._C was built without CUDA")
    assert {"step_mean_kernel", "sde_step_kernel", "adamw8bit_kernel"} <= {r.kernel for r in rows}
    assert all(row.arch.startswith("sm_") for row in rows)


def test_an_aligned_cuda_kernel_may_not_be_narrow(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None or report.find_tool("cuobjdump") is None:
        pytest.skip("nvcc or cuobjdump is not here")
    source, cubin = tmp_path / "narrow.cu", tmp_path / "narrow.cubin"
    source.write_text(
        "template <bool Aligned> __global__ void step_mean_kernel(const float* x, float* y) {\n"
        "  y[blockIdx.x * 256 + threadIdx.x] = 2 * x[blockIdx.x * 256 + threadIdx.x];\n}\n"
        "template __global__ void step_mean_kernel<true>(const float*, float*);\n"
        "template __global__ void step_mean_kernel<false>(const float*, float*);\n"
    )
    report.output_of("nvcc", "-cubin", "-arch=sm_80", source, "-o", cubin)
    faults = {row.variant: row.faults for row in report.cuda_rows(cubin)}
    assert faults["false"] == () and len(faults["true"]) == 2


def test_what_is_not_checked_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert report.main([]) == 2
    said = capsys.readouterr().out
    assert "NOT CHECKED: Triton kernels: triton is not installed" in said
    assert "NOT CHECKED: CUDA kernels: the extension" in said


def test_a_fault_ends_the_report_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = "REG:32 STACK:8 SHARED:0 LOCAL:0"
    (lines,) = report.functions(SASS).values()
    row = report.describe("cuda", "step_mean_kernel", "true", "sm_90", usage, lines)
    monkeypatch.setattr(report, "collect", lambda arches: ([row], []))
    assert report.main([]) == 1
    said = capsys.readouterr().out
    assert "FAULT: cuda step_mean_kernel [true] sm_90: 2 accesses to spilled registers" in said
