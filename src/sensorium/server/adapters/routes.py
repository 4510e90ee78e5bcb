"""``POST /v1/load_lora_adapter`` and ``POST /v1/unload_lora_adapter``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from sensorium.config.lora import check_name
from sensorium.errors import ConfigError, InvalidRequestError, ModelNotFoundError, NotFoundError
from sensorium.server.adapters.folders import allowed_folder
from sensorium.server.context import ServingContext, context_of
from sensorium.server.http.body import model_of, read_body
from sensorium.server.openai.protocol import LoadAdapterBody, UnloadAdapterBody
from sensorium.server.payload import abbreviate

_CLOSED = (
    "This server loads no adapters by request: start it with --enable-lora, "
    "--allow-runtime-lora-updating, --allowed-lora-path FOLDER and an API key; or name adapters "
    "with --lora-modules."
)


def adapters_router() -> APIRouter:
    """Return the router of adapters."""
    router = APIRouter()

    @router.post("/v1/load_lora_adapter", response_model=None)
    async def load_adapter(request: Request) -> Response:
        """Load a LoRA adapter of a model, which requests then name as their model."""
        server = context_of(request)
        body, folder = await read_body(
            request, LoadAdapterBody, lambda body: _checked(server, body)
        )
        with server.models.reserved(body.lora_name):
            context = await model_of(request, body.model)
            try:
                await context.frontend.load_adapter(body.lora_name, folder)
            except ConfigError as error:
                raise InvalidRequestError(error.message, param="lora_path") from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_model=None)
    async def unload_adapter(request: Request) -> Response:
        """Forget a LoRA adapter when the requests that use it have ended."""
        server = context_of(request)
        body, _ = await read_body(request, UnloadAdapterBody, lambda body: _check_open(server))
        if not any(body.lora_name in model.adapters for model in server.models):
            raise ModelNotFoundError(
                f"There is no adapter {abbreviate(body.lora_name)}.", param="lora_name"
            )
        context = await model_of(request, body.lora_name)
        await context.frontend.unload_adapter(body.lora_name)
        context.model.forget_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _check_open(server: ServingContext) -> None:
    """Raise NotFoundError unless requests may change adapters."""
    if not server.config.allow_runtime_lora_updating:
        raise NotFoundError(_CLOSED)


def _checked(server: ServingContext, body: LoadAdapterBody) -> str:
    """Return the folder to load. Raises RequestError."""
    _check_open(server)
    try:
        check_name(body.lora_name, "lora_name")
    except ConfigError as error:
        raise InvalidRequestError(error.message, param="lora_name") from error
    return str(allowed_folder(body.lora_path, server.config.allowed_lora_path))
