import asyncio
import signal
import sys
from typing import Any

import pytest

from mint_lib.server.app import import_kserve
from mint_lib.server.http_errors import Refusal
from mint_lib.server.lifecycle import Readiness, make_draining_server


def test_readiness_goes_from_loading_to_ready_to_draining_and_never_back() -> None:
    readiness = Readiness()
    with pytest.raises(Refusal, match="being loaded"):
        readiness.check()
    readiness.mark_ready()
    readiness.check()
    readiness.begin_drain()
    with pytest.raises(Refusal, match="shutting down"):
        readiness.check()
    readiness.mark_ready()
    assert readiness.state == "draining"


class Base:
    """What of uvicorn's server matters here."""

    def __init__(self, config: Any):
        self.should_exit = False
        self.force_exit = False

    async def on_tick(self, counter: int) -> bool:
        return self.should_exit


def make(*, drain_seconds: float, is_ready: bool = True) -> tuple[Any, Readiness]:
    readiness = Readiness()
    if is_ready:
        readiness.mark_ready()
    base: Any = Base
    config: Any = None
    return make_draining_server(base, config, readiness=readiness, drain_seconds=drain_seconds), readiness


def test_first_signal_ends_readiness_at_once_and_listening_later() -> None:
    server, readiness = make(drain_seconds=0.2)
    server.handle_exit(signal.SIGTERM, None)
    assert readiness.is_draining
    assert asyncio.run(server.on_tick(0)) is False
    asyncio.run(asyncio.sleep(0.25))
    assert asyncio.run(server.on_tick(0)) is True
    assert server.force_exit is False


def test_second_signal_ends_listening_and_third_gives_up() -> None:
    server, _ = make(drain_seconds=60)
    server.handle_exit(signal.SIGTERM, None)
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit
    assert not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit


def test_signal_while_loading_ends_listening_at_once() -> None:
    server, _ = make(drain_seconds=60, is_ready=False)
    server.handle_exit(signal.SIGTERM, None)
    assert asyncio.run(server.on_tick(0)) is True


def test_import_of_kserve_does_not_see_our_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mint", "serve", "--workers", "many"])
    with import_kserve():
        assert sys.argv == ["mint"]
    assert sys.argv[1:] == ["serve", "--workers", "many"]


def test_two_servers_in_one_process_share_nothing(make_served: Any) -> None:
    first, second = make_served(), make_served(name="other")
    assert first.ask("GET", "/v1/models").json() == {"models": ["tiny"]}
    assert second.ask("GET", "/v1/models").json() == {"models": ["other"]}
    first.readiness.begin_drain()
    assert second.ask("GET", "/readyz").status_code == 200
    assert "mint_serving_ready 1.0" in second.figures()
