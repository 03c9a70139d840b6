"""The program's own loop on models of full size whose tensors pretend to be on a GPU: devices, and what the plan expects."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("arch, flags, limit", [
    ("sd15", ["--max_vram", "15"], 15),
    pytest.param("sd15", ["--max_vram", "8", "--train_text_encoder"], 8, marks=pytest.mark.slow),
    pytest.param("sdxl", ["--max_vram", "10"], 10, marks=pytest.mark.slow)])
def test_full_size_models_train_and_draw_within_the_limit(arch, flags, limit, tmp_path):
    if limit == 8:
        pytest.importorskip("torchao")  # its plan needs it
    results = tmp_path / "results.json"
    command = [sys.executable, REPOSITORY / "benchmarks" / "pretend_gpu.py", "--arch", arch, "--results", results, *flags]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "waits for the GPU" not in done.stdout
    row, = json.loads(results.read_text())
    assert row["counted"] == pytest.approx(row["expected"], rel=0.03)
    assert max(row["counted"], row["preparing"], row["drawing"]) < row["with_reserve"] < limit
