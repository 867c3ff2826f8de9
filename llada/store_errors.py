"""What a store, a disk or the way to it answers when it fails, told in one line: the URL, the cause, the remedy.

    told(error, "s3://corpus/a.jsonl")   -> StoreError: s3://corpus/a.jsonl: access was denied (403); ask for ...
    None for everything else: a file that is not there (callers know what that means to them), or a fault of ours

An error is known by the names of its classes, its HTTP status, the code in S3's answer or its number in the operating
system, so that no store's package needs to be there. File systems wrap each other's errors: the whole chain is looked at.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

from llada.errors import UserError

_PACKAGES = (
    "botocore", "aiobotocore", "boto3", "aiohttp", "gcsfs", "adlfs", "google", "azure", "huggingface_hub", "httpx",
    "httpx2", "requests",
)  # fmt: skip
_MAX_CHARS = 1000
_MAX_WORDS = 160  # of what an error says itself


class StoreError(UserError):
    """A store, a disk or the way to it failed."""

    may_pass: bool = False
    """Whether the same call may succeed later."""


class _Problem(NamedTuple):
    cause: str
    remedy: str
    may_pass: bool = False


_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role gives them"
)
_RIGHTS = "check the credentials, and ask for the right to read (for an output: to write) there"
_REGION = "set AWS_REGION to the bucket's region, or AWS_ENDPOINT_URL to its store"
_BUCKET = "correct the name, or create it"
_LATER = "run the same command again later; what is finished is kept"
_FULL = "free some and run the same command again; what is finished is kept"

_BY_CLASS = {
    "NoCredentialsError": _Problem("no credentials were found", _CREDENTIALS),
    "NoAuthTokenError": _Problem("no credentials were found", _CREDENTIALS),
    "PartialCredentialsError": _Problem("half of the credentials is missing", _CREDENTIALS),
    "CredentialRetrievalError": _Problem("the credentials could not be had: {error}", _CREDENTIALS),
    "TokenRetrievalError": _Problem("the login has expired: {error}", "log in again (aws sso login)"),
    "UnauthorizedSSOTokenError": _Problem("the login has expired", "log in again (aws sso login)"),
    "ProfileNotFound": _Problem("{error}", "correct AWS_PROFILE, or add the profile to ~/.aws/config"),
    "NoRegionError": _Problem("no region is given", _REGION),
    "InvalidRegionError": _Problem("{error}", _REGION),
    "ParamValidationError": _Problem(
        "the store cannot have such a name: {error}", "correct the bucket or the path"
    ),
    "DefaultCredentialsError": _Problem(
        "no credentials were found", "run gcloud auth application-default login"
    ),
    "RefreshError": _Problem(
        "the credentials are not accepted: {error}", "run gcloud auth application-default login"
    ),
    "ClientAuthenticationError": _Problem("the credentials are not accepted: {error}", _RIGHTS),
    # Before the failed connections, which they are too.
    "SSLError": _Problem(
        "the TLS connection failed: {error}", "trust its certificate (SSL_CERT_FILE, for S3 AWS_CA_BUNDLE)"
    ),
    "ClientSSLError": _Problem("the TLS connection failed: {error}", "trust its certificate (SSL_CERT_FILE)"),
    "ProxyConnectionError": _Problem("the proxy does not answer: {error}", "correct HTTPS_PROXY", True),
    "ClientProxyConnectionError": _Problem("the proxy does not answer: {error}", "correct HTTPS_PROXY", True),
    "TooManyRedirects": _Problem("it redirects without an end", "correct the URL"),
    "RedirectClientError": _Problem("it redirects to a place that cannot be read: {error}", "correct the URL"),
    "InvalidURL": _Problem("that is no URL: {error}", "correct it"),
    "EndpointConnectionError": _Problem("nothing answers: {error}", "check the URL, AWS_ENDPOINT_URL and the network", True),
    "ClientConnectorError": _Problem("nothing answers: {error}", "check the URL and the network", True),
    "ConnectError": _Problem("nothing answers: {error}", "check the URL and the network", True),
    "TimeoutException": _Problem("no answer in time", _LATER, True),
    "ConnectTimeoutError": _Problem("no answer in time", "check the URL, AWS_ENDPOINT_URL and the network", True),
    "ReadTimeoutError": _Problem("no answer in time", _LATER, True),
    "FSTimeoutError": _Problem("no answer in time", _LATER, True),
    "ServerTimeoutError": _Problem("no answer in time", _LATER, True),
    "ClientPayloadError": _Problem("the connection broke off", _LATER, True),
    "ServerDisconnectedError": _Problem("the connection broke off", _LATER, True),
    "HTTPClientError": _Problem("the connection broke off: {error}", _LATER, True),
    "ConnectionError": _Problem("the connection failed: {error}", _LATER, True),
    "ClientConnectionError": _Problem("the connection failed: {error}", _LATER, True),
}  # fmt: skip
_BY_CODE = {  # of S3
    "NoSuchBucket": _Problem("there is no such bucket", _BUCKET),
    "InvalidBucketName": _Problem("a bucket cannot have such a name", "correct it"),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity"),
        _Problem("the credentials are wrong: {error}", "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ),
    **dict.fromkeys(
        ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
        _Problem("the credentials have expired or are not accepted: {error}", "get new ones"),
    ),
    "RequestTimeTooSkewed": _Problem("this machine's clock is wrong", "set it"),
    **dict.fromkeys(
        (
            "301",
            "307",
            "PermanentRedirect",
            "TemporaryRedirect",
            "Redirect",
            "AuthorizationHeaderMalformed",
            "IllegalLocationConstraintException",
        ),
        _Problem("the bucket is in another region or store: {error}", _REGION),
    ),
    "InvalidObjectState": _Problem("it lies in an archive", "restore it first"),
    "SlowDown": _Problem("the store is overloaded", _LATER, True),
}
_BY_STATUS = {  # of HTTP
    400: _Problem("the request was refused (400): {error}", "check the URL, the credentials and AWS_REGION"),
    301: _Problem("it has moved: {error}", "give its new URL"),
    401: _Problem("it asks for a login (401)", "give credentials, or a URL that needs none"),
    403: _Problem("access was denied (403)", _RIGHTS),
    404: _Problem("nothing is there (404)", "correct the URL"),
    405: _Problem("the server does not take such a request (405)", "give another place"),
    407: _Problem("the proxy asks for a login (407)", "correct HTTPS_PROXY"),
    408: _Problem("no answer in time (408)", _LATER, True),
    410: _Problem("it is gone for good (410)", "give another URL"),
    429: _Problem("it is asked too often (429)", _LATER, True),
    501: _Problem("the server does not take such a request (501)", "give another place"),
}
_BY_NUMBER = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        _Problem("no permission{where}", "change the rights, or give another place"),
    ),
    errno.EROFS: _Problem("the disk is read-only", "give another place"),
    errno.ENOTDIR: _Problem(
        "a file stands where its folder should be{where}", "move it, or give another place"
    ),
    errno.EISDIR: _Problem("that is a folder", "give a file"),
    errno.EEXIST: _Problem("a file is in the way{where}", "move it, or give another place"),
    errno.ENOTEMPTY: _Problem("a folder that is not empty is in the way", "move it, or give another place"),
    errno.ENAMETOOLONG: _Problem("the name is too long", "give a shorter one"),
    errno.ELOOP: _Problem("its links lead in a circle", "mend them"),
    errno.EMFILE: _Problem("too many files are open", "raise the limit (ulimit -n)"),
    errno.EIO: _Problem("the disk or store failed: {error}", _LATER, True),
    errno.ESTALE: _Problem("the network disk was mounted anew", _LATER, True),
    errno.ETIMEDOUT: _Problem("no answer in time", _LATER, True),
    errno.ECONNRESET: _Problem("the connection failed: {error}", _LATER, True),
    errno.ECONNREFUSED: _Problem("nothing answers: {error}", "check the URL and the network", True),
    errno.EHOSTUNREACH: _Problem("nothing answers: {error}", "check the URL and the network", True),
    errno.ENETUNREACH: _Problem("nothing answers: {error}", "check the URL and the network", True),
}
_NUMBERS = {  # of what file systems raise without one
    PermissionError: errno.EACCES,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
    FileExistsError: errno.EEXIST,
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_store_error(error: BaseException) -> bool:
    """Whether a file system failed, rather than our code; some stores' errors are no OSError."""
    if isinstance(error, OSError | StoreError):
        return True
    return type(error).__module__.split(".")[0] in _PACKAGES


def may_pass(error: BaseException) -> bool:
    """Whether it is a store's error that the same call may not meet again: an overloaded store, a network that is away."""
    if isinstance(error, StoreError):
        return error.may_pass
    final = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    if (problem := _find(error)) is not None:
        return problem.may_pass
    return is_store_error(error) and not isinstance(error, final)


def is_past_the_end(error: BaseException) -> bool:
    """Whether a store refuses a range of bytes (416) because the file ends before it."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
            return True
        if is_store_error(each) and 416 in (getattr(each, "status", None), getattr(each, "code", None)):
            return True
    return False


def told(error: BaseException, url: str) -> StoreError | None:
    """The error in one line about `url`; None when it is none of a store, or only says that nothing is there."""
    if isinstance(error, StoreError):
        return error
    if any(getattr(each, "errno", None) in _NO_SPACE for each in _chain(error)):
        return no_space(url)
    if (problem := _find(error)) is None:
        return None
    cause = problem.cause.replace(f" ({url})", "")
    made = StoreError(_in_one_line(f"{url}: {cause}; {problem.remedy}"))
    made.may_pass = problem.may_pass
    return made


def no_space(url: str) -> StoreError:
    """A full disk."""
    return StoreError(f"no space left while writing {url}: {_FULL}")


def reason(error: BaseException) -> str:
    """Why a file could not be had, in a few words, without its URL."""
    problem = _find(error)
    return _in_one_line(problem.cause if problem else str(error) or type(error).__name__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was made from, by Python or (`cause`) by Ray."""
    seen: set[int] = set()
    current: Any = error
    while isinstance(current, BaseException) and id(current) not in seen:
        seen.add(id(current))
        yield current
        cause = getattr(current, "cause", None)
        context = None if current.__suppress_context__ else current.__context__
        current = (cause if isinstance(cause, BaseException) else None) or current.__cause__ or context


def _find(error: BaseException) -> _Problem | None:
    """What the innermost telling error of a chain means, its placeholders filled."""
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, socket.gaierror) or "DNS" in type(each).__name__:
            host = f" {each.host}" if hasattr(each, "host") else ""
            return _Problem(f"there is no host{host}", "correct the URL (for S3: AWS_ENDPOINT_URL)")
    is_absent = any(isinstance(each, FileNotFoundError) for each in chain)
    # s3fs gives many answers numbers of the operating system: what the store said itself goes before.
    for each in sorted(chain, key=lambda each: type(each).__module__ == "builtins"):
        problem = _by_answer(each) or _by_class(each) or _by_number(each)
        if problem is not None and not (is_absent and problem is _BY_STATUS[404]):
            words = _in_one_line(_words(each), _MAX_WORDS)
            return problem._replace(cause=problem.cause.format(error=words, where=_where(each)))
    return None


def _by_answer(error: BaseException) -> _Problem | None:
    """By what a server answered: a code of S3, or a status of HTTP."""
    response = getattr(error, "response", None)
    answer = response if isinstance(response, dict) else {}
    code = str(answer.get("Error", {}).get("Code", ""))
    if code in _BY_CODE:
        return _BY_CODE[code]
    if type(error).__module__.split(".")[0] not in _PACKAGES:
        return None
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for source, name in (
        (error, "status"),
        (error, "status_code"),
        (error, "code"),
        (response, "status_code"),
    ):
        status = status or getattr(source, name, None)
    try:
        number = int(status or code)
    except (TypeError, ValueError):
        return None
    if number in _BY_STATUS:
        return _BY_STATUS[number]
    if number >= 500:
        return _Problem(f"the store failed ({number}): {{error}}", _LATER, True)
    refused = _Problem(f"the store refuses ({number}): {{error}}", "correct the URL")
    return refused if number >= 300 else None


def _by_class(error: BaseException) -> _Problem | None:
    if type(error).__module__.split(".")[0] not in (*_PACKAGES, "fsspec"):
        return None
    names = {kind.__name__ for kind in type(error).__mro__}
    return next((problem for name, problem in _BY_CLASS.items() if name in names), None)


def _by_number(error: BaseException) -> _Problem | None:
    """By the operating system's number, or the class that stands for several."""
    if not isinstance(error, OSError) or type(error).__module__ != "builtins":
        return None
    if error.errno in _BY_NUMBER:
        return _BY_NUMBER[error.errno]
    for kind, number in _NUMBERS.items():
        if isinstance(error, kind):
            return _BY_NUMBER[number]
    return None


def _where(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return f" ({name})" if isinstance(name, str) else ""


def _words(error: BaseException) -> str:
    """What the error itself says."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and (said := response.get("Error", {})):
        region = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return " ".join(filter(None, (str(said.get("Message") or said.get("Code", "")), region)))
    verification = getattr(getattr(error, "certificate_error", None), "verify_message", None)
    said = verification or getattr(error, "strerror", None) or getattr(error, "message", None)
    return str(said or error)


def _in_one_line(text: str, most: int = _MAX_CHARS) -> str:
    line = re.sub(r"\s+", " ", text).strip().removesuffix(".")
    return line if len(line) <= most else line[: most - 1] + "…"
