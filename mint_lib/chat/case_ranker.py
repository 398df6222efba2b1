"""Asks a chat model about one case, step by step and sample by sample.

Goes in: a client, the steps, and a case. Comes out: log-scores of the label set, and how well the answers could be
read. A ranking that lists no label is asked for once more, with a reminder of the form. It knows no teacher.
"""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np

from mint_lib.chat.chain import Step, write_messages
from mint_lib.chat.client import ChatClient
from mint_lib.chat.questions import ChatRequest, Message, Reply
from mint_lib.chat.ranked_list import RankedListReader, ReadList, score_lists
from mint_lib.records import Case, Label

_NOTHING = ReadList((), 0)


class RankedCase(NamedTuple):
    """What came of asking about a case."""

    scores: np.ndarray
    """Log-scores `[label]`."""
    is_parsed: bool
    """Whether any answer lists a label; otherwise all scores are equal."""
    num_reminders: int
    num_unknown_names: int
    """Listed names that are no label's."""


class CaseRanker:
    """Ranks the label set for cases, from several threads."""

    def __init__(
        self,
        client: ChatClient,
        steps: Sequence[Step],
        reader: RankedListReader,
        *,
        labels: Sequence[Label],
        temperature: float | None,
        num_samples: int,
    ):
        self._client = client
        self._steps = tuple(steps)
        self._reader = reader
        self._label_names = [label.name for label in labels]
        self._temperature = temperature
        self._num_samples = num_samples

    def rank(self, case: Case) -> RankedCase:
        """Scores of `case`. Raises as `ChatClient.ask`."""
        found: list[ReadList] = []
        num_reminders = 0
        for sample in range(self._num_samples):
            request, reply = self._ask_chain(case, sample)
            read = self._reader.read(reply.text) if reply is not None else _NOTHING
            if reply is not None and not reply.is_refused and not read.columns:
                num_reminders += 1
                reply = self._remind(request, reply, case, sample)
                read = ReadList(self._reader.read(reply.text).columns, read.num_unknown)
            found.append(read)
        lists = [read.columns for read in found if read.columns]
        return RankedCase(
            score_lists(lists, num_labels=len(self._label_names)),
            bool(lists),
            num_reminders,
            sum(read.num_unknown for read in found),
        )

    def rank_all(self, cases: Mapping[str, Case], *, num_threads: int) -> Generator[tuple[str, RankedCase], None, None]:
        """Key and scores of each of `cases` as it is ranked. Raises as `ChatClient.ask`.

        Whatever ends this early, `close` included, ends calls that wait; those that are being answered are paid for, so
        they are waited for, and their answers are kept.
        """
        executor = ThreadPoolExecutor(num_threads, thread_name_prefix="chat")
        with self._client:
            try:
                keys = {executor.submit(self.rank, case): key for key, case in cases.items()}
                for future in as_completed(keys):
                    yield keys[future], future.result()
            finally:
                self._client.stop()
                executor.shutdown(cancel_futures=True)

    def describe_prompts(self) -> list[dict[str, str]]:
        """The turns of each step as they are sent, with places for what comes from a case."""
        places = {step.name: f"{{{step.name}}}" for step in self._steps}
        requests = (self._write_request(step, "{case_text}", None, places) for step in self._steps)
        return [{message.role: message.text for message in request.messages} for request in requests]

    def _ask_chain(self, case: Case, sample: int) -> tuple[ChatRequest, Reply | None]:
        """The last request and its reply; no reply where a step before it was left without an answer."""
        answers: dict[str, str] = {}
        for step in self._steps:
            request = self._write_request(step, case.text, case.image, answers)
            reply = self._client.ask(request, subject=case.case_id, step=step.name, sample=sample)
            if not reply.text.strip() and step is not self._steps[-1]:
                return request, None
            answers[step.name] = reply.text
        return request, reply

    def _remind(self, request: ChatRequest, reply: Reply, case: Case, sample: int) -> Reply:
        """The answer after a reminder of the form. Chat templates want turns in turn, and none of them empty."""
        turns = (Message("assistant", reply.text.strip() or "(no answer)"), Message("user", self._reader.reminder))
        again = request._replace(messages=(*request.messages, *turns))
        return self._client.ask(again, subject=case.case_id, step=f"{self._steps[-1].name}.reminder", sample=sample)

    def _write_request(
        self, step: Step, text: str | None, image: bytes | None, answers: Mapping[str, str]
    ) -> ChatRequest:
        """The question of `step`; the last one says which form a ranking has."""
        is_last = step is self._steps[-1]
        messages = write_messages(
            step,
            text=text,
            image=image,
            answers=answers,
            label_names=self._label_names,
            ending=self._reader.instruction if is_last else "",
        )
        return ChatRequest(messages, step.max_tokens, self._temperature, self._reader.fields if is_last else None)
