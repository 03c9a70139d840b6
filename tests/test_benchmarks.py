"""What benchmarks/ measures on a GPU, tried on a CPU."""

import json
import shlex
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import bench_gpu
from bench_gpu import CASES, FILLINGS, Case, Results, words_of
from compare_methods import divided

SCRIPTS = {
    "quick.py": "Path(sys.argv[-1]).write_text(json.dumps({'seconds_per_step': 0.5}))\n"
                "Path(sys.argv[-1]).with_suffix('.txt').write_text('a profile')",
    "failing.py": "print('before'); raise SystemExit('no such device')",
    "slow.py": "import time; time.sleep(600)",
    "meeting.py": "import time\n"  # ends once two have come
                  "here = Path(__file__).parent\n"
                  "(here / sys.argv[1]).touch()\n"
                  "while not all((here / name).exists() for name in ('one', 'other')): time.sleep(0.05)\n"
                  "Path(sys.argv[-1]).write_text('{}')\n"
                  "(here / (sys.argv[1] + '-gone')).touch()",
    "last.py": "names = [path.name for path in Path(__file__).parent.glob('*-gone')]\n"
               "Path(sys.argv[-1]).write_text(json.dumps({'gone': sorted(names)}))",
}


def test_flags_of_drawing_are_not_given_to_the_training():
    assert divided(["--method", "lora", "--subject_start", "0.2", "--rank", "4"]) == (["--method", "lora", "--rank", "4"],
                                                                                      ["--subject_start", "0.2"])
    assert divided([]) == ([], [])


@pytest.fixture
def scripts(tmp_path):
    """scripts(name) -> the command of a script that stands in for a benchmark."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(f"import json, sys\nfrom pathlib import Path\n{text}\n")
    return lambda name: shlex.quote(str(tmp_path / name))


@pytest.fixture
def measure(tmp_path):
    """measure(cases, ...) -> {case: row} of what came of them, and the lines that were said."""
    (tmp_path / "copies").mkdir()

    def call(cases, seconds=60, patience=2, filling=FILLINGS["bundled"], **options):
        said = []
        results = Results(tmp_path / "gpu.json", tmp_path / "copies")
        bench_gpu.run(cases, filling, results, {"models": "bundled"}, seconds, patience,
                      say=lambda line, flush: said.append(line), **options)
        rows = json.loads((tmp_path / "gpu.json").read_text())
        assert rows == results.rows == json.loads((tmp_path / "copies" / "gpu.json").read_text())
        return {row["case"]: row for row in rows}, said

    return call


def test_a_failure_is_noted_with_its_last_lines_and_passed_over(scripts, measure, tmp_path):
    rows, said = measure([Case(1, "failing", 1, scripts("failing.py")), Case(1, "quick", 1, scripts("quick.py")),
                          Case(2, "without", 1, "stages.py profile {sdxl}")], patience=20, together={})
    assert (rows["failing"]["failed"], rows["failing"]["last_lines"]) == ("status 1", ["before", "no such device"])
    assert rows["quick"]["seconds_per_step"] == 0.5 and "failed" not in rows["quick"]
    assert rows["without"]["left_out"]
    assert [line.split(" (")[0] for line in said] == ["1 failing", "1 quick", "2 without"]
    assert "status 1" in said[0] and said[0].endswith("    | no such device") and "seconds_per_step 0.5" in said[1]
    for folder in (tmp_path, tmp_path / "copies"):
        assert (folder / "gpu-1-quick.txt").read_text() == "a profile"


def test_a_case_ends_at_its_limit_and_none_begins_that_cannot_end_in_time(scripts, measure):
    rows, said = measure([Case(1, "slow", 0.05, scripts("slow.py")), Case(2, "long", 100, scripts("quick.py")),
                          Case(3, "quick", 1, scripts("quick.py"))], patience=40)
    assert rows["slow"]["failed"].startswith("stopped after") and rows["slow"]["took_s"] >= 2
    assert rows["long"]["not_begun"].endswith("100 are expected") and "took_s" not in rows["long"]
    assert rows["quick"]["seconds_per_step"] == 0.5


def test_cases_of_a_stage_run_together_and_the_next_stage_waits(scripts, measure):
    cases = [Case(1, "one", 1, scripts("meeting.py") + " one"), Case(1, "other", 1, scripts("meeting.py") + " other"),
             Case(2, "last", 1, scripts("last.py"))]
    rows, said = measure(cases, patience=50, together={1: 2}, processors=2)
    assert "failed" not in rows["one"] and "failed" not in rows["other"], said
    assert rows["last"]["gone"] == ["one-gone", "other-gone"]


def test_a_later_run_replaces_what_it_measures_again_and_keeps_the_rest(scripts, measure):
    cases = [Case(2, "one", 1, scripts("failing.py")), Case(3, "other", 1, scripts("quick.py"))]
    before, _ = measure(cases, patience=20)
    after, _ = measure([Case(2, "one", 1, scripts("quick.py"))], patience=20)
    assert "failed" in before["one"] and after["one"]["seconds_per_step"] == 0.5
    assert list(after) == ["one", "other"] and after["other"] == before["other"]


def test_steps_are_measured_by_a_process_that_was_loaded_ahead(scripts, measure):
    trained = next(case for case in CASES if case.name == "sd15")
    rows, said = measure([Case(1, "quick", 1, scripts("quick.py")), trained], seconds=1000, patience=20, processors=4)
    row = rows["sd15"]
    assert "failed" not in row, row
    assert row["seconds_per_step"] > 0 and row["plan"] == "" and 0.45 < row["expected_GiB"] < 0.5
    assert 0.5 < row["loss_of_last_20_steps"]["prior"] < 1.5
    line, = bench_gpu.table(rows.values())[2:]
    assert line.startswith(f"| sd15 | `` | {row['seconds_per_step']} | ")


@pytest.mark.slow
def test_a_step_is_profiled_and_its_text_kept(measure, tmp_path):
    rows, said = measure([case for case in CASES if case.name == "profile"], seconds=1000, patience=15)
    row = rows["profile"]
    assert "failed" not in row, row
    assert row["tera_operations_per_step"] > 0.004 and 0 < row["busy_share"] <= 1
    text = (tmp_path / "gpu-7-profile.txt").read_text()
    assert text == row["text"] and "seconds_per_step: " in text and "convolution_backward" in text


def test_a_profile_tells_work_from_gaps_and_adds_up_kernels():
    import stages

    def event(cat, name, start, lasts):
        return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": lasts}
    events = [event("cpu_op", "aten::mm", 0, 5000), event("kernel", "nvjet_hsh_128x256", 100, 600),
              event("kernel", "flash_fwd_kernel", 650, 250), event("kernel", "nvjet_hsh_128x256", 905, 95),
              event("gpu_memcpy", "Memcpy HtoD", 1030, 70), {"ph": "M", "name": "process_name"}]
    work = stages.work_of(events)
    assert [name for _, _, name in work] == ["nvjet_hsh_128x256", "flash_fwd_kernel", "nvjet_hsh_128x256", "Memcpy HtoD"]
    assert stages.gaps(work) == {"kernels_per_step": 0.4, "busy_share": 0.965, "gaps_over_10_us": 0.1, "their_us_per_step": 3,
                                 "longest_gap_us": 30}
    kinds, costliest = "\n".join(stages.tally(work)).split("\n\n")[:2]
    assert [line.split() for line in kinds.splitlines()[1:]] == [
        ["68.5%", "0.070", "0.2", "matrix", "products,", "convolutions"], ["24.6%", "0.025", "0.1", "attention"],
        ["6.9%", "0.007", "0.1", "copies,", "conversions"]]
    assert costliest.splitlines()[1].split() == ["68.5%", "0.070", "0.2", "nvjet_hsh_128x256"]


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-40GB", 312),
    ("NVIDIA L4", 121), ("NVIDIA L40S", None), ("Tesla T4", 65), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", None), ("CPU, 4 threads", None)])
def test_the_peak_of_a_card_goes_by_its_name(name, peak, monkeypatch):
    import bench_train

    monkeypatch.setattr(bench_train, "machine_name", lambda device: f"{name}, 80 GiB")
    monkeypatch.setattr(bench_train, "fastest_product", lambda plan: 200e12)
    shares = bench_train.shares(100e12, 2, bench_train.plan_device(bench_train.parse_settings(["--train"])))
    assert shares == {"share_of_fastest_product": 0.25} | ({"share_of_peak": round(50 / peak, 3)} if peak else {})


def test_every_case_can_be_said_in_words_and_names_a_script():
    for models, filling in FILLINGS.items():
        said = [words_of(case, filling | {"work": "/work", "reference": "'/a b/script.py'"}) for case in CASES]
        assert all((REPOSITORY / "benchmarks" / words[0]).is_file() and "{" not in " ".join(words) for words in said if words)
        left_out = [case.name for case, words in zip(CASES, said) if words is None]
        assert bool(left_out) == (models == "bundled") and "sd15" not in left_out
    assert len({(case.stage, case.name) for case in CASES}) == len(CASES)
    reference = next(case for case in CASES if case.name == "reference")
    assert words_of(reference, FILLINGS["full"] | {"reference": None}) is None
    assert "/a b/script.py" in words_of(reference, FILLINGS["full"] | {"reference": "'/a b/script.py'"})


def test_pictures_in_one_scene_have_the_masks_of_what_is_drawn(tmp_path):
    import numpy as np
    import one_scene
    from PIL import Image

    drawing = Image.new("RGBA", (60, 40), (255, 0, 255, 255))
    drawing.paste((0, 0, 0, 0), (0, 0, 20, 20))
    one_scene.paint(tmp_path / "thing", "thing", drawing, 3, count=2)
    for name in "01":
        image, mask = (np.array(Image.open(tmp_path / "thing" / f"{name}{end}.png")) for end in ("", ".mask"))
        near = np.abs(image.astype(int) - (255, 0, 255)).max(-1) < 16
        assert near[mask > 250].all() and not near[mask < 5].any() and 0.05 < near.mean() < 0.6
    import world

    assert (tmp_path / "thing" / "0.txt").read_text() == f"a [identifier] thing {list(world.SCENES)[3]}\n"
