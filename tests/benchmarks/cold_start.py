"""From the start of a process to its first correct answer: files and imports side by side against one after the other.

    python tests/benchmarks/cold_start.py --rounds 5
    python tests/benchmarks/cold_start.py --rounds 5 --link-megabits 1000

Both sides are fresh processes that find the base (SmolLM2-135M-Instruct, 538 MB, mirrored) and an adapter on the same
embedded S3 server, check every digest, and rank the same made-up case; their answers are compared first. One after the
other means: download to a folder as a storage initialiser does, then import, then load. Rounds are interleaved, and
every round starts with the side that the last one ended with. Loopback is faster than any network between a pod and its
store; `--link-megabits` puts a link of that speed between them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

TARGET = 0.6
NAMES = ("Noonan syndrome 1", "Kabuki syndrome 1", "Robinow syndrome", "Costello syndrome")
SIDES = ("one after the other", "side by side")


class Blind:
    """Sees nothing."""

    def see_step(self, *, kind: str, num_rows: int, num_tokens: int) -> None: ...

    def see_queue(self, *, num_queued: int, num_running: int) -> None: ...

    def see_prefix_cache(self, *, num_bytes: int, num_evicted_blocks: int) -> None: ...

    def see_isolation(self) -> None: ...


def write_student() -> None:
    """A mirrored base, and a student on it with a random adapter."""
    import peft
    import torch

    from mint_lib.records import StageRecord
    from mint_lib.server.base_files import mirror_base
    from mint_lib.store import Store
    from mint_lib.student import StudentConfig, load_student, student_digest
    from mint_lib.template import Template

    store, config = Store.from_environment(), StudentConfig()
    mirror_base(store, config, "smollm2")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    template = Template.load("rare_disease")
    with tempfile.TemporaryDirectory() as scratch, store.write("student", "cold") as version:
        folder = pathlib.Path(scratch)
        peft.get_peft_model(load_student(config), lora).save_pretrained(scratch, save_embedding_layers=False)
        (folder / "README.md").unlink()
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": config.model}))
        version.add_folder("adapter", folder)
        version.add_bytes("template.yaml", template.data)
        version.add_json("labels.json", [{"id": f"OMIM:{n}", "name": name} for n, name in enumerate(NAMES)])
        version.add_json(
            "student.json",
            {
                "student": config.model_dump(mode="json"),
                "base_digest": student_digest(config),
                "template_digest": template.digest,
                "method": "orpo",
                "method_config": {},
                "lora": {},
                "best_step": 0,
                "keep_best": "loss",
                "num_trainable_parameters": 1,
            },
        )
        version.commit(StageRecord(stage="alignment", config={}, inputs={}, code_version="benchmark"))


def answer_side_by_side() -> list[float]:
    """As the server loads."""
    from mint_lib.engine.requests import EngineLimits
    from mint_lib.server.asking import warm_up
    from mint_lib.server.engines import Engines
    from mint_lib.server.loading import LoadConfig, load_student
    from mint_lib.store import Store

    engines = Engines(limits=EngineLimits(), observer=Blind())
    options = LoadConfig(base="base/smollm2")
    student = load_student(Store.from_environment(), "student/cold", name="cold", engines=engines, options=options)
    return list(warm_up(student, timeout_seconds=60).log_probabilities)


def answer_one_after_the_other() -> list[float]:
    """Everything to disk, then the imports, then the load."""
    from mint_lib.server.base_files import list_mirror
    from mint_lib.server.stored_student import read_student
    from mint_lib.store import Store
    from mint_lib.student_weights import digest_student_files

    store = Store.from_environment()
    stored, mirror = read_student(store, store.resolve("student/cold")), store.resolve("base/smollm2")
    config = stored.facts.student
    sums = {name: entry.sha256 for name, entry in list_mirror(store, mirror).items()}
    if digest_student_files(sums, num_layers=config.num_layers, dtype=config.dtype) != stored.facts.base_digest:
        raise AssertionError("another base")
    with tempfile.TemporaryDirectory() as scratch:
        base_folder = store.download(mirror, pathlib.Path(scratch), "files")
        adapter_folder = store.download(stored.reference, pathlib.Path(scratch), "adapter")

        from mint_lib.engine.answer_format import AnswerFormat
        from mint_lib.engine.label_trie import LabelTrie
        from mint_lib.engine.requests import EngineLimits
        from mint_lib.engine.scheduler import Engine
        from mint_lib.reading import end_of_turn_id
        from mint_lib.server.asking import warm_up
        from mint_lib.server.loading import import_libraries
        from mint_lib.server.safe_adapter import check_adapter
        from mint_lib.server.safe_base import check_base
        from mint_lib.server.students import ServedStudent
        from mint_lib.student import load_student, load_tokenizer

        import_libraries()
        facts = check_base(base_folder)
        check_adapter(adapter_folder, base_model=config.model, num_layers=facts.num_layers, base_tensors=facts.tensors)
        local = config.model_copy(update={"model": f"folder:{base_folder}"})
        tokenizer = load_tokenizer(local)
        engine = Engine(load_student(local), limits=EngineLimits(), observer=Blind())
        engine.start()
        engine.add_adapter("cold", adapter_folder)
        student = ServedStudent(
            name="cold",
            reference=stored.reference,
            engine=engine,
            adapter="cold",
            tokenizer=tokenizer,
            template=stored.template,
            labels=stored.labels,
            trie=LabelTrie.build(tokenizer, stored.template, stored.labels),
            answer_format=AnswerFormat.build(tokenizer, stored.template, stored.labels),
            stop_ids=frozenset({end_of_turn_id(tokenizer)}),
            window_tokens=config.window_tokens,
            intended_use="",
            limits=(),
            load_seconds=0.0,
        )
        warm_up(student, timeout_seconds=60)  # as the server does before it is ready
        return list(warm_up(student, timeout_seconds=60).log_probabilities)


def time_side(side: str) -> tuple[float, list[float]]:
    """Seconds from the start of a fresh process to its answer, and the answer."""
    started = time.monotonic()
    with subprocess.Popen([sys.executable, __file__, "--side", side], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.monotonic() - started
        # What the process does after its answer is not asked about.
        process.kill()
    if not line:
        raise AssertionError(f"{side} gave no answer")
    return seconds, json.loads(line)


@contextlib.contextmanager
def slow_link(endpoint: str, megabits: float) -> Iterator[str]:
    """An address behind which `endpoint` lies at the end of a link of so many megabits per second."""
    command = [sys.executable, __file__, "--link-to", endpoint, "--link-megabits", str(megabits)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


async def carry_link(endpoint: str, megabits: float) -> None:
    """Carry connections to `endpoint`; what comes back shares the link's rate."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    free_at = time.monotonic()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_slow: bool) -> None:
        nonlocal free_at
        with contextlib.suppress(OSError):
            while data := await reader.read(2**18):
                if is_slow:
                    free_at = max(free_at, time.monotonic()) + len(data) * 8 / (megabits * 1e6)
                    await asyncio.sleep(free_at - time.monotonic())
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(carry(reader, far_writer, is_slow=False), carry(far_reader, writer, is_slow=True))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def measure(num_rounds: int, link: str) -> str:
    """One line: name, ratio, range, target.

    Raises:
        AssertionError: the sides' answers differ.
    """
    answers: list[Any] = []
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(-1, num_rounds):  # the first round is not counted: it fills the page cache for both
        for side in SIDES if number % 2 else reversed(SIDES):
            spent, answer = time_side(side)
            answers.append(answer)
            if number >= 0:
                seconds[side].append(spent)
                sys.stderr.write(f"{side}: {spent:.2f} s\n")
        if any(abs(a - b) > 1e-5 for a, b in zip(answers[0], answers[-1], strict=True)):
            raise AssertionError(f"answers differ: {answers[0]} and {answers[-1]}")
    after, beside = (seconds[side] for side in SIDES)
    ratios = sorted(ours / theirs for ours, theirs in zip(beside, after, strict=True))
    middle = statistics.median(ratios)
    return (
        f"cold start, base of 538 MB in S3 ({link}): {middle:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) of one after the "
        f"other, {statistics.median(beside):.1f} s against {statistics.median(after):.1f} s; target <= {TARGET}: "
        f"{'reached' if middle <= TARGET else 'MISSED'}"
    )


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--link-megabits", type=float)
    parser.add_argument("--link-to")
    arguments = parser.parse_args()
    if arguments.write:
        write_student()
        return
    if arguments.side:
        answer = answer_side_by_side() if arguments.side == SIDES[1] else answer_one_after_the_other()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        # The parent has what it wants and is not to wait for engines and temporary folders.
        time.sleep(60)
        return
    if arguments.link_to:
        asyncio.run(carry_link(arguments.link_to, arguments.link_megabits))
    from mint_lib.local_store import local_store

    with tempfile.TemporaryDirectory() as folder, local_store(pathlib.Path(folder)) as variables:
        os.environ.update(variables)
        subprocess.run([sys.executable, __file__, "--write"], check=True)
        if arguments.link_megabits is None:
            sys.stdout.write(measure(arguments.rounds, "loopback") + "\n")
            return
        with slow_link(os.environ["MINT_S3_ENDPOINT_URL"], arguments.link_megabits) as address:
            os.environ["MINT_S3_ENDPOINT_URL"] = address
            sys.stdout.write(measure(arguments.rounds, f"{arguments.link_megabits:g} Mbit/s") + "\n")


if __name__ == "__main__":
    main()
