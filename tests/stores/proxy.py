"""A proxy on loopback that refuses every tunnel."""

import contextlib
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def refusing_proxy(status: int) -> Iterator[int]:
    """Its port. It answers each CONNECT with this status."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(f"HTTP/1.1 {status} Refused\r\nContent-Length: 0\r\n\r\n".encode())

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
