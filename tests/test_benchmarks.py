"""What benchmarks/ measures on a GPU, tried on a CPU."""

import json
import subprocess
import sys

from conftest import REPOSITORY


def test_the_gpu_benchmark_runs_its_cases_and_tables_them(tmp_path):
    results = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, REPOSITORY / "benchmarks" / "bench_gpu.py", "--models", "bundled", "--rounds", "6",
                           "--results", results], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    free, limited = json.loads(results.read_text())
    assert (free["plan"], limited["plan"]) == ("", "--gradient_checkpointing --fused_backward")
    assert 0.3 < limited["expected_GiB"] < 0.45 < free["expected_GiB"] and free["seconds_per_step"] > 0
    assert all(row["loss_of_last_100_steps"][kind] > 0 for row in (free, limited) for kind in ("instance", "prior"))
    assert done.stdout.count("| bundled | `--max_vram 0.45` |") == 2 and "failed" not in done.stdout
    assert not list((REPOSITORY / "benchmarks" / "results").glob("of-bench-gpu*"))
