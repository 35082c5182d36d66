"""Credentials for object storage: found by botocore, checked before use, and registered in job/secrets.py."""

import os
import re
import shlex
from typing import Any

import botocore.exceptions
import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

from emotion.errors import AccessError, EmotionError, StorageError
from job.secrets import protect
from job.storage.s3_errors import EXPIRED_CODES, error_code, is_transient, reason_of
from job.storage.s3_exceptions import PROVIDE_CREDENTIALS, ending_of

PARTS = (  # (name in botocore, variables, key of a profile, key of the answer of a service or helper)
    ("access_key", ("AWS_ACCESS_KEY_ID",), "aws_access_key_id", "AccessKeyId"),
    ("secret_key", ("AWS_SECRET_ACCESS_KEY",), "aws_secret_access_key", "SecretAccessKey"),
    ("token", ("AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"), "aws_session_token", "SessionToken"),
)
TOKEN_FILES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
CONTAINER_VARIABLES = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
)
AWS_SETTINGS = "Correct AWS's own settings: its variables, AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE."
FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
"""Exceptions, besides its own, that botocore raises for missing token files and for helpers with malformed answers."""


class Credentials:
    """The credentials of a session, if there are any. botocore reads and renews them."""

    def __init__(self, session: botocore.session.Session) -> None:
        """Raises AccessError if the credentials cannot be read, SpecError for wrong AWS settings."""
        self._session = session
        try:
            self._found = session.get_credentials()
        except (BotoCoreError, ClientError, *FAILURES) as error:
            raise self._error(error) from error

    @property
    def exist(self) -> bool:
        """Whether there are credentials. Public buckets are read without them."""
        return self._found is not None

    def origin(self) -> str:
        """Where the credentials come from, in words that contain no part of them."""
        return "anonymous" if self._found is None else self._source("access_key")

    def verify(self, **_: object) -> None:
        """If there are credentials, raise what `frozen` raises. A handler for botocore's event before it signs a request."""
        if self._found is not None:
            self.frozen()

    def frozen(self) -> Any:
        """The current key, secret and token. Raises AccessError if they are malformed or cannot be renewed, and BotoCoreError or
        ClientError for transient failures and expired credentials."""
        if self._found is None:
            raise botocore.exceptions.NoCredentialsError
        try:
            frozen = self._found.get_frozen_credentials()
        except (BotoCoreError, ClientError, *FAILURES) as error:
            if is_transient(error) or error_code(error) in EXPIRED_CODES:
                raise
            raise self._error(error) from error
        for part, *_ in PARTS:
            problem = _problem(getattr(frozen, part))
            if problem is not None:
                raise AccessError(
                    f"storage: {self._source(part)} {problem}, which credentials never have. Nothing was sent. Remove it; "
                    f"secrets that are made from files often end in a line break."
                )
        if self._found.method != "env":
            protect("the AWS secret key", frozen.secret_key)
            protect("the AWS session token", frozen.token)
        return frozen

    def _error(self, error: Exception) -> EmotionError:
        kind: type[EmotionError] = AccessError
        if isinstance(error, BotoCoreError) and not isinstance(error, botocore.exceptions.CredentialRetrievalError):
            kind = ending_of(error)
        if _is_silent_service(error):
            kind = StorageError
        return kind(f"storage: {reason_of(error)}. {self._advice(error)}")

    def _advice(self, error: Exception) -> str:
        """A sentence on what a person can do to provide credentials."""
        profile, helper = self._session.profile, self._helper()
        named = f" --profile {profile}" if profile else ""
        match error:
            case botocore.exceptions.SSOError() | botocore.exceptions.TokenRetrievalError():
                return f"Run `aws sso login{named}` and run it again."
            case botocore.exceptions.LoginError():
                return f"Run `aws login{named}` and run it again."
            case ClientError():
                return f"{error.operation_name} gives no credentials: check the role, its trust policy and AWS_PROFILE."
            case botocore.exceptions.ProfileNotFound():
                return "Correct AWS_PROFILE, or check AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE."
            case botocore.exceptions.InvalidConfigError():
                return f"Correct profile {profile or 'default'} in {self._session.get_config_variable('config_file')}."
            case botocore.exceptions.PartialCredentialsError() | botocore.exceptions.NoCredentialsError():
                return PROVIDE_CREDENTIALS
            case BotoCoreError() if not isinstance(error, botocore.exceptions.CredentialRetrievalError):
                return AWS_SETTINGS
        if helper is not None:
            return f"credential_process of profile {profile or 'default'} runs {helper}: make it work in this environment."
        for name in TOKEN_FILES:
            if os.environ.get(name) and isinstance(error, OSError):
                return f"{name} names that file."
        set_here = [name for name in CONTAINER_VARIABLES if os.environ.get(name)]
        return f"Check {', '.join(set_here)}." if set_here else AWS_SETTINGS

    def _helper(self) -> str | None:
        """The program of credential_process, without its arguments, which may hold secrets."""
        try:
            command = self._session.get_scoped_config().get("credential_process")
            return shlex.split(command)[0] if command else None
        except BotoCoreError:
            return None
        except (ValueError, IndexError):
            return "a command with quotes that do not match"

    def _source(self, part: str) -> str:
        """Where a part of the credentials comes from."""
        variables, key, answer = next(rest for name, *rest in PARTS if name == part)
        profile, method = self._session.profile or "default", self._found.method
        if method == "env":
            return next((name for name in variables if os.environ.get(name)), variables[0])
        if method == "shared-credentials-file":
            return f"{key} of profile {profile} in {self._session.get_config_variable('credentials_file')}"
        if method == "config-file":
            return f"{key} of profile {profile} in {self._session.get_config_variable('config_file')}"
        if method == "custom-process":
            return f"{answer} from credential_process {self._helper()} of profile {profile}"
        return f"{answer} from {method}"


def _is_silent_service(error: Exception) -> bool:
    """Whether the service that gives a container its credentials does not answer: it may answer later."""
    if not isinstance(error, botocore.exceptions.CredentialRetrievalError) or error.kwargs["provider"] != "container-role":
        return False
    return "non 200" not in str(error)


def _problem(value: str | None) -> str | None:
    """Describe the error in a part of the credentials without quoting it. HTTP headers hold printable ASCII."""
    wrong = re.search(r"[^!-~]", value or "")
    if value is None or wrong is None:
        return None
    names = {"\n": "a line break", "\r": "a carriage return", "\t": "a tab", " ": "a blank"}
    kind = names.get(wrong[0], "a control character" if wrong[0] < " " or wrong[0] == "\x7f" else "a character that is not ASCII")
    if not value[wrong.start() :].strip():
        return f"ends in {kind}"
    return f"has {kind} at its beginning" if wrong.start() == 0 else f"has {kind} inside"
