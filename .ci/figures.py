#!/usr/bin/env python3
"""Rejects figures in Markdown that stand without the command that printed them.

A figure is a number with a unit of speed, time or quality (tokens/s, GB/s, ms, "1.3 times as fast", a perplexity of
1.33 ...), in text or in a table whose header has such a unit. Its section, from one heading to the next, must have a
command: `cargo ...`, `bitnet ...`, or another one of COMMANDS, in a code block or between backquotes. Quotations and code
that isn't output are not looked at.

    .ci/figures.py FILE.md ...      exit status 1 and one line for each figure without a command
    .ci/figures.py --self-test
"""

import re
import sys

NUMBER = r"\d(?:[\d.,]*\d)?(?:e-?\d+)?"
UNIT = (
    r"(?:(?:tokens?|tok|words|rows)\s*(?:/\s*s\b|a second|per second)"
    r"|[kMGT]i?B/s|(?:10\^9|[kMGT])\s*(?:bytes|multiply-adds|FLOPs?|operations)?\s*(?:/\s*s\b|a second|per second)"
    r"|[GT]FLOPS?\b|(?:ns|us|µs|ms|s|min|h)\b|(?:nano|micro|milli)?seconds?\b|minutes?\b|hours?\b|nats?\b)"
)
FIGURES = [
    re.compile(rf"(?<![\w.-]){NUMBER}(?:\s*(?:to|-|–|and)\s*{NUMBER})?\s*{UNIT}"),
    re.compile(rf"{NUMBER}\s*(?:times|x|×)\s+(?:as (?:fast|slow)|faster|slower|quicker)"),
    re.compile(rf"{NUMBER}\s*%\s+(?:faster|slower|of (?:the |what the )?(?:read |memory's )?bandwidth)"),
    re.compile(rf"perplexity (?:of|is|was)\s+{NUMBER}"),
]
# In a table's header the number is in another cell.
HEADER = re.compile(r"(?:tokens|tok)/s|[kMGT]i?B/s|\b(?:ns|us|µs|ms|seconds|minutes)\b|\bperplexity\b|\bspeedup\b", re.I)
COMMANDS = re.compile(r"(?:^|[`\s;&|(])(?:cargo|bitnet|target/release/bitnet|time|perf|make|\.ci/run) +[\w-]")
# Fences whose content was printed by a program.
OUTPUT = {"", "text", "console"}


def sections(lines):
    """[(number, line)] from each heading to the next, headings in code left alone."""
    section, fenced = [], False
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if not fenced and re.match(r"#{1,6} ", line) and section:
            yield section
            section = []
        section.append((number, line))
    yield section


def has_command(section):
    fenced = False
    for _, line in section:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            if COMMANDS.search(line):
                return True
        elif any(COMMANDS.search("`" + code) for code in re.findall(r"`([^`]+)`", line)):
            return True
    # Inline code may run over the end of a line.
    text = " ".join(line for _, line in section)
    return any(COMMANDS.search("`" + code) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))


def figures(section):
    """(line's number, figure) of each figure in a section."""
    fence, table = None, False
    for at, (number, line) in enumerate(section):
        stripped = line.strip()
        if stripped.startswith("```"):
            fence = None if fence is not None else stripped[3:].strip()
            continue
        if fence is not None and fence not in OUTPUT or stripped.startswith(">"):
            continue
        if stripped.startswith("|"):
            rule = at + 1 < len(section) and re.fullmatch(r"\|[\s:|-]+\|?", section[at + 1][1].strip())
            if rule:
                table = bool(HEADER.search(line))
                continue
            if table and not re.fullmatch(r"[\s:|-]+", stripped) and re.search(r"\|\s*[\d(]", line):
                yield number, stripped
                continue
        else:
            table = False
        # Names and settings are in code.
        text = re.sub(r"`[^`]*`", "", line) if fence is None else line
        for pattern in FIGURES:
            found = pattern.search(text)
            if found:
                yield number, found.group(0)
                break


def check(text):
    return [
        figure
        for section in sections(text.splitlines())
        if not has_command(section)
        for figure in figures(section)
    ]


def self_test():
    bad = [
        "It makes 6220 tokens a second.",
        "Decode: 36.3 tokens/s.",
        "Memory gives 34.5 GB/s here.",
        "That took 0.09 s.",
        "It is 1.5 times as fast as before.",
        "30 % faster now",
        "85 % of the bandwidth",
        "A perplexity of 1.33 is good.",
        "Training took 38 minutes.",
        "| kernel | ms |\n| --- | --- |\n| `a` | 3.1 |",
        "```text\ndecode 36.3 tokens/s\n```",
        "`bitnet run`\n\n## Another section\n\n36.3 tokens/s",
        "`BITNET_THREADS`: 36.3 tokens/s",
    ]
    good = [
        "Values in {-s, 0, s}, d = 0, s = 3.",
        "No figure, 128 tokens, 2 bits a weight, version 1.0, in 32 bytes, s = 8, top 5.",
        "By `bitnet bench -m m.gguf`, 36.3 tokens/s.",
        "```sh\ncargo run --release -- bench\n```\n\n| tokens/s |\n| --- |\n| 36.3 |",
        "`time cargo\nbuild` took 13 min.",
        "```c\nfor (int s = 0; s < 5; s++); // 5 ms\n```",
        "| kind | size |\n| --- | --- |\n| `a` | 3.1 |",
        "> She ran 5 minutes.",
        "# One\n\ntext\n\n```sh\n# 5 ms, a comment\nmake test\n```",
    ]
    wrong = [text for text in bad if not check(text)] + [text for text in good if check(text)]
    for text in wrong:
        print(f"wrong verdict: {text!r}", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments):
    if arguments == ["--self-test"]:
        return self_test()
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    found = False
    for path in arguments:
        with open(path, encoding="utf-8") as file:
            for number, figure in check(file.read()):
                found = True
                print(f"{path}:{number}: no command in this section prints: {figure}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
