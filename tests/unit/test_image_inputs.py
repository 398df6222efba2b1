"""Image students read as transformers has it, and pack into trees whose numbers are those of whole rows."""

import io
import pickle

import peft
import pytest
import torch
from PIL import Image
from tiny_image_students import FAMILIES, make_image, make_student, write_folder
from transformers import AutoTokenizer

from mint_lib.alignment_methods.orpo import orpo_loss
from mint_lib.errors import InvalidInput
from mint_lib.image_inputs.reader import ImageReader, load_chat_template, load_image_processor, load_image_reader
from mint_lib.packing import collate_trees, pack_tree, predict_edges
from mint_lib.reading import encode_answer
from mint_lib.records import Turn

# Log-probabilities are of the order of 5 and float32 sums are made in another order: 1e-6 of that, through four layers.
TOLERANCE = 1e-4
PROMPTS = (
    (
        Turn(role="system", content="Name it."),
        Turn(role="user", content="A boy of 12 years."),
        Turn(role="assistant", content="Which symptoms?"),
        Turn(role="user", content="Seizures."),
    ),
    (Turn(role="user", content="A girl with seizures, hearing loss and a heart defect."),),
)
ANSWERS = (("Noonan syndrome", "Noonan syndrome 2", "Kabuki"), ("Cornelia", "Marfan"))
WIDE, TALL, SQUARE = make_image(1, 64, 40), make_image(2, 30, 60, format="JPEG"), make_image(3, 48, 48)
IMAGES = ((WIDE, SQUARE), (TALL,))
"""Those of both prompts: of different sizes, and not as many."""


@pytest.fixture(scope="module", params=FAMILIES)
def student(request):
    return make_student(request.param)


@pytest.fixture(scope="module")
def idefics3():
    return make_student("idefics3")


def pack(reader, prompts, images, answers):
    """The batch that training would make."""
    read = [reader.read(prompt, of, case_id="c") for prompt, of in zip(prompts, images, strict=True)]
    trees = [
        pack_tree(found.ids, [encode_answer(reader.tokenizer, text) for text in texts])
        for found, texts in zip(read, answers, strict=True)
    ]
    batch = collate_trees(trees, pad_token_id=reader.tokenizer.pad_token_id)
    batch["image_inputs"] = reader.collate_images([found.image_inputs for found in read], trees, batch)
    return trees, batch


def render(reader, prompt, num_images):
    parts = [[{"type": "text", "text": turn.content}] for turn in prompt]
    first = [turn.role for turn in prompt].index("user")
    parts[first] = [{"type": "image"}] * num_images + parts[first]
    turns = [{"role": turn.role, "content": part} for turn, part in zip(prompt, parts, strict=True)]
    return reader.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def read_as_processor(student, prompt, images):
    """What transformers makes of a prompt and its images."""
    decoded = [Image.open(io.BytesIO(data)) for data in images]
    return student.read_as_processor(render(student.reader, prompt, len(images)), decoded)


def score_row(student, prompt, images, answer):
    """Log-probabilities of an answer's tokens by the model's ordinary forward pass over prompt and answer alone."""
    inputs = read_as_processor(student, prompt, images)
    answer_ids = torch.tensor([encode_answer(student.reader.tokenizer, answer)])
    num_prompt, num_answer = inputs["input_ids"].shape[1], answer_ids.shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_ids], dim=1)
    inputs.pop("attention_mask", None)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, num_answer))
    if "cross_attention_mask" in inputs:  # as `generate` goes on with it
        mask = inputs["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, num_answer, -1, -1)], dim=1)
    with torch.inference_mode():
        log_probability_TV = student.model(**inputs, use_cache=False).logits[0].log_softmax(-1)
    return log_probability_TV[num_prompt - 1 : -1].gather(1, answer_ids.T)[:, 0]


def test_image_prompt_is_that_of_the_processor(student):
    for prompt, images in zip(PROMPTS, IMAGES, strict=True):
        expected = read_as_processor(student, prompt, images)
        read = student.reader.read(prompt, images)
        assert read.ids == expected["input_ids"][0].tolist()
        for name, values in read.image_inputs.items():
            torch.testing.assert_close(values, expected[name], rtol=0.0, atol=0.0)


def test_image_trees_equal_whole_rows(student):
    trees, batch = pack(student.reader, PROMPTS, IMAGES, ANSWERS)
    with torch.inference_mode():
        found_N = predict_edges(student.model, batch)
    first_edge = 0
    for tree, prompt, of, answers in zip(trees, PROMPTS, IMAGES, ANSWERS, strict=True):
        for path, answer in zip(tree.paths, answers, strict=True):
            expected = score_row(student, prompt, of, answer)
            torch.testing.assert_close(found_N[[first_edge + e for e in path]], expected, rtol=0.0, atol=TOLERANCE)
        first_edge += len(tree.targets)


def test_image_pixels_enter_once_for_each_tree(student):
    _, one = pack(student.reader, PROMPTS, IMAGES, [answers[:1] for answers in ANSWERS])
    _, many = pack(student.reader, PROMPTS, IMAGES, ANSWERS)
    assert one["image_inputs"]["pixel_values"].shape == many["image_inputs"]["pixel_values"].shape
    assert len(one["input_ids"]) == len(many["input_ids"]) == 2


def test_image_other_pixels_change_every_answer(student):
    _, batch = pack(student.reader, PROMPTS, IMAGES, ANSWERS)
    _, other = pack(student.reader, PROMPTS, [[make_image(9, 64, 40)] * len(of) for of in IMAGES], ANSWERS)
    with torch.inference_mode():
        changed_N = (predict_edges(student.model, batch) - predict_edges(student.model, other)).abs()
    assert changed_N.min() > 10 * TOLERANCE


def test_image_training_step_lowers_the_orpo_loss(student):
    _, batch = pack(student.reader, PROMPTS, IMAGES, ANSWERS)
    weight_N = torch.zeros(len(batch["target_N"]))
    weight_N[batch["edge_L"][batch["answer_L"] == 0]] = 1.0
    weight_N[batch["edge_L"][batch["answer_L"] == 3]] = 1.0
    pairs = {"chosen_P": torch.tensor([0, 0, 3]), "rejected_P": torch.tensor([1, 2, 4]), "nll_weight_N": weight_N}
    batch |= pairs | {"pair_total": torch.tensor(3.0), "nll_total": weight_N.sum(), "case_ids": ["a", "b"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=r".*(language_model|text_model).*\.(q|v|down)_proj"
        )
        model = peft.get_peft_model(make_student(student.reader.family.model_config.model_type).model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before, _ = orpo_loss(predict_edges(model, batch), batch, beta=0.1, nll_weight=1.0)
    before.backward()
    optimizer.step()
    after, _ = orpo_loss(predict_edges(model, batch), batch, beta=0.1, nll_weight=1.0)
    assert after.item() < before.item() - TOLERANCE


def test_image_rows_with_and_without_images_share_a_batch(student):
    if student.reader.family.needs_images:
        with pytest.raises(InvalidInput, match="Case c has no image"):
            student.reader.read(PROMPTS[0], case_id="c")
        return
    trees, batch = pack(student.reader, PROMPTS, ((), (TALL,)), ANSWERS)
    with torch.inference_mode():
        found_N = predict_edges(student.model, batch)
        row = torch.tensor([[*student.reader.read(PROMPTS[0]).ids, trees[0].targets[0]]])
        expected = student.model(row).logits[0, -2].log_softmax(-1)[row[0, -1]]
    torch.testing.assert_close(found_N[0], expected, rtol=0.0, atol=TOLERANCE)


def test_image_batch_without_any_image_asks_for_nothing(idefics3):
    assert pack(idefics3.reader, PROMPTS, ((), ()), ANSWERS)[1]["image_inputs"] == {}


def test_image_read_again_gives_the_same_tensors(student):
    inputs = student.reader.read(PROMPTS[0], (WIDE,)).image_inputs
    again = student.reader.read_images((WIDE,))
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert student.reader.read_images(()) is None


def test_image_reader_survives_pickling_and_a_folder(student, tmp_path):
    expected = student.reader.read(PROMPTS[0], (WIDE,))
    write_folder(student, tmp_path)
    loaded = load_image_reader(tmp_path, AutoTokenizer.from_pretrained(tmp_path))
    for reader in (pickle.loads(pickle.dumps(student.reader)), loaded):
        found = reader.read(PROMPTS[0], (WIDE,))
        assert found.ids == expected.ids
        assert all(torch.equal(found.image_inputs[name], values) for name, values in expected.image_inputs.items())


def test_image_generated_answer_is_that_of_the_processor(student):
    prompt, images = PROMPTS[1], (TALL,)
    tree = pack_tree(student.reader.read(prompt, images).ids, [[0]])  # the answer's only token takes no place
    batch = collate_trees([tree], pad_token_id=0)
    inputs = student.reader.collate_images([student.reader.read_images(images)], [tree], batch)
    inputs.pop("position_ids", None)
    expected = read_as_processor(student, prompt, images)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    with torch.inference_mode():
        found = student.model.generate(
            input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]), **inputs, **options
        )
        assert found.tolist() == student.model.generate(**expected, **options).tolist()


def test_image_prompt_begins_with_the_first_token_once(student):
    reader = pickle.loads(pickle.dumps(student.reader))
    expected = reader.read(PROMPTS[1], (TALL,)).ids
    reader.tokenizer.chat_template = reader.tokenizer.chat_template.removeprefix("<|begin|>")
    assert reader.read(PROMPTS[1], (TALL,)).ids == expected
    assert expected.count(reader.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("mark", ["<image>", "<fake_token_around_image>"])
def test_image_token_in_a_text_is_refused(idefics3, mark):
    with pytest.raises(InvalidInput, match="text of case c7 holds a token that marks images") as raised:
        idefics3.reader.read([Turn(role="user", content=f"A secret {mark} boy")], (WIDE,), case_id="c7")
    assert "secret" not in str(raised.value)


def test_image_token_in_an_answer_is_refused(idefics3):
    with pytest.raises(InvalidInput, match="has 13 image tokens, and its images give 12"):
        pack(idefics3.reader, PROMPTS[1:], ((TALL,),), (("a <image> b", "c"),))


def test_image_tokens_that_are_not_the_features_are_refused_with_both_numbers(idefics3):
    config = type(idefics3.reader.family.model_config).from_dict(idefics3.reader.family.model_config.to_dict())
    config.vision_config.image_size = 64
    reader = ImageReader(idefics3.reader.tokenizer, idefics3.reader.family.image_processor, config)
    with pytest.raises(InvalidInput, match="case c7 has 48 image tokens, and its images give 12 features"):
        reader.read(PROMPTS[1], (TALL,), case_id="c7")


def test_image_that_the_model_would_take_for_padding_is_refused(idefics3):
    reader = pickle.loads(pickle.dumps(idefics3.reader))
    reader.family.image_processor.image_mean = [0.0, 0.0, 0.0]
    black = io.BytesIO()
    Image.new("RGB", (64, 64)).save(black, "PNG")
    with pytest.raises(InvalidInput, match="case c7 has 20 image tokens, and its images give 0 features"):
        reader.read(PROMPTS[1], (black.getvalue(),), case_id="c7")


def test_image_template_that_loses_images_is_refused_with_both_numbers(idefics3):
    reader = pickle.loads(pickle.dumps(idefics3.reader))
    reader.tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(InvalidInput, match="writes 0 image tokens for the 1 images of case c7"):
        reader.read(PROMPTS[0], (WIDE,), case_id="c7")


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0]['content'] + 'x' }}"])
def test_image_template_that_takes_no_parts_is_refused(idefics3, template):
    reader = pickle.loads(pickle.dumps(idefics3.reader))
    reader.tokenizer.chat_template = template
    with pytest.raises(InvalidInput, match="template does not take the prompt of case c7"):
        reader.read(PROMPTS[0], (WIDE,), case_id="c7")


@pytest.mark.parametrize("data", [b"", b"no image", WIDE[: len(WIDE) // 2]])
def test_image_that_cannot_be_decoded_is_refused(idefics3, data):
    with pytest.raises(InvalidInput, match="image of case c7 cannot be decoded"):
        idefics3.reader.read(PROMPTS[0], (data,), case_id="c7")


def test_image_without_a_user_turn_is_refused(idefics3):
    with pytest.raises(InvalidInput, match="Case c7 has images, but its prompt has no user turn"):
        idefics3.reader.read(PROMPTS[0][:1], (WIDE,), case_id="c7")


def test_image_transparent_places_are_white(idefics3):
    encoded = []
    for colour in ((0, 0, 0, 0), (255, 255, 255, 255)):
        file = io.BytesIO()
        Image.new("RGBA", (32, 32), colour).save(file, "PNG")
        encoded.append(idefics3.reader.read_images([file.getvalue()])["pixel_values"])
    assert torch.equal(*encoded)


def test_image_student_of_an_unknown_type_is_refused_with_those_that_work(idefics3):
    family = idefics3.reader.family
    config = type("Config", (), {"model_type": "florence2"})()
    with pytest.raises(InvalidInput, match=r"'florence2'.*idefics3, llava, mllama, qwen2_5_vl, qwen2_vl, smolvlm"):
        ImageReader(idefics3.reader.tokenizer, family.image_processor, config)


def test_image_tokenizer_without_the_image_token_is_refused(idefics3):
    config = type(idefics3.reader.family.model_config).from_dict(idefics3.reader.family.model_config.to_dict())
    config.image_token_id = 10_000
    with pytest.raises(InvalidInput, match="number 10000, and its tokenizer has no such token"):
        ImageReader(idefics3.reader.tokenizer, idefics3.reader.family.image_processor, config)


def test_image_trees_that_share_a_row_are_refused(idefics3):
    tree = pack_tree([1, 2], [[3]])
    batch = collate_trees([tree, tree], pad_token_id=0, one_row=True)
    with pytest.raises(ValueError, match="2 trees are in 1 rows"):
        idefics3.reader.collate_images([None, None], [tree, tree], batch)


def test_image_folder_without_processor_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"holds none of preprocessor_config\.json"):
        load_image_processor(tmp_path)


def test_image_folder_whose_processor_needs_code_is_refused(tmp_path):
    auto_map = '{"AutoImageProcessor": "code.Eyes"}'
    (tmp_path / "preprocessor_config.json").write_text(f'{{"image_processor_type": "Eyes", "auto_map": {auto_map}}}')
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}')
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_image_processor(tmp_path)


def test_image_chat_template_of_older_folders_is_found(tmp_path):
    assert load_chat_template(tmp_path) is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    assert load_chat_template(tmp_path) == "{{ messages }}"
