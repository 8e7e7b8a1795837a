"""One layer's two caches: every token, and the few that recycled steps read, side by side in memory."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.caches import PolicyLayer, TokenStore
from headway.errors import ArgumentError
from headway.methods.long_context.recycled_attention.selection import top_keys


class RecycledLayer(PolicyLayer):
    """`full` holds all tokens, `small` at most `budget` per sequence and KV head, in any order. Up to `budget` tokens
    in all, `full` is what `small` would be, and nothing is copied.

    `score` says which entry goes first: −inf an empty slot, +inf a token that stays. `reference` is the
    query of each sequence's last full step and `full_at` its position: entries behind it are fresh. `steps` counts the
    decoding steps, `full_steps` the full ones of each sequence. `window` is that of a sliding layer, whose old tokens
    are let go and which has no small cache. `last` counts the tokens of the last forward."""

    is_croppable = True

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.full, self.small = TokenStore(), TokenStore(per_head=True)
        self.window: int | None = None
        self.last = 0
        self._forget()

    def _forget(self) -> None:
        none = torch.empty(0)
        self.small.clear()
        self.score, self.reference = none, none
        self.full_at, self.full_steps = none.long(), none.long()
        self.steps = 0

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        return self.full, self.small

    def file(self, key: Tensor, value: Tensor, positions: Int[Tensor, " new"]) -> None:
        self.full.append(key, value, positions)
        self.last = key.shape[2]

    @property
    def chosen(self) -> bool:
        """Whether a full step has left scores to recycle."""
        return self.score.numel() > 0

    @property
    def fresh(self) -> Bool[Tensor, "batch kv_heads slots"]:
        """Which entries of the small cache came after the last full step."""
        return self.small.positions > self.full_at[:, None, None]

    def refresh(
        self,
        scores: Float[Tensor, "batch kv_heads keys"],
        query: Float[Tensor, "batch heads 1 dim"],
        due: Bool[Tensor, " batch"] | None = None,
    ) -> None:
        """Chooses the small cache anew, for all sequences or those that are `due`."""
        every = due is None or not self.chosen or bool(due.all())
        if self.seen > self.budget:
            index = top_keys(scores, self.budget)
            scores = scores.gather(2, index)
            self._copy(index, scores, None if every else due)
        if due is None or every:
            self.score, self.reference = scores, query.clone()
            self.full_at = torch.full((query.shape[0],), self.seen - 1, device=query.device)
            return
        self.score = torch.where(due[:, None, None], scores, self.score)
        self.reference = torch.where(due[:, None, None, None], query, self.reference)
        self.full_at = torch.where(due, self.seen - 1, self.full_at)

    def _copy(self, index: Int[Tensor, "batch kv_heads kept"], score: Tensor, due: Tensor | None = None) -> None:
        """Puts the named tokens side by side; a score of −inf marks an empty slot."""
        positions = index.masked_fill(score == -torch.inf, -1)
        # Whole rows of memory at once: an element-wise gather takes several times as long.
        batch, kv_heads = (torch.arange(n, device=index.device) for n in index.shape[:2])
        key, value = (x[batch[:, None, None], kv_heads[:, None], index] for x in (self.full.key, self.full.value))
        if due is None:
            self.small.length = 0
            self.small.append(key, value, positions)
            return
        row = due[:, None, None]
        for store, new in ((self.small.key, key), (self.small.value, value)):
            store.copy_(torch.where(row[..., None], new, store))
        self.small.positions.copy_(torch.where(row, positions, self.small.positions))

    def push(self, most_fresh: int, real: Bool[Tensor, " batch"] | None = None) -> None:
        """Takes the newest token into the small cache, as an empty slot where it is not `real`. When that is full the
        entry of lowest score goes; when `most_fresh` tokens are fresh already, the oldest of them."""
        key, value, positions = self.full.key[:, :, -1:], self.full.value[:, :, -1:], self.full.positions[:, -1:]
        batch, kv_heads = key.shape[:2]
        stays = torch.full((batch, kv_heads, 1), torch.inf, dtype=self.score.dtype, device=key.device)
        places = positions[:, None].expand(-1, kv_heads, -1)
        if real is not None:
            stays, places = (torch.where(real[:, None, None], x, y) for x, y in ((stays, -torch.inf), (places, -1)))
        if self.seen <= self.budget:
            self.score = torch.cat([self.score, stays], 2)
            return
        if self.small.empty:
            every = torch.arange(self.seen - 1, device=key.device).expand(batch, kv_heads, -1)
            self._copy(every, self.score)
        victim = self._victim(most_fresh)[..., None]
        for store, new in ((self.small.key, key), (self.small.value, value)):
            store.scatter_(2, victim[..., None].expand_as(new), new)
        self.small.positions.scatter_(2, victim, places)
        self.score.scatter_(2, victim, stays)

    def _victim(self, most_fresh: int) -> Int[Tensor, "batch kv_heads"]:
        lowest, victim = self.score.min(-1)
        fresh = self.fresh
        oldest = self.small.positions.masked_fill(~fresh, self.seen).argmin(-1)
        spent = (fresh.sum(-1) >= most_fresh) | (lowest == torch.inf)
        return torch.where(spent & (lowest > -torch.inf), oldest, victim)

    def settle(self) -> None:
        """Lets go of what a sliding layer can no longer read, a window's worth at a time: cropping stays possible."""
        if self.window is not None and self.full.length > 3 * self.window:
            self.full.drop_middle(0, 2 * self.window)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back. The next step is a full one: what the lost tokens chose is chosen anew."""
        count = abs(tokens_to_remove)
        if not count or not self.seen:
            return
        left = self.full.length - count
        if left < min(self.seen - count, (self.window or 1) - 1):
            raise ArgumentError(
                f"tokens_to_remove: got {count}, expected no more than a window of {self.window} in a sliding layer: "
                "older tokens are gone. Take back fewer tokens."
            )
        self.full.crop(count)
        self.seen -= count
        self.last = max(self.last - count, 0)
        self.small.clear()
        self.score = torch.empty(0)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def select(self, index: Int[Tensor, " rows"]) -> None:
        super().select(index)
        for name in ("score", "reference", "full_at", "full_steps"):
            state = getattr(self, name)
            if state.numel():
                setattr(self, name, state[index.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.full.empty:
            self.select(torch.arange(self.full.key.shape[0]).repeat_interleave(repeats))
