"""Writes pre_goldens.json: the words that the tokenizers package (another regex engine, Oniguruma) cuts texts
into with the pre-tokenizers that stand in the models' own tokenizer.json."""

import json

import tokenizers
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MINICPM5 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD, TAIL = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TEKKEN = rf"{LEAD}{UPPER}*{LOWER}+|{LEAD}{UPPER}+{LOWER}*|\p{{N}}|{TAIL}"
GPT4O = rf"{LEAD}{UPPER}*{LOWER}+{CONTRACTION}|{LEAD}{UPPER}+{LOWER}*{CONTRACTION}|\p{{N}}{{1,3}}|{TAIL}"


def split(*patterns):
    cuts = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


PRE = {
    "llama-bpe": split(LLAMA3),
    "qwen2": split(QWEN2),
    "qwen35": split(QWEN35),
    "minicpm5": split(r"\p{N}{1,3}", MINICPM5),
    "tekken": split(TEKKEN),
    "gpt-4o": split(GPT4O),
    "gpt-2": ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]),
}

TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "   three   spaces   between   ",
    "tabs\tand\t\tmore\n\n\nlines\r\n\r\n  indented\n",
    "I'm sure they'RE not WE'LL; it's John's, don't you'd've?",
    "12345678 3.14159 1,000,000 a1b22c333 ²³ ½ ٣٤ 一二三",
    "naïve café über Straße Ångström e\u0301 n\u0303a",
    "日本語のテキストと漢字。你好,世界 안녕하세요",
    "Привет, мир! مرحبا بالعالم हिन्दी में",
    "😀👩‍👩‍👧‍👦🇨🇭👍🏽 emoji",
    "camelCase PascalCase SCREAMING_SNAKE snake_case kebab-case HTMLParser iOS",
    "def f(x):\n    return {'a': [x, 1]}  # comment\n",
    "http://example.org/a?b=c&d=%20#frag //path///x",
    "!!!???...---===+++<<<>>>^^^~~~|||$$$```",
    "\u00a0nbsp\u2003em space\u3000ideographic\u200bzero width",
    "\u0000\u0001 control \u007f",
    "'s 't 're 've 'm 'll 'd 'S 'T 'RE",
    "ends with newline\n",
    "\n",
    " ",
    "a",
    "ǅ ǈ titlecase ʰ modifier ª º",
    "x² + y² = z² (a≠b) ∑∫ €5 £6",
    "spaces before numbers:  12   3456",
]

goldens = {
    "made_with": f"tokenizers {tokenizers.__version__}",
    "texts": TEXTS,
    "words": {name: [[w for w, _ in pre.pre_tokenize_str(t)] for t in TEXTS] for name, pre in PRE.items()},
}
with open("pre_goldens.json", "w", encoding="utf-8") as file:
    json.dump(goldens, file, ensure_ascii=True, indent=0)
    file.write("\n")
