"""A TCP cable that a test can cut, freeze or make faulty; whole, it forwards every byte."""

import contextlib
import socket
import threading


class Cable:
    """Listens on a free port of loopback and forwards to `port`."""

    def __init__(self, port):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs, self._frozen, self._lock = set(), set(), threading.Lock()
        self._cut = self._faulty = False
        self.spoilt = 0  # pieces of a stream in which a byte was changed
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """End what is connected, and refuse what comes."""
        self._cut = True
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            _close(pair)

    def freeze(self):
        """Lose every byte of what is connected now, and tell nobody: half-open for ever.

        Returns
        -------
        int
            How many connections that are.
        """
        with self._lock:
            self._frozen |= self._pairs
            return len(self._frozen)

    def spoil(self):
        """Change a byte of every piece that passes, in both directions."""
        self._faulty = True

    def mend(self):
        """Let new connections through, unchanged."""
        self._cut = self._faulty = False

    def close(self):
        self.cut()
        self._listener.close()

    def _accept(self):
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            if self._cut:
                inner.close()
                continue
            try:
                outer = socket.create_connection(("127.0.0.1", self._target), timeout=5.0)
            except OSError:
                inner.close()
                continue
            outer.settimeout(None)
            pair = (inner, outer)
            with self._lock:
                self._pairs.add(pair)
            for one, other in (pair, pair[::-1]):
                threading.Thread(target=self._pump, args=(one, other, pair), daemon=True).start()

    def _pump(self, source, sink, pair):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if pair in self._frozen:
                    continue
                sink.sendall(self._changed(data) if self._faulty else data)
        with self._lock:
            if pair in self._frozen:
                return  # the other end is not told either
            self._pairs.discard(pair)
        _close(pair)

    def _changed(self, data):
        self.spoilt += 1
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _close(pair):
    for each in pair:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            each.close()
