"""The command line of the page, and of the two small programs that it starts: `run` a job, `look` at photos."""

import argparse
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

from filelock import FileLock, Timeout

import dreambooth_implementation as db
from webui.draft import Draft
from webui.line import Line
from webui.logs import Logs
from webui.places import Library
from webui.program import machine
from webui.runner import run
from webui.seen import look
from webui.server import Server

PORTS = range(7860, 7960)  # that are tried where none is given


class Page:
    """What a server has beside its port."""

    def __init__(self, library):
        self.library, self.draft, self.logs, self.machine = library, Draft(library), Logs(), {}
        self.line = Line(library)

    @property
    def has_gpu(self):
        return self.machine.get("has_gpu", False)

    def begin(self):
        """Let the jobs that wait begin, and find out what machine this is."""
        self.line.thread.start()
        threading.Thread(target=self.ask_machine, daemon=True).start()

    def ask_machine(self):
        """`machine`, in a process of its own, as torch takes memory."""
        webui = Path(__file__).resolve().parent.parent / "webui.py"
        answer = subprocess.run([sys.executable, str(webui), "machine"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        try:
            self.machine = json.loads(answer.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            self.machine = {"error": (answer.stderr.strip().splitlines() or ["?"])[-1][:300]}


def port_number(text):
    if not 1 <= int(text) <= 65535:
        raise ValueError
    return int(text)


def bound_server(page, port):
    """A Server on a port, or on the first that is free. UserError if there is none."""
    for number in [port] if port else PORTS:
        try:
            return Server(page, number)
        except OSError:
            continue
    if port:
        raise db.UserError(f"--port {port}: in use already, or not for this user; give another")
    raise db.UserError(f"ports {PORTS[0]} to {PORTS[-1]} are in use; give another with --port")


def serve(root, port):
    """Serve a library until a signal comes. Jobs under way go on without."""
    db.check_writable(root, "--library")
    root.mkdir(parents=True, exist_ok=True)
    library, address = Library(root), root / ".address"
    try:
        with FileLock(root / ".page.lock").acquire(timeout=0):
            server = bound_server(Page(library), port)
            address.write_text(f"http://127.0.0.1:{server.server_address[1]}", encoding="utf-8")
            print(f"The page is {address.read_text(encoding='utf-8')} (Ctrl-C ends it; trainings go on)", flush=True)
            serve_until_signal(server)
    except Timeout:
        where = address.read_text(encoding="utf-8") if address.is_file() else "in another window"
        raise db.UserError(f"--library {root}: its page is open already, {where}; give another library, or end that page") from None


def serve_until_signal(server):
    server.page.begin()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    over = threading.Event()
    for number in (signal.SIGINT, *db.ending_signals()):
        signal.signal(number, lambda number, frame: over.set())
    while not over.wait(0.5):  # a signal is seen between two waits on every system
        pass
    server.page.line.ended.set()
    server.shutdown()
    under_way = [job.command["title"] for job in server.page.library.jobs().values() if job.state() in ("running", "stopping")]
    if under_way:
        print(f"Still at work: {', '.join(under_way)}. `python webui.py` shows it again.", flush=True)


def helper(words):
    """What the page starts for itself; returns the exit status."""
    if words[0] == "run":
        return run(words[1])
    if words[0] == "machine":
        print(json.dumps(machine()))
        return 0
    print(json.dumps(look(Path(words[1]), Path(words[2]), int(words[3]))))
    return 0


def main(argv=None):
    """Serve the page. The exit status is 0, or 2 after one line on standard error if the user can put it right."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("run", "look", "machine"):
        return helper(argv)
    parser = argparse.ArgumentParser(prog="webui.py", description="A page in the browser for dreambooth_implementation.py.")
    parser.add_argument("--port", type=port_number, help=f"port of the page on 127.0.0.1 (default: the first that is free from "
                                                         f"{PORTS[0]})")
    parser.add_argument("--library", type=Path, default=Path("library"), help="folder for all that the page keeps "
                                                                              "(default: ./library)")
    given = parser.parse_args(argv)
    with db.lasting_console():
        try:
            serve(given.library, given.port)
        except db.UserError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 2
    return 0
