"""The hub: models that moved, and a hub out of reach."""

import socketserver
import threading

import pytest
from conftest import REPOSITORY
from without_torch import answers

import dreambooth_implementation as db


def test_moved_models_are_found_under_their_new_id(monkeypatch, capsys):
    import huggingface_hub

    asked = []
    index = str(REPOSITORY / "demo" / "model" / "model_index.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: asked.append(name) or index)
    assert db.find_model("runwayml/stable-diffusion-v1-5", "--model_name") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert "no longer on the hub" in capsys.readouterr().out


@pytest.fixture
def mute_hub(monkeypatch):
    """The list of the connections made to a server that hangs up on each; it is the hub for processes started meanwhile."""
    made = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self):
            made.append(self.client_address)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangUp) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield made
        server.shutdown()
        thread.join()


def test_an_unreachable_hub_is_asked_once(mute_hub, tmp_path, monkeypatch):
    """The hub's client itself would try again and again, for half a minute."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (status, _, err), = answers(tmp_path, [["--infer", "--model_path", "a/b", "--prompt", "a dog"]])
    assert status == 2 and err.count("\n") == 1 and "--model_path a/b" in err, err
    assert 1 <= len(mute_hub) <= 4  # for its record, for its index, for what else it may be
