import json

from mint_lib.progress import PREFIX, Progress, track_progress


def _events(text):
    return [json.loads(line.removeprefix(PREFIX)) for line in text.splitlines()]


def test_progress_wanted_as_events_tells_start_and_end(capsys, monkeypatch):
    monkeypatch.setenv("MINT_PROGRESS", "json")
    assert list(track_progress("abc", "letters", total=3)) == ["a", "b", "c"]
    events = _events(capsys.readouterr().out)
    assert events[0]["done"] == 0
    assert events[-1] | {"seconds": 0} == {
        "event": "progress",
        "description": "letters",
        "done": 3,
        "total": 3,
        "seconds": 0,
        "figures": {},
        "finished": True,
    }


def test_progress_of_failed_work_is_not_finished(capsys, monkeypatch):
    monkeypatch.setenv("MINT_PROGRESS", "json")
    try:
        with Progress("work", total=2) as progress:
            progress.advance(loss=0.5)
            raise KeyError
    except KeyError:
        pass
    assert not any(event["finished"] for event in _events(capsys.readouterr().out))


def test_progress_faster_than_the_interval_is_thinned(capsys, monkeypatch):
    monkeypatch.setenv("MINT_PROGRESS", "json")
    with Progress("work", total=1000, interval_seconds=60) as progress:
        for _ in range(1000):
            progress.advance()
    assert [event["done"] for event in _events(capsys.readouterr().out)] == [0, 1000]
