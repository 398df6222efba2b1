"""DPO by TRL's trainer against the paper's formula, on the tokens and images that every method trains on."""

import io
import math

import peft
import pytest
import tiny_image_students
import torch
from PIL import Image
from tiny_preferences import TINY, gradient_of, make_adapted_model, make_pair

from mint_lib.alignment_methods.dpo import Dpo
from mint_lib.reading import TextReader, encode_answer
from mint_lib.student import load_student, load_tokenizer
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import write_trees

BETA = 0.3

RAGGED = [
    make_pair("c1", "Girl with hearing loss.", "LIST:\n1. 'Usher syndrome'\n2. 'Sotos'", "LIST:\n1. 'Usher-like'"),
    make_pair("c1", "Girl with hearing loss.", "LIST:\n1. 'Usher syndrome'", "No"),
    make_pair("c2", "Man.", "Yes", "No, and for many a reason that takes longer to say"),
]


@pytest.fixture(scope="module")
def reader():
    return TextReader(load_tokenizer(TINY))


def make_trainer(model, reader, scratch, *, pairs=RAGGED, **arguments):
    defaults = {"output_dir": str(scratch / "trainer"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    defaults |= {"save_strategy": "no", "learning_rate": 1e-2, "max_steps": 3}
    setup = TrainingSetup(
        arguments=defaults | arguments,
        scratch=scratch,
        trees_per_batch=2,
        batch_tokens=4096,
        seed=1,
    )
    trees = write_trees(pairs, scratch / "trees.arrow", reader=reader, window_tokens=512)
    return Dpo(Dpo.Config(beta=BETA), reader=reader).build_trainer(model, trees=trees, setup=setup)


def collate_all(trainer):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])


def score(model, prompt_ids, answer_ids):
    """Log-probability of an answer by the model's own forward pass on one row without padding."""
    input_ids = torch.tensor([[*prompt_ids, *answer_ids]])
    log_probabilities = model(input_ids=input_ids).logits[0, :-1].float().log_softmax(-1)
    return log_probabilities.gather(-1, input_ids[0, 1:, None])[-len(answer_ids) :].sum()


def paper_loss(model, reader):
    """Equation 7 of Rafailov et al. 2023."""
    losses = []
    for pair in RAGGED:
        prompt_ids = reader.read(pair.prompt).ids
        answers = [encode_answer(reader.tokenizer, text) for text in (pair.chosen, pair.rejected)]
        chosen, rejected = (score(model, prompt_ids, answer) for answer in answers)
        with torch.no_grad(), model.disable_adapter():
            chosen_start, rejected_start = (score(model, prompt_ids, answer) for answer in answers)
        losses.append(-torch.nn.functional.logsigmoid(BETA * ((chosen - chosen_start) - (rejected - rejected_start))))
    return torch.stack(losses).mean()


def test_dpo_loss_and_gradient_equal_the_paper(reader, tmp_path):
    model = make_adapted_model(seed=5)
    trainer = make_trainer(model, reader, tmp_path)
    loss, expected = trainer.compute_loss(model, collate_all(trainer)), paper_loss(model, reader)
    assert abs(expected.item() - math.log(2)) > 0.01, "the adapter makes a difference"
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)  # float32 sums in another order
    ours, theirs = gradient_of(model, loss), gradient_of(model, expected)
    # Relative to the largest entry: an entry near 0 is a difference of larger float32 numbers.
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("tuning", ["adapter", "adapter_and_projector", "full"])
def test_dpo_reference_stays_frozen_while_the_student_learns(reader, tmp_path, tuning):
    pairs = RAGGED
    if tuning == "adapter_and_projector":
        student = tiny_image_students.make_student("idefics3")
        model, reader, pairs = adapt(student.model, projector="connector"), student.reader, make_image_pairs(seed=1)
    else:
        model = make_adapted_model(seed=5) if tuning == "adapter" else load_student(TINY)
    trainer = make_trainer(model, reader, tmp_path, pairs=pairs)
    batch = {name: value for name, value in collate_all(trainer).items() if name != "case_ids"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}

    def measure():
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or model, batch))
        with torch.no_grad():
            student = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(dim=1)
        return reference, student

    reference_before, student_before = measure()
    trainer.train()
    reference_after, student_after = measure()
    assert torch.equal(reference_before, reference_after)
    assert (student_before - student_after).abs().min() > 0.1


@pytest.mark.parametrize("is_quantised", [False, True])
def test_dpo_leaves_the_adapter_as_it_was_given(reader, tmp_path, is_quantised):
    model = make_adapted_model(seed=5)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    model.get_base_model().is_loaded_in_4bit = is_quantised  # TRL rounds the adapter of such a student
    make_trainer(model, reader, tmp_path)
    after = dict(model.named_parameters())
    assert list(after) == list(before), "no second adapter is saved with it, or averaged over workers"
    for name, (value, is_trained) in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value)
        assert after[name].requires_grad == is_trained


def test_dpo_sides_are_whole_sequences_of_the_tokens_that_serving_makes(reader, tmp_path):
    trainer = make_trainer(make_adapted_model(seed=5), reader, tmp_path)
    batch = collate_all(trainer)
    sides = [(pair, pair.chosen) for pair in RAGGED] + [(pair, pair.rejected) for pair in RAGGED]
    assert len(batch["input_ids"]) == len(sides)
    for row, (pair, answer) in enumerate(sides):
        ids, is_answer = (
            batch[name][row][batch["attention_mask"][row] == 1] for name in ("input_ids", "completion_mask")
        )
        assert ids[is_answer == 0].tolist() == reader.read(pair.prompt).ids
        assert ids[is_answer == 1].tolist() == encode_answer(reader.tokenizer, answer)
    assert batch["case_ids"] == ["c1", "c1", "c2"]


def test_dpo_rows_lie_on_disk(reader, tmp_path):
    trainer = make_trainer(make_adapted_model(seed=5), reader, tmp_path)
    assert [file["filename"] for file in trainer.train_dataset.cache_files] == [str(tmp_path / "rows.arrow")]


def test_dpo_tells_nobody_that_it_runs(reader, tmp_path, monkeypatch):
    def send(*_, **__):
        raise AssertionError("a message would leave this machine")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", send)
    monkeypatch.delenv("CI", raising=False)
    make_trainer(make_adapted_model(seed=5), reader, tmp_path)


def make_image_pairs(*, seed):
    sizes = [(48, 32), (32, 64)]  # of one case each
    images = [tiny_image_students.make_image(seed + place, *size) for place, size in enumerate(sizes)]
    pairs = [make_pair("c1", "Which face?", "Round", "Long one"), make_pair("c2", "And this one?", "Long", "Round")]
    return [pair.model_copy(update={"images": (image,)}) for pair, image in zip(pairs, images, strict=True)]


def adapt(model, *, projector=None):
    trained = [projector] if projector else None
    config = peft.LoraConfig(r=4, target_modules=r".*(q_proj|v_proj)", init_lora_weights=False, modules_to_save=trained)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", sorted(tiny_image_students.FAMILIES))
def test_dpo_of_an_image_student_equals_the_paper_by_its_own_processor(family, tmp_path):
    student = tiny_image_students.make_student(family)
    model, pairs = adapt(student.model), make_image_pairs(seed=1)
    trainer = make_trainer(model, student.reader, tmp_path, pairs=pairs)
    loss = trainer.compute_loss(model, collate_all(trainer))
    expected = image_paper_loss(model, student, pairs)
    # Float32 sums in another order. Mllama's places before an image look at the padding of their row too.
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    (tmp_path / "other").mkdir()
    other = make_trainer(model, student.reader, tmp_path / "other", pairs=make_image_pairs(seed=9))
    assert abs(other.compute_loss(model, collate_all(other)).item() - expected) > 1e-3, "the images have a say"


def image_paper_loss(model, student, pairs):
    """Equation 7 with rows as transformers itself reads them."""

    def score_rendered(pair, answer):
        prompt_text = student.reader._render(pair.prompt, len(pair.images), pair.case_id)
        images = [Image.open(io.BytesIO(image)).convert("RGB") for image in pair.images]
        answer_ids = encode_answer(student.reader.tokenizer, answer)
        inputs = student.read_as_processor(prompt_text + student.reader.tokenizer.decode(answer_ids), images)
        assert inputs["input_ids"][0, -len(answer_ids) :].tolist() == answer_ids
        log_probabilities = model(**inputs).logits[0, :-1].float().log_softmax(-1)
        targets = inputs["input_ids"][0, 1:, None][-len(answer_ids) :]
        return log_probabilities[-len(answer_ids) :].gather(-1, targets).sum()

    losses = []
    with torch.no_grad():
        for pair in pairs:
            chosen, rejected = (score_rendered(pair, answer) for answer in (pair.chosen, pair.rejected))
            with model.disable_adapter():
                chosen_start, rejected_start = (score_rendered(pair, answer) for answer in (pair.chosen, pair.rejected))
            margin = (chosen - chosen_start) - (rejected - rejected_start)
            losses.append(-torch.nn.functional.logsigmoid(BETA * margin))
    return torch.stack(losses).mean().item()


def test_dpo_of_an_image_student_learns_its_pairs(tmp_path):
    student = tiny_image_students.make_student("idefics3")
    trainer = make_trainer(
        adapt(student.model), student.reader, tmp_path, pairs=make_image_pairs(seed=1), max_steps=15, logging_steps=1
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
