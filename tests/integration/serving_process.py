"""A model server as a process of its own, over the tiny random student, without a store; and how a test starts one.

As a script: `python serving_process.py OPTIONS` with a JSON object of `ServerOptions` serves until a signal. It prints
its URL as the first line of its standard output. The student's answers mean nothing; its numbers are real.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx

from mint_lib.records import Label, Reference
from mint_lib.server.students import ServedStudent

NAMES = (
    "Noonan syndrome",
    "Kabuki syndrome 1",
    "Cornelia de Lange syndrome 2",
    "Williams syndrome",
    "<img src=x onerror=alert(1)>",
)
LABELS = tuple(Label(id=f"OMIM:{100000 + place}", name=name) for place, name in enumerate(NAMES))
REFERENCE = Reference(kind="model", name="tiny", version="v000001", digest=f"sha256:{'ab' * 32}")
INTENDED_USE = "Tests of the model server."
LIMITS = ("Its weights are random: no answer means anything.",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a test may choose."""

    tokens_file: str | None = None
    """None: no tokens are needed."""
    page: bool = False
    names: tuple[str, ...] = ("tiny",)
    reads_images: bool = False
    """The tiny image student in place of the one that reads text."""
    window_tokens: int = 512
    max_batch: int = 8
    max_queued: int = 64
    max_concurrent: int = 64
    deadline_seconds: float = 60.0
    drain_seconds: float = 1.0
    grace_seconds: float = 30.0
    load_seconds: float = 0.0
    """Sleeps so long before the students are loaded."""


def make_students(options: ServerOptions, observer: object) -> list[ServedStudent]:
    """Tiny students of the names of `options`, on one running engine."""
    from mint_lib.engine.answer_format import AnswerFormat
    from mint_lib.engine.label_trie import LabelTrie
    from mint_lib.engine.requests import EngineLimits
    from mint_lib.engine.scheduler import Engine
    from mint_lib.image_inputs.reader import ImageReader
    from mint_lib.reading import end_of_turn_id
    from mint_lib.student import StudentConfig, load_reader, load_student
    from mint_lib.template import Template

    started = time.monotonic()
    config = StudentConfig(model="tiny", window_tokens=options.window_tokens)
    if options.reads_images:
        config = StudentConfig(model="tiny-image", reads="image", window_tokens=options.window_tokens)
    reader = load_reader(config)
    tokenizer = reader.tokenizer
    template = Template.load("tissue_brief" if options.reads_images else "rare_disease_brief").with_num_answers(3)
    limits = EngineLimits(max_batch=options.max_batch, max_queued=options.max_queued)
    engine = Engine(load_student(config), limits=limits, observer=observer)
    engine.start()
    engine.add_adapter("base", None)
    trie = LabelTrie.build(tokenizer, template, LABELS)
    answer_format = AnswerFormat.build(tokenizer, template, LABELS)
    return [
        ServedStudent(
            name=name,
            reference=REFERENCE,
            engine=engine,
            adapter="base",
            tokenizer=tokenizer,
            image_reader=reader if isinstance(reader, ImageReader) else None,
            template=template,
            labels=LABELS,
            trie=trie,
            answer_format=answer_format,
            stop_ids=frozenset({end_of_turn_id(tokenizer)}),
            window_tokens=options.window_tokens,
            intended_use=INTENDED_USE,
            limits=LIMITS,
            load_seconds=time.monotonic() - started,
        )
        for name in options.names
    ]


def serve(options: ServerOptions) -> None:
    """Serve until a signal."""
    from mint_lib.server.access import AccessConfig
    from mint_lib.server.app import build_server
    from mint_lib.server.lifecycle import Readiness, install_early_exit
    from mint_lib.server.limits import RequestLimits
    from mint_lib.server.metrics import ServingMetrics
    from mint_lib.server.students import Lineup

    install_early_exit()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    lineup, readiness = Lineup(), Readiness()
    metrics = ServingMetrics(lineup, readiness)
    path = pathlib.Path(options.tokens_file) if options.tokens_file else None
    server = build_server(
        lineup,
        access=AccessConfig(mode="tokens" if path else "off", tokens_file=path),
        limits=RequestLimits(max_concurrent=options.max_concurrent, deadline_seconds=options.deadline_seconds),
        metrics=metrics,
        readiness=readiness,
        page=options.page,
        host="127.0.0.1",
        port=0,
        drain_seconds=options.drain_seconds,
        grace_seconds=options.grace_seconds,
    )

    def load() -> None:
        time.sleep(options.load_seconds)
        for student in make_students(options, metrics):
            lineup.put(student, retire=lambda _: None)

    sys.stdout.write(f"{server.bind()}\n")
    sys.stdout.flush()
    server.start(load)
    for student in lineup.students():
        student.engine.stop()


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A server process under test."""

    url: str
    process: "subprocess.Popen[str]"
    log: list[str]
    """Lines of its standard error so far."""

    def end(self, *, seconds: float = 60.0) -> int:
        """Send SIGTERM and wait; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextlib.contextmanager
def running_server(options: ServerOptions, *, wait_until_ready: bool = True) -> Iterator[RunningServer]:
    """A server process, ready unless told otherwise, killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(dataclasses.asdict(options))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "".join(log)
        deadline = time.monotonic() + 120
        while wait_until_ready and httpx.get(f"{url}/readyz").status_code != 200:
            assert process.poll() is None, "".join(log)
            assert time.monotonic() < deadline, "".join(log)
            time.sleep(0.05)
        yield RunningServer(url, process, log)
    finally:
        process.kill()
        process.wait()
        reader.join(10)


if __name__ == "__main__":
    found = json.loads(sys.argv[1])
    serve(ServerOptions(**{**found, "names": tuple(found["names"])}))
