"""`POST /tokenize` and `/detokenize`, in vLLM's form: which tokens a prompt is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl.errors import RequestError
from qvl.pipeline.parse_parts import picture_texts
from qvl.server.answers import DetokenizedText, TokenList
from qvl.server.neutral_fields import without_neutral
from qvl.server.schemas import DetokenizeRequest, TokenizeRequest
from qvl.server.serving import chat_request, picture_params, read_request, validated

if TYPE_CHECKING:
    from qvl.pipeline.parse_request import RequestParams
    from qvl.server.exchange import Exchange
    from qvl.types import ChatRequest


async def tokenize(exchange: Exchange) -> None:
    """Answer with the token ids of `messages` as the model is shown them, pictures included, or of a `prompt`."""
    body = await read_request(exchange, TokenizeRequest, lambda body: picture_texts(body.messages or (), "content"))
    messages = body.messages
    if (messages is None) == (body.prompt is None):
        raise RequestError("name one of messages and prompt", param="messages", code="invalid_value")
    exchange.picture_params = lambda: picture_params("messages", messages or (), "content")
    await exchange.until_done(lambda: _tokenize(exchange, body))


async def _tokenize(exchange: Exchange, body: TokenizeRequest) -> None:
    backend = exchange.core.pipeline.backend
    prompt: ChatRequest | str
    if body.prompt is not None:
        exchange.core.served(body.model)
        # A text is split as it stands, by an endpoint too.
        for name in without_neutral(body.model_extra or {}, passed_on=False):
            what = f"{name[:100]}: it changes nothing in the tokens of a text"
            raise RequestError(what, hint="leave it out", param=name[:100], code="unsupported_parameter")
        prompt = body.prompt
    else:
        params: RequestParams = {"tools": body.tools} if body.tools else {}
        served = await chat_request(exchange, body.model, body.messages or (), params, body.model_extra)
        prompt = served.request
    tokens = await backend.tokenize(prompt, texts=bool(body.return_token_strs))
    answer: TokenList = {
        "count": len(tokens.ids),
        "max_model_len": backend.capabilities.max_context,
        "tokens": list(tokens.ids),
        "token_strs": None if tokens.texts is None else list(tokens.texts),
    }
    await exchange.respond_json(answer)


async def detokenize(exchange: Exchange) -> None:
    """Answer with the text of token ids."""
    body = validated(DetokenizeRequest, await exchange.body())
    exchange.core.served(body.model)
    text = await exchange.until_done(lambda: exchange.core.pipeline.backend.detokenize(body.tokens))
    await exchange.respond_json(DetokenizedText(prompt=text))
