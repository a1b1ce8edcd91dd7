"""Writes goldens.json: what Jinja2 makes of the templates beside this file, and of many small ones, configured as
transformers configures it for chat templates (`apply_chat_template`).

    pip install jinja2==3.1.6
    python make_goldens.py

The variables stand in the goldens as Python's `repr` writes them, which is Jinja, too. Where Jinja2 fails, there is no
text.
"""

import datetime
import json
import pathlib

import jinja2
import jinja2.ext
import jinja2.sandbox

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2024, 7, 25, 12, 34, 56)


class Generation(jinja2.ext.Extension):
    """The block that transformers adds: it marks the assistant's words and writes what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("inside"), [], [], body).set_lineno(line)

    def inside(self, caller):
        return caller()


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env


ENV = environment()


def golden(name, template, variables):
    golden = {"name": name, "template": template, "variables": repr(variables)}
    try:
        golden["text"] = ENV.from_string(template).render(**variables)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, SyntaxError) as e:
        golden["error"] = f"{type(e).__name__}: {e}"
    return golden


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a town: \"now\" or later, in °C",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string", "enum": ["Köln", "São Paulo"]},
                    "days": {"type": "integer", "default": 1},
                    "items": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["town"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {}}},
]
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"town": "Köln", "days": 2}}}

CONVERSATIONS = {
    "user": [{"role": "user", "content": "  Hi <there> & \"you\"\n"}],
    "system": [{"role": "system", "content": " Be brief. \n"}, {"role": "user", "content": "Grüße, 世界 👋🏽"}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?\r\n\r\nAnswer."},
        {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n2 "},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "Twice two."},
        {"role": "user", "content": ""},
    ],
    "tools": [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "17.5", "tool_call_id": "call12345"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "<think>Rain.</think>\n17.5 °C, rain"},
        {"role": "user", "content": "Thanks"},
    ],
    "two calls": [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, dict(CALL, id="x")]},
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}],
        }
    ],
    "number": [{"role": "user", "content": 5}],
    "wrong turns": [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
    "other role": [{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}],
}

VALUES = {
    "n": None,
    "t": True,
    "i": 7,
    "f": 2.5,
    "s": "Abc déf\n",
    "l": [3, "a", None, 1.0, [True, "q'"]],
    "d": {"b": 1, "a": {"z": [1, 2], "items": "x"}, "c": "it's \"so\""},
    "people": [
        {"name": "Zoe", "age": 30, "tags": ["x", "y"]},
        {"name": "adam", "age": 9, "tags": []},
        {"name": "Bob", "age": 30},
    ],
}

# Each is written as {{ ... }}.
EXPRESSIONS = (HERE / "expressions.txt").read_text().splitlines()
# Each stands between two lines of percent signs.
BLOCKS = (HERE / "blocks.txt").read_text().split("%%%%%%%%\n")

goldens = []
for path in sorted(HERE.glob("*.jinja")):
    for conversation, messages in CONVERSATIONS.items():
        for more in [
            {"add_generation_prompt": True},
            {"add_generation_prompt": False, "tools": TOOLS, "enable_thinking": False, "date_string": "1 May"},
        ]:
            variables = {
                "messages": messages, "tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>"
            } | more
            name = f"{path.stem}, {conversation}, {'tools' if variables['tools'] else 'plain'}"
            goldens.append(golden(name, path.read_text(), variables))
for expression in EXPRESSIONS:
    if expression and not expression.startswith("#"):
        goldens.append(golden(expression, "{{ " + expression + " }}", VALUES))
for block in BLOCKS:
    goldens.append(golden(block, block.replace("<CR>", "\r"), VALUES))

lines = ",\n".join(json.dumps(golden, ensure_ascii=False) for golden in goldens)
(HERE / "goldens.json").write_text(f"[\n{lines}\n]\n")
texts = sum("text" in golden for golden in goldens)
print(f"{len(goldens)} goldens, {texts} with a text")
