"""Errors as OpenAI clients expect them: `{"error": {message, type, param, code}}`, always all four.

Every way in which a request can fail passes through here, so that each has one status, one code
and a sentence that says what was given, what is allowed and what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MAX_PROBLEMS = 10
"""Validation problems that one answer lists."""
MAX_QUOTE = 200
"""Characters of a bad value that an answer quotes."""

INVALID = "invalid_request_error"
TOO_LARGE = "request_too_large"
ABOUT_A_FIELD = "about_a_field"
"""Type of validation problems whose message and field are in their context."""


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, param, code)
        self.code = code
        self.headers = dict(headers or {})


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the JSON of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str, known: list[str]) -> ApiError:
    message = f"the model {quote(name)} does not exist; this server has: {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


def queue_full(message: str) -> ApiError:
    return ApiError(
        429,
        f"the server is busy: {message}; try again shortly",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(
        503, message, kind="service_unavailable_error", code=code, headers={"Retry-After": "5"}
    )


def generation_failed(message: str) -> ApiError:
    """A request that the engine could not compute; trying again would not help."""
    return ApiError(
        500,
        f"the generation failed: {message[:MAX_QUOTE]}",
        kind="server_error",
        code="generation_failed",
        headers={"x-should-retry": "false"},
    )


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "a valid API key is required: send `Authorization: Bearer KEY`",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request body is larger than {limit} bytes", code=TOO_LARGE)


def quote(value: object) -> str:
    """Return a value as it was given, shortened."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTE else f"{text[:MAX_QUOTE]}..."


def install_handlers(app: FastAPI) -> None:
    """Make every error of `app` look like OpenAI's."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if error.status in (400, 404):
        request.app.state.service.metrics.refused("invalid")
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    request.app.state.service.metrics.refused("invalid")
    problems = error.errors()
    told = [_problem(problem) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        told.append(f"and {len(problems) - MAX_PROBLEMS} more problems")
    param = None if problems[0]["type"] == "json_invalid" else _location(problems[0]) or None
    return JSONResponse(error_body("; ".join(dict.fromkeys(told)), INVALID, param), 400)


def _problem(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")[:MAX_QUOTE]
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem.get('ctx', {}).get('error', message)}"
    if problem["type"] in ("value_error", ABOUT_A_FIELD):
        return message
    if problem["type"] == "extra_forbidden":
        return f"unknown field {_location(problem)!r}"
    if isinstance(problem.get("input"), bytes):
        return "the body was not read as JSON; send the header Content-Type: application/json"
    return f"{_location(problem) or 'body'}: {message}, not {quote(problem.get('input'))}"


def _location(problem: Mapping[str, Any]) -> str:
    """Return the field a problem is about, as a path; pydantic marks bad keys with `[key]`."""
    parts = [str(part) for part in problem["loc"][1:]]
    if problem["type"] == ABOUT_A_FIELD:
        parts.append(problem["ctx"]["field"])
    return ".".join(part for part in parts if part != "[key]")[:MAX_QUOTE]


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = quote(request.url.path)
    messages = {
        400: f"the body is not valid JSON: {error.__cause__}"[:MAX_QUOTE],
        404: f"there is no {path} here; the API is at /v1/completions and /v1/chat/completions",
        405: f"{request.method} is not allowed at {path}",
    }
    if error.status_code == 400:  # FastAPI's word for a body that it could not parse
        request.app.state.service.metrics.refused("invalid")
    message = messages.get(error.status_code, str(error.detail))
    code = TOO_LARGE if error.status_code == 413 else None
    return JSONResponse(
        error_body(message, INVALID, code=code),
        error.status_code,
        headers=dict(error.headers or {}),
    )


async def _unexpected_error(_: Request, error: Exception) -> JSONResponse:
    body = error_body("the server made an error; its log says more", "server_error")
    return JSONResponse(body, 500, headers={"x-should-retry": "false"})
