"""examples/flow_rl_loop.py learns, and needs nothing but torch and g2rpo_kernels; so does the code
that docs/integrate.md asks others to write."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch

from g2rpo_kernels import compat

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "flow_rl_loop.py"
GUIDE = ROOT / "docs" / "integrate.md"


def test_example_raises_its_reward(capsys: pytest.CaptureFixture) -> None:
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    before, after = (
        float(x) for x in re.findall(r"reward \w+ (-\d+\.\d+)", capsys.readouterr().out)
    )
    # The mean distance to one point of a circle of radius 2, from all around it, is 8 / pi.
    assert before == pytest.approx(-2.55, abs=0.15)
    assert after > before + 1


def test_example_imports_torch_and_the_kernels_alone() -> None:
    names = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    assert names == {"torch", "g2rpo_kernels"}


def test_guide_names_what_there_is() -> None:
    """Every import it shows, of every function of the package, and the example."""
    text = GUIDE.read_text()
    imports = set(re.findall(r"g2rpo_kernels\.compat\.(\w+)", text))
    for line in re.findall(r"from g2rpo_kernels\.compat import ([^;\n]+)", text):
        imports |= {name.split()[0] for name in line.split(",")}
    assert imports == set(compat.__all__) - {"SDESchedulerOutput"}
    for path in re.findall(r"\]\(\.\./([\w/.]+)\)", text):
        assert (ROOT / path).is_file(), path
    assert "python examples/flow_rl_loop.py" in text
