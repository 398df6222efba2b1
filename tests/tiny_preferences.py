"""What tests of packed methods share: pairs by their texts, a tiny student with an adapter, a gradient as one row."""

from typing import Any

import peft
import torch

from mint_lib.gate.report import GateReport, GateStatistics
from mint_lib.gate.verdict import REPORT
from mint_lib.records import PreferencePair, Turn
from mint_lib.storage.writer import VersionWriter
from mint_lib.student import StudentConfig, load_student

TINY = StudentConfig(model="tiny")


def make_pair(case_id: str, text: str, chosen: str, rejected: str) -> PreferencePair:
    """A pair whose labels and digests mean nothing."""
    return PreferencePair(
        case_id=case_id,
        prompt=(Turn(role="user", content=text),),
        chosen=chosen,
        rejected=rejected,
        chosen_label_ids=("A:1",),
        rejected_label_ids=("A:2",),
        teacher_digest="sha256:0",
        template_digest="sha256:0",
        policy="test",
    )


def add_passed_gate(version: VersionWriter, *, passed: bool = True) -> None:
    """The verdict that training asks for, on pairs that a test made by hand."""
    statistics = GateStatistics(num_cases={}, num_pairs={}, label_counts={}, batches={})
    report = GateReport(name="test", judged="pairs", reads="text", passed=passed, outcomes=(), statistics=statistics)
    version.add_json(REPORT, report.model_dump(mode="json"))


def make_adapted_model(seed: int) -> Any:
    """The tiny student with an adapter of random weights on every linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(load_student(TINY), config)


def gradient_of(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of all trained weights, one after another."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
