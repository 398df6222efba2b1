"""A client of the engine, for its tests: one request, its events, and the answer that they make."""

import threading

from mint_lib.engine.requests import Failed, Generated, Ranked, Started, TokenMade

PATIENCE_SECONDS = 60.0


class Client:
    """Submits one request and keeps its events."""

    def __init__(self, engine, request):
        self.events = []
        self._is_over = threading.Event()
        self.has_token = threading.Event()
        self.ticket = engine.submit(request, self._deliver)

    def _deliver(self, event):
        self.events.append(event)
        if isinstance(event, TokenMade):
            self.has_token.set()
        if isinstance(event, Generated | Ranked | Failed):
            self._is_over.set()

    def wait(self):
        """The last event, after those before it were found to be in their order."""
        assert self._is_over.wait(PATIENCE_SECONDS), "no answer"
        assert isinstance(self.events[0], Started | Failed)
        assert all(isinstance(event, TokenMade) for event in self.events[1:-1])
        return self.events[-1]

    def answer(self):
        """The ranking, or the tokens and why they end."""
        end = self.wait()
        assert isinstance(end, Generated | Ranked), end
        if isinstance(end, Ranked):
            return end
        tokens = [event.token_id for event in self.events[1:-1]]
        assert len(tokens) == end.num_new_tokens
        return tokens, end.finish_reason

    def scores(self):
        """Log-probabilities of the labels."""
        return list(self.answer().log_probabilities)

    def tokens(self):
        """Ids of the generated tokens."""
        return self.answer()[0]

    def error(self):
        """Why the request failed."""
        end = self.wait()
        assert isinstance(end, Failed), end
        return end.error

    @property
    def num_cached(self):
        """Tokens of the prompt that were not computed again."""
        return self.events[0].num_cached_tokens
