"""The model server against what it is measured by, side by side in one run.

    OMP_NUM_THREADS=2 python tests/benchmarks/serving.py               # ranking, throughput, int8
    OMP_NUM_THREADS=2 python tests/benchmarks/serving.py --only ranking --rounds 7

One line per target: name, median ratio, range, target. Answers are compared first; where they differ nothing is timed.
The weights are SmolLM2-135M's. `cold_start.py` and `soak.py` beside this file measure loading and long load.
"""

import argparse
import itertools
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mint_lib.engine.label_trie import LabelTrie
from mint_lib.engine.requests import EngineLimits, Failed, Generated, GenerateRequest, Ranked, RankRequest, TokenMade
from mint_lib.engine.scheduler import Engine
from mint_lib.reading import encode_prompt
from mint_lib.records import Label
from mint_lib.student import StudentConfig, encode_first_items, load_student, load_tokenizer
from mint_lib.template import Template

STUDENT = StudentConfig()
NUM_LABELS, PROMPT_TOKENS = 20, 384
TIMEOUT_SECONDS = 600.0
NUM_CLIENTS, SHARED_SHARE, NEW_TOKENS = 8, 0.75, 32
_NAMES = (
    "Noonan syndrome 1", "Kabuki syndrome 1", "Cornelia de Lange syndrome 2", "Williams syndrome", "Rett syndrome",
    "Angelman syndrome", "Prader-Willi syndrome", "Marfan syndrome", "Costello syndrome", "CHARGE syndrome",
    "Treacher Collins syndrome 1", "Apert syndrome", "Crouzon syndrome", "Pfeiffer syndrome", "Sotos syndrome",
    "Coffin-Siris syndrome 1", "Rubinstein-Taybi syndrome 1", "Smith-Magenis syndrome", "Bardet-Biedl syndrome 1",
    "Alagille syndrome 1",
)  # fmt: skip


class Silent:
    """An engine observer that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda **_: None


class Timed(NamedTuple):
    """One side of one round."""

    seconds: float
    latencies: tuple[float, ...] = ()


def say(name: str, ratios: Sequence[float], target: str, *, is_met: bool) -> None:
    """One line of the result."""
    low, high = min(ratios), max(ratios)
    verdict = "met" if is_met else "MISSED"
    print(  # noqa: T201 - the benchmark's output
        f"{name:<52} {statistics.median(ratios):6.2f}x  [{low:.2f}, {high:.2f}]  target {target}: {verdict}", flush=True
    )


def draw_text(tokenizer: Any, num_tokens: int, *, seed: int) -> list[int]:
    """`num_tokens` ids of words of no meaning."""
    words = ("short stature", "seizures", "hearing loss", "heart defect", "low muscle tone", "delayed speech")
    rng = random.Random(seed)
    ids: list[int] = []
    while len(ids) < num_tokens:
        ids += tokenizer.encode(f" {rng.choice(words)} {rng.randrange(100)},", add_special_tokens=False)
    return ids[:num_tokens]


def draw_prompt(tokenizer: Any, *, shared: int, seed: int) -> tuple[int, ...]:
    """A prompt of `PROMPT_TOKENS`, the first `shared` of which all prompts have."""
    own = draw_text(tokenizer, PROMPT_TOKENS - shared, seed=seed + 1)
    return (*draw_text(tokenizer, shared, seed=0), *own) if shared else tuple(own)


def ranking_of(prompt_ids: tuple[int, ...], trie: LabelTrie) -> RankRequest:
    """A request to rank."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    return RankRequest(request_id="r", tenant="t", adapter="base", prompt_ids=prompt_ids, deadline=deadline, trie=trie)


def answer_to(prompt_ids: tuple[int, ...], max_new_tokens: int) -> GenerateRequest:
    """A request for exactly so many tokens."""
    return GenerateRequest(
        request_id="r",
        tenant="t",
        adapter="base",
        prompt_ids=prompt_ids,
        deadline=time.monotonic() + TIMEOUT_SECONDS,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset(),
    )


def submit(engine: Engine, request: Any) -> "queue.Queue[Any]":
    """The events of one request."""
    events: queue.Queue[Any] = queue.Queue()
    engine.submit(request, events.put)
    return events


def wait_for(events: "queue.Queue[Any]", kind: type) -> tuple[list[int], Any]:
    """The tokens and the last event of one request."""
    tokens = []
    while True:
        event = events.get(timeout=TIMEOUT_SECONDS)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, TokenMade):
            tokens.append(event.token_id)
        if isinstance(event, kind):
            return tokens, event


def measure_ranking(rounds: int) -> None:
    """Ranking of 20 labels as a trie, against scoring one whole row for every label as evaluation harnesses do."""
    import torch

    tokenizer, model = load_tokenizer(STUDENT), load_student(STUDENT)
    template = Template.load("rare_disease_brief")
    labels = [Label(id=f"L:{number}", name=name) for number, name in enumerate(_NAMES[:NUM_LABELS])]
    answers = encode_first_items(tokenizer, template, labels)
    engine = Engine(model, limits=EngineLimits(step_tokens=1024, prefix_cache_mib=0), observer=Silent())
    engine.add_adapter("base", None)
    engine.start()
    trie = LabelTrie.build(tokenizer, template, labels)

    def rank_as_trie(prompt_ids: tuple[int, ...]) -> list[float]:
        _, ranked = wait_for(submit(engine, ranking_of(prompt_ids, trie)), Ranked)
        return list(ranked.log_probabilities)

    def rank_as_rows(prompt_ids: tuple[int, ...]) -> list[float]:
        scores = []
        for answer in answers:
            input_ids = torch.tensor([[*prompt_ids, *answer]])
            with torch.inference_mode():
                log_probs = model(input_ids=input_ids, use_cache=False).logits.float().log_softmax(-1)
            places = torch.arange(len(prompt_ids) - 1, input_ids.shape[1] - 1)
            scores.append(log_probs[0, places, torch.tensor(answer)].sum().item())
        return torch.tensor(scores, dtype=torch.float64).log_softmax(0).tolist()

    ratios = []
    try:
        for number in range(rounds + 1):
            prompt_ids = draw_prompt(tokenizer, shared=0, seed=number)
            started = time.perf_counter()
            ours = rank_as_trie(prompt_ids)
            middle = time.perf_counter()
            theirs = rank_as_rows(prompt_ids)
            ended = time.perf_counter()
            order = [sorted(range(NUM_LABELS), key=lambda i, s=scores: -s[i]) for scores in (ours, theirs)]
            worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            if order[0] != order[1] or worst > 1e-4:
                raise SystemExit(f"the rankings differ (largest difference {worst:.1e}): nothing is timed")
            if number:  # the first round warms up
                ratios.append((ended - middle) / (middle - started))
    finally:
        engine.stop()
    say(
        f"ranking {NUM_LABELS} labels at {PROMPT_TOKENS} tokens",
        ratios,
        ">= 15x",
        is_met=statistics.median(ratios) >= 15,
    )


class SerialLoop:
    """One worker that takes one request at a time off a queue, as KServe's Hugging Face runtime does."""

    def __init__(self, model: Any, pad_token_id: int):
        self._model, self._pad = model, pad_token_id
        self._queue: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, prompt_ids: tuple[int, ...]) -> list[int]:
        """The new tokens."""
        reply: queue.Queue[list[int]] = queue.Queue()
        self._queue.put((prompt_ids, reply))
        return reply.get(timeout=TIMEOUT_SECONDS)

    def _work(self) -> None:
        import torch

        while True:
            prompt_ids, reply = self._queue.get()
            with torch.inference_mode():
                output = self._model.generate(
                    input_ids=torch.tensor([prompt_ids]),
                    attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
                    do_sample=False, temperature=None, top_p=None, top_k=None,
                    min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=self._pad,
                )  # fmt: skip
            reply.put(output[0, len(prompt_ids) :].tolist())


def measure_throughput(rounds: int) -> None:
    """Eight clients that ask one after the other, against the serial loop: requests per second and p95."""
    tokenizer, model = load_tokenizer(STUDENT), load_student(STUDENT)
    serial = SerialLoop(model, tokenizer.pad_token_id)
    engine = Engine(load_student(STUDENT), limits=EngineLimits(max_batch=NUM_CLIENTS), observer=Silent())
    engine.add_adapter("base", None)
    engine.start()

    def ask_engine(prompt_ids: tuple[int, ...]) -> list[int]:
        return wait_for(submit(engine, answer_to(prompt_ids, NEW_TOKENS)), Generated)[0]

    shared = round(PROMPT_TOKENS * SHARED_SHARE)
    seeds = itertools.count(1)

    def load(ask: Callable[[tuple[int, ...]], list[int]], prompts: list[tuple[int, ...]]) -> tuple[Timed, list[Any]]:
        latencies, answers = [0.0] * len(prompts), [None] * len(prompts)

        def client(first: int) -> None:
            for index in range(first, len(prompts), NUM_CLIENTS):
                asked = time.perf_counter()
                answers[index] = ask(prompts[index])  # type: ignore[call-overload]
                latencies[index] = time.perf_counter() - asked

        threads = [threading.Thread(target=client, args=(first,)) for first in range(NUM_CLIENTS)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Timed(time.perf_counter() - started, tuple(latencies)), answers

    rates, tails = [], []
    try:
        for number in range(rounds + 1):
            prompts = [draw_prompt(tokenizer, shared=shared, seed=next(seeds)) for _ in range(2 * NUM_CLIENTS)]
            ours, our_answers = load(ask_engine, prompts)
            theirs, their_answers = load(serial.ask, prompts)
            if our_answers != their_answers:
                same = sum(a == b for a, b in zip(our_answers, their_answers, strict=True))
                raise SystemExit(f"only {same} of {len(prompts)} greedy answers agree: nothing is timed")
            if number:
                rates.append(theirs.seconds / ours.seconds)
                tails.append(_p95(ours.latencies) / _p95(theirs.latencies))
    finally:
        engine.stop()
    what = f"{NUM_CLIENTS} clients, {SHARED_SHARE:.0%} shared, {NEW_TOKENS} new tokens"
    say(f"{what}: requests/s", rates, ">= 3x", is_met=statistics.median(rates) >= 3)
    say(f"{what}: p95", tails, "<= 0.5x", is_met=statistics.median(tails) <= 0.5)


def _p95(latencies: Sequence[float]) -> float:
    return sorted(latencies)[max(0, round(0.95 * len(latencies)) - 1)]


def measure_int8(rounds: int) -> None:
    """Decoding with int8 linear layers against float32, and how often both rank the same label first."""
    from mint_lib.engine.quantised import quantise_linears

    tokenizer = load_tokenizer(STUDENT)
    template = Template.load("rare_disease_brief")
    labels = [Label(id=f"L:{number}", name=name) for number, name in enumerate(_NAMES[:NUM_LABELS])]
    trie = LabelTrie.build(tokenizer, template, labels)
    engines = {}
    for precision in ("float32", "int8"):
        model = load_student(STUDENT)
        if precision == "int8":
            quantise_linears(model)
        engines[precision] = Engine(model, limits=EngineLimits(max_batch=1), observer=Silent())
        engines[precision].add_adapter("base", None)
        engines[precision].start()

    def top_label(engine: Engine, text: str) -> int:
        prompt_ids = tuple(encode_prompt(tokenizer, template.prompt(text)))
        _, ranked = wait_for(submit(engine, ranking_of(prompt_ids, trie)), Ranked)
        return max(range(len(labels)), key=lambda index: ranked.log_probabilities[index])

    def decode(engine: Engine, prompt_ids: tuple[int, ...]) -> float:
        events = submit(engine, answer_to(prompt_ids, 64))
        times = []
        while not isinstance(event := events.get(timeout=TIMEOUT_SECONDS), Generated):
            if isinstance(event, TokenMade):
                times.append(time.perf_counter())
        return (len(times) - 1) / (times[-1] - times[0])

    try:
        texts = [tokenizer.decode(draw_text(tokenizer, 48, seed=seed)) for seed in range(100)]
        same = sum(top_label(engines["float32"], text) == top_label(engines["int8"], text) for text in texts)
        agreement = same / len(texts)
        ratios = []
        for number in range(rounds + 1):
            prompt_ids = draw_prompt(tokenizer, shared=0, seed=number)[:64]
            rates = {precision: decode(engine, prompt_ids) for precision, engine in engines.items()}
            if number:
                ratios.append(rates["int8"] / rates["float32"])
    finally:
        for engine in engines.values():
            engine.stop()
    accepted = agreement >= 0.995
    say(
        f"int8 decoding, label agreement {agreement:.1%} ({'accepted' if accepted else 'refused by the gate'})",
        ratios, ">= 2.2x at >= 99.5 %", is_met=accepted and statistics.median(ratios) >= 2.2,
    )  # fmt: skip


MEASURES = {"ranking": measure_ranking, "throughput": measure_throughput, "int8": measure_int8}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASURES, help="one of the measures")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name, measure in MEASURES.items():
        if arguments.only in (None, name):
            measure(arguments.rounds)


if __name__ == "__main__":
    main()
