"""SFT by TRL's trainer against the mean cross-entropy of the tokens, on the tokens and images of every method."""

import pytest
import tiny_image_students
import torch
from tiny_preferences import TINY, gradient_of, make_adapted_model, make_pair

from mint_lib.alignment_methods.sft import Sft
from mint_lib.reading import TextReader, encode_answer
from mint_lib.student import load_tokenizer
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import write_trees

RAGGED = [
    make_pair("c1", "Girl with hearing loss.", "LIST:\n1. 'Usher syndrome'\n2. 'Sotos'", "LIST:\n1. 'Usher-like'"),
    make_pair("c1", "Girl with hearing loss.", "LIST:\n1. 'Usher syndrome'\n2. 'Sotos'", "No"),
    make_pair("c1", "Girl with hearing loss.", "LIST:\n1. 'Usher syndrome'", "No"),
    make_pair("c2", "Man.", "Yes", "No, and for many a reason that takes longer to say"),
]
CHOSEN = [RAGGED[0], RAGGED[2], RAGGED[3]]


@pytest.fixture(scope="module")
def reader():
    return TextReader(load_tokenizer(TINY))


def make_trainer(model, reader, scratch, *, pairs=RAGGED, nll="answer", **arguments):
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
    return Sft(Sft.Config(nll=nll), reader=reader).build_trainer(model, trees=trees, setup=setup)


def collate_all(trainer):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])


def mean_cross_entropy(model, reader, *, nll):
    """Of all labelled tokens of the batch, by the model's own forward pass on rows without padding."""
    losses = []
    for pair in CHOSEN:
        prompt_ids, answer_ids = reader.read(pair.prompt).ids, encode_answer(reader.tokenizer, pair.chosen)
        input_ids = torch.tensor([*prompt_ids, *answer_ids])
        logits = model(input_ids=input_ids[None]).logits[0, :-1]
        found = torch.nn.functional.cross_entropy(logits, input_ids[1:], reduction="none")
        losses.append(found[-len(answer_ids) :] if nll == "answer" else found)
    return torch.cat(losses).mean()


@pytest.mark.parametrize("nll", ["answer", "prompt_and_answer"])
def test_sft_loss_and_gradient_are_the_mean_cross_entropy(reader, tmp_path, nll):
    model = make_adapted_model(seed=5)
    trainer = make_trainer(model, reader, tmp_path, nll=nll)
    loss = trainer.compute_loss(model, collate_all(trainer))
    expected = mean_cross_entropy(model, reader, nll=nll)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)  # float32 sums in another order
    ours, theirs = gradient_of(model, loss), gradient_of(model, expected)
    # Relative to the largest entry: an entry near 0 is a difference of larger float32 numbers.
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("nll", ["answer", "prompt_and_answer"])
def test_sft_step_in_several_passes_is_the_step_in_one(reader, tmp_path, nll):
    trained = []
    for passes, name in ((1, "one"), (3, "three")):
        model = make_adapted_model(seed=5)
        (tmp_path / name).mkdir()
        arguments = {"per_device_train_batch_size": len(CHOSEN) // passes, "gradient_accumulation_steps": passes}
        # SGD, since Adam's first step has the same size whatever the gradient's.
        arguments |= {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
        trainer = make_trainer(model, reader, tmp_path / name, nll=nll, **arguments)
        trainer.train()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    start = make_adapted_model(seed=5)
    before = torch.cat([p.detach().flatten() for p in start.parameters() if p.requires_grad])
    one, three = (after - before for after in trained)
    # The answers' lengths differ, so an average of averages would be off by tens of per cent.
    torch.testing.assert_close(three, one, atol=1e-4 * one.abs().max().item(), rtol=1e-3)


def test_sft_trains_each_chosen_answer_of_a_prompt_once_to_its_end(reader, tmp_path):
    batch = collate_all(make_trainer(make_adapted_model(seed=5), reader, tmp_path))
    for row, pair in enumerate(CHOSEN):
        is_token, is_labelled = batch["attention_mask"][row] == 1, batch["labels"][row] != -100
        assert batch["input_ids"][row][is_token & ~is_labelled].tolist() == reader.read(pair.prompt).ids
        assert batch["labels"][row][is_labelled].tolist() == encode_answer(reader.tokenizer, pair.chosen)
    assert len(batch["labels"]) == len(CHOSEN)
    assert batch["case_ids"] == ["c1", "c1", "c2"]


def make_image_pairs(*, seed):
    image = tiny_image_students.make_image(seed, 48, 32)
    return [make_pair("c1", "Which face?", "Round", "Long one").model_copy(update={"images": (image,)})]


@pytest.mark.parametrize("nll", ["answer", "prompt_and_answer"])
@pytest.mark.parametrize("family", ["idefics3", "mllama"])
def test_sft_of_an_image_student_learns_from_its_image(family, nll, tmp_path):
    student = tiny_image_students.make_student(family)
    pairs = make_image_pairs(seed=1)
    trainer = make_trainer(student.model, student.reader, tmp_path, pairs=pairs, nll=nll, max_steps=4, logging_steps=1)
    batch = collate_all(trainer)
    assert not (batch["labels"] == student.reader.family.image_token_id).any(), "pixels are nothing to be said"
    loss = trainer.compute_loss(student.model, dict(batch)).item()
    (tmp_path / "other").mkdir()
    other = make_trainer(student.model, student.reader, tmp_path / "other", pairs=make_image_pairs(seed=9), nll=nll)
    assert abs(other.compute_loss(student.model, collate_all(other)).item() - loss) > 1e-3, "the image has a say"
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(loss, abs=1e-4)  # logged with four digits
    assert losses[-1] < losses[0]
