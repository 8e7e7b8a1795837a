"""The model hub: whether it can be reached, and its errors in one line each.

An unreachable hub is found out once, by one connection attempt of a few seconds, and not by the retries that
`huggingface_hub` makes for every file (23 s for the first of them on a machine without a network). Models that are in
the hub's own cache still load then.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from headway.errors import ArgumentError, HeadwayError, HostError, MissingExtraError

# Seconds until a hub that does not answer counts as unreachable, name lookup included.
PATIENCE = 4.0


def hub_address() -> str:
    """The address of the hub in use (HF_ENDPOINT, else the public one)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def reachable(address: str, *, patience: float = PATIENCE) -> bool:
    """Whether a connection to the hub (or to the proxy in front of it) opens within `patience` seconds. False without
    trying where the user has set HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    host, port = _first_hop(address)
    answered = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=patience).close()
        except OSError:
            return
        answered.set()

    # A name lookup has no time limit of its own, hence the thread; a daemon never holds up the end of the program.
    knocking = threading.Thread(target=knock, daemon=True)
    knocking.start()
    knocking.join(patience)
    return answered.is_set()


def _first_hop(address: str) -> tuple[str, int]:
    target = urlsplit(address)
    proxy = getproxies().get(target.scheme)
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        return target.hostname or "", target.port or 8080
    return target.hostname or "", target.port or (80 if target.scheme == "http" else 443)


def explain(error: Exception, name: str, *, offline: bool, local: bool) -> HeadwayError:
    """The Headway error for what transformers or the hub raised while `name` was loaded."""
    from huggingface_hub import errors

    chain = list(_causes(error))
    texts = " ".join(str(link) for link in chain)

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    who = f"model {name!r}"
    if "trust_remote_code" in texts:
        return ArgumentError(
            f"{who}: it brings Python code of its own, which is not run by default; if you trust its author, pass "
            "trust_remote_code=True"
        )
    if met(errors.HFValidationError):
        return ArgumentError(f"{who}: expected a short name, a folder, or a hub id of the form owner/name")
    if met(errors.GatedRepoError):
        return HostError(f"{who}: access is gated; accept its terms at {hub_address()}/{name}, then run: hf auth login")
    if met(errors.RevisionNotFoundError):
        return ArgumentError(f"{who}: it has no such revision; leave `revision` out to get its newest one")
    if met(errors.RepositoryNotFoundError):
        return HostError(f"{who}: the hub has no such model, or it is private; check the name, or run: hf auth login")
    if offline and not local:
        return HostError(
            f"{who}: the hub at {hub_address()} cannot be reached, and this model is not whole in its local cache; "
            f"connect to a network and run: hf download {name}, or give a local folder or an embedded model"
        )
    if re.search(r"safetensors", texts) and re.search(r"no file named|does not appear to have|not found", texts):
        return HostError(
            f"{who}: it holds no safetensors weights, and pickled weights are not loaded because they can run code; "
            "save it again with: model.save_pretrained(folder)"
        )
    if met(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        return HostError(f"{who}: the connection to {hub_address()} failed; try again, or run: hf download {name}")
    if met(ImportError):
        return MissingExtraError(f"{who}: it needs a package that is not installed; {brief(error)}")
    return HostError(f"{who}: cannot be loaded; {type(error).__name__}: {brief(error)}")


def brief(error: BaseException, limit: int = 300) -> str:
    """The message of an error on one line, cut at `limit` characters."""
    line = re.sub(r"\s+", " ", str(error)).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
