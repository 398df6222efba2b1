"""What the student's tokenizer makes of a pair: names that come back, tokens that differ, the prompt that is served."""

import pytest
from tiny_pairing import LABELS, make_config, make_toy, pair_toy

from mint_lib.errors import InvalidInput
from mint_lib.pairing.checks import PairChecker
from mint_lib.reading import TextReader, encode_answer, encode_prompt
from mint_lib.records import Label
from mint_lib.template import Template


def test_preferences_prompt_equals_what_serving_renders_from_the_stored_template(tiny_tokenizer):
    config = make_config(top_k=3)
    cases, rankings = make_toy(2)
    pairs, _ = pair_toy(config, tiny_tokenizer, cases, rankings)
    stored = Template.from_bytes(Template.load(config.template).with_num_answers(3).data)
    assert pairs[0].prompt == stored.prompt(cases[0].text)
    assert pairs[0].template_digest == stored.digest
    assert stored.parse(pairs[0].chosen) == [LABELS[place].name for place in range(3)]


def test_preferences_trained_tokens_equal_the_rendered_conversation(tiny_tokenizer):
    cases, rankings = make_toy(1)
    [pair], _ = pair_toy(make_config(), tiny_tokenizer, cases, rankings)
    ids = encode_prompt(tiny_tokenizer, pair.prompt) + encode_answer(tiny_tokenizer, pair.chosen)
    turns = [*(turn.model_dump() for turn in pair.prompt), {"role": "assistant", "content": pair.chosen}]
    assert tiny_tokenizer.decode(ids) == tiny_tokenizer.apply_chat_template(turns, tokenize=False)


def test_preferences_label_that_the_tokenizer_does_not_give_back_is_refused(tiny_tokenizer):
    spoiled = [*LABELS, Label(id="OMIM:99", name="Disease <|end|> x")]
    with pytest.raises(InvalidInput, match="OMIM:99"):
        PairChecker(TextReader(tiny_tokenizer), Template.load("rare_disease"), spoiled, 600)


def test_preferences_labels_with_equal_tokens_are_refused(tiny_tokenizer):
    class Forgetful:
        """Tokenises every answer alike but remembers how the last one reads."""

        def __getattr__(self, name):
            return getattr(tiny_tokenizer, name)

        def encode(self, text, **options):
            if not text.startswith("POTENTIAL_DISEASES:"):
                return tiny_tokenizer.encode(text, **options)
            self.last = text
            return tiny_tokenizer.encode("same", **options)

        def decode(self, ids, **options):
            return self.last

    with pytest.raises(InvalidInput, match="OMIM:0 and OMIM:1"):
        PairChecker(TextReader(Forgetful()), Template.load("rare_disease"), LABELS, 600)
