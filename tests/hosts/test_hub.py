from __future__ import annotations

import socket
import threading

import pytest

from headway.errors import ArgumentError, HostError, MissingExtraError
from headway.hosts import hub

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxy_and_no_offline_mode(monkeypatch):
    from huggingface_hub import constants

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def closed():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return f"127.0.0.1:{port}"


def test_a_hub_that_answers_is_reachable(server):
    assert hub.reachable(f"http://{server}")


def test_a_closed_port_and_an_unknown_name_are_not_reachable(closed):
    assert not hub.reachable(f"http://{closed}")
    assert not hub.reachable("https://no-such-host.invalid")


def test_a_name_lookup_that_hangs_does_not_hold_up_the_answer(monkeypatch):
    never = threading.Event()

    def hang(*_, **__):
        never.wait()
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    assert not hub.reachable("https://hub.invalid", patience=0.05)
    never.set()


def test_offline_mode_of_the_hub_is_respected(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable(f"http://{server}")


def test_a_proxy_is_asked_in_place_of_the_hub(server, closed, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://{server}")
    assert hub.reachable("https://no-such-host.invalid")
    monkeypatch.setenv("https_proxy", closed)
    assert not hub.reachable("https://no-such-host.invalid")


def test_the_first_hop_knows_the_usual_ports():
    assert hub._first_hop("https://hub.example") == ("hub.example", 443)
    assert hub._first_hop("http://hub.example/mirror") == ("hub.example", 80)
    assert hub._first_hop("http://hub.example:8000") == ("hub.example", 8000)


def raised(cause: Exception) -> Exception:
    """An OSError on several lines, the way transformers wraps what the hub's library raised."""
    try:
        raise OSError("could not load\nsee the documentation") from cause
    except OSError as error:
        return error


def hub_error(name: str) -> Exception:
    import httpx2
    from huggingface_hub import errors

    kind = getattr(errors, name)
    response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.invalid"))
    return kind("gone", response=response) if issubclass(kind, errors.HfHubHTTPError) else kind("gone")


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("GatedRepoError", HostError, "accept its terms.*hf auth login"),
        ("RepositoryNotFoundError", HostError, "no such model"),
        ("RevisionNotFoundError", ArgumentError, "no such revision"),
        ("HFValidationError", ArgumentError, "owner/name"),
        ("LocalEntryNotFoundError", HostError, "connection to .* failed"),
    ],
)
def test_every_error_of_the_hub_is_one_line_with_its_fix(name, kind, words):
    error = hub.explain(raised(hub_error(name)), "owner/name", offline=False, local=False)
    assert type(error) is kind
    assert "\n" not in str(error)
    with pytest.raises(kind, match=words):
        raise error


def test_offline_and_missing_packages_are_told_apart():
    offline = hub.explain(raised(hub_error("LocalEntryNotFoundError")), "owner/name", offline=True, local=False)
    assert "cannot be reached" in str(offline)
    assert "hf download owner/name" in str(offline)
    missing = hub.explain(ImportError("install\nsentencepiece"), "owner/name", offline=False, local=False)
    assert isinstance(missing, MissingExtraError)
    assert "install sentencepiece" in str(missing)
