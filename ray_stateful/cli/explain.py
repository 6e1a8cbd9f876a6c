"""An error as one line that says what to do. Pure."""

from __future__ import annotations

import re

from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint, StorageError, UnknownFormat
from ray_stateful.storage.credentials import without_credentials

# What the clients of the stores say when they have no credentials, wrong ones, or no permission.
_DENIED = re.compile(
    r"ACCESS[ _]?DENIED|\b40[13]\b|FORBIDDEN|UNAUTHORIZED|CREDENTIAL|INVALID_?ACCESS_?KEY|SIGNATURE_?DOES_?NOT_?MATCH"
    r"|AuthenticationFailed|permission denied",
    re.IGNORECASE,
)
_UNREACHABLE = re.compile(
    r"NETWORK_CONNECTION|could ?n.t connect|resolve host|curlCode|still failing after|timed out", re.IGNORECASE
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|bucket does not exist|404", re.IGNORECASE)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NO_SCHEME = re.compile(r"Unrecognized filesystem type", re.IGNORECASE)


def explain(error: BaseException) -> str:
    """What went wrong, and what to do about it."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    text = without_credentials(text)
    advice = _advice(error, _said(error, text))
    return f"{text}: {advice}" if advice else text


def _said(error: BaseException, text: str) -> str:
    """What an error says, without the path it is about: a path may contain "404", or "safetensors"."""
    if isinstance(error, DamagedCheckpoint):
        return error.found
    return _QUOTED.sub("", error.cause if isinstance(error, StorageError) else text)


def _advice(error: BaseException, text: str) -> str | None:
    if isinstance(error, UnknownFormat):
        # The error itself says which version to install.
        return None
    if isinstance(error, HostileCheckpoint) and "safetensors" not in text:
        return "do not use this checkpoint, unless you know who wrote it and why"
    if isinstance(error, DamagedCheckpoint):
        if "never committed" in text:
            return "choose another one; `ray-stateful ls RUN` shows which are committed, and `gc` deletes the others"
        if "safetensors" in text or "nothing to import" in text:
            return None
        if "no checkpoint" in text:
            return "give the directory of a checkpoint; `ray-stateful ls RUN` lists those of a run"
        return "`ray-stateful verify` lists all that is wrong"
    if isinstance(error, FileExistsError):
        return None
    if isinstance(error, OSError | StorageError):
        if _DENIED.search(text):
            return "check the credentials (environment, profile, or role) and their permission for this path"
        if _NO_BUCKET.search(text):
            return "check the name of the bucket and its region"
        if _UNREACHABLE.search(text):
            return "check the endpoint, the region and the network"
    if _NO_SCHEME.search(text):
        return "use a path, or a URI that starts with s3://, gs://, abfss:// or file://"
    return None
