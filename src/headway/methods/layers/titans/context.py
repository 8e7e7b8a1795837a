"""Memory as context (MAC): each segment attends to itself, to learned tokens, and to what the memory knew before it.

    h = M*_{s−1}(queries) ,   y = Attn([P ; h ; segment]) ,   o_t = y_t ⊗ M_t*(y_t) ,   M learns y

The memory is written from the output of attention. Segments are counted in the tokens of a document, and the state
holds the open one: its keys, those of h, and the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from headway.door.mixer import Mixer, State, register_mixer
from headway.door.own import Attend
from headway.errors import ArgumentError, unknown
from headway.kernels.document_chunks import document_chunks
from headway.kernels.memory_net import MemoryState
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.layers.titans.joins import Join
from headway.methods.layers.titans.memory import MemoryTrace, NeuralMemory, Tensors, split, unpack
from headway.methods.layers.titans.mixers import TitansMixer, named
from headway.methods.layers.titans.window import PERSISTENT_STD, ROPE_BASE

MEMORY_QUERIES = ("learned", "previous", "self")


@register_mixer
class TitansMAC(TitansMixer):
    """Titans, memory as context.

    segment: tokens that attend to each other, a multiple of `chunk` (the paper's models: 512). persistent: learned
    tokens in front. memory_query: what the memory is asked at the start of a segment: "learned" queries,
    `memory_tokens` of them; the tokens of the "previous" segment; or those of the segment it"self", each answer seen
    only at or behind its token. join: "gate" or "add". The others: `MemoryOptions`.

    causal=False is the paper's form as written, for encoders: every token of a segment asks, sees all answers and the
    whole segment, and reads the memory behind it."""

    slug = "titans_mac"
    parts = ("memory", "segment")

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        causal: bool = True,
        segment: int = 256,
        persistent: int = 4,
        memory_query: str = "learned",
        memory_tokens: int = 16,
        join: str = "gate",
        **memory: Any,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers, causal=causal)
        options = self.memory_options(memory)
        self.memory = NeuralMemory(width, heads, options)
        asks = memory_query if causal else "self"
        self.segment = _Segment(width, heads, segment, persistent, asks, memory_tokens, layer, options.chunk, causal)
        self.join = Join(width, join)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        state = super().init_state(batch, device=device, dtype=dtype)
        if self.segment.asks != "self":
            return state
        # Tokens that come later ask the memory as it was when the segment began.
        weights = unpack({n[7:]: t for n, t in state.tensors.items() if n.startswith("memory.")}, state.seen).weights
        return state.replace(**named("began", {str(layer): w.clone() for layer, w in enumerate(weights)}))

    def mix(
        self,
        x: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None,
        position: Int[Tensor, "batch tokens"],
        after: Int[Tensor, " batch"],
        state: State | None,
        mode: str,
        trace: list[MemoryTrace] | None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Tensors]:
        began = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        tensors, seen = dict(began.tensors), began.seen
        chunks = document_chunks(position, self.segment.size, mask=mask, seen=seen)
        tokens, places = chunks.gather(x), chunks.gather(position[..., None].to(torch.float64))[..., 0].long()
        watched = self.segment.attend.watched
        rows = _text_rows(position, mask) if watched else 0
        outputs, traces = [], []
        for index in range(chunks.count):
            real = chunks.real[:, index]
            used = real.any(0).nonzero()[:, 0].tolist()
            low, high = (used[0], used[-1] + 1) if used else (0, 1)
            here = slice(low, high)
            known: list[MemoryTrace] | None = None if trace is None else []
            piece = (index * self.segment.size + low, rows) if watched else None
            y, tensors, seen = self._one(
                tokens[:, index, here], real[:, here], places[:, index, here], low, tensors, seen, mode, known, piece
            )
            outputs.append(pad(y, (0, 0, low, self.segment.size - high)))
            if known:
                edges = (low, self.segment.size - high)
                traces.append([pad(part, edges) for part in known[0].tensors()])
        y = chunks.scatter(torch.stack(outputs, 1)) if outputs else torch.zeros_like(x)
        if trace is not None and traces:
            real_tokens = torch.ones_like(position, dtype=torch.bool) if mask is None else mask
            joined = (torch.stack(list(parts), 2)[..., None] for parts in zip(*traces, strict=True))
            back = (torch.where(real_tokens[:, None], chunks.scatter(part)[..., 0], 0.0) for part in joined)
            trace.append(MemoryTrace(*back))
        return self.out(y), tensors

    def _one(
        self,
        x: Float[Tensor, "batch rows width"],
        real: Bool[Tensor, "batch rows"],
        position: Int[Tensor, "batch rows"],
        low: int,
        tensors: Tensors,
        seen: Int[Tensor, " batch"],
        mode: str,
        trace: list[MemoryTrace] | None,
        piece: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensors, Tensor]:
        """Some slots of one segment of every row, beginning at slot `low`. `piece` is what the door is told."""
        memory = {name[7:]: t for name, t in tensors.items() if name.startswith("memory.")}
        segment = {name[8:]: t for name, t in tensors.items() if name.startswith("segment.")}
        starts = real[:, 0] & (position[:, 0] % self.segment.size == 0) if low == 0 else torch.zeros_like(real[:, 0])
        opens = starts & (position[:, 0] == 0)
        weights = unpack(memory, seen).weights
        if bool(opens.any()):
            fresh = self.memory.net.to(weights[0].dtype).weights
            rows = opens.view(-1, 1, 1, 1)
            weights = tuple(torch.where(rows, w, old) for w, old in zip(fresh, weights, strict=True))
        began: Tensors = {}
        if self.segment.asks == "self":
            rows = starts.view(-1, 1, 1, 1)
            old = [tensors[f"began.{layer}"] for layer in range(len(weights))]
            weights = tuple(torch.where(rows, w, o) for w, o in zip(weights, old, strict=True))
            began = named("began", {str(layer): w for layer, w in enumerate(weights)})
        y, segment = self.segment(x, real, low, starts, opens, segment, self.memory, weights, mode, piece)
        read, after = self.memory(
            y, position=position, mask=real, seen=seen, tensors=memory, mode=mode, trace=trace, name=self.title
        )
        last = torch.where(real, position, -1).amax(1)
        seen = torch.where(last >= 0, last + 1, seen)
        if not self.causal:
            done: MemoryState = unpack(after or memory, seen)
            read = self.memory.retrieve(done.now()[0], self.memory.query(y))
        return self.join(y, read), named("memory", after) | named("segment", segment) | began, seen

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        small = {"chunk": 4, "expansion": 2, "segment": 8, "persistent": 2, "memory_tokens": 3}
        return cls(**{"width": 16, "heads": 2, **small, **changes})


class _Segment(nn.Module):
    """Attention within a segment, behind persistent tokens and answers of the memory."""

    def __init__(
        self,
        width: int,
        heads: int,
        size: int,
        persistent: int,
        asks: str,
        memory_tokens: int,
        layer: int,
        chunk: int,
        causal: bool,
    ) -> None:
        super().__init__()
        if asks not in MEMORY_QUERIES:
            raise unknown("memory_query", asks, MEMORY_QUERIES)
        if size < 1 or size % chunk:
            raise ArgumentError(
                f"segment, chunk: got {size} and {chunk}, expected chunks that divide a segment: the memory is asked "
                "between two segments, when no chunk is open. Make the segment a multiple of the chunk."
            )
        for name, count in (("persistent", persistent), ("memory_tokens", memory_tokens)):
            if count < 0:
                raise ArgumentError(f"{name}: got {count}, expected 0 or more.")
        self.width, self.heads, self.size, self.asks, self.causal = width, heads, size, asks, causal
        self.dim = width // heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, width) * PERSISTENT_STD) if persistent else None
        learned = asks == "learned"
        self.answers = memory_tokens if learned else size
        if learned:
            self.queries = nn.Parameter(torch.randn(heads, memory_tokens, self.dim))
        self.attend = Attend(layer=layer, scale=self.dim**-0.5, causal=causal, text_dim=self.dim)
        self.frequencies = tuple(rope_frequencies(self.dim, ROPE_BASE).tolist())

    def start(self, batch: int, dtype: torch.dtype | None = None) -> Tensors:
        """Keys and values of the open segment and of the answers it sees, and what a later segment asks."""

        def zeros(tokens: int) -> Tensor:
            return self.project.weight.new_zeros(batch, self.heads, tokens, self.dim, dtype=dtype)

        tensors = {"key": zeros(self.size), "value": zeros(self.size)}
        tensors |= {"answer_key": zeros(self.answers), "answer_value": zeros(self.answers)}
        if self.asks == "previous":
            wide = torch.promote_types(dtype or self.project.weight.dtype, torch.float32)
            tensors |= {
                "asked": zeros(self.size).to(wide),
                "answered": torch.zeros(batch, dtype=torch.bool, device=self.project.weight.device),
            }
        return tensors

    def forward(
        self,
        x: Float[Tensor, "batch rows width"],
        real: Bool[Tensor, "batch rows"],
        low: int,
        starts: Bool[Tensor, " batch"],
        opens: Bool[Tensor, " batch"],
        tensors: Tensors,
        memory: NeuralMemory,
        weights: tuple[Tensor, ...],
        mode: str,
        piece: tuple[int, int] | None,
    ) -> tuple[Float[Tensor, "batch rows width"], Tensors]:
        """The rows' outputs, and what is kept. `weights` are the memory's at the start of each row's segment."""
        rows = x.shape[1]
        plain, key, value = (split(part, self.heads) for part in self.project(x).chunk(3, -1))
        slots = torch.arange(low, low + rows, device=x.device)
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=x.device)
        query, key = (rotate(part, slots, frequencies) for part in (plain, key))
        kept = {
            "key": _placed(tensors["key"], key, real, low),
            "value": _placed(tensors["value"], value, real, low),
            **self._answers(x, real, low, starts, opens, tensors, memory, weights),
        }
        order = torch.arange(self.size, device=x.device)
        filled = order <= slots[:, None]
        if not self.causal:
            there = pad(real, (low, self.size - low - rows))[:, None]
            filled = (filled & (order == slots[:, None])) | there
        else:
            filled = filled.expand(x.shape[0], rows, self.size)
        visible = torch.cat([*self._prefix(filled, kept), filled], -1)[:, None]
        both = (("answer_key", "key"), ("answer_value", "value"))
        keys, values = (torch.cat([kept[a], kept[b]], 2).to(x.dtype) for a, b in both)
        keys = torch.cat(
            [pad(keys[:, :, : self.answers], (self.dim, 0)), pad(keys[:, :, self.answers :], (0, self.dim))], 2
        )
        if self.persistent is not None:
            learned = linear(self.persistent, self.project.weight[self.width :]).chunk(2, -1)
            first_key, first_value = (split(p[None], self.heads).expand(x.shape[0], -1, -1, -1) for p in learned)
            keys = torch.cat([pad(first_key, (self.dim, 0)), keys], 2)
            values = torch.cat([first_value, values], 2)
            visible = pad(visible, (self.persistent.shape[0], 0), value=True)
        query = torch.cat([query, plain], -1)

        def native() -> Tensor:
            if mode != "reference":
                return scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=self.attend.scaling)
            logits = query @ keys.transpose(-1, -2) * self.attend.scaling
            return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values

        front = keys.shape[2] - self.size
        found = self.attend(query, keys, values, native=native, visible=visible, front=front, piece=piece)
        return found.transpose(1, 2).flatten(2), kept

    def _answers(
        self,
        x: Tensor,
        real: Tensor,
        low: int,
        starts: Tensor,
        opens: Tensor,
        tensors: Tensors,
        memory: NeuralMemory,
        weights: tuple[Tensor, ...],
    ) -> Tensors:
        """Keys and values of what the memory said to this segment."""
        kept = {name: tensors[name] for name in ("answer_key", "answer_value")}
        extra: Tensors = {}
        if self.asks == "self":
            said = self._said(memory.retrieve(weights, memory.query(x)))
            return {name: _placed(kept[name], part, real, low) for name, part in zip(kept, said, strict=True)}
        if self.asks == "previous":
            extra["answered"] = torch.where(starts, ~opens, tensors["answered"])
            extra["asked"] = _placed(tensors["asked"], memory.query(x), real, low)
        if not self.answers or not bool(starts.any()):
            return kept | extra
        if self.asks == "previous":
            query = tensors["asked"]
        else:
            query = torch.nn.functional.normalize(self.queries, dim=-1).expand(x.shape[0], -1, -1, -1)
        rows = starts.view(-1, 1, 1, 1)
        said = self._said(memory.retrieve(weights, query).to(x.dtype))
        fresh = zip(kept, said, strict=True)
        return {name: torch.where(rows, part.to(kept[name].dtype), kept[name]) for name, part in fresh} | extra

    def _said(self, answers: Float[Tensor, "batch tokens width"]) -> tuple[Tensor, Tensor]:
        key, value = linear(answers, self.project.weight[self.width :]).chunk(2, -1)
        return split(key, self.heads), split(value, self.heads)

    def _prefix(self, filled: Tensor, kept: Tensors) -> list[Tensor]:
        """Which answers each row sees."""
        batch, rows = filled.shape[:2]
        if self.asks == "self":
            return [filled]
        if self.asks == "previous":
            return [kept["answered"][:, None, None].expand(batch, rows, self.answers)]
        return [filled.new_ones(batch, rows, self.answers)]


def _text_rows(position: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None) -> int:
    """The tokens of a call that holds one text from its first token on in every row; 0 for any other."""
    tokens = position.shape[1]
    plain = mask is None or bool(mask.all())
    return tokens if plain and bool((position == torch.arange(tokens, device=position.device)).all()) else 0


def _placed(
    kept: Float[Tensor, "batch heads size dim"],
    new: Float[Tensor, "batch heads rows dim"],
    real: Bool[Tensor, "batch rows"],
    low: int,
) -> Float[Tensor, "batch heads size dim"]:
    """The kept tokens with new ones in the slots from `low` on, where they are real."""
    high = low + new.shape[2]
    middle = torch.where(real[:, None, :, None], new.to(kept.dtype), kept[:, :, low:high])
    return torch.cat([kept[:, :, :low], middle, kept[:, :, high:]], 2)
