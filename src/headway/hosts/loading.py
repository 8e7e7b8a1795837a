"""`load`: a model and its tokenizer from a short name, a local folder or a hub id."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headway.errors import ArgumentError, HeadwayError, HostError, missing_extra, unknown
from headway.hosts import convert, hub
from headway.hosts.cache import Report, converted, damage, host_folder, remembered_sha256, sha256_of
from headway.hosts.registry import EmbeddedHost, absent_needs, embedded_hosts, package_file, reinstall

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
#: Heads that `classes` keeps, by the end of the architecture's name.
HEADS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForImageClassification": "AutoModelForImageClassification",
}
_CONVERTERS: dict[str, Callable[[Path, Path, Report], None]] = {
    "smollm2": convert.convert_gguf,
    "vit": convert.convert_dinov2,
}


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    classes: bool = False,
    check_weights: bool = True,
    verify: bool = False,
) -> tuple[Any, Any]:
    """A model in eval mode and what prepares its input: a tokenizer, or an image processor for a vision model.

    name: "smollm2", "minilm" or "vit" (embedded in a Python package, converted once where needed; a folder of that name
        is given as "./vit"), a local folder, or a hub id "owner/name".
    dtype: "float32", "bfloat16", "float16", "float64" or the torch dtype. The embedded weights are kept in float32.
    attn_implementation: passed on to transformers; None is the model's own default.
    trust_remote_code: run Python code that comes with the model. Only if you trust its author.
    revision: branch, tag or commit of a hub id.
    classes: keep the head of a checkpoint that says it is a classifier of texts, tokens or pictures.
    check_weights: look for NaN and infinity in the weights.
    verify: hash the converted weights again, not only compare their size.

    A causal language model comes with its output layer (`AutoModelForCausalLM`), a classifier with its head where
    `classes` asks for it, anything else as the bare model (`AutoModel`). Only safetensors are read.
    `model.name_or_path` of an embedded host is "package==version".

    Raises ArgumentError for an argument that cannot be used, MissingExtraError for a package that is not installed, and
    HostError for a model that is absent, damaged, or out of reach."""
    wanted = str(os.fspath(name))
    torch_dtype, torch_device = _dtype(dtype), _device(device)
    options = {
        "dtype": torch_dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "classes": classes,
    }
    embedded = embedded_hosts().get(wanted)
    local = embedded is None and _is_local(wanted)
    if revision is not None and (embedded is not None or local):
        raise ArgumentError(
            f"revision: got {revision!r} for {wanted!r}, expected none; only hub ids have revisions, leave it out"
        )
    if embedded is not None:
        model, processor = _load_embedded(embedded, options, verify)
    elif local:
        model, processor = _load_source(_model_folder(wanted), wanted, options, local=True)
    else:
        model, processor = _load_source(_hub_id(wanted), wanted, {**options, "revision": revision}, local=False)
    if check_weights:
        _check_finite(model, wanted)
    return model.to(torch_device).eval(), processor


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise unknown("dtype", dtype, DTYPES.values())
    return dtype


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ArgumentError(
            f"device: got {str(device)!r}, which cannot be used here ({hub.brief(error, 120)}); use device='cpu'"
        ) from error
    return found


def _is_local(name: str) -> bool:
    looks_local = name.startswith((".", "/", "~", os.sep)) or name.endswith(".gguf")
    return looks_local or os.path.exists(os.path.expanduser(name))


def _model_folder(name: str) -> Path:
    folder = os.path.expanduser(name)
    if not os.path.exists(folder):
        raise HostError(f"model {name!r}: no such folder; give the path of a folder written by save_pretrained")
    if not os.path.isdir(folder):
        raise HostError(f"model {name!r}: is a file, expected a folder written by save_pretrained")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise HostError(
            f"model {name!r}: is no model folder, it has no config.json; write one with model.save_pretrained(folder) "
            "and tokenizer.save_pretrained(folder)"
        )
    return Path(folder)


def _hub_id(name: str) -> str:
    """The name itself, if it can be a hub id; a likely misspelling of a short name is an error and not a look-up."""
    names = list(embedded_hosts())
    if "/" not in name:
        near = get_close_matches(name.lower(), names, n=1)
        if near or not name.strip():
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(
                f"model: got {name!r}, expected one of {', '.join(names)}, a local folder, or a hub id "
                f"owner/name.{hint}"
            )
    return name


def _load_embedded(host: EmbeddedHost, options: dict[str, Any], verify: bool) -> tuple[Any, Any]:
    folder = _embedded_folder(host, verify)
    if folder is None:
        return _load_instead(host, options)
    model, processor = _load_source(folder, host.name, options, local=True)
    model.name_or_path = model.config._name_or_path = f"{host.package}=={host.version}"
    return model, processor


def _embedded_folder(host: EmbeddedHost, verify: bool) -> Path | None:
    """The folder with the host's weights: the package's own, the copy in the cache, or one converted now. None where
    there is neither package nor copy."""
    copy = host_folder(host.key)
    if host.recipe and damage(copy, verify=verify) is None:
        return copy
    source = package_file(host)
    if source is None:
        return None
    if not host.recipe:
        _check_sha256(host, remembered_sha256(source))
        return source.parent
    absent = absent_needs(host)
    if absent:
        raise missing_extra(absent[0], host.extra or "", f"converting the model {host.name!r}")
    run = partial(_convert_checked, host, source)
    return converted(host.key, run, title=f"model {host.name!r}", room=host.converted_bytes, verify=verify)


def _convert_checked(host: EmbeddedHost, source: Path, folder: Path, report: Report) -> None:
    report("checking the package")
    _check_sha256(host, sha256_of(source))
    _CONVERTERS[host.name](source, folder, report)


def _check_sha256(host: EmbeddedHost, found: str) -> None:
    if found != host.sha256:
        raise HostError(
            f"model {host.name!r}: {host.file} has the wrong checksum {found[:12]}…, expected {host.sha256[:12]}…; "
            f"install the package again with: {reinstall(host)}"
        )


def _load_instead(host: EmbeddedHost, options: dict[str, Any]) -> tuple[Any, Any]:
    """The same model from the hub, where there is one."""
    missing = f"model {host.name!r}: the package {host.package} is not installed"
    if host.hub_id is None:
        raise HostError(f"{missing}, and no hub model has the same weights; install it with: {host.install}")
    try:
        found = _load_source(host.hub_id, host.hub_id, options, local=False)
    except HostError as error:
        raise HostError(
            f"{missing}, and {host.hub_id} cannot be had from the hub either; install the package with: {host.install}"
        ) from error
    logger.warning("%s; took %s from the hub, whose numbers differ a little", missing, host.hub_id)
    return found


def _load_source(source: str | Path, name: str, options: dict[str, Any], *, local: bool) -> tuple[Any, Any]:
    """Model and processor from a folder or a hub id, with every failure turned into one line."""
    from transformers import AutoConfig

    offline = local or not hub.reachable(hub.hub_address())
    shared = {
        "trust_remote_code": options["trust_remote_code"],
        "revision": options.get("revision") or "main",
        "local_files_only": offline,
    }
    weights = {"dtype": options["dtype"], "attn_implementation": options["attn_implementation"]}
    try:
        with convert.quiet_bars() if local else nullcontext():
            _know_own_models(source)
            config = AutoConfig.from_pretrained(source, **shared)
            kind = _model_class(config, classes=options["classes"])
            model, facts = kind.from_pretrained(
                source, config=config, use_safetensors=True, output_loading_info=True, **weights, **shared
            )
            processor = _processor(source, model, shared)
    except HeadwayError:
        raise
    except Exception as error:
        implementation = options["attn_implementation"]
        if implementation is not None and implementation in str(error):
            raise ArgumentError(
                f"attn_implementation: got {implementation!r}, which {name!r} cannot use ({hub.brief(error, 200)}); "
                "leave it out for the model's default"
            ) from error
        raise hub.explain(error, name, offline=offline, local=local) from error
    _check_complete(facts, name, pooler=kind.__name__ in HEADS.values())
    return model, processor


def _know_own_models(source: str | Path) -> None:
    """Makes models that were trained here known to transformers. They stand above hosts, so they are named by text."""
    config = Path(source) / "config.json"
    if config.is_file() and str(json.loads(config.read_text(encoding="utf-8")).get("model_type")).startswith("headway"):
        importlib.import_module("headway.models")


def _model_class(config: Any, *, classes: bool = False) -> Any:
    """AutoModelForCausalLM where the checkpoint says that it is one, a classifier where `classes` are wanted and it
    says that it is one, AutoModel for everything else."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # A mapping value may be several names: one class per variant of the configuration.
    causal = {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ((names,) if isinstance(names, str) else names)
    }
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    stated = set(config.architectures or ())
    for ending, kind in HEADS.items() if classes else ():
        if any(name.endswith(ending) for name in stated):
            return getattr(transformers, kind)
    registered = type(config) in AutoModelForCausalLM._model_mapping and any(n.endswith("ForCausalLM") for n in stated)
    return AutoModelForCausalLM if remote or registered or stated & causal else AutoModel


def _processor(source: str | Path, model: Any, shared: dict[str, Any]) -> Any:
    """The tokenizer of a text model, the image processor of a vision model, the processor of one that takes both or
    sound; None for one of numbers, which need no preparing."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    if hasattr(model.config, "vision_config") or model.main_input_name == "input_features":
        return AutoProcessor.from_pretrained(source, **shared)
    if model.main_input_name == "numbers":
        return None
    if model.main_input_name == "pixel_values":
        _require_pillow()
        return AutoImageProcessor.from_pretrained(source, **shared)
    return AutoTokenizer.from_pretrained(source, **shared)


def _require_pillow() -> None:
    from transformers.utils import is_vision_available

    if not is_vision_available():
        raise missing_extra("pillow", "vision", "preparing images")


def _check_complete(facts: dict[str, Any], name: str, *, pooler: bool) -> None:
    """Weights that a checkpoint lacks would be random numbers. Only a pooler may be missing, where no head reads it: no
    attention sees it."""
    absent = sorted(facts["missing_keys"])
    unread = [] if pooler else [key for key in absent if "pooler." in key]
    if unread:
        logger.warning("model %r: its pooler is not in the checkpoint and holds random numbers", name)
    rest = [key for key in absent if key not in unread]
    if rest:
        raise HostError(
            f"model {name!r}: its checkpoint lacks {len(rest)} of the weights (first: {rest[0]}), which would be "
            "random; save the whole model again with: model.save_pretrained(folder)"
        )


def _check_finite(model: torch.nn.Module, name: str) -> None:
    for parameter, tensor in model.named_parameters():
        # One sum is quicker than an element-wise look; only if it is not finite are the elements looked at.
        if tensor.is_meta or torch.isfinite(tensor.sum(dtype=torch.float32)):
            continue
        broken = int((~torch.isfinite(tensor)).sum())
        if broken:
            raise HostError(
                f"model {name!r}: the weight {parameter} holds {broken:,} NaN or infinite numbers; get its files "
                "again, or pass check_weights=False to look at it all the same"
            )
