"""Writes spm_goldens.json: a small SentencePiece BPE model with byte fallback, in the settings of LLaMA's
(identity normalisation, digits split, no whitespace removed), and what SentencePiece makes of some texts."""

import io
import json

import sentencepiece as spm

CORPUS = """
The river rises in the northern hills and runs south through three small towns before it meets the sea.
In spring the water is high and cold, and nobody swims; in summer the children of the towns are in it all day.
An old mill stands at the second bend. Its wheel has not turned for sixty years, but the walls are dry.
The miller's daughter, who is eighty-four, remembers the sound: a slow knocking, day and night, like a heart.
She says that silence was the strangest thing when the wheel stopped, stranger than the war, stranger than the dark.
Every morning at 6:30 a heron comes to the weir, stands on one leg, waits, and catches a fish within 15 minutes.
When the first snow falls the path along the bank is closed, and the 7 bridges are salted by the council's men.
There is a saying here: whoever drinks from all three springs will come back, whether they want to or not.
Der Fluss entspringt im Norden und fließt durch drei kleine Städte; im Frühling führt er Hochwasser.
La rivière est froide au printemps, mais les enfants s'y baignent tout l'été, même après l'orage.
def depth(level, offset=0.5): return level - offset  # metres above the weir
for day in range(1, 31):
    if day % 7:
        print(day, depth(day * 0.25))
        heron  =  fish[day]    # one a day
"""

TEXTS = [
    "",
    " ",
    "   ",
    "a",
    "The river",
    " The river",
    "   The river",
    "The  river   rises    in     the hills",
    "The river ",
    "The river   ",
    "stranger than the strangest stranger",
    "wheel wheels wheeled wheeling",
    "the the the",
    "thethethe",
    "aaaaaaaaaaaaaaaa",
    "6:30 15 1234567890 0.25",
    "line one\nline two\n\nline four\n",
    "\n",
    "\ttab\t\ttabs",
    "carriage\r\nreturn",
    "eighty-four, forty-eight; (seventy) [nine] {two}",
    "def depth(level, offset=0.5): return level - offset",
    "Städte fließt Frühling",
    "été après l'orage",
    "e\u0301te\u0301 combining",
    "ﬁ ligature ½ ² ℃",
    "日本語のテキスト",
    "你好,世界 안녕",
    "Привет мир",
    "😀 emoji 👩‍👩‍👧‍👦🇨🇭",
    "a😀b",
    "\u2581 the lower one eighth block itself",
    "\u00a0nbsp\u3000ideographic",
    "\u0001\u007f control",
    "no byte <0x41> in here, <s only",
    "The miller's daughter, who is eighty-four, remembers the sound: a slow knocking.",
    "zzzzqqqqxxxx",
    "é",
    "mixed ABC abc 123 äöü ßẞ 中文 ½",
    "the river the river the river the river the river the river the river the river",
]

model = io.BytesIO()
spm.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS.strip().split("\n")),
    model_writer=model,
    model_type="bpe",
    vocab_size=560,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=True,
    character_coverage=1.0,
    allow_whitespace_only_pieces=True,
    num_threads=1,
)
sp = spm.SentencePieceProcessor(model_proto=model.getvalue())

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def kind(i):
    return UNKNOWN if sp.is_unknown(i) else CONTROL if sp.is_control(i) else BYTE if sp.is_byte(i) else NORMAL


n = sp.vocab_size()
byte = {int(sp.id_to_piece(i)[3:5], 16): i for i in range(n) if sp.is_byte(i)}
# Ids that no text encodes to: whole and broken characters out of bytes, alone and between words.
river = sp.encode("river")
ID_LISTS = [
    [byte[b] for b in "日".encode()],
    [byte[b] for b in "日".encode()[:2]],
    [byte[0xF0], byte[0x9F]],
    [byte[0xF0], byte[0x9F], *river],
    [*river, byte[0xE6], byte[0x97], *river],
    [byte[0xFF], byte[0x41], byte[0xC3], byte[0xA9], byte[0x80]],
    [sp.bos_id(), *river, sp.eos_id()],
    [*river, *river],
]
goldens = {
    "made_with": f"sentencepiece {spm.__version__}",
    "tokens": [sp.id_to_piece(i) for i in range(n)],
    "scores": [sp.get_score(i) for i in range(n)],
    "types": [kind(i) for i in range(n)],
    "bos": sp.bos_id(),
    "eos": sp.eos_id(),
    "unk": sp.unk_id(),
    "encode": [{"text": t, "ids": sp.encode(t), "decoded": sp.decode(sp.encode(t))} for t in TEXTS],
    "decode": [{"ids": ids, "decoded": sp.decode(ids)} for ids in ID_LISTS],
}
with open("spm_goldens.json", "w", encoding="utf-8") as file:
    json.dump(goldens, file, ensure_ascii=True)
    file.write("\n")
