"""Problems: what is wrong with a request -> one sentence in `application/problem+json` (RFC 9457)."""

import json
from http import HTTPStatus

from starlette.responses import JSONResponse

MEDIA_TYPE = "application/problem+json"
_LENGTH = 300
_NOT_JSON = "Ensure that input is a valid JSON formatted string."
_SHAPE = ('the body is not what is asked for: send {"dataframe_split": {"columns": ["image"], "data": [["BASE64"]]}}, '
          'with "params": {"top": 3} beside it if you like')  # fmt: skip


def problem(status: int, detail: str, **headers: str) -> JSONResponse:
    """`detail` is the sentence; `retry_after="1"` becomes a header."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status, named, MEDIA_TYPE)


def sentence_of(body: bytes) -> str:
    """MLflow's answer to a body that it does not take -> what is wrong, without the body and without a traceback."""
    try:
        said = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return _SHAPE
    if _NOT_JSON in said[:100]:
        return "the body is not JSON: " + _SHAPE.removeprefix("the body is not what is asked for: ")
    if "Failed to predict data" in said:                                         # repeats the whole body, then says why
        said = said.rsplit("Error: ", 1)[-1]
    elif "input fields" in said or "Received a list" in said or "unexpected input type" in said:
        return _SHAPE
    said = " ".join(said.split("\nInput:")[0].split())
    return said if len(said) <= _LENGTH else said[:_LENGTH] + " ..."
