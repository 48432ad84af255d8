"""The Hugging Face hub, where it can't be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies


@contextmanager
def no_retries() -> Iterator[None]:
    """Where the hub's name can't be resolved, look in the cache only, instead of asking again for minutes."""
    from huggingface_hub import constants

    libraries = [constants]
    try:
        from datasets import config

        libraries.append(config)
    except ModuleNotFoundError:
        pass
    before = [library.HF_HUB_OFFLINE for library in libraries]
    offline = constants.HF_HUB_OFFLINE or not _is_known(constants.ENDPOINT)
    for library in libraries:
        library.HF_HUB_OFFLINE = library.HF_HUB_OFFLINE or offline
    try:
        yield
    finally:
        for library, value in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = value


def _is_known(endpoint: str) -> bool:
    if getproxies():
        return True  # a proxy resolves names by itself
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True
