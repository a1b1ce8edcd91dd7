#!/usr/bin/env python3
"""Checks `bitnet serve` with OpenAI's own Python client (pip install openai).

    openai_client.py BASE_URL MODEL [API_KEY]
    openai_client.py http://127.0.0.1:8080/v1 model

Any model that can chat will do, one of random weights too: nothing depends on what it says. Each check that fails is
named, and the exit status is 1 then. All requests together take a few seconds with a tiny model.
"""

import asyncio
import json
import sys
import traceback

import openai

if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
BASE_URL, MODEL = sys.argv[1:3]
KEY = sys.argv[3] if len(sys.argv) == 4 else "unused"
# Without retries, so that each error is seen.
OPTIONS = {"base_url": BASE_URL, "api_key": KEY, "max_retries": 0, "timeout": 120}
client = openai.OpenAI(**OPTIONS)

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why is the sky blue?"}]
TOKENS = 12
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def chat(**more):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "max_tokens": TOKENS, "seed": 1, **more})


def complete(**more):
    return client.completions.create(
        **{"model": MODEL, "prompt": "There was", "max_tokens": TOKENS, "seed": 1, **more})


def refused(kind, call, status, param=None):
    """The call must fail with this exception of the client."""
    try:
        call()
    except kind as error:
        assert error.status_code == status, error.status_code
        assert error.body["message"] and error.body["type"], error.body
        assert param is None or error.param == param, f"{error.param} instead of {param}"
        return error
    raise AssertionError(f"no {kind.__name__}")


@check
def models_are_listed():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check
def a_chat_is_answered():
    answer = chat()
    assert answer.object == "chat.completion" and answer.model == MODEL
    [choice] = answer.choices
    assert choice.index == 0 and choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason in ("length", "stop")
    usage = answer.usage
    assert 1 <= usage.completion_tokens <= TOKENS
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.bitnet["receipt"]


@check
def a_text_is_continued():
    answer = complete()
    assert answer.object == "text_completion"
    assert isinstance(answer.choices[0].text, str)
    assert 1 <= answer.usage.completion_tokens <= TOKENS


@check
def the_seed_decides():
    assert chat().choices[0].message.content == chat().choices[0].message.content
    # The seed of an answer without one is told, and gives the same answer.
    first = chat(seed=None)
    assert chat(seed=first.bitnet["seed"]).choices[0].message.content == first.choices[0].message.content
    assert chat(seed=None).bitnet["seed"] != first.bitnet["seed"]


@check
def streams_have_the_same_text():
    whole = chat()
    text, finish, usage = "", None, None
    for chunk in chat(stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    # What the cache had differs from one time to the next.
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens
    text = "".join(chunk.choices[0].text for chunk in complete(stream=True))
    assert text == complete().choices[0].text


@check
def a_stream_can_be_left():
    with chat(stream=True, max_tokens=100) as stream:
        next(iter(stream))
    assert chat().choices[0].message.content is not None


@check
def each_choice_has_the_next_seed():
    answer = chat(n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        alone = chat(seed=5 + choice.index)
        assert choice.message.content == alone.choices[0].message.content
    texts = ["", "", ""]
    for chunk in chat(n=3, seed=5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


@check
def several_prompts():
    prompts = ["There was", "A fox went"]
    answer = complete(prompt=prompts)
    alone = [complete(prompt=prompt) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in alone]
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)


@check
def log_probabilities():
    answer = chat(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True) and values[0] >= token.logprob
    # The log probability of the same token does not depend on how it was asked for.
    streamed = []
    for chunk in chat(logprobs=True, top_logprobs=3, stream=True):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert [token.logprob for token in streamed] == [token.logprob for token in content]
    plain = complete(logprobs=2).choices[0].logprobs
    assert len(plain.tokens) == len(plain.token_logprobs) == len(plain.top_logprobs)


@check
def stop_texts():
    text = complete(max_tokens=40).choices[0].text
    # Two characters that do occur. What can't be read as text is shown as U+FFFD, and is no good to look for.
    pairs = [text[i:i + 2] for i in range(len(text) - 1)]
    stop = next((pair for pair in reversed(pairs) if "\ufffd" not in pair), None)
    if stop is None:
        return
    answer = complete(max_tokens=40, stop=stop)
    assert answer.choices[0].text == text[:text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = complete(max_tokens=40, stop=[stop, "\u2603" * 5], stream=True)
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert streamed == answer.choices[0].text


@check
def embeddings():
    texts = ["One text", "Another", "One text"]
    # The client asks for base64 by itself, so both forms are compared.
    packed = client.embeddings.create(model=MODEL, input=texts)
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    vectors = [entry.embedding for entry in packed.data]
    assert [entry.index for entry in packed.data] == [0, 1, 2]
    assert vectors[0] == vectors[2] != vectors[1]
    for a, b in zip(vectors, [entry.embedding for entry in plain.data]):
        assert len(a) == len(b) and all(abs(x - y) < 1e-6 for x, y in zip(a, b))
    alone = client.embeddings.create(model=MODEL, input=texts[1])
    assert alone.data[0].embedding == vectors[1]
    assert packed.usage.prompt_tokens > 0


@check
def tools_may_be_offered():
    answer = chat(tools=[WEATHER], tool_choice="auto").choices[0]
    # Whether the model calls one is its business.
    assert answer.message.content is not None or answer.message.tool_calls
    assert all(chunk.object for chunk in chat(tools=[WEATHER], stream=True))
    assert chat(tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls is None
    # Then it must call one, unless the limit cuts it.
    forced = chat(tools=[WEATHER], tool_choice="required", max_tokens=200).choices[0]
    if forced.finish_reason == "tool_calls":
        [call] = forced.message.tool_calls
        assert call.function.name == "weather" and isinstance(json.loads(call.function.arguments)["city"], str)
    else:
        assert forced.finish_reason == "length"
    refused(openai.BadRequestError, lambda: chat(tool_choice="required"), 400, "tool_choice")


@check
def answers_have_the_form_that_is_asked_for():
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    choice = chat(response_format=form, max_tokens=100).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content)["ok"], bool)
    assert complete(max_tokens=40, extra_body={"choice": ["yes", "no"]}).choices[0].text in ("yes", "no")
    wrong = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "no such type"}}}
    refused(openai.BadRequestError, lambda: chat(response_format=wrong), 400)


@check
def content_in_parts():
    parts = [{"type": "text", "text": "Why is "}, {"type": "text", "text": "the sky blue?"}]
    in_parts = chat(messages=[MESSAGES[0], {"role": "user", "content": parts}])
    assert in_parts.choices[0].message.content == chat().choices[0].message.content
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    refused(openai.BadRequestError, lambda: chat(messages=[{"role": "user", "content": image}]), 400, "messages")


@check
def errors_are_the_right_exceptions():
    bad, missing = openai.BadRequestError, openai.NotFoundError
    assert refused(missing, lambda: chat(model="no such model"), 404).code == "model_not_found"
    refused(missing, lambda: client.models.retrieve("no such model"), 404)
    refused(bad, lambda: chat(messages=[]), 400, "messages")
    refused(bad, lambda: chat(messages="text"), 400, "messages")
    refused(bad, lambda: chat(temperature="hot"), 400, "temperature")
    refused(bad, lambda: chat(temperature=-1), 400)
    refused(bad, lambda: chat(n=0), 400, "n")
    refused(bad, lambda: chat(extra_body={"no_such_field": 1}), 400, "no_such_field")
    refused(bad, lambda: complete(prompt=[]), 400, "prompt")
    refused(bad, lambda: complete(prompt=[2**31]), 400)
    refused(bad, lambda: client.embeddings.create(model=MODEL, input=[]), 400, "input")
    long = refused(bad, lambda: complete(prompt=[1] * 500_000), 400)
    assert long.code == "context_length_exceeded", long.code


@check
def a_wrong_key_is_refused():
    if KEY == "unused":
        return
    wrong = openai.OpenAI(**{**OPTIONS, "api_key": KEY + "x"})
    refused(openai.AuthenticationError, lambda: wrong.models.list(), 401)


@check
def answers_do_not_depend_on_other_requests():
    seeds = range(50)
    alone = [chat(seed=seed).choices[0].message.content for seed in seeds]

    async def together():
        async with openai.AsyncOpenAI(**OPTIONS) as busy:
            async def one(seed):
                answer = await busy.chat.completions.create(
                    model=MODEL, messages=MESSAGES, max_tokens=TOKENS, seed=seed)
                return answer.choices[0].message.content
            return await asyncio.gather(*map(one, seeds))

    assert asyncio.run(together()) == alone


@check
def too_many_requests():
    async def flood():
        async with openai.AsyncOpenAI(**OPTIONS) as busy:
            async def one(seed):
                return await busy.chat.completions.create(
                    model=MODEL, messages=MESSAGES, max_tokens=100, n=16, seed=seed)
            return await asyncio.gather(*map(one, range(60)), return_exceptions=True)

    results = asyncio.run(flood())
    limited = [result for result in results if isinstance(result, openai.RateLimitError)]
    others = [result for result in results if isinstance(result, Exception) and result not in limited]
    assert not others, others[0]
    # 960 answers do not fit the default queue. A server that was given a longer one takes them all.
    for error in limited:
        assert error.status_code == 429 and int(error.response.headers["retry-after"]) >= 1
    assert len(limited) < len(results)
    assert chat().choices


def main():
    failed = 0
    for function in CHECKS:
        try:
            function()
            print(f"ok      {function.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {function.__name__}")
            traceback.print_exc()
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
