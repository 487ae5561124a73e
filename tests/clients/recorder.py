"""A proxy between a client and a router: it records the requests, and lets the client reach nothing but this machine."""

import collections
import http.client
import http.server
import json
import select
import socket
import threading
import urllib.parse

# method, path and body of a request; status and text of its response
Exchange = collections.namedtuple("Exchange", "method path body status response")
LIMIT = 80  # requests of one run: an agent that repeats itself is stopped
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "accept-encoding"}


class Recorder:
    """Use as a context manager. `url` stands for the router's; as `HTTPS_PROXY` the same port refuses every other host."""

    def __init__(self, router_url):
        self.router = urllib.parse.urlsplit(router_url)
        self.exchanges = []

    def __enter__(self):
        recorder = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if len(recorder.exchanges) >= LIMIT:
                    self.send_error(400, f"more than {LIMIT} requests")
                    return
                connection = http.client.HTTPConnection(recorder.router.hostname, recorder.router.port, timeout=120)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
                connection.request(self.command, self.path, body or None, headers)
                response, received = connection.getresponse(), b""
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                self.send_header("connection", "close")
                self.end_headers()
                try:
                    while data := response.read1(65536):
                        received += data
                        self.wfile.write(data)
                        self.wfile.flush()
                except OSError:
                    pass  # the client cancelled the request
                finally:
                    connection.close()
                    text = body.decode(errors="replace")
                    recorder.exchanges.append(Exchange(self.command, self.path, text, response.status, received.decode(errors="replace")))
                self.close_connection = True

            do_GET = do_HEAD = do_POST

            def do_CONNECT(self):
                host, _, port = self.path.rpartition(":")
                self.close_connection = True
                if host not in ("127.0.0.1", "localhost"):
                    self.send_error(403)
                    return
                with socket.create_connection((host, int(port))) as far:
                    self.send_response(200)
                    self.end_headers()
                    relay(self.connection, far)

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # a client that was ended

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def requests(self):
        """Those that ask for output, with a parsed body."""
        return [one._replace(body=json.loads(one.body)) for one in self.exchanges if one.method == "POST" and "count_tokens" not in one.path]


def relay(near, far):
    """Passes bytes both ways until one side closes."""
    while True:
        for source in select.select([near, far], [], [], 120)[0] or [None]:
            data = source.recv(65536) if source else b""
            if not data:
                return
            (far if source is near else near).sendall(data)
