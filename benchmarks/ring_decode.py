"""Another `decode` for the scripts: static cache, slots filled anew, CUDA graphs.

A candidate that gpu.py measures beside grpo.py's own, with the same arguments, noise
and results; it is not in the scripts until a GPU has shown what it is worth.

`slots` completions are decoded side by side. All of them write their keys and values
into one column of a cache of L = P + C columns, which is a ring: the next column, and
after the last the first. A completion needs the last L columns at most, so a slot whose
completion is finished takes the next one at once: its prompt, which was read at the
start, is copied into the P columns before. No tensor changes its shape or place, and on
a GPU all of a step, the drawing of the token included, is one CUDA graph. With nothing
left to fill, half of the slots are given up each time that half of them are idle.

Keys and values are kept in the dtype in which attention multiplies them: under autocast
that is bf16, half the memory, and what the attention would have rounded them to. The
query heads that share a key's head are put where queries of one head stand: attention
reads each key once, where transformers' would copy it for each of them first.

Refused: sliding windows, which a column's place in the ring says nothing of.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention


def shared_heads(module, query, key, value, attention_mask, scaling, **_) -> tuple:
    """Attention of one query per head, query (S, H, 1, D), to all that attention_mask
    (S, 1, 1, L) shows of key and value (S, H / g, L, D)."""
    grouped = query.view(*key.shape[:2], -1, query.shape[-1])  # (S, H / g, g, D)
    kwargs = dict(attn_mask=attention_mask, scale=scaling)
    output = scaled_dot_product_attention(grouped, key, value, **kwargs)
    return output.reshape(len(query), 1, -1, output.shape[-1]), None


transformers.AttentionInterface.register("shared_heads", shared_heads)


class Ring(transformers.Cache):
    """Keys and values of all layers, (S, heads, L, D) each, and the column that the
    next token is written into, (1,)."""

    def __init__(self, prompts: transformers.DynamicCache, slots: int, columns: int):
        like = [part for layer in prompts.layers for part in (layer.keys, layer.values)]
        device = like[0].device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else None
        self.prompts = [part.to(dtype or part.dtype) for part in like]
        shape = lambda x: (slots, x.shape[1], columns, x.shape[3])
        self.parts = [x.new_zeros(shape(x)) for x in self.prompts]
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers = []  # transformers' own

    def update(self, key, value, layer: int, *args, **kwargs) -> tuple:
        """What transformers calls to write one column, and to read all of them."""
        pair = self.parts[2 * layer : 2 * layer + 2]
        for part, new in zip(pair, (key, value)):
            part.index_copy_(2, self.column, new.to(part.dtype))
        return tuple(pair)

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def fill(self, slots: torch.Tensor, prompts: torch.Tensor, columns: torch.Tensor):
        """Copy the keys and values of prompts into columns of slots."""
        for part, prompt in zip(self.parts, self.prompts):
            part[slots[:, None], :, columns] = prompt[prompts].transpose(1, 2)


@torch.no_grad()
def decode(
    model, prompts, attention_mask, noise, temperature, eos_token_id, slots=512
) -> tuple:
    """grpo.py's decode, of at most `slots` completions side by side."""
    if getattr(model.config, "sliding_window", None):
        raise ValueError("a model with a sliding window")
    device, (B, C), P = prompts.device, noise.shape, prompts.shape[1]
    exact = torch.float32 if device.type == "mps" else torch.float64
    S, L, group_size = min(slots, B), P + C, B // len(prompts)
    zeros = lambda *shape, **kwargs: torch.zeros(shape, device=device, **kwargs)
    completions = zeros(B + 1, C, dtype=torch.int64)  # idle slots write the last row
    logprobs, noise = zeros(B + 1, C), torch.cat([noise, noise[:1]])

    def draw(logits, rows, t):
        log_softmax = (logits.float() / temperature).log_softmax(-1)
        cdf = log_softmax.to(exact).exp().cumsum(-1)
        point = noise[rows, t, None].to(exact) * cdf[:, -1:]
        token = torch.searchsorted(cdf, point, right=True).clamp(max=cdf.shape[-1] - 1)
        completions[rows, t] = token[:, 0]
        logprobs[rows, t] = log_softmax.gather(-1, token)[:, 0]
        return token

    cache, seen = transformers.DynamicCache(), attention_mask.bool()
    kwargs = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
    kwargs |= dict(position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0))
    first = model(prompts, attention_mask=attention_mask, **kwargs).logits[:, -1]
    lengths, cache = seen.sum(-1, keepdim=True), Ring(cache, S, L)
    # of each slot: the row it decodes, tokens drawn before, the last one, its position
    rows, t = torch.full((S,), B, device=device), zeros(S, dtype=torch.int64)
    token, position = zeros(S, 1, dtype=torch.int64), zeros(S, 1, dtype=torch.int64)
    visible, idle = zeros(S, 1, 1, L, dtype=torch.bool), zeros(S, dtype=torch.bool)
    visible[..., 0] = True
    idle[:], state, next_row = True, (rows, t, token, position, visible, idle), 0

    def step():
        """All slots feed their token and draw the next one."""
        rows, t, token, position, visible, idle = state
        visible.index_fill_(3, cache.column, True)
        kwargs = dict(position_ids=position, past_key_values=cache, use_cache=True)
        logits = model(token, attention_mask=visible, **kwargs).logits[:, -1]
        cache.column.copy_((cache.column + 1) % L)
        t.copy_((t + 1).clamp(max=C - 1))
        position.add_(1)
        token.copy_(draw(logits, rows, t))
        idle.logical_or_(torch.isin(token[:, 0], eos_token_id) | (t == C - 1))
        rows.masked_fill_(idle, B)

    implementation = model.config._attn_implementation
    model.config._attn_implementation = "shared_heads"
    run = None
    try:
        while True:
            rows, t, token, position, visible, idle = state
            free = idle.nonzero()[:, 0]
            while len(free) and next_row < B:
                slots = free[: B - next_row]
                new = torch.arange(next_row, next_row + len(slots), device=device)
                next_row, which = next_row + len(slots), new // group_size
                columns = (cache.column + torch.arange(-P, 0, device=device)) % L
                cache.fill(slots, which, columns)
                visible[slots] = False
                visible[slots[:, None], 0, 0, columns] = seen[which]
                drawn = draw(first[which], new, torch.zeros_like(new))
                rows[slots], t[slots], token[slots] = new, 0, drawn
                position[slots] = lengths[which]
                done = torch.isin(drawn[:, 0], eos_token_id) | (C == 1)
                idle[slots] = done
                rows[slots[done]] = B
                free = idle.nonzero()[:, 0]
            if len(free) == len(idle):
                return completions[:B], logprobs[:B]
            if len(free) >= len(idle) / 2:
                kept = (~idle).nonzero()[:, 0]
                state = tuple(x[kept] for x in state)
                cache.parts, run = [part[kept] for part in cache.parts], None
            if run is None:
                run = graph_of(step) if device.type == "cuda" else step
            run()
    finally:
        model.config._attn_implementation = implementation


def graph_of(step: Callable) -> Callable:
    """step as a CUDA graph. It is called once before, and that call counts, too."""
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        step()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
