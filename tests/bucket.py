"""A bucket on 127.0.0.1 that speaks Google Cloud Storage's protocol, and fails when it is told to.

The emulator serves one request at a time and knows neither preconditions, on which a run's lock
rests, nor the header with an object's generation, without which TensorStore reads nothing. Here
requests run beside each other, and both are as the real service has them.
"""

import contextlib
import datetime
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

NAME = "runs"
"""The bucket's name."""


class Bucket:
    """A bucket and its server. `status` and `delay` hold for every request."""

    def __init__(self):
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(NAME, self.storage)
        self.lock = threading.Lock()
        self.status: int | None = None
        """What the server answers instead of serving; None serves."""
        self.failures = 0
        """How many of the next requests are answered by 503."""
        self.delay = 0.0
        """Seconds before each request is served."""
        self.port, self._server = 0, None
        self.start()

    def start(self) -> None:
        """Listen; after `stop`, on the same port, with the objects as they were."""
        address = ("127.0.0.1", self.port)
        self._server = _Server(address, partial(_Handler, self, self.storage))
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that lead every client here."""
        address = f"http://127.0.0.1:{self.port}"
        return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects that begin with a prefix."""
        with self.lock:
            return sorted(o["name"] for o in self.storage.get_file_list(NAME, prefix)[0])

    def read(self, name: str) -> bytes:
        """Content of an object."""
        with self.lock:
            return self.storage.get_file(NAME, name)

    def make_older(self, name: str, seconds: float) -> None:
        """Let an object have been written earlier."""
        with self.lock:
            about = self.storage.get_file_obj(NAME, name)
            written = datetime.datetime.fromisoformat(about["updated"].removesuffix("Z"))
            older = written - datetime.timedelta(seconds=seconds)
            about["updated"] = older.isoformat(timespec="microseconds") + "Z"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Print nothing: clients that were killed answer no more."""


class _Handler(RequestHandler):
    generation = "0"  # of the object that the request is about

    def __init__(self, bucket: Bucket, *args):
        self.bucket = bucket
        super().__init__(*args)

    def _serve(self, serve) -> None:
        time.sleep(self.bucket.delay)
        if self.bucket.status is not None:
            self._refuse(self.bucket.status)
            return
        if self.bucket.failures:
            self.bucket.failures -= 1
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        with self.bucket.lock:
            self.generation = self._generation()
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            wanted = None if "upload_id" in query else query.get("ifGenerationMatch")
            if wanted and wanted[0] != self.generation:
                self._refuse(HTTPStatus.PRECONDITION_FAILED)
            else:
                serve()

    def end_headers(self):
        if self.command == "GET" and self.generation != "0":
            self.send_header("x-goog-generation", self.generation)
        super().end_headers()

    def _refuse(self, status: int) -> None:
        if length := int(self.headers.get("Content-Length", 0)):
            self.rfile.read(length)
        body = json.dumps({"error": {"code": int(status), "message": HTTPStatus(status).phrase}})
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def _generation(self) -> str:
        """Return the generation of the object that the request is about; "0" if there is none."""
        url = urllib.parse.urlsplit(self.path)
        names = urllib.parse.parse_qs(url.query).get("name")
        in_path = url.path.partition("/b/")[2].split("/", 2)[2:]  # behind the bucket and "o"
        name = names[0] if names else urllib.parse.unquote("".join(in_path))
        try:
            return self.storage.get_file_obj(NAME, name)["generation"]
        except NotFound:
            return "0"

    def do_GET(self):
        self._serve(super().do_GET)

    def do_POST(self):
        self._serve(super().do_POST)

    def do_PUT(self):
        self._serve(super().do_PUT)

    def do_DELETE(self):
        self._serve(super().do_DELETE)

    def do_PATCH(self):
        self._serve(super().do_PATCH)


@contextlib.contextmanager
def bucket() -> Iterator[Bucket]:
    """Serve an empty bucket."""
    served = Bucket()
    try:
        yield served
    finally:
        with contextlib.suppress(OSError):
            served.stop()


if __name__ == "__main__":  # to try by hand: python tests/bucket.py, then use what it prints
    with bucket() as b:
        print(" ".join(f"{k}={v}" for k, v in b.environment.items()), os.getpid(), flush=True)
        threading.Event().wait()
