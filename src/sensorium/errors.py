"""Errors that Sensorium raises on purpose, as one tree.

    SensoriumError
    ├── RequestError                      the caller's fault: 4xx
    │   ├── InvalidRequestError           400 invalid_request
    │   ├── ChatTemplateError             422 chat_template_failed
    │   ├── PromptTooLongError            400 context_length_exceeded
    │   ├── TooManyItemsError             400 too_many_items
    │   ├── UnsupportedModalityError      400 unsupported_modality
    │   ├── PlaceholderMismatchError      400 placeholder_mismatch
    │   ├── MediaRefusedError             400 media_refused
    │   ├── MediaUndecodableError         400 media_undecodable
    │   ├── InvalidEmbeddingsError        400 invalid_embeddings
    │   ├── MediaTooLargeError            413 media_too_large
    │   ├── BodyTooLargeError             413 body_too_large
    │   ├── UnsupportedEncodingError      415 unsupported_encoding
    │   ├── MediaNotCachedError           404 media_not_cached
    │   ├── ModelOutputNotFiniteError     422 model_output_not_finite
    │   ├── MediaFetchError               424 media_fetch_failed
    │   ├── MediaFetchTimeoutError        424 media_fetch_timeout
    │   ├── AuthenticationError           401 invalid_api_key
    │   ├── ModelNotFoundError            404 model_not_found
    │   └── NotFoundError                 404 not_found
    ├── ConfigError                       a wrong flag, keyword or file at start
    │   ├── UnsupportedModelError         nothing here can load that architecture
    │   └── ForkedProcessError            a model, or an LLM, used in a forked process
    └── UnavailableError                  not now: 503
        ├── OverloadedError               503 overloaded
        ├── EncoderEndedError             503 encoder_ended
        └── EngineDeadError               503 engine_unavailable

Each class carries its HTTP status and code; the server has one handler that maps them, and offline
users catch the same classes. Request and configuration errors are ``ValueError`` too, so that plain
Python code reads naturally.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SensoriumError(Exception):
    """Base class of all errors.

    Attributes:
        message: What was wrong, with the value, and what to do.
        param: Place in the request, such as ``messages[0].content[1].image_url``; None when the
            whole request is meant.
        status: HTTP status.
        code: Code in the body of an HTTP answer.
        type: Type in the body of an HTTP answer.
        index: Of an error in a list of prompts, the place of the prompt; None elsewhere.
        outputs: Of an error in a list of prompts, the outputs that were complete by then at their
            places and None at the others; None elsewhere.
    """

    status: int = 500
    code: str = "internal_error"
    type: str = "server_error"
    index: int | None = None
    outputs: list[Any] | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def to_dict(self) -> dict[str, str | None]:
        """Return the ``error`` member of the body of an HTTP answer."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }


class RequestError(SensoriumError, ValueError):
    """The request cannot be served as it stands."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidRequestError(RequestError):
    """A field is malformed, mistyped or unknown, or a value is out of its range."""


class ChatTemplateError(RequestError):
    """The model's chat template fails on a well-formed conversation.

    The mistake is the template's, which the operator can replace. When a template refuses a
    conversation by itself, the error is ``InvalidRequestError``.
    """

    status = 422
    code = "chat_template_failed"
    type = "model_error"


class PromptTooLongError(RequestError):
    """The prompt, with its expanded placeholders, does not fit the model's context or the cache.

    Code and words are those of OpenAI's API: programs that shorten their prompt and try again look
    for them.
    """

    code = "context_length_exceeded"

    @classmethod
    def beyond(cls, most: int, however: str, *, param: str | None) -> PromptTooLongError:
        """Make the error of a prompt beyond ``most`` tokens.

        ``however`` says how long the prompt is, and what to do.
        """
        return cls(
            f"This model's maximum context length is {most} tokens. However, {however}", param=param
        )


class TooManyItemsError(RequestError):
    """The prompt has more items of a modality than ``limit_mm_per_prompt`` allows."""

    code = "too_many_items"


class UnsupportedModalityError(RequestError):
    """The model does not take the modality of an item."""

    code = "unsupported_modality"


class PlaceholderMismatchError(RequestError):
    """The prompt has more or fewer placeholders than there are items.

    Attributes:
        found: The message without its advice.
    """

    code = "placeholder_mismatch"

    def __init__(self, found: str, advice: str = "", *, param: str | None = None) -> None:
        super().__init__(f"{found} {advice}" if advice else found, param=param)
        self.found = found


class MediaRefusedError(RequestError):
    """The scheme, host, address or path of a media item is not allowed."""

    code = "media_refused"


class MediaUndecodableError(RequestError):
    """The bytes are not media of the kind they should be."""

    code = "media_undecodable"


class InvalidEmbeddingsError(RequestError):
    """Precomputed embeddings have a wrong shape, type or content."""

    code = "invalid_embeddings"


class MediaTooLargeError(RequestError):
    """A media item is over a limit of bytes, pixels, frames or seconds."""

    status = 413
    code = "media_too_large"


class BodyTooLargeError(RequestError):
    """The body of an HTTP request is over the limit."""

    status = 413
    code = "body_too_large"


class UnsupportedEncodingError(RequestError):
    """The body is compressed in a way that is not read here."""

    status = 415
    code = "unsupported_encoding"


class MediaNotCachedError(RequestError):
    """An item was named by uuid only, and nothing is cached under that name."""

    status = 404
    code = "media_not_cached"


class ModelOutputNotFiniteError(RequestError):
    """The model made infinite, undefined or all-equal numbers of a well-formed input.

    Its weights or its dtype are at fault, for this input at least.
    """

    status = 422
    code = "model_output_not_finite"
    type = "model_error"


class MediaFetchError(RequestError):
    """The host of a media URL answered with an error, or the connection broke."""

    status = 424
    code = "media_fetch_failed"


class MediaFetchTimeoutError(RequestError):
    """The host of a media URL did not deliver in time."""

    status = 424
    code = "media_fetch_timeout"


class AuthenticationError(RequestError):
    """The request has no API key, or a wrong one."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here."""

    status = 404
    code = "model_not_found"


class NotFoundError(RequestError):
    """The thing that a request names is not stored here, or not any more."""

    status = 404
    code = "not_found"


class ConfigError(SensoriumError, ValueError):
    """A flag, keyword, environment variable or model file cannot be used; raised at start."""

    code = "invalid_config"


class UnsupportedModelError(ConfigError):
    """No module here can load the architecture that the configuration names."""

    code = "unsupported_model"


class ForkedProcessError(ConfigError):
    """The process was forked from one in which a model has run, or that made the object.

    A forked process lacks the threads that compute. Start it by "spawn".
    """

    code = "forked_process"


class UnavailableError(SensoriumError):
    """The request is fine, but cannot be served now.

    Attributes:
        retry_after: Seconds until trying again makes sense.
    """

    status = 503
    code = "engine_unavailable"
    retry_after: int = 1


class OverloadedError(UnavailableError):
    """The queue is full; try again later."""

    code = "overloaded"


class EncoderEndedError(UnavailableError):
    """An item ended the encoders that had it, and is not tried again for some time."""

    code = "encoder_ended"


class EngineDeadError(UnavailableError):
    """The engine has stopped."""


NOT_LOADED = "could not be loaded"
"""Words of the error of a model that cannot be loaded, which has the code of others."""

ENDED = "The engine ended while it ran this request"
"""Words of the error of a request that was running when its engine ended, and may be the cause."""
ENDED_ALONE = f"{ENDED} and no other"
"""Words of the error where nothing else was running: most likely it is the cause."""


def error_of(
    code: str, message: str, param: str | None, default: type[SensoriumError]
) -> SensoriumError:
    """Rebuild an error of another process from its code.

    ``default`` is the class for a code that none here has.
    """
    known = {cls.code: cls for cls in _subclasses(SensoriumError)}
    return known.get(code, default)(message, param=param)


def _subclasses(cls: type[SensoriumError]) -> list[type[SensoriumError]]:
    # Deepest last: of classes that share a code, those who raise use the special one.
    return [s for child in cls.__subclasses__() for s in (child, *_subclasses(child))]


@contextmanager
def located(
    param: str | None = None,
    *,
    rename: Callable[[str], str] | None = None,
    prompt: int | None = None,
) -> Iterator[None]:
    """Give errors that pass through the place in the caller's request that they are about.

    A copy of the error is raised, since several requests may wait for one load and share its error.

    Args:
        param: The place of request errors that name none.
        rename: Maps a place to the name that the caller knows it by; the message follows.
        prompt: Index of the prompt in the caller's list; the message begins with it.
    """
    try:
        yield
    except SensoriumError as error:
        found = copy.copy(error)
        if isinstance(error, RequestError):
            found.param = error.param or param
        if rename is not None and found.param is not None:
            inner, found.param = found.param, rename(found.param)
            found.message = found.message.replace(inner, found.param, 1)
        if prompt is not None:
            found.index = prompt
            found.message = f"Prompt {prompt}: {found.message}"
        found.args = (found.message,)
        raise found.with_traceback(error.__traceback__) from error.__cause__


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 id``, ``2 ids``; ``plural`` if it is irregular."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"
