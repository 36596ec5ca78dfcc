"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((HERE / "interpreted").glob("check_*.py")), ids=lambda p: p.stem)
def test_interpreted(path: Path) -> None:
    """In a process of its own: once Triton has decorated functions to compile, it cannot interpret them."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
