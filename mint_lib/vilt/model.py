"""ViLT with a classification head: building it, its forward pass, and fitting it with the best epoch kept.

Goes in: a ViLT configuration, windows of token ids and photos from `vilt_inputs`. Comes out: logits over labels and a
history. Faces are embedded here and handed to ViLT as embeddings, because its own path shuffles the patches with the
global random state and has no way to leave a whole photo out. Knows neither cases nor labels by name.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mint_lib.progress import Progress

if TYPE_CHECKING:
    import torch

# Shapes: B batch, T text tokens, P photo patches with their [CLS] first, C channels, S side, H hidden size, L labels.
_MAX_GRADIENT_NORM = 1.0
_PATCH_SUMMARY = 8
"""Numbers that the head reads of every patch."""


class Batch(NamedTuple):
    """Cases as the network reads them, in one order."""

    texts: Sequence[Sequence[int]]
    """Token ids of a window each."""
    photos: Sequence[np.ndarray | None]
    """Float channels [C, S, S]; None is masked."""
    targets: Sequence[int] = ()
    """Indices of the right labels, in training."""


class TrainingPlan(NamedTuple):
    """How to fit."""

    learning_rate: float
    weight_decay: float
    num_epochs: int
    patience_epochs: int
    warmup_share: float


def build_network(vilt_config: Any, num_labels: int, *, encoder: Any = None) -> "torch.nn.ModuleDict":
    """`encoder` (a ViltModel; fresh from `vilt_config` if None) under GestaltMML's head: 2 H, LayerNorm, GELU, L.

    The head reads ViLT's pooled output and the mean over the text's positions. A few numbers of every position of the
    photo add their own evidence to each label: what a patch shows means something else at the eyes than at the chin,
    and from scratch a mean over patches, or a head over everything, does not learn that from hundreds of cases.
    """
    import torch
    from torch import nn
    from transformers import ViltModel

    width = vilt_config.hidden_size
    num_patches = (vilt_config.image_size // vilt_config.patch_size) ** 2
    modules = {
        "encoder": encoder or ViltModel(vilt_config),
        "head": nn.Sequential(
            nn.Dropout(vilt_config.hidden_dropout_prob),
            nn.Linear(2 * width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, num_labels),
        ),
        "patch_summary": nn.Linear(width, _PATCH_SUMMARY),
        "face_head": nn.Linear(num_patches * _PATCH_SUMMARY, num_labels, bias=False),
    }
    network = nn.ModuleDict(modules)
    shape = (vilt_config.num_channels, vilt_config.image_size, vilt_config.image_size)
    network.register_buffer("photo_mean", torch.zeros(shape))
    network.register_buffer("photo_scale", torch.ones(shape))
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def standardise_photos(network: "torch.nn.ModuleDict", photos: Sequence[np.ndarray]) -> None:
    """Let `network` read every channel and position as its distance from the mean of `photos`, in deviations.

    All faces share most of what a photo holds; without this the common face drowns what differs.
    """
    import torch

    stack = np.stack(photos)
    network.get_buffer("photo_mean").copy_(torch.from_numpy(stack.mean(axis=0)))
    network.get_buffer("photo_scale").copy_(torch.from_numpy(stack.std(axis=0) + 1e-3))


def compute_logits(network: "torch.nn.ModuleDict", batch: Batch) -> "torch.Tensor":
    """Logits `[B, L]`. A case without a photo has its patches masked, and only the photo's [CLS] position is read."""
    import torch

    encoder = network["encoder"]
    embeddings, config = encoder.embeddings, encoder.config
    device = embeddings.cls_token.device
    num_cases, width = len(batch.texts), max(map(len, batch.texts))
    ids_BT = torch.full((num_cases, width), config.pad_token_id or 0)
    text_mask_BT = torch.zeros((num_cases, width), dtype=torch.long)
    for row, ids in enumerate(batch.texts):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        text_mask_BT[row, : len(ids)] = 1
    ids_BT, text_mask_BT = ids_BT.to(device), text_mask_BT.to(device)
    photos_BCSS = np.zeros((num_cases, config.num_channels, config.image_size, config.image_size), dtype=np.float32)
    for row, photo in enumerate(batch.photos):
        if photo is not None:
            photos_BCSS[row] = photo
    channels_BCSS = (torch.from_numpy(photos_BCSS).to(device) - network.photo_mean) / network.photo_scale
    patches_BPH = embeddings.patch_embeddings(channels_BCSS).flatten(2).transpose(1, 2)
    patches_BPH = torch.cat([embeddings.cls_token.expand(num_cases, -1, -1), patches_BPH], dim=1)
    patches_BPH = embeddings.dropout(patches_BPH + embeddings.position_embeddings)
    photo_mask_BP = torch.ones(patches_BPH.shape[:2], dtype=torch.long)
    photo_mask_BP[[photo is None for photo in batch.photos], 1:] = 0
    photo_mask_BP = photo_mask_BP.to(device)
    output = encoder(input_ids=ids_BT, attention_mask=text_mask_BT, image_embeds=patches_BPH, pixel_mask=photo_mask_BP)
    hidden_BNH = output.last_hidden_state
    text_BH = _mean(hidden_BNH[:, :width], text_mask_BT)
    summary_BP8 = network["patch_summary"](hidden_BNH[:, width + 1 :]) * photo_mask_BP[:, 1:, None]
    text_logits_BL: torch.Tensor = network["head"](torch.cat([output.pooler_output, text_BH], dim=-1))
    return text_logits_BL + network["face_head"](summary_BP8.flatten(1))


def fit_network(
    network: "torch.nn.ModuleDict",
    plan: TrainingPlan,
    *,
    draw_epoch: Callable[[], Iterable[Batch]],
    num_batches: int,
    evaluate: Callable[[], dict[str, float]],
) -> list[dict[str, float]]:
    """Fit with AdamW under warm-up and cosine; the network ends with the weights of its best epoch.

    Args:
        network: made by `build_network`; changed in place.
        plan: rates and lengths.
        draw_epoch: gives the `num_batches` batches of one pass over the training cases.
        num_batches: batches of an epoch.
        evaluate: figures on validation, with `validation_nll` in nats, lower is better.

    Returns:
        One dictionary per epoch: `epoch`, `train_loss` and the figures of `evaluate`.
    """
    import torch

    matrices = [value for value in network.parameters() if value.ndim > 1]
    vectors = [value for value in network.parameters() if value.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=plan.learning_rate,
    )
    num_steps = plan.num_epochs * num_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate_share(step, num_steps, plan.warmup_share)
    )
    device = next(network.parameters()).device
    history: list[dict[str, float]] = []
    best_epoch, best_weights = 0, copy.deepcopy(network.state_dict())
    with Progress("teacher: vilt learns", total=num_steps) as progress:
        for epoch in range(1, plan.num_epochs + 1):
            network.train()
            losses = []
            for batch in draw_epoch():
                target_B = torch.tensor(batch.targets, device=device)
                loss = torch.nn.functional.cross_entropy(compute_logits(network, batch), target_B)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT_NORM)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.advance(loss=losses[-1])
            history.append({"epoch": epoch, "train_loss": float(np.mean(losses)), **evaluate()})
            if best_epoch == 0 or history[-1]["validation_nll"] < history[best_epoch - 1]["validation_nll"]:
                best_epoch, best_weights = epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= plan.patience_epochs:
                break
    network.load_state_dict(best_weights)
    return history


def _rate_share(step: int, num_steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate at `step`."""
    num_warmup = warmup_share * num_steps
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1.0, num_steps - num_warmup)))


def _mean(hidden_BNH: "torch.Tensor", mask_BN: "torch.Tensor") -> "torch.Tensor":
    """Mean over the positions that `mask_BN` keeps; each row keeps at least one."""
    weights_BN1 = mask_BN[..., None].to(hidden_BNH.dtype)
    return (hidden_BNH * weights_BN1).sum(1) / weights_BN1.sum(1)
