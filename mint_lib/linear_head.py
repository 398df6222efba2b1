"""The linear head: log-probabilities of given tokens without the logits of the whole vocabulary in memory.

Goes in: hidden states and the output layer's weight, or a model and a forward pass of it. Comes out: one float32
log-probability for each edge, with gradients. The vocabulary-wide logits exist for one chunk of edges at a time. Heads
and models that do more than a matrix product, an optional scale or soft cap and a softmax are noticed and run as they
are. This module knows neither trees nor losses. It imports torch at its top, so import it where it is needed.

Shape suffixes: as in `mint_lib/packing.py`, and C edges in a chunk.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mint_lib.errors import InvalidInput


@dataclasses.dataclass(frozen=True)
class Tail:
    """What a model does to each output of its head before they are its logits: y = softcap * tanh(scale * x / softcap).

    Gemma 2 has a soft cap, Granite and Cohere a scale, most families neither.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, output_CV: torch.Tensor) -> torch.Tensor:
        """The logits, in place of `output_CV`."""
        if self.scale != 1.0:
            output_CV.mul_(self.scale)
        if self.softcap is not None:
            output_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return output_CV


_PLAIN_TAIL = Tail()


def predict_targets(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    *,
    chunk_tokens: int,
    tail: Tail = _PLAIN_TAIL,
) -> torch.Tensor:
    """Log-probability of each edge's target, [N]: float32, or float64 of float64 inputs.

    At most `chunk_tokens` rows of logits exist at a time, and none is kept for the backward pass. Gradients are
    computed only for inputs that require them; there are no second derivatives. Under autocast the matrix products run
    in its dtype.
    """
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device) and hidden_NH.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        bias_V = bias_V.to(dtype) if bias_V is not None else None
    with_jacobian = torch.is_grad_enabled() and hidden_NH.requires_grad
    return _PredictTargets.apply(hidden_NH, weight_VH, bias_V, target_N, tail, chunk_tokens, with_jacobian)


class _PredictTargets(torch.autograd.Function):
    """The backward pass of a frozen head multiplies no matrices, that of a trained one recomputes the logits.

    The gradient that will come in is one unknown number for each edge, and the log-probability of an edge depends on
    its own hidden state only. So the derivative by the hidden states, [N, H], is computed while the chunk's softmax is
    there, and scaled later: two matrix products in all, as many as with whole logits, where recomputing takes three.
    The derivative by the weight sums over edges and does not factor like this. Keeping the softmax would keep [N, V],
    so a trained head pays the product with the weight a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        tail: Tail,
        chunk_tokens: int,
        with_jacobian: bool,
    ) -> torch.Tensor:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        log_probability_N = torch.empty(len(hidden_NH), dtype=dtype, device=hidden_NH.device)
        jacobian_NH = torch.empty_like(hidden_NH) if with_jacobian else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for rows in _split(len(hidden_NH), chunk_tokens):
                log_probability_N[rows], slope_CV = _predict_chunk(
                    hidden_NH[rows], weight_VH, bias_V, target_N[rows], tail, with_slope=with_jacobian
                )
                if jacobian_NH is not None and slope_CV is not None:
                    jacobian_NH[rows] = slope_CV.to(weight_VH.dtype) @ weight_VH
                del slope_CV  # or the next chunk's logits would stand beside it
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        inputs = (hidden_NH, weight_VH, bias_V, target_N) if trains_head else (None,) * 4
        ctx.save_for_backward(jacobian_NH, *inputs)
        ctx.tail, ctx.chunk_tokens = tail, chunk_tokens
        return log_probability_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[Any, ...]:
        jacobian_NH, hidden_NH, weight_VH, bias_V, target_N = ctx.saved_tensors
        grad_hidden_NH = grad_weight_VH = grad_bias_V = None
        if ctx.needs_input_grad[0]:
            grad_hidden_NH = (grad_N[:, None] * jacobian_NH).to(jacobian_NH.dtype)
        if hidden_NH is None:
            return grad_hidden_NH, None, None, None, None, None, None
        # Sums over chunks are kept in the wider dtype, or a bfloat16 head's gradient would depend on the chunk size.
        if ctx.needs_input_grad[1]:
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=grad_N.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias_V = torch.zeros_like(bias_V, dtype=grad_N.dtype)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for rows in _split(len(hidden_NH), ctx.chunk_tokens):
                _, slope_CV = _predict_chunk(
                    hidden_NH[rows], weight_VH, bias_V, target_N[rows], ctx.tail, with_slope=True
                )
                assert slope_CV is not None
                slope_CV.mul_(grad_N[rows, None])
                if grad_bias_V is not None:
                    grad_bias_V += slope_CV.sum(dim=0)
                if grad_weight_VH is not None:
                    grad_weight_VH += slope_CV.to(hidden_NH.dtype).T @ hidden_NH[rows]
                del slope_CV
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        if grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(bias_V.dtype)
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None, None, None, None


def _split(num_edges: int, chunk_tokens: int) -> Iterator[slice]:
    """Chunks of nearly equal size: a last one of a few edges would read the whole weight for little."""
    num_chunks = -(-num_edges // chunk_tokens)
    for chunk in range(num_chunks):
        yield slice(num_edges * chunk // num_chunks, num_edges * (chunk + 1) // num_chunks)


def _predict_chunk(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_C: torch.Tensor,
    tail: Tail,
    *,
    with_slope: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each target and, [C, V], its derivative by the head's outputs. The logits become the slope."""
    outputs_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V)
    logits_CV = tail.apply_(outputs_CV.to(torch.promote_types(outputs_CV.dtype, torch.float32)))
    del outputs_CV
    cap_slope_CV = None
    if with_slope and tail.softcap is not None:
        cap_slope_CV = 1.0 - (logits_CV / tail.softcap).square_()
    largest_C1 = logits_CV.amax(dim=-1, keepdim=True)
    shifted_C1 = logits_CV.gather(-1, target_C[:, None]) - largest_C1
    total_C1 = logits_CV.sub_(largest_C1).exp_().sum(dim=-1, keepdim=True)
    log_probability_C = (shifted_C1 - total_C1.log())[:, 0]
    if not with_slope:
        return log_probability_C, None
    slope_CV = logits_CV.div_(total_C1).neg_()
    slope_CV.scatter_add_(-1, target_C[:, None], torch.ones_like(total_C1))
    if cap_slope_CV is not None:
        slope_CV.mul_(cap_slope_CV)
    if tail.scale != 1.0:
        slope_CV.mul_(tail.scale)
    return log_probability_C, slope_CV


def predict_by_forward(
    model: Any,
    run_forward: Callable[[], Any],
    *,
    source_N: torch.Tensor,
    target_N: torch.Tensor,
    chunk_tokens: int,
) -> torch.Tensor:
    """Log-probability of each edge's target, [N], by one forward pass in which the head works in chunks.

    `model` has `get_output_embeddings`; `run_forward` runs it, or what wraps it, and returns its output; `source_N` are
    places in the flattened hidden states. A head that is no plain linear layer (adapted, quantised, offloaded, with
    hooks) and a model that does more to its logits than a `Tail` can say run as they are on the N edges, with whole
    logits. If a model has a tail, its first pass is run twice, since that is found out by passing through it. The model
    is left as it was.

    Raises:
        InvalidInput: the model does not call its output layer exactly once.
    """
    head = model.get_output_embeddings()
    if _is_plain(head) and model not in _tails:
        generators = _read_generators(source_N.device)
        found_N, logits_1V = _predict_by_stand_in(head, run_forward, source_N, target_N, _PLAIN_TAIL, chunk_tokens)
        _tails[model] = _recognise_tail(logits_1V, _make_probe(head.weight))
        if _tails[model] == _PLAIN_TAIL:
            return found_N
        _write_generators(generators, source_N.device)
    tail = _tails.get(model)
    if tail is None or not _is_plain(head):
        return _predict_by_whole_logits(head, run_forward, source_N, target_N)
    return _predict_by_stand_in(head, run_forward, source_N, target_N, tail, chunk_tokens)[0]


_tails: weakref.WeakKeyDictionary[Any, Tail | None] = weakref.WeakKeyDictionary()
"""What each model met so far does to its head's outputs, None for what no `Tail` says. It is in the model's code and
configuration, so it is looked at once: on an accelerator a look at values waits for all that was queued."""


def _is_plain(head: Any) -> bool:
    """Whether a call of `head` multiplies by its weight, adds its bias and does nothing else."""
    return (
        type(head) is torch.nn.Linear
        and type(head.weight) is torch.nn.Parameter  # a quantised or sharded one has a type of its own
        and "forward" not in vars(head)
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


def _make_probe(weight_VH: torch.Tensor) -> torch.Tensor:
    """Outputs of a head, [1, V], that tell what a model does to them: values of both signs and one beyond any cap.

    They are exact in bfloat16 too. The row is as wide as the vocabulary, because a model may cut, permute or mask it.
    """
    probe_1V = torch.linspace(-32.0, 32.0, len(weight_VH), device=weight_VH.device).bfloat16().float()[None]
    probe_1V[0, 0] = 2.0**30
    return probe_1V


def _recognise_tail(logits_1V: torch.Tensor, probe_1V: torch.Tensor) -> Tail | None:
    """The tail that makes `logits_1V` of `probe_1V`, or None."""
    if logits_1V.shape != probe_1V.shape:
        return None
    seen_1V = logits_1V.detach().float()
    for tail in (Tail(scale=(seen_1V[0, -1] / probe_1V[0, -1]).item()), Tail(softcap=seen_1V[0, 0].item())):
        # A few roundings of float32 are 1e-6.
        if torch.allclose(tail.apply_(probe_1V.clone()), seen_1V, rtol=1e-5, atol=0.0):
            return tail
    return None


def _predict_by_stand_in(
    head: torch.nn.Linear,
    run_forward: Callable[[], Any],
    source_N: torch.Tensor,
    target_N: torch.Tensor,
    tail: Tail,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities, and what the model made of the probe that its head gave it instead of outputs."""
    found: list[torch.Tensor] = []

    def stand_in(hidden_BTH: torch.Tensor) -> torch.Tensor:
        hidden_NH = hidden_BTH.flatten(0, -2)[source_N]
        log_probability_N = predict_targets(
            hidden_NH, head.weight, head.bias, target_N, chunk_tokens=chunk_tokens, tail=tail
        )
        found.append(log_probability_N)
        # The empty sum ties the model's output to its parameters: data parallelism looks there for those in use.
        return _make_probe(head.weight) + log_probability_N[:0].sum()

    head.forward = stand_in
    try:
        logits_1V = run_forward().logits
    finally:
        del head.forward
    if len(found) != 1:
        raise InvalidInput(
            f"the student called its output layer {len(found)} times in a forward pass. It can be trained and ranked "
            "only if it calls it once, as causal language models do: choose another student."
        )
    return found[0], logits_1V


def _predict_by_whole_logits(
    head: torch.nn.Module, run_forward: Callable[[], Any], source_N: torch.Tensor, target_N: torch.Tensor
) -> torch.Tensor:
    """The log-probabilities by the head and the model as they are; only the places are gathered before the head."""

    def gather(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BTH, *rest = inputs
        return (hidden_BTH.flatten(0, -2)[source_N], *rest)

    handle = head.register_forward_pre_hook(gather)
    try:
        logits_NV = run_forward().logits
    finally:
        handle.remove()
    return -torch.nn.functional.cross_entropy(logits_NV.float(), target_N, reduction="none")


def _read_generators(device: torch.device) -> tuple[torch.Tensor, ...]:
    """States of the random generators that a forward pass on `device` draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(states)


def _write_generators(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    """Put them back, so that a pass that is run again drops out the same units."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
