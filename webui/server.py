"""The HTTP server: the page's own files, what it looks at, what it does; for this machine alone."""

import json
import shutil
import sys
import traceback
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dreambooth_implementation as db
from webui.actions import ACTIONS
from webui.draft import safe_name, save_stream
from webui.guard import HEADERS, Refusal, check_request
from webui.places import found
from webui.state import LOOKS

STATIC = Path(__file__).resolve().parent / "static"
STATIC_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json",
                ".svg": "image/svg+xml"}
LARGEST_WORDS, LARGEST_ADAPTER = 1 << 20, 64 << 30  # bytes of what the page sends
LOST = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError, TimeoutError)


class Server(ThreadingHTTPServer):
    """Serves a page: an object with library, draft, logs and machine."""

    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"

    def __init__(self, page, port):
        self.page = page
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), LOST):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version, server_version, sys_version, timeout = "HTTP/1.1", "dreambooth", "", 60

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method):
        """Carry out a request, or tell the page why not."""
        self.unread = self.length()
        try:
            url = urllib.parse.urlsplit(self.path)
            path = urllib.parse.unquote(url.path, errors="replace")
            check_request(method, path, self.headers)
            if self.unread is None:
                raise Refusal("cut_short", 411)
            query = {name: value[-1] for name, value in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
            {"GET": self.get, "POST": self.post, "PUT": self.put}[method](path, query)
        except Refusal as refusal:
            self.send_json({"refused": refusal.word, "details": refusal.details}, refusal.status)
        except db.UserError as problem:
            self.send_json({"refused": "program", "details": {"said": str(problem)}}, 400)
        except LOST:
            self.close_connection = True
        except OSError as problem:
            said = f"{problem.filename or ''} {problem.strerror or problem}".strip()
            self.send_json({"refused": "program", "details": {"said": said}}, 500)
        except Exception as problem:  # a fault of the page's own: it is told on the page, and in full in the terminal
            traceback.print_exc()
            said = f"{type(problem).__name__}: {problem}"
            self.send_json({"refused": "program", "details": {"said": said}}, 500)

    def length(self):
        """Bytes that follow the headers; None if that is not told as it should be."""
        text = self.headers.get("Content-Length", "0")
        is_told = text.isdecimal() and len(text) < 15 and "Transfer-Encoding" not in self.headers
        return int(text) if is_told else None

    def get(self, path, query):
        kind, _, rest = path.removeprefix("/").partition("/")
        if kind == "api":
            return self.send_json(found(LOOKS, rest)(self.server.page, query))
        if kind in ("files", "outside"):
            return self.send_file(*self.server.page.library.file(rest, outside=kind == "outside"), lasts=bool(query))
        own = {f"/static/{file.name}": file for file in STATIC.iterdir()} | {"/": STATIC / "index.html"}
        file = found(own, path)
        self.send_file(file, f"{STATIC_KINDS[file.suffix]}; charset=utf-8")

    def post(self, path, query):
        action = found(ACTIONS, path.removeprefix("/api/"))
        if self.unread > LARGEST_WORDS:
            raise Refusal("too_large", 413, megabytes=LARGEST_WORDS >> 20)
        try:
            values = json.loads(self.rfile.read(self.unread) or b"{}")
        except (ValueError, RecursionError):
            values = None
        self.unread = 0
        if not isinstance(values, dict):
            raise Refusal("cut_short")
        with self.server.page.library.lock:
            try:
                answer = action(self.server.page, values)
            except (TypeError, AttributeError, KeyError):  # of another shape than the page sends
                raise Refusal("cut_short") from None
        self.send_json(answer)

    def put(self, path, query):
        """A file that was dropped: a photo, or an adapter of another's."""
        page, name = self.server.page, query.get("name", "")
        length = self.unread
        self.close_connection, self.unread = True, 0  # what is left unread would be taken for the next request
        if path == "/api/photo":
            return self.send_json(page.draft.add(name, self.rfile, length))
        if path != "/api/adapter":
            raise Refusal("gone", 404)
        name = safe_name(name)
        page.library.adapters.mkdir(parents=True, exist_ok=True)
        if not name.endswith(".safetensors"):
            raise Refusal("not_safetensors")
        if (page.library.adapters / name).exists():
            raise Refusal("name_taken", name=name)
        if length > min(LARGEST_ADAPTER, shutil.disk_usage(page.library.adapters).free):
            raise Refusal("no_room")
        save_stream(page.library.adapters / name, self.rfile, length)
        self.send_json({"name": name})

    def send_json(self, value, status=200):
        self.send_bytes(json.dumps(value, ensure_ascii=False).encode(errors="replace"), "application/json; charset=utf-8", status)

    def send_bytes(self, data, kind, status=200):
        self.begin(kind, len(data), status)
        self.wfile.write(data)

    def send_file(self, path, kind, lasts=False):
        """`lasts`: the address changes with the file, so that the browser may keep it."""
        with open(path, "rb") as file:
            self.begin(kind, path.stat().st_size, more={"Cache-Control": "private, max-age=604800"} if lasts else {})
            shutil.copyfileobj(file, self.wfile, 1 << 20)

    def begin(self, kind, length, status=200, more=()):
        if self.unread != 0:  # what was refused unread would be taken for the next request
            self.close_connection = True
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(length), **dict(more)}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *args):
        """The terminal is for what a person should know."""
