"""The agent's end of the protocol, for one client, doing exactly what a measurement wants. Messages as in shim/wire."""

import contextlib
import socket
import struct
import time
from pathlib import Path

HEADER = struct.Struct("<IHHII")
MAGIC, VERSION = int.from_bytes(b"NVSH", "little"), 1
WELCOME, GRANT, REVOKE, DISPLACED = 1, 2, 3, 8
HELLO, USE_GPU, WAITING, REVOKED, RESUMED, MOVED, MOVES = 1, 2, 4, 5, 6, 8, 9
BY = ["demand", "plain", "protected", "unproven"]
OUTCOMES = ["drained", "timed_out", "capturing"]
IN, OUT = 0, 1
ALL = 1 << 62


class Gone(Exception):
    """The client has ended the session, or does not answer."""


class ScriptedAgent:
    """Listens in `run_dir` for one client at a time."""

    def __init__(self, run_dir, patience=60):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.run_dir / "clients.sock"))
        self.listener.listen(4)
        self.listener.settimeout(patience)
        self.patience = patience
        self.client = self.gpu = self.by = None
        self.epoch, self.waiting = 0, 0
        self.news = []

    def greet(self):
        """Takes a client and learns which GPU it uses."""
        self.hang_up()
        self.client, _ = self.listener.accept()
        self.client.settimeout(self.patience)
        self.gpu, self.epoch, self.news, self.bytes = None, 0, [], b""
        self._await(HELLO)
        self._send(WELCOME, struct.pack("<QI", 1, 600_000))
        self.gpu = self._await(USE_GPU)[4:20]

    def hang_up(self):
        if self.client is not None:
            self.client.close()
            self.client = None

    def _send(self, kind, payload):
        try:
            self.client.sendall(HEADER.pack(MAGIC, VERSION, kind, len(payload), 0) + payload)
        except OSError as error:
            raise Gone(str(error)) from error

    def _receive(self):
        def exactly(count):
            while len(self.bytes) < count:
                try:
                    more, descriptors, _, _ = socket.recv_fds(self.client, 4096, 8)
                except OSError as error:
                    raise Gone(f"no message within {self.patience} s: {error}") from error
                for descriptor in descriptors:
                    # The client's page and its descriptors of the driver: nothing here counts with them.
                    with contextlib.suppress(OSError):
                        socket.close(descriptor)
                if not more:
                    raise Gone("the client closed the connection")
                self.bytes += more
            taken, self.bytes = self.bytes[:count], self.bytes[count:]
            return taken

        magic, version, kind, length, _ = HEADER.unpack(exactly(HEADER.size))
        if (magic, version) != (MAGIC, VERSION):
            raise Gone("not a frame of this protocol")
        payload = exactly(length)
        if kind == MOVES:
            self.by = BY[struct.unpack("<I", payload)[0]]
        elif kind == WAITING:
            self.waiting = struct.unpack_from("<I", payload, 16)[0]
        return kind, payload

    def _await(self, kind, epoch=None):
        """The next message of a kind (and epoch); others stay for later."""
        def fits(message):
            return message[0] == kind and (epoch is None or struct.unpack_from("<Q", message[1], 16)[0] == epoch)

        for message in self.news:
            if fits(message):
                self.news.remove(message)
                return message[1]
        while True:
            message = self._receive()
            if fits(message):
                return message[1]
            if message[0] in (REVOKED, RESUMED, MOVED):
                self.news = [*self.news[-200:], message]

    def revoke(self, shortfall=ALL, drain_ms=30_000):
        """Takes the GPU away; the epoch. What comes of it is asked for with `revoked`."""
        self.epoch += 1
        self._send(REVOKE, self.gpu + struct.pack("<QIQ", self.epoch, drain_ms, shortfall))
        return self.epoch

    def revoked(self, epoch):
        """(outcome, drain seconds, announced bytes)"""
        payload = self._await(REVOKED, epoch)
        outcome, drain_ns, moved = struct.unpack_from("<IQQ", payload, 24)
        return OUTCOMES[outcome], drain_ns / 1e9, moved

    def grant(self, prefetch=ALL):
        self.epoch += 1
        self._send(GRANT, self.gpu + struct.pack("<QQ", self.epoch, prefetch))
        return self.epoch

    def resumed(self, epoch):
        """(announced bytes, seconds for which the gate stayed closed for them)"""
        moved, moved_ns = struct.unpack_from("<QQ", self._await(RESUMED, epoch), 24)
        return moved, moved_ns / 1e9

    def moved(self, epoch):
        """(bytes, seconds) once all has been moved."""
        _, moved, moved_ns = struct.unpack_from("<IQQ", self._await(MOVED, epoch), 24)
        return moved, moved_ns / 1e9

    def displaced(self, brought, pushed):
        self._send(DISPLACED, self.gpu + struct.pack("<II", brought, pushed))

    def take(self, shortfall=ALL):
        """Takes the GPU away and waits until everything is out: bytes, seconds, drain seconds."""
        epoch = self.revoke(shortfall)
        outcome, drain, announced = self.revoked(epoch)
        if outcome != "drained":
            raise Gone(f"the client answered {outcome}")
        moved, seconds = self.moved(epoch) if announced else (0, 0.0)
        return moved, seconds, drain

    def give(self, prefetch=ALL):
        """Gives it back and waits until everything is in: bytes, seconds, seconds until the gate was open."""
        began = time.perf_counter()
        epoch = self.grant(prefetch)
        announced, _ = self.resumed(epoch)
        opened = time.perf_counter() - began
        moved, seconds = self.moved(epoch) if announced else (0, 0.0)
        return moved, seconds, opened
