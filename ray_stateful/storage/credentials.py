"""Secrets in URIs, which are neither shown nor kept. Pure."""

from __future__ import annotations

import re

# Query parameters that are secrets. pyarrow knows a few of them and refuses the others, in an error that has the URI.
_SECRETS = (
    "access_key|access_key_id|access_token|account_key|aws_access_key_id|aws_secret_access_key|client_secret|password"
    "|sas_token|secret_access_key|secret_key|session_token|sig|token"
)
# The secret before a host. "container@account", without a colon, is where an Azure blob is, and a number after a colon
# is a port. A secret may have a slash in it: such a URI can't be read, but the error has it.
_BEFORE_HOST = re.compile(r"(?<=[A-Za-z0-9+.-]://)[^/?#:@\s]*:(?![0-9]+[/?#\s])(?:[^/?#\s]*@|[^?#\s]*@)")
# Where such a secret can be. Looked for first: in an error about a stranger's file there may be a hundred thousand
# colons, and from each of them it would be searched to the end for an "@".
_UP_TO_AT = re.compile(r"(?<![^?#\s])[^?#\s]*@")
# Anything with a colon in it before an "@"; or a query with one of these parameters.
SECRET = re.compile(rf"://.*:.*@|[?&](?:{_SECRETS})=", re.IGNORECASE | re.DOTALL)


def without_credentials(uri: str) -> str:
    """`uri`, or a text that contains URIs, without the secrets that pyarrow takes in them: safe to show and keep.

    The secrets stand before the host, or in the query of an Azure URI.
    """
    uri = _UP_TO_AT.sub(lambda found: _BEFORE_HOST.sub("", found[0]), uri)
    return re.sub(rf"([?&](?:{_SECRETS})=)[^&#\s]*", r"\1***", uri, flags=re.IGNORECASE)
