"""The waiting line: turns between tenants, limits, and the estimate of when to try again."""

import pytest

from mint_lib.engine.requests import EngineLimits, GenerateRequest
from mint_lib.engine.waiting_line import Entry, WaitingLine
from mint_lib.errors import Overloaded


def make_entry(name, tenant="a", at=0.0):
    request = GenerateRequest(
        request_id=name,
        tenant=tenant,
        adapter="x",
        prompt_ids=(1,),
        deadline=at + 60,
        max_new_tokens=1,
        stop_ids=frozenset(),
    )
    return Entry(request=request, deliver=lambda _: None, queued_at=at)


def take_all(line):
    order = []
    while (first := line.peek()) is not None:
        entry = line.take()
        assert entry is first
        order.append(entry.request.request_id)
    return order


def test_waiting_line_tenants_take_turns_in_order_of_arrival():
    line = WaitingLine(EngineLimits())
    for name, tenant in [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c"), ("b2", "b")]:
        line.add(make_entry(name, tenant))
    assert take_all(line) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(line) == 0


def test_waiting_line_full_refuses_with_a_wait_from_the_recent_rate():
    line = WaitingLine(EngineLimits(max_queued=4))
    for index in range(4):
        line.add(make_entry(str(index), tenant=str(index)))
    with pytest.raises(Overloaded, match="All 4 places") as refusal:
        line.add(make_entry("more", at=100.0))
    assert refusal.value.retry_after_seconds == 1.0
    for at in (90.0, 95.0):
        line.note_answered(1, at)
    with pytest.raises(Overloaded) as refusal:
        line.add(make_entry("more", at=100.0))
    # Two answers in 10 seconds, four requests ahead.
    assert refusal.value.retry_after_seconds == pytest.approx(20.0)
    with pytest.raises(Overloaded) as refusal:
        line.add(make_entry("more", at=5000.0))
    assert refusal.value.retry_after_seconds == 1.0
    assert len(line) == 4


def test_waiting_line_share_of_one_tenant_is_limited_and_others_get_in():
    line = WaitingLine(EngineLimits(max_queued=10, max_queued_per_tenant=2))
    line.add(make_entry("a1"))
    line.add(make_entry("a2"))
    with pytest.raises(Overloaded, match="You have 2 requests"):
        line.add(make_entry("a3"))
    line.add(make_entry("b1", tenant="b"))
    line.take()
    line.add(make_entry("a3"))
    assert take_all(line) == ["b1", "a2", "a3"]


def test_waiting_line_discarded_entries_are_not_served():
    line = WaitingLine(EngineLimits())
    entries = {name: make_entry(name, tenant=name[0]) for name in ("a1", "a2", "b1")}
    for entry in entries.values():
        line.add(entry)
    line.discard(entries["a1"])
    line.discard(entries["a1"])
    assert line.take_if(lambda entry: entry.request.tenant == "b") == [entries["b1"]]
    assert take_all(line) == ["a2"]
