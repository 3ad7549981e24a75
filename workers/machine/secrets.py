"""Keeps secrets out of the environment of processes that compute, as these may run code that comes with a model.

Names and values are matched by patterns. A list of what is let through would break what torch, CUDA and a site's setup
read; a secret under a harmless name isn't found. The files of a login stay readable to the same user: a client library
is only kept from looking there. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Words that a secret's name has, TOKEN as a whole word (TOKENIZERS_PARALLELISM is none); what leads to one, such as a
# profile, an agent, or a trusted publisher's identity; and all that storage clients read.
NAMES = re.compile(
    r"(^|_)TOKENS?(_|$)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|WEBHOOK|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY"
    r"|^(AWS|AZURE|GOOGLE|GCP|GCS|CLOUDSDK|S3|FSSPEC|MINIO|R2|B2|OSS|ACTIONS_ID)_|^HF_OIDC|^SSH_AUTH_SOCK$",
    re.IGNORECASE,
)
# Tokens of the Hub, and URLs with a password.
VALUES = re.compile(r"hf_[A-Za-z0-9]{20,}|://[^/\s@]*:[^/\s@]+@")
# Where huggingface_hub looks for a stored login: nowhere.
NO_LOGIN = {"HF_TOKEN_PATH": "/nonexistent/quantmill/token"}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables that hold or lead to a secret."""
    return {name: value for name, value in environment.items() if not is_secret(name, value)} | NO_LOGIN


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret, or leads to one."""
    return bool(NAMES.search(name) or VALUES.search(value))
