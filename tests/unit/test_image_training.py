"""An image student uses what it sees: it learns what only the images tell, and without them it knows nothing."""

import io
import math

import peft
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer, Idefics3ForConditionalGeneration

from mint_lib.alignment_methods.orpo import orpo_loss
from mint_lib.image_inputs.reader import load_image_reader
from mint_lib.packing import collate_trees, pack_tree, predict_edges
from mint_lib.reading import encode_answer
from mint_lib.records import Turn
from mint_lib.student_weights import fetch_student_folder
from mint_lib.training.preference_trees import average_pairs

ANSWERS = ("Noonan syndrome", "Kabuki syndrome")
PROMPT = (Turn(role="user", content="Name the disease."),)
NUM_STEPS, NUM_TRAINED, NUM_HELD_OUT = 40, 8, 64


def draw_case(generator):
    """An image of a red or a blue square on grey, and the number of the answer that its colour calls for."""
    is_blue = int(torch.randint(2, (), generator=generator))
    grey, left, top = torch.randint(0, 24, (3,), generator=generator).tolist()
    size = int(torch.randint(32, 64, (), generator=generator))
    image = Image.new("RGB", (size, size), (96 + grey,) * 3)
    ImageDraw.Draw(image).rectangle((left, top, left + 16, top + 16), fill=((220, 30, 30), (30, 30, 220))[is_blue])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), is_blue


class Trained:
    """The tiny image student after some steps of ORPO with an adapter, and held-out cases."""

    def __init__(self):
        folder = fetch_student_folder("tiny-image")
        self.reader = load_image_reader(folder, AutoTokenizer.from_pretrained(folder))
        generator = torch.Generator().manual_seed(5)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = Idefics3ForConditionalGeneration.from_pretrained(folder)
            config = peft.LoraConfig(
                task_type="CAUSAL_LM", r=8, target_modules=r".*text_model.*_proj", modules_to_save=["connector"]
            )
            self.model = peft.get_peft_model(base, config)
            optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
            self.losses = []
            for _ in range(NUM_STEPS):
                images, labels = zip(*(draw_case(generator) for _ in range(NUM_TRAINED)), strict=True)
                loss, _ = self.measure(images, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.losses.append(loss.item())
        self.model.eval()
        images, self.labels = zip(*(draw_case(generator) for _ in range(NUM_HELD_OUT)), strict=True)
        order = torch.randperm(NUM_HELD_OUT, generator=generator).tolist()
        blank = io.BytesIO()
        Image.new("RGB", (48, 48), "white").save(blank, "PNG")
        self.images = {
            "true": images,
            "permuted": [images[index] for index in order],
            "blank": [blank.getvalue()] * NUM_HELD_OUT,
        }

    def measure(self, images, labels):
        """Loss of a batch of one pair for each image, and each pair's margin in nats per token."""
        read = [self.reader.read(PROMPT, [image]) for image in images]
        answers = [encode_answer(self.reader.tokenizer, text) for text in ANSWERS]
        trees = [pack_tree(found.ids, answers) for found in read]
        batch = collate_trees(trees, pad_token_id=0)
        batch["image_inputs"] = self.reader.collate_images([found.image_inputs for found in read], trees, batch)
        chosen_P = torch.tensor([2 * row + label for row, label in enumerate(labels)])
        weight_N = torch.zeros(len(batch["target_N"]))
        weight_N[batch["edge_L"][torch.isin(batch["answer_L"], chosen_P)]] = 1.0
        batch |= {"chosen_P": chosen_P, "rejected_P": chosen_P ^ 1, "nll_weight_N": weight_N}
        batch |= {"pair_total": torch.tensor(float(len(labels))), "nll_total": weight_N.sum()}
        log_probability_N = predict_edges(self.model, batch)
        loss, _ = orpo_loss(log_probability_N, batch, beta=0.5, nll_weight=1.0)
        chosen, rejected = average_pairs(log_probability_N.detach(), batch)
        return loss, chosen - rejected

    def judge(self, kind):
        """Loss and preference accuracy on the held-out cases with images of that kind."""
        with torch.inference_mode():
            loss, margin_P = self.measure(self.images[kind], self.labels)
        return loss.item(), (margin_P > 0).float().mean().item()


@pytest.fixture(scope="module")
def trained():
    return Trained()


def test_image_training_learns_what_only_the_image_tells(trained):
    _, accuracy = trained.judge("true")
    assert accuracy >= 0.95


@pytest.mark.parametrize("kind", ["blank", "permuted"])
def test_image_training_is_at_chance_without_the_right_image(trained, kind):
    _, accuracy = trained.judge(kind)
    # 99.9% of guesses at 64 pairs fall within 3.3 standard deviations of one half.
    assert abs(accuracy - 0.5) < 3.3 * math.sqrt(0.25 / NUM_HELD_OUT)


@pytest.mark.parametrize("kind", ["blank", "permuted"])
def test_image_training_loss_rises_without_the_right_image(trained, kind):
    assert trained.judge(kind)[0] > trained.judge("true")[0] + 0.1
