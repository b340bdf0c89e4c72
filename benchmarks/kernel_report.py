"""What the compilers made of every kernel: registers, shared memory, spills, width of accesses.

    python benchmarks/kernel_report.py [--arch 80 90 100] [--json FILE]

Needs no GPU. Triton kernels are compiled ahead of time; CUDA kernels are read out of the built
extension. Exits with 1 if a kernel spills, or if one whose design says 16 bytes an access reads or
writes the elements of a row in narrower pieces; with 2 if there was nothing to check. What could
not be checked is said. AdamW8bit reads and writes elements one by one, too, for tails and unaligned
slices: it must do so 8 at a time besides.

Which accesses go along a row is told from the machine code: those whose address depends on the
thread. An address that all threads share is a number of a row or of a branch (a coefficient, a
seed), and may be narrow, as may the kernels that read partial sums (`finish_*`) or rewards.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WIDE = 16  # bytes
NOT_ALONG_ROWS = ("finish_", "group_advantages", "probe")
IN_EIGHTS = "adamw8bit"  # elements at a time: 8 bytes of codes, 16 or more of the others
WITH_SEEDS = ("normal", "sde_step")  # whose branches' seeds are int64, one a thread or for all
SUMS = 4  # stores of partial sums, at most; an access of 16 bytes taken apart makes that many


@dataclass(frozen=True)
class Access:
    """One global load or store of the machine code."""

    store: bool
    size: int  # bytes a thread
    by_thread: bool  # whether its address depends on the thread
    constant: bool = False  # of a table, or of what no kernel writes


@dataclass(frozen=True)
class Row:
    """One kernel, as one compiler made it for one architecture."""

    backend: str  # "triton" or "cuda"
    kernel: str
    variant: str
    arch: str
    registers: int
    shared: int  # bytes, static and dynamic
    stack: int  # bytes a thread
    spills: int  # LDL + STL instructions
    load: str  # widest/narrowest bytes of the loads along a row
    store: str
    faults: tuple[str, ...] = ()


# ---- Reading machine code ----

INSTRUCTION = re.compile(r"(?:/\*\w+\*/\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
FUNCTION = re.compile(r"^\s*Function : (\S+)|^\.text\.(\S+?):")
ARCH = re.compile(r"\barch = (sm_\w+)")
THREAD = ("SR_TID", "SR_LANEID")
MANY = {"128": 4, "64": 2, "WIDE": 2}  # registers an instruction writes, by its suffix


def functions(sass: str) -> dict[tuple[str, str], list[str]]:
    """(function, arch) -> its lines, in what cuobjdump or nvdisasm print; arch "" in a cubin."""
    found, arch, lines = {}, "", []
    for line in sass.splitlines():
        at, start = ARCH.search(line), FUNCTION.match(line)
        if at:
            arch = at[1]
        elif start:
            lines = found.setdefault((start[1] or start[2], arch), [])
        else:
            lines.append(line)
    return found


def accesses_and_spills(lines: Iterable[str]) -> tuple[list[Access], int]:
    """Global accesses in order, and the number of accesses to local memory.

    Follows, in the order of the text, which registers depend on the thread. A pointer that a loop
    advances depends on it before the loop already, so one pass is enough.
    """
    accesses, spills = [], 0
    tainted: dict[int, str | None] = {}  # register -> predicate under which it is not, if any
    for line in lines:
        match = INSTRUCTION.match(line.strip())
        if not match:
            continue
        predicate, opcode, operands = match.groups()
        name, *suffixes = opcode.split(".")

        def by_thread(text: str, predicate: str | None = predicate) -> bool:
            read = registers(text) & tainted.keys()
            return any(predicate is None or tainted[r] != predicate for r in read)

        if name in ("LDL", "STL"):
            spills += 1
        if name in ("LDG", "STG"):
            address = operands[operands.rfind("[") : operands.rfind("]")]
            constant = "CONSTANT" in suffixes
            accesses.append(Access(name == "STG", size_of(suffixes), by_thread(address), constant))
        if name.startswith(("ST", "RED", "BAR", "BRA", "EXIT", "ISETP", "FSETP")):
            continue
        written, _, read = operands.partition(",")
        target = re.search(r"\bR(\d+)\b", written)
        if target is None:  # writes a predicate or a uniform register
            continue
        count = max(1, 2 * (name[0] == "D"), *(MANY.get(suffix, 1) for suffix in suffixes))
        depends = by_thread(read) or any(word in read for word in THREAD)
        for register in range(int(target[1]), int(target[1]) + count):
            if depends or name.startswith("SHFL"):
                tainted[register] = None
            elif predicate is None:
                tainted.pop(register, None)
            elif register in tainted:  # elsewhere the old value stays
                tainted[register] = predicate
    return accesses, spills


def registers(text: str) -> set[int]:
    """Numbers of the registers an operand list names; R2.64 is R2 and R3."""
    found = set()
    for number, wide in re.findall(r"\bR(\d+)(\.64)?", text):
        found |= {int(number), int(number) + 1} if wide else {int(number)}
    return found


def size_of(suffixes: list[str]) -> int:
    for suffix, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in suffixes:
            return size
    return 4


def faults_of(kernel: str, accesses: list[Access], spills: int) -> tuple[str, ...]:
    """Why a kernel fails: spills; narrow accesses along a row."""
    faults = [f"{spills} accesses to spilled registers"] if spills else []
    if kernel.startswith(NOT_ALONG_ROWS):
        return tuple(faults)
    if kernel.startswith(IN_EIGHTS):
        return (*faults, *faults_in_eights(accesses))
    least = 8 if kernel.startswith(WITH_SEEDS) else WIDE
    loads = [a for a in accesses if not a.store and a.by_thread and a.size < least]
    stores = [a for a in accesses if a.store and a.size < WIDE]
    writes_rows = not kernel.startswith(("branch_log_prob", "branch_squares"))
    if loads:
        narrow = min(a.size for a in loads)
        faults.append(f"{len(loads)} loads of {narrow} bytes along a row; expected {WIDE}")
    wide = any(a.store and a.size == WIDE for a in accesses)
    if writes_rows and (len(stores) >= SUMS or not wide):
        faults.append(f"{len(stores)} stores narrower than {WIDE} bytes along a row")
    return tuple(faults)


def faults_in_eights(accesses: list[Access]) -> list[str]:
    """Gradients, weights and the codes of both moments are read; all but the gradients, written."""
    faults = []
    for store, codes, others in ((False, 2, 2), (True, 2, 1)):
        sizes = [a.size for a in accesses if a.store == store and a.by_thread and not a.constant]
        for size, least in ((8, codes), (WIDE, others)):
            if sizes.count(size) < least:
                what = f"{'stores' if store else 'loads'} of {size} bytes"
                faults.append(f"{sizes.count(size)} {what} of 8 elements; expected {least} or more")
    return faults


def widths(accesses: list[Access], store: bool) -> str:
    sizes = [a.size for a in accesses if a.store == store and a.by_thread]
    return f"{max(sizes)}/{min(sizes)}" if sizes else "-"


def describe(backend: str, kernel: str, variant: str, arch: str, usage: str, lines: list) -> Row:
    """usage: cuobjdump's line of registers and memory; lines: the kernel's machine code."""
    amounts = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    accesses, spills = accesses_and_spills(lines)
    return Row(
        backend, kernel, variant, arch, amounts["REG"], amounts["SHARED"],
        amounts["STACK"] + amounts["LOCAL"], spills, widths(accesses, False),
        widths(accesses, True), faults_of(kernel, accesses, spills),
    )  # fmt: skip


# ---- Tools ----


def find_tool(name: str) -> str | None:
    """cuobjdump and its kin: on the path, or the one Triton brings."""
    found = shutil.which(name)
    spec = find_spec("triton")
    if found is None and spec is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    return found


def output_of(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode and "does not contain device code" not in done.stderr:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def usages(binary: Path) -> dict[tuple[str, str], str]:
    """(function, arch) -> cuobjdump's line of registers and memory."""
    found, arch, name = {}, "", None
    for line in output_of(find_tool("cuobjdump"), "--dump-resource-usage", binary).splitlines():
        at = ARCH.search(line)
        arch = at[1] if at else arch
        start = re.match(r"\s*Function (\S+):", line)
        if start:
            name = start[1]
        elif name is not None and "REG:" in line:
            found[name, arch], name = line, None
    return found


# ---- The two halves ----


def triton_rows(arches: list[int], dtypes: tuple | None = None) -> Iterator[Row]:
    from g2rpo_kernels.triton import ahead_of_time

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        for dtype, launch in ahead_of_time.launches(dtypes or ahead_of_time.DTYPES):
            for arch in arches:
                compiled = ahead_of_time.compile_launch(launch, arch)
                binary.write_bytes(compiled.asm["cubin"])
                (usage,) = usages(binary).values()
                (lines,) = functions(output_of(find_tool("nvdisasm"), "-c", binary)).values()
                kernel = launch.kernel.__name__
                variant = f"{dtype} {ahead_of_time.variant(launch)}"
                row = describe("triton", kernel, variant, f"sm_{arch}", usage, lines)
                yield Row(**{**asdict(row), "shared": compiled.metadata.shared})


def cuda_rows(binary: Path, arches: list[int] | None = None) -> Iterator[Row]:
    """Kernels of an extension or cubin; those instantiated for unaligned rows may be narrow."""
    listings = functions(output_of(find_tool("cuobjdump"), "--dump-sass", binary))
    for (symbol, arch), usage in sorted(usages(binary).items()):
        number = int(re.sub(r"\D", "", arch) or 0)
        if arches is not None and number and number not in arches:
            continue
        lines = listings[symbol, arch]
        kernel, variant = kernel_name(symbol)
        row = describe("cuda", kernel, variant, arch, usage, lines)
        if "ILb0E" in symbol:
            kept = tuple(fault for fault in row.faults if "spilled" in fault)
            row = Row(**{**asdict(row), "faults": kept})
        yield row


def kernel_name(symbol: str) -> tuple[str, str]:
    """The kernel's own name, and its template arguments with their namespaces left out."""
    demangler = find_tool("cu++filt") or find_tool("c++filt")
    plain = output_of(demangler, symbol).strip() if demangler else symbol
    inside = re.search(r"(\w+_kernel)(?:<(.*?)>\()?", plain)
    if inside is None:
        return symbol, ""
    return inside[1], re.sub(r"\w+::", "", inside[2] or "")


def collect(arches: list[int]) -> tuple[list[Row], list[str]]:
    """All rows, and what was not checked and why."""
    rows, unchecked = [], []
    if find_spec("triton") is None:
        unchecked.append("Triton kernels: triton is not installed")
    elif find_tool("cuobjdump") is None or find_tool("nvdisasm") is None:
        unchecked.append("Triton kernels: neither cuobjdump and nvdisasm nor Triton's own are here")
    else:
        rows += triton_rows(arches)
    binary = extension()
    if binary is None:
        unchecked.append("CUDA kernels: the extension g2rpo_kernels._C is not built")
    elif find_tool("cuobjdump") is None:
        unchecked.append("CUDA kernels: no cuobjdump (CUDA toolkit, or pip install triton)")
    else:
        found = list(cuda_rows(binary, arches))
        rows += found
        missing = [a for a in arches if not any(row.arch.startswith(f"sm_{a}") for row in found)]
        if missing:
            without = "" if found else ", which was built without CUDA (no nvcc)"
            unchecked.append(f"CUDA kernels for {missing}: not in {binary.name}{without}")
    return rows, unchecked


def extension() -> Path | None:
    spec = find_spec("g2rpo_kernels._C")
    return Path(spec.origin) if spec is not None and spec.origin else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], metavar="SM")
    parser.add_argument("--json", type=Path, help="also write the rows and what was not checked")
    arguments = parser.parse_args(argv)
    rows, unchecked = collect(arguments.arch)
    print("| backend | kernel | variant | arch | registers | shared | stack | spills "
          "| load, bytes | store, bytes |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r.backend} | {r.kernel} | {r.variant} | {r.arch} | {r.registers} | {r.shared} "
              f"| {r.stack} | {r.spills} | {r.load} | {r.store} |")  # fmt: skip
    print("\nload, store: widest/narrowest access whose address depends on the thread.")
    for what in unchecked:
        print(f"NOT CHECKED: {what}")
    faulty = [row for row in rows if row.faults]
    for r in faulty:
        print(f"FAULT: {r.backend} {r.kernel} [{r.variant}] {r.arch}: {'; '.join(r.faults)}")
    if arguments.json:
        report = {"rows": [asdict(row) for row in rows], "not_checked": unchecked}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(rows)} kernels checked, {len(faulty)} at fault")
    return 1 if faulty else 0 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
