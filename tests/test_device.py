"""Where and in which precision to compute, and what a device lacks."""

import pytest
import torch

import dreambooth_implementation as db


def test_small_tensors_go_to_a_gpu_from_pinned_memory_without_waiting():
    class Tensor:
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            return device.type, self.pinned, non_blocking
    assert db.moved(Tensor(), torch.device("cuda")) == ("cuda", True, True)
    assert db.moved(Tensor(), torch.device("cpu")) == ("cpu", False, False)


def test_without_a_compiler_it_says_so(run, photos, tiny_model, monkeypatch):
    monkeypatch.setattr(db.shutil, "which", lambda name: None)
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("a model was loaded"))
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                         "a dog", "--compile")
    assert status == 2 and "C++ compiler" in err and err.count("\n") == 1, err


def test_the_peak_on_a_gpu_is_said_with_and_without_gaps(monkeypatch):
    for what, size in {"allocated": 3, "reserved": 4}.items():
        monkeypatch.setattr(torch.cuda, f"max_memory_{what}", lambda device, size=size: size * db.GIB)
    assert db.peak_memory(torch.device("cuda")) == "3.00 GiB of tensors on the GPU, 4.00 GiB with what lies unused between them"
