"""Several services behind one client: which one is called, and how soon another when that one is gone or silent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from scripted_service import Fault, ScriptedServer, ScriptedService

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client import Timeouts, connect
from trainer_client.transports.grpc_transport import GrpcTransport
from weighting_contract.errors import DeadlineExceeded

CREATE = pb.CreateWeighterRequest(name="w")


@pytest.fixture
def servers() -> Iterator[list[ScriptedServer]]:
    servers = [ScriptedServer(ScriptedService()) for _ in range(3)]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def hole() -> Iterator[int]:
    """A port where connections are taken and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def calls(servers: list[ScriptedServer]) -> list[int]:
    return [server.service.calls["CreateWeighter"] for server in servers]


def one_name(*ports: int) -> GrpcTransport:
    """A transport for one address that stands for several services, as a name with several records does."""
    return GrpcTransport(["ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)])


def test_a_silent_first_address_leaves_time_for_the_next(hole: int, servers: list[ScriptedServer]) -> None:
    url = f"grpc://127.0.0.1:{hole},127.0.0.1:{servers[0].port},127.0.0.1:{servers[1].port}"
    with connect(url, timeouts=Timeouts(admin_s=3)) as client:
        for _ in range(3):
            client.create_weighter("w", {"features": {"names": ["a"]}})
    assert calls(servers) == [3, 0, 0], "the one that answered is stayed with"


def test_only_silent_addresses_cost_one_deadline(hole: int) -> None:
    client = connect(f"grpc://127.0.0.1:{hole},127.0.0.1:{hole}", timeouts=Timeouts(admin_s=0.2))
    with client, pytest.raises(DeadlineExceeded, match="did not answer ListWeighters in time"):
        client.list_weighters()


def test_a_slow_answer_is_waited_for_where_there_were_answers_before(servers: list[ScriptedServer]) -> None:
    first, second = servers[0].service, servers[1].service
    transport = GrpcTransport([f"127.0.0.1:{server.port}" for server in servers[:2]])
    transport.call("CreateWeighter", CREATE, 20)
    first.before["CreateWeighter"] = lambda request, context: first.released.wait(0.3)
    transport.call("CreateWeighter", CREATE, 0.5)  # longer than half of the time
    assert (first.calls["CreateWeighter"], second.calls["CreateWeighter"]) == (2, 0)
    first.before["CreateWeighter"] = first.hang
    with pytest.raises(DeadlineExceeded):
        transport.call("CreateWeighter", CREATE, 0.2)
    transport.call("CreateWeighter", CREATE, 20)
    assert second.calls["CreateWeighter"] == 1, "the next call goes to the next address"
    transport.close()


def test_one_name_for_several_services_is_one_of_them(servers: list[ScriptedServer]) -> None:
    transport = one_name(*(server.port for server in servers))
    for _ in range(4):
        transport.call("CreateWeighter", CREATE, 20)
    transport.close()
    assert sorted(calls(servers)) == [0, 0, 4]


def test_clients_of_one_name_spread_over_its_services(servers: list[ScriptedServer]) -> None:
    for _ in range(40):  # all of them at one service: 3 * 3 ** -40
        transport = one_name(*(server.port for server in servers))
        transport.call("CreateWeighter", CREATE, 20)
        transport.close()
    assert sum(count > 0 for count in calls(servers)) > 1


def test_a_service_that_dies_is_left_within_the_call(servers: list[ScriptedServer]) -> None:
    transport = one_name(*(server.port for server in servers))
    for left in (2, 1):
        transport.call("CreateWeighter", CREATE, 20)
        [current] = [server for server in servers if server.service.calls["CreateWeighter"]]
        current.stop()
        current.service.calls.clear()
        servers.remove(current)
        transport.call("CreateWeighter", CREATE, 20)
        assert sorted(calls(servers)) == [0] * (left - 1) + [1]
        for server in servers:
            server.service.calls.clear()
    transport.close()


def test_a_call_that_dies_with_its_service_is_made_again(servers: list[ScriptedServer]) -> None:
    transport = one_name(*(server.port for server in servers))
    deaths = []

    def die(server: ScriptedServer) -> Fault:
        def fault(request: Any, context: grpc.ServicerContext) -> None:
            if not deaths:
                over = threading.Event()
                context.add_callback(over.set)
                deaths.append(threading.Thread(target=server.stop))
                deaths[0].start()
                over.wait(20)  # until nobody waits for an answer any more

        return fault

    for server in servers:
        server.service.before["CreateWeighter"] = die(server)
    transport.call("CreateWeighter", CREATE, 20)
    assert sorted(calls(servers)) == [0, 1, 1]
    deaths[0].join()
    transport.close()


def test_a_silent_service_of_a_name_is_passed_over(hole: int, servers: list[ScriptedServer]) -> None:
    for _ in range(4):
        transport = one_name(hole, servers[0].port)
        transport.call("CreateWeighter", CREATE, 3)
        transport.close()
    assert calls(servers) == [4, 0, 0]
