"""Whether the hub can be asked at all, found out once and soon. Its own client tries each file five times, half a
minute where there is no network, and waits for ever for a hub that is silent."""

from __future__ import annotations

from functools import cache

from besa_exp.errors import first_line

HUB_TIMEOUT = 15.0  # seconds; of one request


def hub_problem() -> str | None:
    """Why the hub cannot be reached; None: it answers."""
    from huggingface_hub import constants

    return _problem(constants.ENDPOINT)


@cache
def _problem(endpoint: str) -> str | None:
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] # its client's, by version

    try:
        get_session().head(endpoint, timeout=HUB_TIMEOUT)
    except (OSError, HTTPError) as error:
        return first_line(error)
    return None
