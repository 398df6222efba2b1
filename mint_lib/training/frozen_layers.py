"""The layers below the adapter give the same output for the same row at every epoch: here it is computed once and kept.

Goes in: a decoder of which only the last layers are trained, and the rows of its training set. Comes out: the same
decoder, which in training mode starts at its first trained layer. Memory: tokens x hidden size x bytes of its dtype.
In evaluation mode, and for rows it has not seen, it runs as ever.

Shape suffixes: B rows, T places, H hidden size.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mint_lib.attention import make_attention_mask
from mint_lib.packing import collate_trees, move_to, pack_tree

if TYPE_CHECKING:
    import torch
    import transformers

logger = logging.getLogger(__name__)
_INPUTS = ("input_ids", "attention_mask", "position_ids")


class FrozenLayers:
    """Keeps the output of a decoder's first layers, and from then on stands in for them."""

    def __init__(self, decoder: Any, *, num_frozen: int, pad_token_id: int):
        """Watch `decoder` (with `embed_tokens`, `layers` and `norm`, as Llama); `num_frozen` layers are not trained."""
        self._decoder = decoder
        self._num_frozen = num_frozen
        self._pad_token_id = pad_token_id
        self._hidden_TH: dict[bytes, torch.Tensor] = {}
        self._found: list[tuple[Any, int, slice]] | None = None
        decoder.register_forward_pre_hook(self._look_up, with_kwargs=True)
        decoder.embed_tokens.register_forward_hook(self._replace_embeddings)
        for layer in decoder.layers[:num_frozen]:
            layer.forward = self._skip_if_found(layer.forward)

    def fill(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """Compute and keep the rows of `batches`; returns the bytes kept. The same batches give the same bits.

        Trees are kept one by one, however rows are made of them.
        """
        import torch

        decoder = self._decoder
        # Rows of other lengths will be padded elsewhere, and a place of padding is looked up like a tree.
        padding = pack_tree([self._pad_token_id], [[self._pad_token_id]])
        padding_batch = move_to(collate_trees([padding], pad_token_id=self._pad_token_id), decoder.device)
        layers, norm, was_training = decoder.layers, decoder.norm, decoder.training
        decoder.layers, decoder.norm = layers[: self._num_frozen], torch.nn.Identity()
        decoder.eval()
        try:
            with torch.no_grad():
                for batch in itertools.chain([padding_batch], batches):
                    inputs = {name: batch[name] for name in _INPUTS if name in batch}
                    if "end_BT" in batch:
                        implementation = decoder.config._attn_implementation
                        inputs["attention_mask"] = make_attention_mask(
                            batch["end_BT"], implementation=implementation, dtype=decoder.dtype
                        )
                    hidden_BTH = decoder(**inputs, use_cache=False).last_hidden_state
                    for key, row, places in self._list_pieces(inputs):
                        self._hidden_TH[key] = hidden_BTH[row, places].clone()
        finally:
            decoder.layers, decoder.norm = layers, norm
            decoder.train(was_training)
        return sum(hidden_TH.nbytes for hidden_TH in self._hidden_TH.values())

    def _list_pieces(self, inputs: Mapping[str, Any]) -> list[tuple[bytes, int, slice]]:
        """What can be kept: what its output depends on, its row and its places.

        With positions, a row falls into trees, each from a place at position 0 to the next: of two trees with the same
        tokens, their positions say what hangs where. A place of padding is a tree of its own. Without, a piece is a row
        up to the padding at its end.
        """
        ids_BT = inputs["input_ids"].cpu().numpy()
        positions = inputs.get("position_ids")
        pieces = []
        for row, ids_T in enumerate(ids_BT):
            if positions is None:
                is_token_T = ids_T != self._pad_token_id
                starts, end = [0], len(ids_T) - int(is_token_T[::-1].argmax()) if is_token_T.any() else 0
                parts = [ids_T]
            else:
                position_T = positions[row].cpu().numpy()
                starts, end = (position_T == 0).nonzero()[0].tolist(), len(ids_T)
                parts = [ids_T, position_T]
            for start, stop in itertools.pairwise([*starts, end]):
                key = hashlib.sha256(b"".join(part_T[start:stop].tobytes() for part_T in parts)).digest()
                pieces.append((key, row, slice(start, stop)))
        return pieces

    def _look_up(self, decoder: Any, _arguments: Any, options: Mapping[str, Any]) -> None:
        """Before a forward pass: the kept outputs of its rows, if it is a training pass and all are there."""
        self._found = None
        if not decoder.training or options.get("input_ids") is None:
            return
        found = [(self._hidden_TH.get(key), row, places) for key, row, places in self._list_pieces(options)]
        self._found = found if all(hidden_TH is not None for hidden_TH, _, _ in found) else None

    def _replace_embeddings(self, _module: Any, _inputs: Any, embeddings_BTH: "torch.Tensor") -> Any:
        if self._found is None:
            return None
        hidden_BTH = embeddings_BTH.detach().new_zeros(embeddings_BTH.shape)
        for hidden_TH, row, places in self._found:
            hidden_BTH[row, places] = hidden_TH
        return hidden_BTH

    def _skip_if_found(self, forward: Any) -> Any:
        def skip_or_run(hidden_BTH: "torch.Tensor", *arguments: Any, **options: Any) -> Any:
            return hidden_BTH if self._found is not None else forward(hidden_BTH, *arguments, **options)

        return skip_or_run


def cache_frozen_layers(
    trainer: "transformers.Trainer", *, last_layers: int, pad_token_id: int, tell: Callable[[int, int], None]
) -> None:
    """Keep what all but the `last_layers` of the trainer's model give for every training row, in the order of rows.

    `tell` is called with the rows done and all rows.
    """
    base = trainer.model.get_base_model()
    rows, size = trainer.train_dataset, trainer.args.per_device_train_batch_size

    def batches() -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(rows), size):
            tell(start, len(rows))
            chunk = [rows[index] for index in range(start, min(start + size, len(rows)))]
            yield trainer._prepare_inputs(trainer.data_collator(chunk))
        tell(len(rows), len(rows))

    num_frozen = base.config.num_hidden_layers - last_layers
    num_bytes = FrozenLayers(base.get_decoder(), num_frozen=num_frozen, pad_token_id=pad_token_id).fill(batches())
    logger.info("kept the output of %d frozen layers: %.0f MB", num_frozen, num_bytes / 1e6)
