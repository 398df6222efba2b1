"""Mixed load on a running model server for a long time, bad requests among it: nothing lost, no 5xx, memory flat.

    mint serve model/quickstart &
    python tests/benchmarks/soak.py --minutes 30

Without arguments it asks the server that `mint serve` started in this folder. Every good request must be answered with
200 (a 429 is waited out as `Retry-After` says, and counted); every bad one with its own 4xx. Prints one line a minute
and a verdict.
"""

import argparse
import collections
import json
import pathlib
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx

from pipelines.ask import read_connection

_NOTES = (
    "A boy of 4 years with short stature, pulmonary stenosis and a webbed neck.",
    "A girl of 9 years with seizures, absent speech and a happy disposition.",
    "A woman of 31 years with tall stature, a dilated aortic root and long fingers.",
    "An infant with low muscle tone, feeding difficulties and delayed growth.",
)
_WARM_UP_SHARE = 0.2
"""Memory is compared from here on: before it, caches fill."""
_MAX_GROWTH = 0.05


class Kind(NamedTuple):
    """One kind of request."""

    send: Callable[[httpx.Client, random.Random], httpx.Response | None]
    expected: int | None
    """Status; None: the client hangs up, and there is no answer to look at."""


class Soak:
    """The load and what came of it."""

    def __init__(self, url: str, token: str, model: str):
        self.url, self.token, self.model = url, token, model
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        predict, chat = f"/v1/models/{model}:predict", "/openai/v1/chat/completions"

        def note(rng: random.Random) -> str:
            return f"{rng.choice(_NOTES)} Seen {rng.randrange(10_000)} days ago."

        def post(path: str, body: Callable[[random.Random], Any], **headers: str) -> Any:
            def send(client: httpx.Client, rng: random.Random) -> httpx.Response:
                content = body(rng)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                return client.post(path, content=data, headers={"Content-Type": "application/json", **headers})

            return send

        def ask(rng: random.Random, **more: Any) -> dict[str, Any]:
            messages = [{"role": "user", "content": note(rng)}]
            return {"model": model, "messages": messages, "max_tokens": 24, "as_case": True, **more}

        def stream(client: httpx.Client, rng: random.Random) -> httpx.Response:
            with client.stream("POST", chat, json=ask(rng, stream=True)) as reply:
                body = reply.read().decode()
            if reply.status_code == 200 and not body.rstrip().endswith("data: [DONE]"):
                raise ValueError("a stream ended early")
            return reply

        def hang_up(client: httpx.Client, rng: random.Random) -> None:
            with client.stream("POST", chat, json=ask(rng, stream=True)) as reply:
                next(reply.iter_bytes(), None)

        self.kinds = {
            "v1": Kind(post(predict, lambda rng: {"instances": [{"text": note(rng)}]}), 200),
            "v2": Kind(
                post(
                    f"/v2/models/{model}/infer",
                    lambda rng: {
                        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [note(rng)]}],
                    },
                ),
                200,
            ),
            "chat": Kind(post(chat, ask), 200),
            "ranked list": Kind(
                post(chat, lambda rng: {**ask(rng, answer_format="ranked_list"), "max_tokens": None}), 200
            ),
            "stream": Kind(stream, 200),
            "hang up": Kind(hang_up, None),
            "not json": Kind(post(predict, lambda rng: b'{"instances": [{"text": '), 400),
            "not a number": Kind(post(predict, lambda rng: b'{"instances": [{"text": "a"}], "parameters": NaN}'), 400),
            "too long": Kind(post(predict, lambda rng: {"instances": [{"text": "word " * 20_000}]}), 400),
            "too large": Kind(post(predict, lambda rng: b" " * 30_000_000), 413),
            "unknown model": Kind(post("/v1/models/nothing:predict", lambda rng: {"instances": [{"text": "a"}]}), 404),
            "wrong token": Kind(post(predict, lambda rng: {"instances": []}, Authorization="Bearer no"), 401),
            "remote image": Kind(
                post(
                    chat,
                    lambda rng: {
                        "model": model,
                        "messages": [
                            {
                                "role": "user",
                                "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/a"}}],
                            }
                        ],
                    },
                ),
                400,
            ),
        }

    def run_client(self, seed: int, until: float) -> None:
        """One client that sends one request after the other."""
        rng = random.Random(seed)
        headers = {"Authorization": f"Bearer {self.token}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False) as client:
            while time.monotonic() < until:
                name = rng.choice([*self.kinds, "v1", "v1", "chat", "stream"])
                kind = self.kinds[name]
                try:
                    reply = kind.send(client, rng)
                except (httpx.HTTPError, ValueError) as error:
                    self._note(name, "lost" if kind.expected == 200 else type(error).__name__, kind.expected is None)
                    continue
                status = reply.status_code if reply is not None else None
                if status == 429 and reply is not None:
                    self._note(name, "429", True)
                    time.sleep(float(reply.headers["Retry-After"]))
                    continue
                self._note(name, str(status), status == kind.expected)

    def _note(self, name: str, outcome: str, is_right: bool) -> None:
        with self._lock:
            self.counts[f"{name}: {outcome}"] += 1
            if not is_right:
                self.wrong[f"{name}: {outcome}"] += 1

    def read_memory(self) -> float:
        """Resident MiB of the server."""
        headers = {"Authorization": f"Bearer {self.token}"}
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=60, trust_env=False).text
        found = re.search(r"^\w*process_resident_memory_bytes\S* (\S+)$", text, re.MULTILINE)
        if found is None:
            raise SystemExit("the server's metrics hold no resident memory")
        return float(found[1]) / 2**20


def main() -> None:
    """Load the server and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--connection", type=pathlib.Path, default=pathlib.Path(".mint/serve/connection.json"))
    arguments = parser.parse_args()
    connection = read_connection(arguments.connection)
    if connection.token_file is None:
        raise SystemExit("the soak sends wrong tokens too: serve with tokens")
    soak = Soak(connection.url, connection.token_file.read_text().strip(), connection.models[0])
    started = time.monotonic()
    until = started + 60 * arguments.minutes
    threads = [
        threading.Thread(target=soak.run_client, args=(seed, until), daemon=True) for seed in range(arguments.clients)
    ]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(60.0, max(1.0, 6 * arguments.minutes)))
        memory.append((time.monotonic() - started, soak.read_memory()))
        answered = sum(soak.counts.values())
        print(f"{memory[-1][0] / 60:5.1f} min  {answered:6d} requests  {memory[-1][1]:7.0f} MiB", flush=True)  # noqa: T201
    settled = [size for at, size in memory if at >= _WARM_UP_SHARE * 60 * arguments.minutes]
    half = max(1, len(settled) // 2)
    growth = (sum(settled[-half:]) / half) / (sum(settled[:half]) / half) - 1
    print(json.dumps(dict(sorted(soak.counts.items())), indent=2))  # noqa: T201
    is_met = not soak.wrong and growth <= _MAX_GROWTH
    print(  # noqa: T201
        f"soak {arguments.minutes:g} min: wrong outcomes {dict(soak.wrong) or 'none'}, memory {growth:+.1%} from "
        f"the first to the second half, target none and at most {_MAX_GROWTH:+.0%}: {'met' if is_met else 'MISSED'}"
    )
    raise SystemExit(not is_met)


if __name__ == "__main__":
    main()
