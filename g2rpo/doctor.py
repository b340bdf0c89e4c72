"""`g2rpo doctor`: what this machine has, which backends run on it, and what is missing.

It is needed most where something is missing, so it imports nothing at the top but the standard
library, and everything else where it is probed. A probe returns what it found or the reason it
found nothing; a package that is installed but cannot be imported is shown with its error.
The packages are in doctor_packages.py, what a configuration can choose in doctor_features.py, the
short benchmark in doctor_bench.py.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import __version__
from .doctor_features import sections
from .doctor_packages import PACKAGES, TRAIN, Found, Package, first_line, probe

USAGE = """\
usage: g2rpo doctor [--bench | --fp8 [PRESET|FILE.yaml --group.key value ...]]

Says what this machine has, which backends the ops run on and why, which attention, optimizers,
scorers and trackers a run would find, and what is missing for which feature, with the command that
gets it. Exit code 0 when the ops can run.

--bench measures in some twenty seconds what the machine does at most and the main ops beside the
same in eager PyTorch."""

REBUILD = "G2RPO_BUILD=auto pip install --editable . --no-deps --no-build-isolation"
# No feature needs it, but transformers imports it where it is installed.
TORCHVISION = Package("torchvision", "nothing", "pip uninstall torchvision")
# What `gk.fp8_support` answers, in words; its reason follows.
FP8_KINDS = {
    "rowwise": "rowwise, scales inside the product: ",
    "tensorwise": "tensorwise, scales after the product, which costs a pass more: ",
    "none": "none, rollout.precision 'fp8' is refused: ",
}


def run(*command: str) -> tuple[str, str]:
    """Output of a tool, or the reason there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", first_line(error)
    if done.returncode:
        return "", (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
    return done.stdout.strip(), ""


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def vector_variant() -> tuple[str | None, str]:
    """Which of its vector variants the native CPU backend runs, or None and why."""
    try:
        extension = importlib.import_module("g2rpo_kernels._C")
    except ImportError as error:
        return None, first_line(error)
    if not hasattr(extension, "cpu"):
        return None, "the native extension has no CPU part"
    return extension.cpu.variant(), ""


def driver() -> tuple[str, str]:
    """The NVIDIA driver's version, or "" and why not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", "nvidia-smi is not on the PATH: no NVIDIA driver, or hidden from this container"
    version, why = run(tool, "--query-gpu=driver_version", "--format=csv,noheader")
    return version.partition("\n")[0], why


def gpus() -> tuple[list[str], str]:
    """A line a GPU that torch can use, or none and why."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return [], f"torch {torch.__version__} is a build without CUDA (see pytorch.org)"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return [], f"torch was built with CUDA but finds no GPU: {first_line(error)}"
        return [], "torch was built with CUDA but finds no GPU"
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"{p.name}, compute capability {p.major}.{p.minor}, "
            f"{p.total_memory / 2**30:.1f} GiB, {p.multi_processor_count} multiprocessors"
        )
    return lines, ""


def toolkit() -> tuple[str, str]:
    """nvcc's path and release, or "" and where it was looked for."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [*([Path(home, "bin", "nvcc")] if home else []), Path("/usr/local/cuda/bin/nvcc")]
    on_path = shutil.which("nvcc")
    nvcc = on_path or next((str(place) for place in places if place.is_file()), None)
    if nvcc is None:
        looked = ", ".join(["the PATH", *map(str, places)])
        return "", f"no nvcc in {looked}; only building the cuda backend needs it"
    text, why = run(nvcc, "--version")
    release = re.search(r"release ([\d.]+)", text)
    if release is None:
        return "", f"{nvcc} does not say its release: {why or text}"
    return f"{nvcc}, release {release[1]}", ""


def build_facts(folder: Path) -> list[tuple[str, str]]:
    """What the native extension was built of and what was left out, from _build.json."""
    file = folder / "_build.json"
    if not file.is_file():
        return [("native build", f"none recorded; from a checkout: {REBUILD}")]
    facts = json.loads(file.read_text())
    openmp = "with OpenMP" if facts.get("openmp") else "without OpenMP"
    rows = [("compiler", f"{facts.get('compiler')}, {openmp}")] if facts.get("cpu") else []
    if facts.get("cuda"):
        archs = ", ".join(f"{arch // 10}.{arch % 10}" for arch in facts.get("cuda_archs", []))
        rows.append(("cuda code for", f"compute capability {archs} (nvcc {facts.get('nvcc')})"))
    rows += [(f"without {item['what']}", item["why"]) for item in facts.get("left_out", [])]
    if facts.get("left_out"):
        rows.append(("to rebuild", f"from a checkout: {REBUILD}"))
    return rows


def fp8_products(gpus: int) -> list[tuple[str, str]]:
    """How FP8 completions would multiply, a line a GPU."""
    import g2rpo_kernels as gk

    if not gpus:
        return [("CPU", "emulated, exactly and slowly: without a GPU they are for tests")]
    rows = []
    for i in range(gpus):
        try:
            kind, reason = gk.fp8_support(f"cuda:{i}")
        except RuntimeError as error:  # of the GPU, which the other lines are to outlive
            kind, reason = "none", first_line(error)
        rows.append((f"GPU {i}", FP8_KINDS[kind] + reason))
    return rows


def try_ops(device: str) -> str:
    """Draw a step and differentiate its loss on a device; "" if that works, else the error."""
    try:
        import torch

        import g2rpo_kernels as gk

        velocity = torch.ones(1, 8, device=device, requires_grad=True)
        latents = torch.zeros(1, 8, device=device)
        c = gk.step_coefficients(0.9, 0.8).to(device)
        seeds = torch.arange(3, device=device).view(1, 3)
        x_next, log_prob = gk.sde_step(velocity.detach(), latents, c, seeds=seeds)
        gk.policy_loss(velocity, latents, x_next, log_prob, log_prob, c).loss.backward()
        if not velocity.grad.isfinite().all():
            return "the gradient of policy_loss is not finite"
    except Exception as error:  # this is what the command is there to show
        return first_line(error)
    return ""


def backend_text(status: object, gpu: bool) -> str:
    """A `BackendStatus` in words; what would serve a GPU that is not here serves nothing."""
    used = [device for device in status.used_for if gpu or device != "cuda"]
    state = "available" if status.available else "absent"
    if status.used_for and not used:
        return f"{state}; it would serve a GPU"
    return f"{state}{', used on ' + ' and '.join(used) if used else ''}: {status.reason}"


def conclusions(
    found: Mapping[str, Found], broken: Mapping[str, str], statuses: Mapping, gpu: bool
) -> list[tuple[str, str]]:
    """What works now, a line each. broken: what `try_ops` said by device."""
    from .cli import TRAIN_EXTRA

    ops = "; ".join(f"{device}: {why or 'work'}" for device, why in broken.items())
    lacking = [name for name in TRAIN_EXTRA if not found[name].works]
    digits = f"no: {', '.join(lacking)} missing or broken; {TRAIN}" if lacking else "yes"
    flux = "no: no GPU; python examples/flux_miniature.py tries every command without one"
    if gpu:
        flux = "yes, where the GPU holds 23.8 GB of weights and what the activations need"
    cpu = statuses["cpu"]
    on_gpu = [name for name in ("cuda", "triton") if statuses[name].available]
    where = f"yes, {on_gpu[0]}" if on_gpu else "no, the reference runs there"
    return [
        ("the ops", ops),
        ("native CPU ops", "yes" if cpu.available else f"no: {cpu.reason}"),
        ("fused GPU ops", where if gpu else "no: no GPU"),
        ("g2rpo train digits", digits),
        ("g2rpo train flux-lora", flux if digits == "yes" else digits),
    ]


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    print(f"\n{title}")
    for name, text in rows:
        indent = " " * (width + 2)
        body = textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent,
                             break_long_words=False, break_on_hyphens=False)  # fmt: skip
        print(f"  {name:{width}}{body.strip()}")


def bench() -> int:
    """The short benchmark, on the GPU if there is one."""
    import torch

    from . import doctor_bench

    lines, _ = gpus()
    device = "cuda" if lines else "cpu"
    head = lines[0] if lines else f"{cpu_model()}, torch uses {torch.get_num_threads()} threads"
    print(f"{head}; torch {torch.__version__}, g2rpo {__version__}")
    return doctor_bench.run(device)


def main(arguments: Sequence[str] = ()) -> int:
    if set(arguments) & {"-h", "--help"}:
        print(USAGE)
        return 0
    if arguments and list(arguments) != ["--bench"]:
        print(f"g2rpo doctor: error: expected --bench, --fp8 or nothing; got {' '.join(arguments)}",
              file=sys.stderr)  # fmt: skip
        return 2
    system = f"{platform.python_implementation()}, {platform.system()} {platform.machine()}"
    versions = [("g2rpo", f"{__version__}, in {Path(__file__).parent}"),
                ("python", f"{platform.python_version()}, {system}")]  # fmt: skip
    try:
        import torch

        import g2rpo_kernels as gk
    except Exception as error:
        show("versions", versions)
        print(f"\ng2rpo doctor: error: the ops cannot be imported: {first_line(error)}")
        return 1
    if arguments:
        return bench()
    cuda, hip = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU only"
    show("versions", [*versions, ("torch", f"{torch.__version__}, {built}")])

    variant, why = vector_variant()
    show("processor", [
        ("model", f"{cpu_model()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"),
        ("vectors", f"torch {torch.backends.cpu.get_cpu_capability()}; "
                    f"native CPU ops {variant or f'none ({why})'}"),
    ])  # fmt: skip
    lines, no_gpu = gpus()
    version, no_driver = driver()
    nvcc, no_nvcc = toolkit()
    show("GPUs", [
        *([(f"GPU {i}", line) for i, line in enumerate(lines)] or [("GPU", f"none: {no_gpu}")]),
        ("driver", version or f"none: {no_driver}"),
        ("CUDA toolkit", nvcc or f"none: {no_nvcc}"),
    ])  # fmt: skip

    statuses = gk.backends()
    show("backends of the ops", [(name, backend_text(s, bool(lines)))
                                 for name, s in statuses.items()])  # fmt: skip
    show("FP8 products, for rollout.precision 'fp8'", fp8_products(len(lines)))
    show("native build", build_facts(Path(gk.__file__).parent))

    found = {package.module: probe(package) for package in PACKAGES}
    rows = []
    for package in PACKAGES:
        what = found[package.module]
        state = what.version or f"missing; {package.get}"
        if what.error:
            state = f"{what.version}, BROKEN: {what.error}"
        rows.append((package.distribution or package.module, f"{state}  ({package.needed_for})"))
    show("packages, and what needs them", rows)
    for title, rows in sections(found, lines):
        show(title, rows)
    vision = probe(TORCHVISION)
    if vision.error:
        print(f"\nWarning: torchvision {vision.version} is installed and cannot be imported "
              f"({vision.error}).\nNothing here needs it, but transformers imports it and fails "
              f"with it: {TORCHVISION.get},\nor install the release made for torch "
              f"{torch.__version__}.")  # fmt: skip

    devices = ["cpu", *(["cuda"] if lines else [])]
    broken = {device: try_ops(device) for device in devices}
    show("what works now", conclusions(found, broken, statuses, bool(lines)))
    return 1 if any(broken.values()) else 0
