"""Decoding: choices by logits and seed, and how answers end."""

import time

import pytest
import torch

from mint_lib.engine.decoding import Answer, choose_candidate
from mint_lib.engine.requests import GenerateRequest

END = 9


class SpelledOut:
    """An answer format that allows the given sets of tokens, one after another."""

    def __init__(self, *steps):
        self.steps = steps

    def start(self):
        return 0

    def allowed(self, state):
        return self.steps[state] if state < len(self.steps) else ()

    def advance(self, state, token_id):
        assert token_id in self.steps[state]
        return state + 1


def make_request(**changes):
    return GenerateRequest(
        **{
            "request_id": "r",
            "tenant": "t",
            "adapter": "a",
            "prompt_ids": (1,),
            "deadline": time.monotonic() + 60,
            "max_new_tokens": 10,
            "stop_ids": frozenset({END}),
            **changes,
        }
    )


def likeliest(token_id):
    return torch.nn.functional.one_hot(torch.tensor(token_id), 10).float()


def draw_many(logits, count=4000, **options):
    generator = torch.Generator().manual_seed(3)
    drawn = [choose_candidate(logits, generator=generator, **options) for _ in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)).double() / count


def test_decoding_temperature_zero_takes_the_likeliest():
    assert choose_candidate(likeliest(4), temperature=0.0, top_p=0.1, generator=torch.Generator()) == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_decoding_draws_follow_the_tempered_probabilities(temperature):
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    expected = (logits.double() / temperature).softmax(0)
    # Four standard deviations of a share of 4000 draws.
    assert (draw_many(logits, temperature=temperature, top_p=1.0) - expected).abs().max() < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("num_candidates", [5, 1000])
def test_decoding_top_p_keeps_the_smallest_set_that_reaches_it(num_candidates):
    share = torch.tensor([0.1, 0.45, 0.05, 0.3, 0.1])
    # Beyond the first candidates that are sorted, the mass lies on many equal ones.
    logits = torch.cat([share.log(), torch.full((num_candidates - 5,), -30.0)])
    frequency = draw_many(logits, temperature=1.0, top_p=0.7)
    assert set(frequency.nonzero().flatten().tolist()) == {1, 3}
    assert abs(frequency[1] - 0.6) < 4 * 0.5 / 4000**0.5


def test_decoding_top_p_over_a_flat_vocabulary_is_not_cut_at_the_first_candidates():
    frequency = draw_many(torch.zeros(1000), temperature=1.0, top_p=0.9)
    assert 850 < int((frequency > 0).sum()) <= 901


def test_decoding_same_seed_repeats_and_another_differs():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def answer(seed):
        made = Answer(make_request(temperature=1.0, max_new_tokens=20, stop_ids=frozenset()), seed=seed)
        while made.finish_reason is None:
            made.take(logits)
        return made.token_ids

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)


def test_decoding_stop_token_ends_the_answer_and_is_not_told():
    answer = Answer(make_request(), seed=0)
    answer.take(likeliest(4))
    answer.take(likeliest(END))
    assert (answer.token_ids, answer.finish_reason) == ([4], "stop")


def test_decoding_longest_answer_ends_by_length():
    answer = Answer(make_request(max_new_tokens=2), seed=0)
    answer.take(likeliest(4))
    assert answer.finish_reason is None
    answer.take(likeliest(4))
    assert (answer.token_ids, answer.finish_reason) == ([4, 4], "length")


def test_decoding_format_takes_forced_tokens_without_logits_and_lets_only_allowed_ones_compete():
    answer = Answer(make_request(answer_format=SpelledOut((1,), (2,), (3, 5), (6,), (7, 8), (END,))), seed=0)
    assert answer.token_ids == [1, 2]
    answer.take(likeliest(4) + 0.5 * likeliest(5))
    assert answer.token_ids == [1, 2, 5, 6]
    answer.take(likeliest(7))
    assert (answer.token_ids, answer.finish_reason) == ([1, 2, 5, 6, 7], "stop")


def test_decoding_format_longer_than_allowed_ends_by_length_inside_a_forced_run():
    answer = Answer(make_request(max_new_tokens=2, answer_format=SpelledOut((1,), (2,), (3,), (END,))), seed=0)
    assert (answer.token_ids, answer.finish_reason) == ([1, 2], "length")
