"""ViLT with a classification head: building it, its forward pass and its loss.

Goes in: a ViLT configuration, windows of token ids and photos from `inputs`. Comes out: logits over labels. Faces are
embedded here and handed to ViLT as embeddings, because its own path shuffles the patches with the global random state
and has no way to leave a whole photo out. Knows neither cases nor labels by name.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

# Shapes: B batch, T text tokens, P photo patches with their [CLS] first, C channels, S side, H hidden size, L labels.
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


def compute_loss(network: "torch.nn.ModuleDict", batch: Batch) -> "torch.Tensor":
    """Mean cross-entropy of the batch's targets."""
    import torch

    logits_BL = compute_logits(network, batch)
    target_B = torch.tensor(batch.targets, device=logits_BL.device)
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits_BL, target_B)
    return loss


def _mean(hidden_BNH: "torch.Tensor", mask_BN: "torch.Tensor") -> "torch.Tensor":
    """Mean over the positions that `mask_BN` keeps; each row keeps at least one."""
    weights_BN1 = mask_BN[..., None].to(hidden_BNH.dtype)
    return (hidden_BNH * weights_BN1).sum(1) / weights_BN1.sum(1)
