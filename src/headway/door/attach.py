"""Attaching methods to a model for the length of a scope, and taking them off again without a trace.

One `Door` stands in a model while at least one scope is open. It owns the hooks and the implementation names; the last
scope to leave closes it and everything is as it was.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from headway.door import adapter
from headway.door.call import AttentionCall, Forward, Site
from headway.door.execute import Executed, execute, execute_parts, refuse_emptied_rows
from headway.door.policy_hosts import require_one_sequence_per_row
from headway.door.selector_calls import refuse_drafts
from headway.door.stages import CachePolicy, Driver, Editor, Observer, Selector, Stage
from headway.door.text import text_call
from headway.errors import ArgumentError, ConflictError, InterceptionError, unknown

_DOORS: weakref.WeakKeyDictionary[nn.Module, Door] = weakref.WeakKeyDictionary()
_MODULE_DOORS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Door]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()
_REGISTERED: set[str] = set()
#: How often each shared config is renamed by an open door, so that the last door restores it.
_NAMED: dict[int, tuple[Any, str, int]] = {}


@dataclass
class SiteReport:
    """What ran at one site in one scope: path name -> calls, mean density of all and of every query head, seconds spent
    on selecting and executing."""

    site: Site
    paths: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    density_sum: float = 0.0
    head_sums: Tensor | float = 0.0
    select_seconds: float = 0.0
    execute_seconds: float = 0.0

    @property
    def calls(self) -> int:
        return sum(self.paths.values())

    @property
    def density(self) -> float:
        return self.density_sum / self.calls if self.calls else float("nan")

    @property
    def density_by_head(self) -> list[float]:
        if isinstance(self.head_sums, Tensor):
            return (self.head_sums / self.calls).tolist()
        return [self.density] * self.site.heads

    def row(self) -> dict[str, Any]:
        return {
            "site": self.site.name,
            "layer": self.site.layer,
            "calls": self.calls,
            "paths": dict(self.paths),
            "density": self.density,
            "density_by_head": self.density_by_head,
            "select_seconds": self.select_seconds,
            "execute_seconds": self.execute_seconds,
        }


class Handle:
    """One scope: the stages it brings and the sites they act at. A context manager; `attach` and `detach` do the same
    by hand. `report()` tells what ran."""

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        *,
        layers: Sequence[int] | None = None,
        sites: Sequence[str] | None = None,
        selftest: bool = True,
        example: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.stages = tuple(stages)
        self.layers = None if layers is None else tuple(layers)
        self.patterns = None if sites is None else tuple(sites)
        self.selftest = selftest
        self.example = example
        self.reports: dict[str, SiteReport] = {}
        self._door: Door | None = None
        self._driven: Any = None

    def attach(self) -> Handle:
        """Opens the door, tests it on the example, and puts the stages in place."""
        if self._door is not None:
            raise ConflictError(
                "scope: got one that is attached already, expected a free one. Detach it, or make another."
            )
        door = open_door(self.model)
        try:
            if self.selftest:
                from headway.door.selftest import ensure_tested

                ensure_tested(door, self.example)
            self._check_layers(door)
            self._door = door
            for stage in self.stages:
                stage.prepare(self.sites)
            door.add(self)
        except BaseException:
            self._door = None
            close_door(door)
            raise
        self._drive()
        for stage in self.stages:
            if isinstance(stage, Observer):
                stage.start()
        return self

    def detach(self) -> None:
        """Takes the stages off; the last scope of a model restores it."""
        door, self._door = self._door, None
        if door is not None:
            self._stop_driving()
            door.remove(self)
            close_door(door)

    def __enter__(self) -> Handle:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def covers(self, site: Site) -> bool:
        if self.layers is not None and site.layer not in self.layers:
            return False
        return self.patterns is None or any(fnmatch(site.name, p) for p in self.patterns)

    def acting(self, site: Site) -> list[Stage]:
        return [s for s in self.stages if self.covers(site) and s.acts_at(site)]

    @property
    def sites(self) -> list[Site]:
        """The sites this scope covers, in the order in which the host runs them; empty before it is attached."""
        return [] if self._door is None else [site for site in self._door.sites.values() if self.covers(site)]

    def report(self) -> list[dict[str, Any]]:
        """A row per site that ran in this scope: calls, path, density in all and by query head, and the time split."""
        return [self.reports[name].row() for name in self.reports]

    def note(
        self,
        site: Site,
        path: str,
        density: float,
        by_head: Tensor | float,
        select_seconds: float,
        execute_seconds: float,
    ) -> None:
        report = self.reports.setdefault(site.name, SiteReport(site))
        report.paths[path] += 1
        report.density_sum += density
        report.head_sums = report.head_sums + by_head
        report.select_seconds += select_seconds
        report.execute_seconds += execute_seconds

    def _fronts(self) -> list[Callable[..., Any]]:
        """What stands in front of the host's `generate`: the driver, and the refusal of drafts."""
        ahead = [
            s
            for s in self.stages
            if (isinstance(s, Selector) and s.looks_ahead) or (isinstance(s, CachePolicy) and s.by_forward)
            if hasattr(self.model, "generate")
        ]
        drivers = [s.generate for s in self.stages if isinstance(s, Driver)]
        return [*(partial(refuse_drafts, s.title) for s in ahead), *drivers]

    def _drive(self) -> None:
        """Puts them there; a driver goes first and finds the rest behind it."""
        self._driven = self.model.__dict__.get("generate")
        for front in self._fronts():
            generate: Any = self.model.generate
            self.model.__dict__["generate"] = partial(front, self.model, generate)

    def _stop_driving(self) -> None:
        if self._fronts():
            if self._driven is None:
                self.model.__dict__.pop("generate", None)
            else:
                self.model.__dict__["generate"] = self._driven

    def _check_layers(self, door: Door) -> None:
        known = sorted({site.layer for site in door.sites.values()})
        policy = next((s for s in self.stages if isinstance(s, CachePolicy)), None)
        left = [site.name for site in door.sites.values() if site.kind == "self" and not self.covers(site)]
        narrowed = self.layers is not None or self.patterns is not None
        # Without a self-test the sites are not known yet, so any narrowing may leave one out.
        if policy is not None and (left or (narrowed and not known)):
            raise ConflictError(
                f"layers, sites: got a scope {f'without {left[0]}' if left else 'of some sites'} for {policy.title}, "
                "expected the whole model: its cache serves every layer. Attach it in a scope of its own, without "
                "layers and sites."
            )
        if not known:
            return
        for layer in self.layers or ():
            if layer not in known:
                raise unknown("layers", layer, known)
        names = [site.name for site in door.sites.values()]
        for pattern in self.patterns or ():
            if not any(fnmatch(name, pattern) for name in names):
                raise unknown("sites", pattern, names)


class Door:
    """The interception of one model: hooks, names, sites, and the scopes that are open."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.handles: list[Handle] = []
        self.users = 0
        self.thread = threading.get_ident()
        self.sites: dict[tuple[str, int], Site] = {}
        self.tested_for: tuple[Any, ...] | None = None
        self.probe: Any = None
        self.modules = {module: name for name, module in model.named_modules()}
        self._renamed: list[Any] = []
        self._hooks: list[Any] = []
        self._local = threading.local()

    def install(self, model: nn.Module) -> None:
        """Hooks and implementation names, all or nothing."""
        try:
            for config in adapter.configs(model):
                self._rename(config)
            for module in self.modules:
                if adapter.uses_registry(module):
                    _MODULE_DOORS[module] = weakref.ref(self)
                    self._hooks.append(module.register_forward_pre_hook(self._enter_attention, with_kwargs=True))
                    self._hooks.append(module.register_forward_hook(self._leave_attention, always_call=True))
                if module is model or hasattr(module, "_can_set_attn_implementation"):
                    self._hooks.append(module.register_forward_pre_hook(self._enter_model, with_kwargs=True))
                    self._hooks.append(module.register_forward_hook(self._leave_model, always_call=True))
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module in self.modules:
            if _MODULE_DOORS.get(module, lambda: None)() is self:
                del _MODULE_DOORS[module]
        for config in self._renamed:
            _restore_name(config)
        self._renamed.clear()

    def _rename(self, config: Any) -> None:
        name = config._attn_implementation_internal
        if name is None:
            return
        count = _NAMED[id(config)][2] if id(config) in _NAMED else 0
        native = _NAMED[id(config)][1] if count else str.__str__(name)
        if native not in _REGISTERED:
            adapter.register(native, _Dispatch(native))
            _REGISTERED.add(native)
        _NAMED[id(config)] = (config, native, count + 1)
        config._attn_implementation_internal = adapter.DoorName(native)
        self._renamed.append(config)

    def add(self, handle: Handle) -> None:
        everything = [s for h in (*self.handles, handle) for s in h.stages]
        for kind, what in ((CachePolicy, "cache policies"), (Driver, "drivers")):
            found = [s for s in everything if isinstance(s, kind)]
            if len(found) > 1:
                raise ConflictError(
                    f"methods: got two {what}, {found[0].title} and {found[1].title}, expected one for a model. Attach "
                    "one at a time."
                )
        for site in self.sites.values():
            _refuse_conflicts(site, [s for h in (*self.handles, handle) for s in h.acting(site)])
        self.handles.append(handle)

    @property
    def policy(self) -> CachePolicy | None:
        return next((s for h in self.handles for s in h.stages if isinstance(s, CachePolicy)), None)

    def remove(self, handle: Handle) -> None:
        self.handles.remove(handle)

    @contextmanager
    def probing(self, probe: Any) -> Iterator[None]:
        """While a probe is set, calls go to it instead of the scopes."""
        self.probe = probe
        try:
            yield
        finally:
            self.probe = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Door:
        """A copy of the host shares this door's hooks, which pass over modules that are not the host's."""
        return self

    def _enter_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if module not in self.modules:
            return None
        if torch.compiler.is_compiling():
            _refuse_traced()
        local = self._local
        local.depth = getattr(local, "depth", 0) + 1
        if local.depth > 1 and getattr(local, "forward", None) is not None:
            if local.forward.padding is None:
                local.forward.padding = _padding(kwargs)
            return None
        policy = self.policy if self.probe is None else None
        changed = None
        if policy is not None:
            kwargs = _with_policy_cache(policy, module, kwargs)
            changed = args, kwargs
        past = _cache_length(kwargs)
        local.step = getattr(local, "step", -1) + 1 if past else 0
        local.forward = Forward(
            step=local.step,
            padding=_padding(kwargs),
            cache=kwargs.get("past_key_values"),
            model=module,
            inputs=kwargs,
        )
        local.fired = defaultdict(int)
        local.hidden = {}
        return changed

    def _leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if module not in self.modules:
            return
        local = self._local
        local.depth = max(getattr(local, "depth", 1) - 1, 0)
        if local.depth:
            return
        fired, forward, local.forward, local.hidden = local.fired, local.forward, None, {}
        policy = self.policy if self.probe is None else None
        if output is not None and policy is not None and forward is not None:
            cache = forward.inputs.get("past_key_values")
            if cache is not None and id(getattr(cache, "policy", None)) == id(policy):
                policy.settle(cache)
        if output is not None and not fired and self.handles and self.probe is None:
            raise InterceptionError(
                f"model: got a forward of {type(module).__name__} in which no attention passed the door, expected "
                "at least one. The attention implementation was changed, or the model was compiled, while a scope was "
                "open; leave the scope first."
            )

    def _enter_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self.modules:
            return
        if torch.compiler.is_compiling():
            _refuse_traced()
        local = self._local
        if not getattr(local, "depth", 0):
            local.forward, local.fired, local.hidden = Forward(), defaultdict(int), {}
        hidden = args[0] if args else next((kwargs[k] for k in ("hidden_states", "query", "x") if k in kwargs), None)
        local.hidden[module] = (hidden, kwargs)

    def _leave_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        """Lets go of the module's inputs, which would otherwise all live until the end of the forward."""
        getattr(self._local, "hidden", {}).pop(module, None)

    def serve(
        self,
        native: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        keywords: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """One attention operation of the host, on its way through the open scopes."""
        local = self._local
        forward = getattr(local, "forward", None) or Forward()
        fired = getattr(local, "fired", None)
        if fired is None:
            fired = local.fired = defaultdict(int)
        hidden, given = getattr(local, "hidden", {}).get(module, (None, {}))
        # Pieces of one text are one site, however many they are.
        turn = fired[module] if keywords.get("piece") is None else 0
        fired[module] += 1
        site = self.site(module, turn, query, key, {**given, **keywords})
        function = adapter.native_function(module, native)
        stages = [(h, s) for h in self.handles for s in h.acting(site)] if self.probe is None else []
        if self.probe is None and not stages:
            return function(module, query, key, value, mask, **keywords)
        _place(forward, query, key, given, keywords)
        slots = _slots(forward, site, module, query, key)
        call = adapter.normal_form(
            site, module, query, key[:, :, :slots], value[:, :, :slots], mask, implementation=native, forward=forward,
            hidden=hidden, **keywords,
        )  # fmt: skip
        call = _at_positions(call)
        if self.probe is not None:
            return self.probe(call, function, mask, keywords)
        return _run(call, function, (query, key, value, mask), keywords, stages)

    def site(self, module: nn.Module, turn: int, query: Tensor, key: Tensor, keywords: dict[str, Any]) -> Site:
        """The site of a module; a module that attends several times in one forward has one site per turn."""
        name = self.modules.get(module, type(module).__name__)
        if (name, turn) not in self.sites:
            full = name if turn == 0 else f"{name}#{turn}"
            site = adapter.site_of(module, full, len(self.sites), query, key, keywords)
            kind = "cross" if _is_cross(module, keywords) else "self"
            site = replace(site, kind=kind)
            if self.probe is None:
                # A scope that was attached without a self-test could not be checked at this site before.
                _refuse_conflicts(site, [s for h in self.handles for s in h.acting(site)])
            self.sites[name, turn] = site
        return self.sites[name, turn]


def pass_by(module: nn.Module) -> None:
    """Notes, with the scopes that are open, a call of one of Headway's own modules that has no keys to weigh.

    Raises InterceptionError where a method was to change it."""
    door = _MODULE_DOORS.get(module, lambda: None)()
    if door is None or door.probe is not None:
        return
    local = door._local
    if getattr(local, "fired", None) is None:
        local.fired = defaultdict(int)
    local.fired[module] += 1
    site = door.sites.get((door.modules.get(module, ""), 0))
    if site is None:
        return
    for handle in door.handles:
        for stage in handle.acting(site):
            if isinstance(stage, Selector | Editor):
                raise InterceptionError(
                    f"{stage.title} at {site.name}: got tokens behind a filled state, whose earlier keys are sums by "
                    "now, expected a text from its first token on. Run it without a cache (use_cache=False)."
                )
        if handle.acting(site):
            handle.note(site, "past the door: its keys are sums in a state", 1.0, 1.0, 0.0, 0.0)


class _Dispatch:
    """The function behind a `DoorName`: finds the door of the module that calls, or steps aside."""

    def __init__(self, native: str) -> None:
        self.native = native

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        door = _MODULE_DOORS.get(module, lambda: None)()
        if door is None:
            function = adapter.native_function(module, self.native)
            return function(module, query, key, value, attention_mask, **keywords)
        return door.serve(self.native, module, query, key, value, attention_mask, keywords)


def use(
    model: nn.Module,
    *methods: Stage,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] | None = None,
    selftest: bool = True,
    example: dict[str, Any] | None = None,
) -> Handle:
    """Attaches methods to a model for the length of a `with` block.

    `layers` and `sites` (module paths, `*` allowed) narrow where they act. The first scope on a model runs a self-test
    on `example` (a small input is made when none is given): parity with the host's own output, causality, row sums,
    and that the host's output depends on its heads. Raises InterceptionError with the reason when the host cannot be
    intercepted, ConflictError when methods want the same thing, ArgumentError for a layer or site that is not there."""
    for method in methods:
        if not isinstance(method, Stage):
            raise ArgumentError(
                f"methods: got {method!r}, expected instances of Selector, Editor, CachePolicy, Driver or Observer. "
                "Construct the method first."
            )
    return Handle(model, methods, layers=layers, sites=sites, selftest=selftest, example=example)


def observe(model: nn.Module, *observers: Observer, **options: Any) -> Handle:
    """`use` for observers only: nothing can change the output."""
    for observer in observers:
        if not isinstance(observer, Observer) or isinstance(observer, Selector | Editor):
            raise ArgumentError(
                f"observers: got {observer!r}, expected observers only. Use `headway.use` for methods that act."
            )
    return use(model, *observers, **options)


def open_door(model: nn.Module) -> Door:
    """The door of a model, installed when this is its first scope. Each `open_door` needs a `close_door`."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: got {type(model).__name__}, expected a torch module such as a transformers model.")
    _refuse_compiled(model)
    with _LOCK:
        door = _DOORS.get(model)
        if door is None:
            door = Door(model)
            door.install(model)
            _DOORS[model] = door
        elif door.thread != threading.get_ident():
            raise ConflictError(
                f"model: got a second scope on {type(model).__name__} from another thread while one is open, "
                "expected one thread to hold a model's scopes. Open both scopes in one thread, or load a second model."
            )
        door.users += 1
        return door


def _refuse_compiled(model: nn.Module) -> None:
    """Raises InterceptionError for a model, or a part of one, that was compiled in any of the ways PyTorch knows."""
    if hasattr(model, "_orig_mod"):
        raise InterceptionError(
            "model: got a compiled model, whose hooks are traced away; expected an ordinary one. Pass model._orig_mod."
        )
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            how = "module.compile() or torch.compile(module)"
        elif hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            how = "forward = torch.compile(forward)"
        else:
            continue
        raise InterceptionError(
            f"model: got {name or type(model).__name__} compiled ({how}), whose hooks are traced away; expected an "
            "ordinary module. Load the model again and leave it uncompiled."
        )


@torch.compiler.disable
def _refuse_traced() -> None:
    """Raises InterceptionError for a model that is compiled while a scope is open: a trace keeps what one forward did,
    and methods would go on with its caches and positions. Called where a hook is traced, run when the trace is."""
    raise InterceptionError(
        "model: got a compiled model while a scope is open, expected an ordinary one: a trace would repeat what the "
        "methods did in its first forward. Call the model itself, without torch.compile."
    )


def close_door(door: Door) -> None:
    with _LOCK:
        door.users -= 1
        if door.users == 0:
            door.uninstall()
            model = door.model()
            if model is not None:
                _DOORS.pop(model, None)


def _run(
    call: AttentionCall,
    function: adapter.AttentionFunction,
    tensors: tuple[Tensor, Tensor, Tensor, Any],
    keywords: dict[str, Any],
    stages: list[tuple[Handle, Stage]],
) -> tuple[Tensor, Tensor | None]:
    selectors = [s for _, s in stages if isinstance(s, Selector) and call.forward.phase in s.phases]
    policy = next((s for _, s in stages if isinstance(s, CachePolicy)), None)
    editors = [s for _, s in stages if isinstance(s, Editor)]
    edited = call
    for editor in editors:
        if "call" in editor.edits:
            changed = editor.edit_call(edited)
            refuse_emptied_rows(edited, changed, editor.title)
            edited = changed
    start = time.perf_counter()
    weights: Tensor | None = None
    done: Executed | str = "native"
    if policy is not None:
        parts = policy.read(edited)
        if parts is not None:
            if selectors:
                raise ConflictError(
                    f"methods at {call.site.name}: got {selectors[0].title}, which selects keys in "
                    f"{call.forward.phase}, where {policy.title} reads its own cache; expected one of them to act. Use "
                    "a selector for the other phase, or other layers."
                )
            done = execute_parts(edited, parts, editors, policy.title, time.perf_counter() - start)
    if isinstance(done, str) and (selectors or edited is not call or any("weights" in e.edits for e in editors)):
        reads = any(isinstance(s, Observer) and s.reads_weights for _, s in stages)
        done = execute(edited, selectors, editors, changed=edited is not call, masked=reads)
    if not isinstance(done, str):
        edited, output, lse, path = done.call, done.output, done.lse, done.path
        density: float = done.density
        by_head: Tensor | float = done.density_by_head
        spent = (done.select_seconds, done.execute_seconds)
    else:
        native, weights = function(call.module, *tensors, **keywords)
        output, lse, path = native.transpose(1, 2), None, done
        density, by_head = 1.0, 1.0
        spent = (0.0, time.perf_counter() - start)
    for editor in editors:
        if "output" in editor.edits:
            path = f"{path}+edit" if path.startswith("native") else path
            output = editor.edit_output(edited, output, lse)
            weights = None
    with torch.no_grad():
        _show(edited, output, lse, [s for _, s in stages if isinstance(s, Observer)])
    for handle in dict.fromkeys(h for h, _ in stages):
        handle.note(call.site, path, density, by_head, *spent)
    return output.transpose(1, 2).contiguous(), weights


def _show(call: AttentionCall, output: Tensor, lse: Tensor | None, observers: Sequence[Observer]) -> None:
    """Gives the call to observers, or its text to those that ask for that."""
    text: tuple[AttentionCall, Tensor] | None = call, output
    if any(observer.on_text for observer in observers):
        text = text_call(call, output)
    for observer in observers:
        if not observer.on_text:
            observer.observe(call, output, lse)
        elif text is not None:
            observer.observe(*text, lse if text[0] is call else None)


def _refuse_conflicts(site: Site, stages: Sequence[Stage]) -> None:
    for first, second in combinations([s for s in stages if isinstance(s, Selector)], 2):
        together = getattr(first, "intersects", False) and getattr(second, "intersects", False)
        if together or not first.phases & second.phases:
            continue
        raise ConflictError(
            f"methods at {site.name}: got two selectors, {first.title} and {second.title}, expected one. Give them "
            "different layers or sites, or combine their selections in one selector."
        )
    policies = [s for s in stages if isinstance(s, CachePolicy)]
    if policies:
        _refuse_beside_policy(site, policies[0], stages)
    readers = [s for s in stages if isinstance(s, Observer) and s.reads_weights]
    writers = [s for s in stages if isinstance(s, Editor) and "weights" in s.edits and not s.keeps_weights]
    if readers and writers:
        raise ConflictError(
            f"methods at {site.name}: got {readers[0].title}, which reads weights from q and k, and "
            f"{writers[0].title}, which "
            "replaces them; expected one or the other. Capture head_output, or read in a scope without the editor."
        )


def _refuse_beside_policy(site: Site, policy: CachePolicy, stages: Sequence[Stage]) -> None:
    """What a cache policy's own calls cannot carry at a site: selectors of the same phase, readers of weights or keys,
    and editors that know only the host's calls."""
    for stage in stages:
        both = isinstance(stage, Selector) and stage.phases & policy.narrows
        blind = isinstance(stage, Editor) and stage.edits and not policy.narrows <= stage.reads_parts
        if both or blind or (isinstance(stage, Observer) and (stage.reads_weights or stage.reads_keys)):
            why = (
                f"selects keys in {', '.join(sorted(stage.phases & policy.narrows))}, where the policy reads its cache"
                if isinstance(stage, Selector)
                else "needs all keys of all heads in one call"
            )
            raise ConflictError(
                f"methods at {site.name}: got {policy.title} and {stage.title}, which {why}; expected one of them, as "
                "a policy serves every layer. Attach one at a time, or a selector for the other phase."
            )


def _with_policy_cache(policy: CachePolicy, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The host's keyword inputs with a cache of the policy where the host would make or has made an empty one, and with
    the padding mask that a mask of pairs says."""
    mask = kwargs.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        padding = _padding(kwargs)
        if padding is None:
            raise ArgumentError(
                "attention_mask: got a mask of four dimensions that hides more than padding and the future, expected "
                f"(batch, tokens): {policy.title} keeps other keys than the host, and its mask would stand over the "
                "wrong ones. Leave it out, or pass the padding mask."
            )
        kwargs = kwargs | {"attention_mask": padding.long()}
    require_one_sequence_per_row(kwargs.get("position_ids"), kwargs.get("attention_mask"))
    cache = kwargs.get("past_key_values")
    if getattr(cache, "policy", None) is not policy:
        if cache is None:
            asked = kwargs.get("use_cache")
            if not (getattr(getattr(model, "config", None), "use_cache", False) if asked is None else asked):
                return kwargs
        elif _tokens_seen(cache, 0):
            raise ConflictError(
                f"past_key_values: got a {type(cache).__name__} with {_tokens_seen(cache, 0)} tokens that was filled "
                f"without {policy.title}, expected an empty cache or none. Start the request inside the scope."
            )
        kwargs = kwargs | {"past_key_values": policy.make_cache(model)}
    return policy.enter(kwargs["past_key_values"], kwargs)


def _restore_name(config: Any) -> None:
    entry = _NAMED.get(id(config))
    if entry is None:
        return
    _, native, count = entry
    if count > 1:
        _NAMED[id(config)] = (config, native, count - 1)
        return
    del _NAMED[id(config)]
    if isinstance(config._attn_implementation_internal, adapter.DoorName):
        config._attn_implementation_internal = native


def _padding(kwargs: dict[str, Any]) -> Tensor | None:
    """Which positions so far are tokens: from a mask of positions, or from one of pairs that hides padding and the
    future and nothing else, which `generate` makes for a static cache."""
    mask = kwargs.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask.bool()
    past = _cache_length(kwargs)
    tokens = past + mask.shape[-2]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] < tokens:
        return None
    seen = mask > torch.finfo(mask.dtype).min * adapter.HIDDEN_SHARE if mask.is_floating_point() else mask.bool()
    seen = seen[:, 0, :, :tokens]
    real = seen[:, -1]
    return real if torch.equal(seen, real[:, None] & torch.ones_like(seen).tril(past)) else None


def _cache_length(kwargs: dict[str, Any]) -> int:
    return _tokens_seen(kwargs.get("past_key_values"), 0)


def _tokens_seen(cache: Any, layer: int) -> int:
    """Tokens that a cache has seen at a layer; 0 for no cache, or for layers whose cache does not count."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return int(cache.get_seq_length(layer))
    except (ValueError, IndexError, AttributeError):
        return 0


def _place(forward: Forward, query: Tensor, key: Tensor, given: dict[str, Any], keywords: dict[str, Any]) -> None:
    """Fills in what the module's own inputs tell about this forward: cache, positions, phase."""
    cache = next(
        (given[k] for k in ("past_key_values", "past_key_value", "layer_past") if given.get(k) is not None), None
    )
    forward.cache = cache if cache is not None else forward.cache
    positions = keywords.get("position_ids", given.get("position_ids"))
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == query.shape[2]:
        forward.positions = positions
    past = key.shape[2] > 1 or (forward.cache is not None and forward.step > 0)
    forward.phase = "decode" if query.shape[2] == 1 and past else "prefill"


def _slots(forward: Forward, site: Site, module: nn.Module, query: Tensor, key: Tensor) -> int:
    """How many of the keys are there: a static cache also holds empty slots for tokens to come."""
    layer = getattr(module, "layer_idx", None)
    seen = _tokens_seen(forward.cache, layer) if site.kind == "self" and isinstance(layer, int) else 0
    return seen if query.shape[2] <= seen < key.shape[2] else key.shape[2]


def _at_positions(call: AttentionCall) -> AttentionCall:
    """The call with the place of its keys in the sequence, for caches that hold fewer slots than tokens."""
    cache, layer = call.forward.cache, getattr(call.module, "layer_idx", None)
    if call.site.kind != "self" or cache is None or not isinstance(layer, int):
        return call
    seen = _tokens_seen(cache, layer)
    if seen < call.queries or seen == call.keys:
        return call
    return call.replace(first_key=max(seen - call.keys, 0), first_query=seen - call.queries)


def _is_cross(module: nn.Module, keywords: dict[str, Any]) -> bool:
    if any(keywords.get(k) is not None for k in ("key_value_states", "encoder_hidden_states")):
        return True
    return bool(getattr(module, "is_cross_attention", False))
