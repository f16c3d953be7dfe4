import os
import socket
from collections.abc import Iterator

import psutil
import pytest

from corral.contributions import Port, Service
from corral.runtime import supervisor


@pytest.fixture
def listening_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def service(*numbers: int) -> Service:
    return Service("box", "part", "thing", "image", "program", ports=tuple(Port(number) for number in numbers))


def test_taken_port_is_named_with_service_and_process(listening_port: int) -> None:
    (taken,) = supervisor.taken_ports([service(listening_port)])
    assert taken.startswith(f"port {listening_port} (thing) is taken by {psutil.Process().name()} (pid {os.getpid()}")


def test_port_of_all_addresses_is_taken_too() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:  # noqa: S104
        assert not supervisor.is_free(listener.getsockname()[1])


def test_port_is_free_right_after_its_connections_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            connection, _ = listener.accept()
            connection.close()  # the server's side ends first and lingers
    assert supervisor.is_free(port)
    assert supervisor.taken_ports([service(port)]) == []


def test_holder_that_cannot_be_seen_is_said_so(listening_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_kind: str) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", refuse)
    assert supervisor.holder_of(listening_port) == "a process that only its owner or root can see"


def test_holder_of_another_farm_is_named_with_its_folder(listening_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "folder_of", lambda _process: "/srv/farm/.corral/demo/demo")
    assert supervisor.holder_of(listening_port).endswith("which corral runs in /srv/farm/.corral/demo/demo")
