"""One forward pass over pieces of many requests: prompt chunks, answers that grow and label tries, all at once.

Goes in: a decoder-only model and segments, each some new tokens of one request. Comes out: logits of the places that
were asked for. The tokens of all segments go through the model's layers one after another, without padding; only
attention runs segment by segment, over that request's own keys and values. The model's own code is used: this module
gives it an attention function and takes the hidden states before its output layer. It knows no requests and no queue.

Shape suffixes: N tokens of all segments, Q tokens of a segment, R queries of a segment after query heads were folded,
T places that a segment sees, H query heads, K key-value heads, D head size, E hidden size, I tokens that stand for
images, W wanted places, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.engine.key_values import Geometry, KeyValues
from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BASE = "__base__"  # PEFT's word for "no adapter" in a batch of several
_ATTENTION = "mint_segments"
_OTHER_ATTENTION = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """New tokens of one request."""

    key_values: KeyValues
    start: int
    """The place of the first token; all earlier places have been computed and memory has been reserved."""
    token_ids: tuple[int, ...]
    positions: tuple[int, ...] | None = None
    """Position of each token; None: the same as its place."""
    seen: "torch.Tensor | None" = None
    """Boolean [Q, T]: which places each token sees; None: all up to and including its own."""
    wanted: tuple[int, ...] = ()
    """Tokens whose logits are needed, counted within the segment."""
    adapter: str = BASE
    """PEFT's name of the adapter."""
    image_places: tuple[int, ...] = ()
    """Tokens that stand for images, counted within the segment."""
    image_features: "torch.Tensor | None" = None
    """[I, E]: what is read at `image_places` in place of the tokens' own embeddings."""


class ForwardPass:
    """Runs a model over segments. The model can still be called in the ordinary way."""

    def __init__(self, model: "PreTrainedModel"):
        """Prepare `model`, which is in evaluation mode, on its device and quantised already if it is to be.

        Raises:
            InvalidInput: the model's attention is not the plain kind.
        """
        self._model = model
        self._running: _Running | None = None
        self.geometry = _read_geometry(model)
        _register_attention()
        # The decoder only: a vision tower attends as it always does.
        model.get_decoder().set_attn_implementation(_ATTENTION)
        model.get_output_embeddings().register_forward_pre_hook(self._gather_wanted)
        key_values = KeyValues(self.geometry)
        key_values.reserve(2)
        # What a layer hands to attention shows only in a pass.
        self.run([Segment(key_values=key_values, start=0, token_ids=(0, 0), wanted=(1,))])

    def follow_adapters(self, layers: Sequence["torch.nn.Module"]) -> None:
        """Let PEFT's LoRA `layers` apply to each token the adapter of its segment."""
        for layer in layers:
            layer.register_forward_pre_hook(self._name_adapters, with_kwargs=True)

    def run(self, segments: Sequence[Segment]) -> list["torch.Tensor"]:
        """Float32 logits of each segment's wanted places, [W, V]; keys and values are written."""
        import torch

        device = self.geometry.device
        with torch.inference_mode():
            running = _Running(segments, self.geometry)
            tokens = self._embed(segments)
            self._running = running
            try:
                # Each token is a row of length 1: LoRA layers tell adapters apart by row, other layers do not care.
                logits_W1V = self._model(
                    **tokens,
                    position_ids=torch.tensor(running.positions, device=device)[:, None],
                    # A mask of four dimensions is taken as given, so none is made; attention below does not read it.
                    attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
                    use_cache=False,
                    segments=running,
                ).logits
            finally:
                self._running = None
            assert len(logits_W1V) == len(running.wanted_W), "the model's output layer was replaced"
            return list(logits_W1V[:, 0].float().split([len(segment.wanted) for segment in segments]))

    def _embed(self, segments: Sequence[Segment]) -> "dict[str, torch.Tensor]":
        """The model's argument for the tokens of all segments: ids, or embeddings where some stand for images."""
        import torch

        token_ids = [token_id for segment in segments for token_id in segment.token_ids]
        ids_N1 = torch.tensor(token_ids, device=self.geometry.device)[:, None]
        if not any(segment.image_places for segment in segments):
            return {"input_ids": ids_N1}
        embedded_N1E = self._model.get_input_embeddings()(ids_N1)
        first = 0
        for segment in segments:
            if segment.image_features is not None:
                rows_I = torch.tensor(segment.image_places, device=embedded_N1E.device) + first
                embedded_N1E[rows_I, 0] = segment.image_features.to(embedded_N1E)
            first += len(segment.token_ids)
        return {"inputs_embeds": embedded_N1E}

    def _gather_wanted(self, _module: "torch.nn.Module", inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._running is None:
            return None
        hidden_N1E, *rest = inputs
        return (hidden_N1E[self._running.wanted_W], *rest)

    def _name_adapters(
        self, _module: "torch.nn.Module", inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._running is None:
            return None
        return inputs, {**kwargs, "adapter_names": self._running.adapter_names}


class _Running:
    """The pass that is under way, as the layers see it."""

    def __init__(self, segments: Sequence[Segment], geometry: Geometry):
        import torch

        self._segments = segments
        self.positions: list[int] = []
        self.adapter_names: list[str] = []
        self._bounds: list[tuple[int, int]] = []
        wanted: list[int] = []
        for segment in segments:
            first, stop = len(self.positions), len(self.positions) + len(segment.token_ids)
            self.positions += segment.positions or range(segment.start, segment.start + stop - first)
            self.adapter_names += [segment.adapter] * (stop - first)
            self._bounds.append((first, stop))
            wanted += [first + place for place in segment.wanted]
        self._bias_QT = [_make_bias(segment, geometry) for segment in segments]
        self.wanted_W = torch.tensor(wanted, dtype=torch.long, device=geometry.device)

    def attend(
        self,
        layer: int,
        query_NHD: "torch.Tensor",
        key_NKD: "torch.Tensor",
        value_NKD: "torch.Tensor",
        scaling: float | None,
    ) -> "torch.Tensor":
        """Attention of every segment over its own places, [N, H, D]."""
        import torch

        num_heads, num_kv_heads = query_NHD.shape[1], key_NKD.shape[1]
        output_NHD = torch.empty_like(query_NHD)
        for segment, (first, stop), bias_QT in zip(self._segments, self._bounds, self._bias_QT, strict=True):
            num_tokens = stop - first
            key_values = segment.key_values
            key_values.write(
                layer, segment.start, key_NKD[first:stop].transpose(0, 1), value_NKD[first:stop].transpose(0, 1)
            )
            key_KTD, value_KTD = key_values.view(layer, segment.start + num_tokens)
            # Query heads that share keys become further queries of one head: the same numbers, and keys and values
            # are not repeated for every query head.
            shape = (num_tokens, num_kv_heads, num_heads // num_kv_heads, query_NHD.shape[2])
            query_KRD = query_NHD[first:stop].view(shape).transpose(0, 1).flatten(1, 2)
            output_KRD = torch.nn.functional.scaled_dot_product_attention(
                query_KRD[None],
                key_KTD[None],
                value_KTD[None],
                attn_mask=None if bias_QT is None else bias_QT.repeat_interleave(shape[2], dim=0),
                scale=scaling,
            )[0]
            output_NHD[first:stop].view(shape).copy_(
                output_KRD.view(num_kv_heads, num_tokens, *shape[2:]).transpose(0, 1)
            )
        return output_NHD


def _make_bias(segment: Segment, geometry: Geometry) -> "torch.Tensor | None":
    """What is added to a segment's attention scores: 0 where a token sees a place, else minus infinity."""
    import torch

    num_tokens = len(segment.token_ids)
    seen_QT = segment.seen
    if seen_QT is None:
        if num_tokens == 1:
            return None
        seen_QT = torch.ones(num_tokens, segment.start + num_tokens, dtype=torch.bool).tril(segment.start)
    bias_QT = torch.zeros(seen_QT.shape, dtype=geometry.dtype).masked_fill(~seen_QT, -torch.inf)
    return bias_QT.to(geometry.device)


def _attend(
    module: "torch.nn.Module",
    query_NH1D: "torch.Tensor",
    key_NK1D: "torch.Tensor",
    value_NK1D: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    *,
    scaling: float | None = None,
    segments: _Running | None = None,
    **kwargs: Any,
) -> tuple["torch.Tensor", None]:
    """The attention function the model's layers call; without `segments`, transformers' own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segments is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_NH1D, key_NK1D, value_NK1D, attention_mask, scaling=scaling, **kwargs
        )
        return output
    if unknown := [name for name in _OTHER_ATTENTION if kwargs.get(name) is not None]:
        raise InvalidInput(_describe_refusal(module.config.model_type, f"its attention uses {unknown[0]}"))
    output_NHD = segments.attend(module.layer_idx, query_NH1D[:, :, 0], key_NK1D[:, :, 0], value_NK1D[:, :, 0], scaling)
    return output_NHD[:, None], None


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _read_geometry(model: "PreTrainedModel") -> Geometry:
    """Shape of the model's keys and values.

    Raises:
        InvalidInput: its layers are not all of the plain kind.
    """
    config = model.config.get_text_config()
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise InvalidInput(_describe_refusal(config.model_type, f"it has layers of the kind {min(other)}"))
    if not model._supports_attention_backend or not hasattr(config, "num_attention_heads"):
        raise InvalidInput(_describe_refusal(config.model_type, "its layers do not take an attention function"))
    embedding = model.get_input_embeddings().weight
    return Geometry(
        num_layers=config.num_hidden_layers,
        num_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=embedding.dtype,
        device=embedding.device,
    )


def _describe_refusal(model_type: str, reason: str) -> str:
    return (
        f"A student of the type {model_type} cannot be served: {reason}. Choose a decoder-only model whose layers all "
        "have full attention, for instance of the type llama, qwen2 or qwen3."
    )
