"""A TCP proxy before another port of this machine: a network that is slow, or that loses everything for a while."""

import queue
import socket
import threading
import time


class Proxy:
    """Passes bytes on: `delay` seconds later each way, and not at all while it is cut. What was under way when it is
    cut arrives when it is mended, as with TCP over a partition."""

    def __init__(self, target_port):
        self.target_port, self.delay = target_port, 0.0
        self.whole = threading.Event()
        self.whole.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        self.whole.clear()

    def mend(self):
        self.whole.set()

    def close(self):
        self.mend()
        for one in self.sockets:
            one.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near):
        self.whole.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self.target_port))
        except OSError:
            near.close()
            return
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets += [near, far]
        for source, sink in ((near, far), (far, near)):
            under_way = queue.Queue(1024)
            threading.Thread(target=self._read, args=(source, under_way), daemon=True).start()
            threading.Thread(target=self._write, args=(sink, under_way), daemon=True).start()

    def _read(self, source, under_way):
        while True:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            under_way.put((time.monotonic() + self.delay, data))
            if not data:
                return

    def _write(self, sink, under_way):
        while True:
            due, data = under_way.get()
            time.sleep(max(0.0, due - time.monotonic()))
            self.whole.wait()
            try:
                if data:
                    sink.sendall(data)
                    continue
                sink.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side has gone
            sink.close()
            return
