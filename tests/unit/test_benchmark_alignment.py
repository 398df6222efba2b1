"""The benchmark of the alignment engine: its sides compute the same on a tiny model, and it notices if they do not."""

import http.server
import secrets
import threading
import types
import urllib.request

import pytest
from benchmarks import alignment_rows, alignment_runs, alignment_stall, alignment_steps
from benchmarks.alignment_timing import Target, Timing, compare_timings, take_turns

from mint_lib.student import StudentConfig, load_tokenizer

TINY_MODEL = types.MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
)
SHAPES = {
    "ragged pairs": alignment_steps.RAGGED_PAIRS._replace(prompt_tokens=24, answer_tokens=6),
    "tree": alignment_steps.TREE._replace(prompt_tokens=12, answer_tokens=4),
}


@pytest.fixture(scope="module")
def model():
    return alignment_steps.build_model(TINY_MODEL)


@pytest.mark.parametrize("likelihood", ["prompt_and_answer", "answer"])
@pytest.mark.parametrize("peer", ["TRL", "Liger"])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_all_sides_have_one_loss_and_gradient(model, shape, peer, likelihood):
    if peer == "Liger":
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    rows = alignment_steps.draw_rows(SHAPES[shape], vocabulary=64)
    ours = alignment_steps.make_ours(model, rows, likelihood)
    theirs = alignment_steps.MAKERS[peer](model, rows, likelihood)
    alignment_steps.check_equal(model, ours, theirs, what=shape)


def test_step_in_several_passes_has_the_same_loss_and_gradient(model, monkeypatch):
    rows = alignment_steps.draw_rows(SHAPES["ragged pairs"], vocabulary=64)
    whole = alignment_steps.make_ours(model, rows, "prompt_and_answer")
    monkeypatch.setattr(alignment_steps, "BATCH_TOKENS", 16)
    split = alignment_steps.make_ours(model, rows, "prompt_and_answer")
    alignment_steps.check_equal(model, split, whole, what="passes")


def test_steps_on_other_tokens_are_told_apart(model):
    rows = alignment_steps.draw_rows(SHAPES["ragged pairs"], vocabulary=64)
    ours = alignment_steps.make_ours(model, rows, "answer")
    others = alignment_steps.make_trl(model, [*rows[:-1], rows[0]], "answer")
    with pytest.raises(AssertionError, match="losses differ"):
        alignment_steps.check_equal(model, ours, others, what="tokens")


def test_rows_of_both_sides_have_the_same_token_ids(tmp_path):
    tokenizer, pairs = load_tokenizer(StudentConfig(model="tiny")), alignment_rows.draw_pairs(5)
    # The tiny tokenizer splits every character, so its rows would be far longer than the benchmark's.
    short = [
        pair.model_copy(update={"prompt": tuple(turn.model_copy(update={"content": "Boy."}) for turn in pair.prompt)})
        for pair in pairs
    ]
    ours = alignment_rows.make_ours(short, tokenizer, tmp_path)
    trl = alignment_rows.make_trl(short, tokenizer)
    rows = ours.read_ids(ours.prepare())
    assert rows == trl.read_ids(trl.prepare())
    assert [tokenizer.decode(chosen[:-1]) for _, chosen, _ in rows] == [pair.chosen for pair in pairs]


def test_losses_of_runs_are_compared_step_by_step():
    losses = [1.0 + step for step in range(alignment_runs.NUM_STEPS)]
    alignment_runs.check_losses(losses, losses, tolerance=0.0)
    with pytest.raises(AssertionError, match="differ by up to"):
        alignment_runs.check_losses([*losses[:-1], losses[-1] * 1.01], losses, tolerance=1e-3)
    with pytest.raises(AssertionError, match="of 8 steps"):
        alignment_runs.check_losses(losses[:-1], losses[:-1], tolerance=1e-3)


def test_slow_link_carries_bytes_both_ways_unchanged():
    sent, answer = secrets.token_bytes(200_000), secrets.token_bytes(100_000)
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            """Stay silent."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        with alignment_stall.slow_link(endpoint, bytes_per_second=1e9) as address:
            request = urllib.request.Request(address, data=sent, method="PUT")
            with urllib.request.urlopen(request, timeout=30) as reply:
                assert reply.read() == answer
        thread.join()
    assert received == [sent]


def test_sides_take_turns_and_start_where_the_round_before_ended():
    calls = []
    timings = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, num_rounds=3)
    assert "".join(calls) == "abbaab"
    assert {side: len(found) for side, found in timings.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("target", "clock", "verdict"),
    [
        (Target("at least", 2.0), "wall", "2 (1 to 3, 3 rounds), target at least 2: met"),
        (Target("at most", 2.0), "wall", "2 (1 to 3, 3 rounds), target at most 2: met"),
        (Target("at least", 2.5), "wall", "2 (1 to 3, 3 rounds), target at least 2.5: MISSED"),
        (Target("at most", 2.0), "cpu", "5 (5 to 5, 3 rounds), target at most 2: MISSED"),
    ],
)
def test_line_gives_the_median_ratio_of_its_clock_and_its_verdict(target, clock, verdict):
    over = [Timing(wall=1.0, cpu=5.0), Timing(wall=3.0, cpu=5.0), Timing(wall=2.0, cpu=5.0)]
    line = compare_timings("what", over, [Timing(1.0, 1.0)] * 3, target, clock=clock)
    assert line.startswith(f"what [{clock}]: {verdict} | ")
    assert line.endswith("wall s 2 / 1 | cpu s 5 / 1")
