"""Who sees whom in a row of prompt trees, in the form that a model's attention takes it.

Goes in: for each place of a row, the first place after its subtree. Comes out: a mask over all pairs of places, or a
table of blocks whose size does not grow with their square. It knows neither tokens nor losses.

Places stand in depth-first order, so a place q sees a place k if and only if k <= q < end of k: one number for each
place says everything, and trees that share a row are kept apart by the same rule.

Shape suffixes: B rows, T places in a row, Q places that look, K places that are seen, C blocks of places in a row.
"""

from typing import TYPE_CHECKING, Literal

from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig

AttentionOption = Literal["auto", "sdpa", "flex"]
AttentionImplementation = Literal["sdpa", "flex_attention"]

_BLOCK_PLACES = 128
"""Places of a block, the size that FlexAttention's kernels are tuned for (torch's own default)."""


def choose_attention(option: AttentionOption, *, use_gpu: bool) -> AttentionImplementation:
    """The `attn_implementation` that a student is loaded with for training; `auto` takes FlexAttention on GPUs.

    Raises:
        InvalidInput: FlexAttention without a GPU.
    """
    if option == "flex" and not use_gpu:
        raise InvalidInput(
            "alignment.attention is flex, but there is no GPU: FlexAttention has no backward pass on CPUs. Set it to "
            "auto or sdpa."
        )
    return "flex_attention" if option == "flex" or (option == "auto" and use_gpu) else "sdpa"


def check_attention_window(model_config: "PreTrainedConfig", window_tokens: int) -> None:
    """Check that prompt and answer of `window_tokens` together see each other whole in every layer of the student.

    The mask of a tree takes the place of the student's own, which in layers with a sliding window or with chunks hides
    what is far away. Up to that length both are the same. Recurrent layers know no mask, so branches would run into
    each other. A student whose configuration does not list its layers' types is taken at its `sliding_window`.

    Raises:
        InvalidInput: a layer sees less, or is of a type that takes no mask.
    """
    config = model_config.get_text_config()
    types = set((getattr(config, "layer_types", None) or [])[: config.num_hidden_layers])
    if unknown := sorted(types - {"full_attention", "sliding_attention", "chunked_attention"}):
        raise InvalidInput(
            f"the student ({config.model_type}) has layers of type {', '.join(unknown)}, which cannot keep the answers "
            "of a prompt apart. Choose a student whose layers are full, sliding or chunked attention, or a method "
            "without prompt trees (dpo, sft)."
        )
    windows = {}
    if "sliding_attention" in types or not types:
        windows["a sliding window"] = getattr(config, "sliding_window", None)
    if "chunked_attention" in types:
        windows["chunks"] = getattr(config, "attention_chunk_size", None)
    for name, num_seen in windows.items():
        if num_seen and window_tokens > num_seen:
            raise InvalidInput(
                f"student.window_tokens is {window_tokens}, but layers of the student ({config.model_type}) have "
                f"{name} of {num_seen} tokens, and a prompt tree would show them more. Lower it to at most {num_seen}."
            )


def make_attention_mask(
    end_BT: "torch.Tensor", *, implementation: str, dtype: "torch.dtype | None" = None
) -> "torch.Tensor | BlockMask":
    """The mask of rows whose place q sees place k if and only if k <= q < `end_BT[:, k]`, on the device of `end_BT`.

    Returns:
        For `sdpa` a boolean tensor [B, 1, T, T]; for `eager`, which adds the mask to the scores, a tensor [B, 1, T, T]
        of `dtype` (float32 if none is given) with 0 and minus infinity; for `flex_attention` a `BlockMask`.

    Raises:
        InvalidInput: another implementation, which would ignore the mask.
    """
    import torch

    if implementation == "flex_attention":
        return _make_block_mask(end_BT)
    if implementation not in ("sdpa", "eager"):
        raise InvalidInput(
            f"the student's attention is {implementation!r}, which takes no mask of trees. Load it with one of sdpa, "
            "eager, flex_attention."
        )
    place_T = torch.arange(end_BT.shape[1], device=end_BT.device)
    sees_BQK = (place_T <= place_T[:, None]) & (place_T[:, None] < end_BT[:, None, :])
    if implementation == "sdpa":
        return sees_BQK[:, None]
    return torch.zeros_like(sees_BQK, dtype=dtype or torch.float32).masked_fill(~sees_BQK, -torch.inf)[:, None]


def _make_block_mask(end_BT: "torch.Tensor") -> "BlockMask":
    """The same rule as a `BlockMask`: blocks nobody sees are skipped, and blocks seen whole need no rule.

    The table follows from each block's smallest and largest end, so no tensor over pairs of places is made.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    num_places = end_BT.shape[1]
    num_missing = -num_places % _BLOCK_PLACES
    # Repeating the last end changes neither the smallest nor the largest of its block.
    end_BCK = torch.cat([end_BT, end_BT[:, -1:].expand(-1, num_missing)], dim=1).unflatten(1, (-1, _BLOCK_PLACES))
    block_C = torch.arange(end_BCK.shape[1], device=end_BT.device)
    first_Q1 = (block_C * _BLOCK_PLACES)[:, None]
    is_below_QK = block_C < block_C[:, None]
    is_seen_BQK = is_below_QK & (end_BCK.amax(dim=2)[:, None] > first_Q1)
    is_whole_BQK = is_seen_BQK & (end_BCK.amin(dim=2)[:, None] >= first_Q1 + _BLOCK_PLACES)
    is_own_QK = block_C == block_C[:, None]

    def list_blocks(is_listed_BQK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many blocks each block looks at, and which; [B, 1, C] and [B, 1, C, C]."""
        listed_BQK = is_listed_BQK.int()
        order_BQK = listed_BQK.argsort(dim=-1, descending=True, stable=True).int()
        return listed_BQK.sum(dim=-1, dtype=torch.int32)[:, None], order_BQK[:, None]

    def sees(row: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < end_BT[row, k])

    mask: BlockMask = BlockMask.from_kv_blocks(
        *list_blocks((is_seen_BQK & ~is_whole_BQK) | is_own_QK),
        *list_blocks(is_whole_BQK),
        BLOCK_SIZE=_BLOCK_PLACES,
        mask_mod=sees,
        seq_lengths=(num_places, num_places),
    )
    return mask
