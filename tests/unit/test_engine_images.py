"""The engine on image students: answers are those of the whole model, and one picture is never taken for another."""

import dataclasses
import time

import pytest
import torch
from engine_client import PATIENCE_SECONDS, Client
from tiny_image_students import make_image, make_student

from mint_lib.engine.answer_format import AnswerFormat
from mint_lib.engine.label_trie import LabelTrie
from mint_lib.engine.prompt_images import PromptImages
from mint_lib.engine.requests import EngineLimits, Failed, Generated, GenerateRequest, RankRequest
from mint_lib.engine.scheduler import Engine
from mint_lib.errors import ComputationFailed, DeadlineExceeded, Draining, InvalidInput
from mint_lib.packing import collate_trees, pack_tree
from mint_lib.records import Label, Turn
from mint_lib.student import StudentConfig, load_student, rank_labels
from mint_lib.template import Template

TEMPLATE = Template.load("rare_disease").with_num_answers(3)
NAMES = ["Noonan syndrome", "Noonan syndrome 2", "Kabuki syndrome 1", "Marfan's disease"]
LABELS = [Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(NAMES)]
BATCHED = ("llava", "idefics3", "smolvlm")
ALONE = ("mllama", "qwen2_vl", "qwen2_5_vl")
# What the issue asks of a ranking; single passes agree to about 1e-6.
RANKING_ROUNDING = 1e-4
NO_STOP = frozenset({0})
LONG_TURN = (
    Turn(role="user", content="What is to be seen in this picture of the patient? Name the rare disease. " * 3),
)


class Watcher:
    """An observer that keeps the rows of each pass."""

    def __init__(self):
        self.rows = []
        self.num_tokens = {"prompt": 0, "decode": 0, "labels": 0}

    def see_step(self, *, kind, num_rows, num_tokens):
        self.rows.append(num_rows)
        self.num_tokens[kind] += num_tokens

    def see_queue(self, *, num_queued, num_running): ...

    def see_prefix_cache(self, *, num_bytes, num_evicted_blocks): ...

    def see_isolation(self): ...


@dataclasses.dataclass
class Running:
    """An engine over one tiny student, and what the tests compare it with."""

    student: object
    engine: Engine
    watcher: Watcher

    def _read(self, images, turns, tenant, fields):
        reader = self.student.reader
        read = reader.read(turns, images)
        seen = None
        if images:
            token = reader.family.image_token_id
            seen = PromptImages.build(read.ids, read.image_inputs, image_token_id=token)
        fields = {"deadline": time.monotonic() + PATIENCE_SECONDS, **fields}
        return {
            "request_id": "r",
            "tenant": tenant,
            "adapter": "base",
            "prompt_ids": tuple(read.ids),
            "images": seen,
        } | fields

    def rank(self, *images, turns=LONG_TURN, tenant="a", **fields):
        trie = LabelTrie.build(self.student.reader.tokenizer, TEMPLATE, LABELS)
        return Client(self.engine, RankRequest(**self._read(images, turns, tenant, fields), trie=trie))

    def generate(self, *images, turns=LONG_TURN, tenant="a", **fields):
        fields = {"max_new_tokens": 12, "stop_ids": NO_STOP} | fields
        return Client(self.engine, GenerateRequest(**self._read(images, turns, tenant, fields)))

    def own_scores(self, *images, turns=LONG_TURN):
        """Of the code that training and evaluation use."""
        scores = rank_labels(self.student.model, self.student.reader, TEMPLATE, LABELS, [turns], images=[images])
        return pytest.approx([float(value) for value in scores[0]], abs=RANKING_ROUNDING)

    def own_tokens(self, *images, turns=LONG_TURN, num_tokens=12):
        """Of the model's own greedy generation."""
        reader = self.student.reader
        read = reader.read(turns, images)
        tree = pack_tree(read.ids, [[0]])
        batch = collate_trees([tree], pad_token_id=0)
        inputs = reader.collate_images([read.image_inputs], [tree], batch)
        inputs.pop("position_ids", None)
        ids = batch["input_ids"]
        with torch.inference_mode():
            found = self.student.model.generate(
                **inputs,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                eos_token_id=0,
                pad_token_id=0,
            )[0, ids.shape[1] :].tolist()
        return found[: found.index(0)] if 0 in found else found


@pytest.fixture(scope="module")
def students():
    """Of each family two alike: the engine changes how the one that it gets attends."""
    return {family: (make_student(family), make_student(family)) for family in (*BATCHED, *ALONE)}


@pytest.fixture
def make_running(students):
    started = []

    def make(family, **limits):
        own, served = students[family]
        watcher = Watcher()
        engine = Engine(
            served.model,
            limits=EngineLimits(**limits),
            observer=watcher,
            collate_images=served.reader.collate_images,
        )
        engine.add_adapter("base", None)
        engine.start()
        started.append(engine)
        return Running(own, engine, watcher)

    yield make
    for engine in started:
        engine.stop()


def picture(seed, width=32, height=32):
    return make_image(seed, width, height)


@pytest.mark.parametrize("family", [*BATCHED, *ALONE])
def test_engine_ranks_and_generates_with_a_picture_as_the_whole_model_does(make_running, family):
    running = make_running(family)
    first, second = picture(1), picture(2, 48, 40)
    clients = [running.rank(first), running.generate(first), running.rank(second), running.generate(second)]
    assert clients[0].scores() == running.own_scores(first)
    assert clients[1].tokens() == running.own_tokens(first)
    assert clients[2].scores() == running.own_scores(second)
    assert clients[3].tokens() == running.own_tokens(second)
    # Otherwise the pictures would have no say, and nothing would have been tested.
    assert clients[0].scores() != running.own_scores(second)


@pytest.mark.parametrize("family", BATCHED)
@pytest.mark.parametrize("step_tokens", [16, 24, 256])
def test_engine_mixes_prompts_with_pictures_and_of_text_in_one_pass(make_running, family, step_tokens):
    running = make_running(family, step_tokens=step_tokens)
    pictures = [picture(seed, 32 + 8 * (seed % 3), 32) for seed in range(4)]
    shown = [(pictures[0],), (), (pictures[1], pictures[2]), (), (pictures[3],)]
    turns = [(Turn(role="user", content=f"Case {number}. " * (number + 1)),) for number in range(5)]
    clients = [
        (running.rank if number % 2 else running.generate)(*images, turns=turn)
        for number, (images, turn) in enumerate(zip(shown, turns, strict=True))
    ]
    for number, (client, images, turn) in enumerate(zip(clients, shown, turns, strict=True)):
        if number % 2:
            assert client.scores() == running.own_scores(*images, turns=turn)
        else:
            assert client.tokens() == running.own_tokens(*images, turns=turn)
    assert max(running.watcher.rows) > 1


@pytest.mark.parametrize("family", BATCHED)
def test_engine_same_picture_again_comes_from_the_cache_and_another_never_does(make_running, family):
    running = make_running(family)
    first, second = picture(1), picture(2)
    cold, warm = running.rank(first).scores(), running.rank(first)
    assert warm.scores() == pytest.approx(cold, abs=1e-6)
    assert warm.num_cached >= 64
    other = running.rank(second)
    assert other.scores() == running.own_scores(second)
    # Prompts begin alike up to their picture only, which stands within the first block.
    assert other.num_cached == 0
    assert running.rank(first).scores() == running.own_scores(first)


def test_engine_pictures_of_a_long_conversation_are_found_up_to_the_first_that_differs(make_running):
    running = make_running("llava")
    before = (Turn(role="system", content="You look at pictures and describe them. " * 6), *LONG_TURN)
    first, second, third = picture(1), picture(2), picture(3)
    assert running.rank(first, second, turns=before).scores() == running.own_scores(first, second, turns=before)
    prompt = running.student.reader.read(before, [first, second]).ids
    token = running.student.reader.family.image_token_id
    num_before = prompt.index(token)
    changed = running.rank(first, third, turns=before)
    assert changed.scores() == running.own_scores(first, third, turns=before)
    # The text before the pictures is shared in whole blocks; no block with a picture is.
    assert changed.num_cached == num_before // 32 * 32 > 0
    swapped = running.rank(second, first, turns=before)
    assert swapped.scores() == running.own_scores(second, first, turns=before)
    assert swapped.num_cached == changed.num_cached


def test_engine_text_that_spells_no_picture_is_not_taken_for_one_that_has_its_tokens(make_running):
    running = make_running("llava")
    shown = running.rank(picture(1))
    shown.wait()
    request = running._read((picture(1),), LONG_TURN, "a", {})
    trie = LabelTrie.build(running.student.reader.tokenizer, TEMPLATE, LABELS)
    blind = Client(running.engine, RankRequest(**request | {"images": None}, trie=trie))
    assert blind.scores() != pytest.approx(shown.scores(), abs=1e-3)
    assert blind.num_cached == 0


def test_engine_picture_is_not_shared_between_tenants(make_running):
    running = make_running("llava")
    running.rank(picture(1), tenant="a").wait()
    other = running.rank(picture(1), tenant="b")
    assert other.scores() == running.own_scores(picture(1))
    assert other.num_cached == 0


def test_engine_one_pixel_makes_another_picture(make_running):
    running = make_running("llava")
    read = running.student.reader.read(LONG_TURN, [picture(1)])
    token = running.student.reader.family.image_token_id
    changed = {name: tensor.clone() for name, tensor in read.image_inputs.items()}
    changed["pixel_values"].view(-1)[-1] += 1e-3
    digests = {
        PromptImages.build(read.ids, inputs, image_token_id=token).digest for inputs in (read.image_inputs, changed)
    }
    assert len(digests) == 2
    again = running.student.reader.read(LONG_TURN, [picture(1)]).image_inputs
    assert PromptImages.build(read.ids, again, image_token_id=token).digest in digests


def test_engine_pictures_that_arrive_together_are_computed_once(make_running):
    running = make_running("llava", step_tokens=256)
    running.rank(picture(9)).wait()
    before = running.watcher.num_tokens["prompt"]
    clients = [running.rank(picture(1)) for _ in range(4)]
    assert all(client.scores() == running.own_scores(picture(1)) for client in clients)
    num_prompt = len(running.student.reader.read(LONG_TURN, [picture(1)]).ids)
    assert running.watcher.num_tokens["prompt"] - before < 2 * num_prompt


@pytest.mark.parametrize("family", BATCHED)
def test_engine_tiny_cache_evicts_pictures_and_answers_stay_right(make_running, family):
    running = make_running(family, prefix_cache_mib=0)
    for seed in (1, 2, 1):
        client = running.rank(picture(seed))
        assert client.scores() == running.own_scores(picture(seed))
        assert client.num_cached == 0


def test_engine_picture_that_spoils_the_numbers_fails_alone(make_running):
    running = make_running("llava")
    broken = running._read((picture(1),), LONG_TURN, "a", {})
    spoilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in broken["images"].inputs.items()}
    token = running.student.reader.family.image_token_id
    broken["images"] = PromptImages.build(broken["prompt_ids"], spoilt, image_token_id=token)
    trie = LabelTrie.build(running.student.reader.tokenizer, TEMPLATE, LABELS)
    clients = [
        running.rank(picture(2)),
        Client(running.engine, RankRequest(**broken, trie=trie)),
        running.rank(picture(1)),
    ]
    assert clients[0].scores() == running.own_scores(picture(2))
    assert isinstance(clients[1].error(), ComputationFailed)
    assert clients[2].scores() == running.own_scores(picture(1))


def test_engine_prompt_with_more_image_tokens_than_features_is_refused(make_running):
    running = make_running("llava")
    request = running._read((picture(1),), LONG_TURN, "a", {})
    token = running.student.reader.family.image_token_id
    ids = (*request["prompt_ids"], token)
    request |= {"prompt_ids": ids, "images": PromptImages.build(ids, request["images"].inputs, image_token_id=token)}
    client = Client(running.engine, GenerateRequest(**request, max_new_tokens=2, stop_ids=NO_STOP))
    assert isinstance(client.error(), InvalidInput)
    assert running.rank(picture(1)).scores() == running.own_scores(picture(1))


def test_engine_holds_no_features_once_a_prompt_is_computed(make_running):
    running = make_running("llava")
    client = running.generate(picture(1), max_new_tokens=200, stop_ids=frozenset())
    assert client.has_token.wait(PATIENCE_SECONDS)
    runs = list(running.engine._batch._runs.values())
    assert runs
    assert all(run._image_features is None for run in runs)
    client.ticket.cancel()


def test_engine_of_a_text_student_refuses_a_picture():
    engine = Engine(load_student(StudentConfig(model="tiny")), limits=EngineLimits(), observer=Watcher())
    engine.add_adapter("base", None)
    images = PromptImages.build([1, 2], {"pixel_values": torch.zeros(1)}, image_token_id=2)
    request = GenerateRequest(
        request_id="r",
        tenant="a",
        adapter="base",
        prompt_ids=(1, 2),
        images=images,
        deadline=time.monotonic() + 1,
        max_new_tokens=1,
        stop_ids=NO_STOP,
    )
    with pytest.raises(InvalidInput, match="text only"):
        engine.submit(request, lambda _: None)
    engine.stop()


@pytest.mark.parametrize("family", ["llava", "mllama", "qwen2_vl"])
def test_engine_ranked_list_of_a_picture_is_a_list_of_distinct_labels(make_running, family):
    running = make_running(family)
    tokenizer = running.student.reader.tokenizer
    answer_format = AnswerFormat.build(tokenizer, TEMPLATE, LABELS)
    client = running.generate(picture(1), max_new_tokens=answer_format.max_tokens, answer_format=answer_format)
    names = TEMPLATE.parse(tokenizer.decode(client.tokens()))
    assert len(set(names)) == 3
    assert set(names) <= set(NAMES)


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_engine_seeded_samples_of_a_picture_repeat(make_running, family):
    running = make_running(family)
    answers = [running.generate(picture(1), temperature=1.5, seed=seed).tokens() for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("family", ALONE)
def test_engine_without_a_way_to_lay_out_pictures_refuses_such_a_family(students, family):
    with pytest.raises(InvalidInput, match=f"type {family} are not embeddings.*vLLM"):
        Engine(students[family][1].model, limits=EngineLimits(), observer=Watcher())


def test_engine_one_by_one_takes_label_sets_in_several_passes(make_running):
    running = make_running("mllama", exact_trie_tokens=16)
    assert running.rank(picture(1)).scores() == running.own_scores(picture(1))


def test_engine_one_by_one_ends_cancelled_late_and_stopped_answers(make_running):
    running = make_running("mllama")
    endless = {"max_new_tokens": 900, "stop_ids": frozenset()}
    cancelled = running.generate(picture(1), **endless)
    assert cancelled.has_token.wait(PATIENCE_SECONDS)
    cancelled.ticket.cancel()
    late = running.generate(picture(1), **endless, deadline=time.monotonic() + 1.0)
    assert isinstance(late.error(), DeadlineExceeded)
    stopped, waiting = running.generate(picture(1), **endless), running.rank(picture(2))
    assert stopped.has_token.wait(PATIENCE_SECONDS)
    running.engine.stop()
    assert isinstance(stopped.error(), Draining)
    assert isinstance(waiting.error(), Draining)
    assert not isinstance(cancelled.events[-1], Generated | Failed)


def test_engine_one_by_one_fails_a_spoilt_request_alone(make_running):
    running = make_running("qwen2_vl")
    request = running._read((picture(1),), LONG_TURN, "a", {})
    token = running.student.reader.family.image_token_id
    spoilt = request["images"].inputs | {
        "pixel_values": torch.full_like(request["images"].inputs["pixel_values"], torch.nan)
    }
    request["images"] = PromptImages.build(request["prompt_ids"], spoilt, image_token_id=token)
    trie = LabelTrie.build(running.student.reader.tokenizer, TEMPLATE, LABELS)
    clients = [
        Client(running.engine, RankRequest(**request, trie=trie)),
        Client(running.engine, GenerateRequest(**request, max_new_tokens=3, stop_ids=NO_STOP)),
        running.rank(picture(1)),
    ]
    assert [type(client.error()) for client in clients[:2]] == [ComputationFailed] * 2
    assert clients[2].scores() == running.own_scores(picture(1))
