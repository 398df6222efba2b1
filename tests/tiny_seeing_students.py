"""A tiny image student that learns to name tissues by colour, and the cases it is asked about.

Each image is a square of its tissue's colour on grey, at a place and of a size by lot: nothing but the colour tells the
tissue, and the mean colour of the image tells little of it.
"""

import io
import pathlib

import numpy as np
import peft
import torch
from PIL import Image, ImageDraw

from mint_lib.packing import collate_trees, pack_tree, predict_edges, sum_answers
from mint_lib.records import Case, Label
from mint_lib.student import StudentConfig, encode_first_items, load_reader, load_student
from mint_lib.template import Template

STUDENT = StudentConfig(model="tiny-image", reads="image", window_tokens=512)
COLOURS = {"Liver": (220, 40, 40), "Breast": (40, 40, 220), "Kidney": (40, 200, 40)}
LABELS = tuple(Label(id=f"TISSUE:{name.casefold()}", name=name) for name in COLOURS)
TEMPLATE = Template.load("tissue_brief").with_label_names(LABELS)
_BATCH = 12


def make_cases(split: str, num_cases: int, *, synthetic: bool = True) -> list[Case]:
    """Cases of two images a patient, in turn of each tissue and of one of two sites."""
    rng = np.random.default_rng([len(split), num_cases])
    rows = []
    for number in range(num_cases):
        patient = number // 2
        label = LABELS[patient % len(LABELS)]
        rows.append(
            Case(
                case_id=f"{split}-{number}",
                group_id=f"{split}-patient-{patient}",
                text="Nuclei that only the teacher reads of.",
                image=draw_square(COLOURS[label.name], rng),
                label_id=label.id,
                attributes={"site": "north" if patient % 4 < 2 else "south"},
                source="test",
                synthetic=synthetic,
            )
        )
    return rows


def draw_square(colour: tuple[int, int, int], rng: np.random.Generator) -> bytes:
    """A PNG of 48 x 48 pixels."""
    grey, left, top = 96 + int(rng.integers(24)), *map(int, rng.integers(0, 30, 2))
    image = Image.new("RGB", (48, 48), (grey,) * 3)
    ImageDraw.Draw(image).rectangle((left, top, left + 16, top + 16), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def save_student(folder: pathlib.Path, *, num_steps: int, is_blind: bool = False) -> None:
    """Write the adapter of a student after `num_steps` of learning which tissue an image is of.

    A blind one learns from images of one grey, and so only how often tissues are: it answers from the prompt.
    """
    reader = load_reader(STUDENT)
    answers = encode_first_items(reader.tokenizer, TEMPLATE, LABELS)
    cases = make_cases("train", num_steps * _BATCH)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=8, target_modules=r".*text_model.*_proj", modules_to_save=["connector"]
        )
        model = peft.get_peft_model(load_student(STUDENT), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=num_steps)
        order = np.random.default_rng(0).permutation(len(cases))
        blank = draw_square((108, 108, 108), np.random.default_rng(0))
        for start in range(0, len(cases), _BATCH):
            chunk = [cases[index] for index in order[start : start + _BATCH]]
            shown = [blank if is_blind else case.image or b"" for case in chunk]
            read = [reader.read(TEMPLATE.prompt(), [image]) for image in shown]
            trees = [pack_tree(found.ids, answers) for found in read]
            batch = collate_trees(trees, pad_token_id=0)
            batch["image_inputs"] = reader.collate_images([found.image_inputs for found in read], trees, batch)
            score_BA = sum_answers(predict_edges(model, batch), batch).view(len(chunk), len(LABELS))
            truth_B = torch.tensor([[label.id for label in LABELS].index(str(case.label_id)) for case in chunk])
            loss = torch.nn.functional.cross_entropy(score_BA, truth_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if is_blind:
        # What it still does with an image is chance; without a projector it is nothing.
        for name, weight in model.named_parameters():
            if "connector" in name and "modules_to_save" in name:
                weight.data.zero_()
    model.save_pretrained(str(folder))
