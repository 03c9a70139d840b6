"""What the tests of the page share: a library in an empty working folder, its server, trainings as they lie on the disk."""

import http.client
import json
import threading
import urllib.parse

import pytest
from conftest import picture

import webui.draft
from webui.jobs import Job
from webui.main import Page
from webui.places import Library
from webui.seen import look
from webui.server import Server


class Client:
    """Asks a server as the page in a browser does."""

    def __init__(self, port):
        self.port, self.host = port, f"127.0.0.1:{port}"

    def request(self, method, path, body=None, **headers):
        """(status, headers, body) of an answer; headers by name with _ for -, None for one that is not sent."""
        sent = {"Host": self.host, **({"Origin": f"http://{self.host}"} if method != "GET" else {})}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            if body is not None and "Content-Length" not in sent:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def get(self, path, **query):
        status, _, body = self.request("GET", f"{path}?{urllib.parse.urlencode(query)}")
        return json.loads(body) if status == 200 else (status, json.loads(body)["refused"])

    def act(self, action, **values):
        """The answer of an action; (status, word, details) of one that was refused."""
        status, _, body = self.request("POST", f"/api/{action}", json.dumps(values).encode())
        answer = json.loads(body)
        return answer if status == 200 else (status, answer["refused"], answer["details"])

    def put(self, what, name, data):
        status, _, body = self.request("PUT", f"/api/{what}?{urllib.parse.urlencode({'name': name})}", data)
        return json.loads(body) if status == 200 else (status, json.loads(body)["refused"])


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webui.draft, "looked_at", look)  # in this process, which is quicker
    return Library("library")


@pytest.fixture
def page(library):
    """A Client of a server for `library`, in which no job begins."""
    server = Server(Page(library), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Client(server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join()


RECORD = {"method": "lora", "base_model": "demo/model", "used": {"steps": 800, "resolution": 64, "lr_scheduler": "constant"},
          "subjects": [{"identifier": "sks", "class_prompt": "a dog", "instance_prompt": "a sks dog", "name": "dog"}]}


@pytest.fixture
def trained(library):
    """trained(name, **record) -> the folder of a training as if it had ended well."""
    def make(name, **record):
        place = library.trained / name
        (place / "photos").mkdir(parents=True)
        (place / "output" / "samples").mkdir(parents=True)
        picture(0).save(place / "photos" / "0.png")
        picture(1).save(place / "output" / "samples" / "a-sks-dog-on-the-moon-0.png")
        (place / "output" / "dreambooth.json").write_text(json.dumps(RECORD | record))
        job = Job.make(place / "job", "train", ["--train", f"--output_dir={place / 'output'}"], title=name, uses=[name],
                       fields={"class_prompt": "a dog", "method": "lora"})
        job.write("exit", 0)
        return place

    return make


@pytest.fixture
def photo_bytes(tmp_path):
    """photo_bytes(seed, size) -> a PNG as a browser sends it."""
    def make(seed=0, size=(48, 40)):
        path = tmp_path / f"sent-{seed}.png"
        picture(seed, size).save(path)
        return path.read_bytes()

    return make
