"""Everything a GPU is needed for, in bounded time: `make gpu-check`, or

    python3 benchmarks/gpu_check.py [--limit SECONDS]

Builds the extension in place where it lacks CUDA and nvcc is there, tests the ops on every backend
of this card, then times them, the cases that matter most first. What was done is in
benchmarks/results/<gpu>.json at every moment, so a run that is cut short keeps what it had. Needs
torch and, for the tests, pytest; nothing need be installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import _paths  # noqa: F401
import torch
from goals import verdicts
from report import text_table
from results import Store, default_path, load

import g2rpo_kernels as gk
from g2rpo import doctor

TESTS = ("ops", "native", "normal", "policy_loss", "group_advantages", "compat", "tracing")
CRASHES = 3  # how often the benchmarks are taken up again after their process has died


def call(command: list[str], limit: float, **variables: str) -> tuple[int | None, float, str]:
    """Run and show a command. Exit code (None: out of time), seconds, the end of its output."""
    started = time.perf_counter()
    print(f"\n$ {' '.join(command)}    (at most {limit:.0f} s)", flush=True)
    # The package of this tree, wherever the command's own start puts sys.path.
    path = os.pathsep.join(filter(None, (str(_paths.ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**variables, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=_paths.ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        errors="replace", stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    last: deque[str] = deque(maxlen=40)

    def show() -> None:
        for line in process.stdout:
            last.append(line.rstrip())
            print(line, end="", flush=True)

    reader = threading.Thread(target=show)
    reader.start()
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own workers too, and nobody else's
        process.wait()
        code = None
    reader.join()
    seconds = time.perf_counter() - started
    print(f"-> {'out of time' if code is None else f'exit code {code}'}, {seconds:.0f} s")
    return code, seconds, "\n".join(last)


def build(limit: float) -> dict:
    """The extension with CUDA, in place; what was done and the reason where nothing was."""
    status = gk.backends()["cuda"]
    if status.available:
        return {"did": "nothing: the cuda backend is there"}
    nvcc, why = doctor.toolkit()
    if not nvcc:
        return {"did": "nothing", "why": f"{status.reason}; {why}"}
    major, minor = torch.cuda.get_device_capability()
    # For this card alone, which takes a fraction of the time; what the user has set goes before.
    code, seconds, end = call([sys.executable, "setup.py", "build_ext", "--inplace"], limit,
                              G2RPO_BUILD="cuda", G2RPO_CUDA_ARCHS=f"{major}{minor}")  # fmt: skip
    return {"did": "setup.py build_ext --inplace", "code": code, "seconds": seconds, "end": end}


def test(limit: float) -> dict:
    if importlib.util.find_spec("pytest") is None:
        return {"did": "nothing", "why": "pytest is not installed: pip install pytest"}
    files = [f"tests/test_{name}.py" for name in TESTS]
    many = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    code, seconds, end = call(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *many, *files], limit
    )
    return {"did": "pytest " + " ".join(files), "code": code, "seconds": seconds, "end": end}


def bench(path: Path, limit: float, arguments: list[str]) -> dict:
    """run.py in a process of its own: a kernel that faults takes its process along, not the run."""
    began = time.perf_counter()
    command = [sys.executable, "benchmarks/run.py", "--device", "cuda", "--results", str(path),
               "--resume", *arguments]  # fmt: skip
    code, end = None, ""
    for _ in range(CRASHES):
        left = limit - (time.perf_counter() - began)
        if left < 10:
            break
        # It stops beginning cases in time to end by itself.
        code, _, end = call([*command, "--limit", f"{0.8 * left:.0f}"], left)
        if code in (0, 2, 3, None):  # an end of its own, or out of time
            break
    return {"did": "run.py", "code": code, "seconds": time.perf_counter() - began, "end": end}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="Other options go to benchmarks/run.py.")  # fmt: skip
    parser.add_argument("--limit", type=float, default=240, help="seconds each part may take")
    parser.add_argument("--results", type=Path, help="the file to write")
    parser.add_argument("--no-tests", action="store_true")
    options, rest = parser.parse_known_args()
    if not torch.cuda.is_available():
        why = doctor.gpus()[1]
        print(f"gpu_check: error: no GPU to check: {why}", file=sys.stderr)
        return 2
    print(f"{doctor.gpus()[0][0]}; torch {torch.__version__}, Python {sys.version.split()[0]}")
    for name in ("pytest", "pytest_benchmark", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed; "
                  + ("no tests" if name == "pytest" else "not needed here"))  # fmt: skip
    path = options.results or default_path("cuda")
    parts = {"build": build(options.limit)}
    store = Store(path, "cuda")
    store.content["parts"] = parts
    store.save()
    if not options.no_tests:
        parts["tests"] = test(options.limit)
        store.save()
    done = bench(path, options.limit, rest)
    store = Store(path, "cuda", resume=True)
    store.content["parts"]["benchmarks"] = done
    store.save()

    content = load(path)
    print(f"\n{text_table(content)}\n")
    print("\n".join(verdicts(content)))
    for name, part in content["parts"].items():
        said = part["end"].splitlines()[-1:] if part.get("end") else [part.get("why", "")]
        print(f"{name:44} {part['did']}: {part.get('code', '')} {' '.join(said)}")
    print(f"\nwritten to {path}; python benchmarks/report.py puts it into the README")
    codes = [part["code"] for part in content["parts"].values() if "code" in part]
    return 0 if all(code == 0 for code in codes) else 1


if __name__ == "__main__":
    sys.exit(main())
