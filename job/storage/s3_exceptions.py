"""Which of botocore's exceptions are transient, and the exception with which the job ends otherwise.
tests/job/test_s3_exceptions.py verifies that every exception of the installed botocore is listed here."""

import botocore.exceptions as b
from botocore.parsers import ResponseParserError

from emotion.errors import AccessError, EmotionError, SpecError, StorageError

PROVIDE_CREDENTIALS = "Provide AWS credentials: environment variables, a profile or an instance role."
MAY_PASS: tuple[type[Exception], ...] = (
    b.ConnectionError,  # and its kinds: no connection, timeouts, proxies
    b.HTTPClientError,
    b.CredentialRetrievalError,  # of a helper program or a container's service, when credentials are renewed
    b.MetadataRetrievalError,
    b.CapacityNotAvailableError,
    b.ChecksumError,
    b.FlexibleChecksumError,
    b.IncompleteReadError,
    ResponseParserError,
)
"""Failures of the network, a server, or a service for credentials: a retry may succeed."""
CREDENTIALS: tuple[type[Exception], ...] = (
    b.NoCredentialsError,
    b.PartialCredentialsError,
    b.ProfileNotFound,
    b.InvalidConfigError,  # of a profile: what a role or single sign-on needs is missing
    b.UnknownCredentialError,
    b.NoAuthTokenError,
    b.TokenRetrievalError,
    b.UnknownTokenProviderError,
    b.SSOError,
    b.LoginError,
    b.RefreshWithMFAUnsupportedError,
)
"""Somebody has to provide credentials: exit code 77."""
SETTINGS: tuple[type[Exception], ...] = (
    b.ConfigParseError,
    b.ConfigNotFound,
    b.UnknownRegionError,
    b.InvalidRegionError,
    b.BaseEndpointResolverError,
    b.ServiceNotInRegionError,
    b.EndpointProviderError,
    b.InvalidEndpointConfigurationError,
    b.InvalidEndpointDiscoveryConfigurationError,
    b.InvalidHostLabelError,
    b.InvalidIMDSEndpointError,
    b.InvalidIMDSEndpointModeError,
    b.InvalidProxiesConfigError,
    b.InvalidDefaultsMode,
    b.InvalidRetryConfigurationError,
    b.InvalidRetryModeError,
    b.InvalidChecksumConfigError,
    b.InvalidDNSNameError,
    b.InvalidS3AddressingStyleError,
    b.InvalidS3UsEast1RegionalEndpointConfigError,
    b.InvalidSTSRegionalEndpointsConfigError,
    b.UnsupportedS3ArnError,
    b.UnsupportedS3ControlArnError,
    b.UnsupportedOutpostResourceError,
    b.UnsupportedS3ConfigurationError,
    b.UnsupportedS3AccesspointConfigurationError,
    b.UnsupportedS3ControlConfigurationError,
    b.UnsupportedSignatureVersionError,
    b.UnknownSignatureVersionError,
    b.MissingDependencyException,  # of an endpoint or a profile that needs another library
    b.ParamValidationError,  # the name of a bucket or of an object
    b.ValidationError,
)
"""The spec, the environment or AWS's own files have to be corrected: exit code 64."""
OTHERS: tuple[type[Exception], ...] = (
    b.AliasConflictParameterError,
    b.ApiVersionNotFoundError,
    b.AwsChunkedWrapperError,
    b.DataNotFoundError,
    b.InvalidExpressionError,
    b.MD5UnavailableError,
    b.MissingParametersError,
    b.OperationNotPageableError,
    b.PaginationError,
    b.StubResponseError,
    b.UndefinedModelAttributeError,
    b.UnknownClientMethodError,
    b.UnknownServiceStyle,
    b.UnseekableStreamError,
    b.UnsupportedServiceProtocolsError,
    b.WaiterConfigError,
    b.WaiterError,
)
"""A mistake in this package, or a damaged installation: exit code 70."""
ENDS_WITH: dict[type[Exception], type[EmotionError]] = {
    **dict.fromkeys(MAY_PASS, StorageError),
    **dict.fromkeys(CREDENTIALS, AccessError),
    **dict.fromkeys(SETTINGS, SpecError),
    **dict.fromkeys(OTHERS, EmotionError),
}
"""Exception of botocore → exception of the job if the request is not retried. It also applies to subclasses without an entry."""


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later. Not for an answer of the server (ClientError)."""
    if isinstance(error, b.SSLError):
        return "EOF" in str(error)  # a connection that ended during the handshake, not a wrong certificate
    return ending_of(error) is StorageError


def ending_of(error: Exception) -> type[EmotionError]:
    """The type of exception with which a failure ends the job. Unknown failures count as wrong settings."""
    if is_proxy_refusal(error):
        return AccessError
    if is_malformed(error):
        return SpecError
    return next((ENDS_WITH[kind] for kind in type(error).__mro__ if kind in ENDS_WITH), SpecError)


def is_proxy_refusal(error: Exception) -> bool:
    """Whether the proxy wants other credentials, or forbids this host."""
    cause = str(getattr(error, "kwargs", {}).get("error"))
    return isinstance(error, b.ProxyConnectionError) and any(f"failed: {code}" in cause for code in (401, 403, 407))


def is_malformed(error: Exception) -> bool:
    """Whether a request could not be created, because of a malformed header, host name or proxy: a retry cannot help."""
    if isinstance(error, b.ProxyConnectionError):
        # botocore supports http and https proxies, and puts http:// before other URLs.
        return "://" in str(error.kwargs["proxy_url"]).partition("://")[2]
    cause: object = getattr(error, "kwargs", {}).get("error")
    if not isinstance(error, b.HTTPClientError) or not isinstance(cause, ValueError | TypeError):
        return False
    return "closed file" not in str(cause)  # a connection that another thread has closed
