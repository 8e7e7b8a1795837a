"""The sparse kernels of every method that selects: with its selection held fixed no row depends on a later token, with
everything selected they are dense attention, and the report tells their time.

`test_methods` asks the same of whole methods, where those that look ahead show their weights, which come by a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import headway
from headway.door.attach import Handle
from headway.door.call import AttentionCall, Site
from headway.door.selection import BlockMask, Blocks, Dense, Keys, Selection, Window
from headway.door.stages import Selector, Stage
from tests.contracts import methods as contract
from tests.contracts.methods import SLUGS, TOKENS, host, read, stages, tokens

SHARE = 0.3
SPARSE = {"blocks", "keys", "window"}
#: Of the methods, those that select for themselves; the others read through a cache or an editor of their own.
SELECTING = [slug for slug in SLUGS if any(isinstance(s, Selector) for s in stages(slug, "llama", SHARE))]
#: One host of each family but Mistral, whose own window in every layer is less than any of these reads.
FAMILIES = [name for name in contract.FAMILIES if name != "mistral"]
METHOD = pytest.mark.parametrize("slug", SELECTING)
FAMILY = pytest.mark.parametrize("name", FAMILIES)
#: A whole prompt, a few steps, and a row within a block of every method behind which tokens change.
CHUNKS, ROW = contract.decodes(), 203


class Around(Selector):
    """A stage in whose selections something is changed. It never gives way to dense attention."""

    def __init__(self, stage: Selector, change: Callable[[Selection, AttentionCall], Selection]) -> None:
        self.stage, self.change, self.phases = stage, change, stage.phases

    def acts_at(self, site: Site) -> bool:
        return self.stage.acts_at(site)

    def select(self, call: AttentionCall) -> Selection:
        return self.change(self.stage.select(call), call)


class Again(Around):
    """Selections that were made before, in the same order, whatever comes."""

    def __init__(self, stage: Selector, made: list[Selection]) -> None:
        super().__init__(stage, lambda selection, call: selection)
        self.made: Iterator[Selection] = iter(made)

    def select(self, call: AttentionCall) -> Selection:
        return next(self.made)


def everything(selection: Selection, call: AttentionCall) -> Selection:
    """The same kind of selection, on the same grid, of every key."""
    if isinstance(selection, Blocks):
        grid = selection.mask
        return Blocks(BlockMask.full(call.queries, call.keys, grid.query_block, grid.key_block))
    if isinstance(selection, Keys):
        index = torch.arange(call.keys).expand(1, 1, selection.index.shape[2], -1)
        return Keys(index, query_block=selection.query_block)
    return Window(0, call.keys) if isinstance(selection, Window) else selection


def wrapped(slug: str, name: str, wrap: Callable[[Selector], Selector]) -> list[Stage]:
    return [wrap(s) if isinstance(s, Selector) else s for s in stages(slug, name, SHARE)]


def ran_sparse(handle: Handle) -> None:
    """Every layer that sees the whole text took the sparse kernel."""
    wide = {site.layer for site in handle.sites if site.window is None}
    rows = [row for row in handle.report() if row["layer"] in wide]
    assert rows
    for row in rows:
        assert SPARSE & set(row["paths"]), row


def run(model: nn.Module, acting: list[Stage], ids: torch.Tensor) -> torch.Tensor:
    with headway.use(model, *acting) as handle:
        logits = read(model, ids, CHUNKS)
        ran_sparse(handle)
    return logits


def test_the_methods_that_select_are_these():
    assert {"dhsa", "flexprefill", "power-attention"} <= set(SELECTING)


@METHOD
@FAMILY
def test_with_its_selection_held_fixed_no_row_depends_on_a_later_token(slug, name):
    """Tokens from a row within a block on change, and with them the keys and values of every layer behind it."""
    model, ids = host(name), tokens()
    changed = ids.clone()
    changed[0, ROW:] = (changed[0, ROW:] + 7) % 100 + 8
    made: list[Selection] = []

    def note(selection: Selection, call: AttentionCall) -> Selection:
        made.append(selection)
        return selection

    first = run(model, wrapped(slug, name, lambda stage: Around(stage, note)), ids)
    assert any(not isinstance(selection, Dense) for selection in made)
    again = run(model, wrapped(slug, name, lambda stage: Again(stage, made)), ids)
    second = run(model, wrapped(slug, name, lambda stage: Again(stage, made)), changed)
    assert torch.equal(first, again)
    contract.close(first[:, :ROW], second[:, :ROW], "before the change", share=1e-5)
    assert not torch.allclose(first[:, ROW], second[:, ROW], atol=1e-3)


@METHOD
@FAMILY
def test_the_sparse_kernel_with_everything_selected_is_dense(slug, name):
    model, ids = host(name), tokens(2)
    with torch.no_grad():
        native = model(input_ids=ids).logits
    got = run(model, wrapped(slug, name, lambda stage: Around(stage, everything)), ids)
    contract.close(got, native, "everything selected")
    sparse = run(model, list(stages(slug, name, SHARE)), ids)
    assert float((sparse - native).abs().max()) > 1e-2 * float(native.abs().max())


@METHOD
def test_the_report_tells_the_seconds_of_choosing_and_of_executing(slug):
    model = host("llama")
    with headway.use(model, *stages(slug, "llama", SHARE)) as handle:
        read(model, tokens(), [TOKENS])
        ran_sparse(handle)
    for row in handle.report():
        assert row["select_seconds"] > 0
        assert row["execute_seconds"] > 0
    with headway.use(model, *stages(slug, "llama", 1.0)) as handle:
        read(model, tokens(), [TOKENS])
    assert all(row["select_seconds"] == 0 for row in handle.report() if set(row["paths"]) == {"native"})
