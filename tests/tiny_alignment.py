"""What tests of the alignment engine share: pairs, a config, a trainer of the tiny student, and the watch around it."""

import torch

from mint_lib.plugins import load_plugin
from mint_lib.records import Label, PreferencePair
from mint_lib.student import StudentConfig, load_reader, load_student
from mint_lib.template import Template
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.settings import AlignmentConfig
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import write_trees
from mint_lib.training.tuning import prepare_tuning
from mint_lib.training.watch import Validation, watch_training

TINY = StudentConfig(model="tiny")
TEMPLATE = Template.load("rare_disease").with_num_answers(1)
LABELS = [Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(["Noonan", "Kabuki", "Marfan"])]
SIGNS = ["short stature", "long eyelashes", "tall stature"]


def make_pairs(num_cases):
    pairs = []
    for case in range(num_cases):
        truth = case % len(LABELS)
        for other in range(len(LABELS)):
            if other != truth:
                pairs.append(
                    PreferencePair(
                        case_id=f"case-{case}",
                        prompt=TEMPLATE.prompt(f"Child of {case} years, {SIGNS[truth]}."),
                        chosen=TEMPLATE.answer([LABELS[truth].name]),
                        rejected=TEMPLATE.answer([LABELS[other].name]),
                        chosen_label_ids=(LABELS[truth].id,),
                        rejected_label_ids=(LABELS[other].id,),
                        teacher_digest="sha256:0",
                        template_digest=TEMPLATE.digest,
                        policy="test",
                    )
                )
    return pairs


PAIRS = make_pairs(12)


def config_of(**values):
    defaults = {
        "name": "test",
        "seed": 1,
        "student": TINY,
        "learning_rate": 1e-2,
        "trees_per_batch": 4,
        "validate_every_steps": 2,
        "lora": LoraConfig(rank=8),
    }
    return AlignmentConfig(**(defaults | values))


def build(method_name, folder, config=None, pairs=PAIRS):
    config = config or config_of(method=method_name)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    reader = load_reader(config.student)
    trees = write_trees(pairs, folder / "trees.arrow", reader=reader, window_tokens=config.student.window_tokens)
    model = prepare_tuning(load_student(config.student), tuning=config.tuning, lora=config.lora).model
    plugin = load_plugin("alignment_methods", method_name, base=AlignmentMethod)
    setup = TrainingSetup.of_config(config, folder)
    method = plugin(plugin.Config(**config.method_config), reader=reader)
    return method.build_trainer(model, trees=trees, setup=setup), reader


def watch(trainer, reader, folder, state, **changes):
    validation = Validation(
        pairs=PAIRS, labels=LABELS, template=TEMPLATE, reader=reader, window_tokens=512, over_long="refuse"
    )
    options = {
        "base_name": "tiny",
        "validate_every_steps": 2,
        "keep_best": "loss",
        "patience": 99,
        "tell": lambda *_: None,
        "save": lambda *_: None,
    }
    guard = watch_training(trainer, validation=validation, state=state, folder=folder, **(options | changes))
    return validation, guard
