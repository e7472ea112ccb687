"""Mutated rows: each is reported with a reason and a remedy, or all its words arrive in the tokens."""

import csv
import json
import re
from random import Random

import mutated_rows
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axolotl.utils.dict import DictDefault
from ledger import CASES, COUNT, SEED, Ledger
from templates import TEMPLATES, known
from tiny import make_rows, make_tokenizer, write_jsonl

from bapo_plugin.last_word import is_for_the_user
from bapo_plugin.opening import Opening
from bapo_plugin.preparation import Preparation
from bapo_plugin.rows.ends import StopTexts
from bapo_plugin.rows.table import problems_of
from bapo_plugin.rows.tokens import prepare_batch

# `type:` -> whether chosen and rejected are whole conversations; whether columns hold messages (None: either)
TYPES = {
    "chat_template.default": (False, None),
    "chat_template.argilla_chat": (True, True),
    "chatml.prompt_pairs": (False, False),
    "chatml.argilla_chat": (True, True),
    "llama3.prompt_pairs": (False, False),
    "user_defined": (False, False),
}
REMEDY = re.compile(r";|must |, see /|rows\d+\.(jsonl|csv), line \d+|is empty")
ROOM = 100_000  # tokens


def config(folder, path, kind, template=None, **bapo):
    entry = {"path": str(path), "split": "train", "type": kind}
    if kind.startswith("chat_template"):
        entry["field_messages"] = "prompt"
    if kind == "user_defined":
        formats = {"prompt_format": "Q: {prompt} A: ", "chosen_format": "{chosen}"}
        columns = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
        entry["type"] = {**columns, **formats, "rejected_format": "{rejected}"}
    chat = {"chat_template": "jinja", "chat_template_jinja": template} if template else {}
    return DictDefault(
        {
            "datasets": [entry],
            "bapo": {"on_faulty": "drop", **bapo},
            "sequence_len": ROOM,
            "dataset_prepared_path": str(folder / "prepared"),
            "base_model": str(folder),
            "chat_template": "tokenizer_default",
            "seed": 1,
        }
        | chat
    )


class Reader:
    """How rows of a `type:` and a template become tokens."""

    def __init__(self, folder, name, kind):
        self.tokenizer, template, ends, _ = known(name)
        cfg = config(folder, folder / "seed.jsonl", kind, template)
        opening = Opening(cfg, self.tokenizer)
        opening.named = set(ends)
        (self.source,) = opening.sources("datasets", 0)
        stops = {*opening.named, *opening._ends, self.tokenizer.eos_token_id} - {None}
        self.stops = StopTexts(self.tokenizer, stops)
        self.words = self.source.encode._words

    def tokens(self, row):
        batch = {name: [value] for name, value in row.items()}
        read, encode = self.source.read, self.source.encode
        return {
            name: cells[0]
            for name, cells in prepare_batch(batch, [0], read, encode, ROOM, "drop").items()
        }

    def specials(self, ids):
        special = set(self.words._ids.values())
        return [i for i in ids if i in special]


def test_rows(tmp_path):
    ledger = Ledger()
    write_jsonl(tmp_path / "seed.jsonl", make_rows(2))
    readers = {}
    for number in CASES or range(COUNT or 300):
        random = Random(f"{SEED} {number}")
        kind = random.choice([*TYPES, *["chat_template.default"] * 3])
        name = random.choice(list(TEMPLATES))
        if (name, kind) not in readers:
            readers[name, kind] = Reader(tmp_path, name, kind)
        whole, messages = TYPES[kind]
        messages = random.random() < 0.5 if messages is None else messages
        row = mutated_rows.mutated(random, whole, messages)
        done = [name, kind, *row.done]
        ledger.counts["tried"] += 1
        try:
            judge(ledger, number, done, row.values, readers[name, kind])
        except Exception as error:
            ledger.fail("TRACEBACK", number, done, error)
    ledger.settle("Rows")


def judge(ledger, number, done, row, reader):
    found = reader.tokens(row)
    if problem := found["problem"]:
        ledger.counts["reported"] += 1
        if not REMEDY.search(problem) or len(problem) > 1000:
            ledger.fail("NO REMEDY", number, done, problem)
        if re.search(r"[\ufdd0-\ufdef]", problem) and "ufdd0" not in ascii(row):
            ledger.fail("STAND-IN", number, done, problem)
        return
    ledger.counts["taken"] += 1
    for part in ("chosen", "rejected"):
        lost = lost_words(row, part, found, reader.tokenizer, reader.stops)
        if lost:
            ledger.fail("WORDS LOST", number, done, f"{lost!r} in {found[part]!r}")
    shown = [found[name] for name in ("ask", "prompt", "chosen", "rejected", "base", "words")]
    if re.search("[\ufdd0-\ufdef]", "".join(shown)):
        ledger.fail("STAND-IN", number, done, shown)
    # special tokens are those that the template writes around words that hold none
    calm = reader.tokens({k: v if k.startswith("base") else harmless(v) for k, v in row.items()})
    if not calm["problem"]:
        for part in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ours, theirs = reader.specials(found[part]), reader.specials(calm[part])
            if part != "prompt_ids":  # a response may bring its own end of turn
                ours, theirs = ours[:-1], theirs[:-1]
            if ours != theirs:
                ledger.fail("SPECIAL TOKENS", number, done, f"{part}: {shown}")


def harmless(value):
    """The value without special tokens in its words."""
    if isinstance(value, str):
        for token in sorted(mutated_rows.TOKENS, key=len, reverse=True):
            value = value.replace(token, "x")
        return value
    if isinstance(value, dict):
        return {k: v if k in ("role", "from") else harmless(v) for k, v in value.items()}
    return [harmless(v) for v in value] if isinstance(value, list) else value


def lost_words(row, part, found, tokenizer, stops):
    """Words of prompt and response that aren't in the tokens; white space and the end of turn aside."""
    ids = [*found["prompt_ids"], *found[f"{part}_ids"]]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = "".join(text.split())
    lost = []
    for column in ("prompt", part):
        for words, is_old in said(row.get(column)):
            if is_old:  # templates drop thoughts of former turns, as they are meant to
                words = re.sub(r".*</think>", "", words, flags=re.DOTALL)
            words = "".join((stops.strip(words) if column == part else words).split())
            if words not in text:
                lost.append(words)
    return lost


def said(value, is_old=False):
    """(text, whether of the assistant in a former turn) of all that a value says."""
    if isinstance(value, str):
        yield value, is_old
    elif isinstance(value, list):
        for i, item in enumerate(value):
            role = item.get("role") if isinstance(item, dict) else None
            yield from said(item, is_old or (role == "assistant" and i < len(value) - 1))
    elif isinstance(value, dict):
        for key in ("content", "value", "text"):
            yield from said(value.get(key), is_old)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files(tmp_path, suffix):
    """As many rows come out, or are reported, as went in; a file that can't be read is an error that names the line."""
    ledger = Ledger()
    tokenizer = make_tokenizer()
    stops = StopTexts(tokenizer, {tokenizer.eos_token_id})
    for number in range(COUNT // 200 or 2):
        random = Random(f"{SEED} {suffix} {number}")
        rows = [mutated_rows.mutated(random, False, False).values for _ in range(40)]
        if random.random() < 0.9:  # else they are refused as a whole
            rows = [mutated_rows.readable(row) for row in rows]
        if suffix in ("csv", "parquet"):
            rows = [flat(row) for row in rows]
        path = tmp_path / f"rows{number}.{suffix}"
        write(path, rows)
        is_broken = random.random() < 0.3
        if is_broken:
            path.write_bytes(mutated_rows.broken(random, path.read_bytes()))
        ledger.counts["tried"] += 1
        kind = random.choice(("chat_template.default", "chatml.prompt_pairs"))
        try:
            work = Preparation(config(tmp_path, path, kind), tokenizer)
            (table,) = work.all_rendered(keep=False)["datasets"]
            (left,) = work.usable({"datasets": [table]})["datasets"]
        except Exception as error:
            ledger.counts["files refused"] += 1
            ledger.reasons[str(error)[:200]] += 1
            if not is_for_the_user(error):
                ledger.fail("TRACEBACK", number, path, error)
            elif not REMEDY.search(str(error)):
                ledger.fail("NO REMEDY", number, path, error)
            continue
        faulty = sum(said.rows for said in problems_of(table).values())
        ledger.counts["rows taken"] += len(left)
        ledger.counts["rows reported"] += faulty
        if len(left) + faulty != len(table) or (not is_broken and len(table) != len(rows)):
            ledger.fail("ROWS LOST", number, path, f"{len(rows)} {len(table)} {len(left)} {faulty}")
        for found in left if not is_broken else ():
            row = rows[found["row"] - 1]
            for part in ("chosen", "rejected"):
                if lost := lost_words(row, part, found, tokenizer, stops):
                    ledger.fail("WORDS LOST", number, path, f"{lost!r} in {found[part]!r}")
    ledger.settle(f"Files of {suffix}")


def flat(row):
    """The row as a table can hold it: text or nothing."""
    columns = ("prompt", "chosen", "rejected", "base")
    cells = {name: row.get(name) for name in columns}
    texts = {name: v and str(v).encode("utf-8", "replace").decode() for name, v in cells.items()}
    return {name: text or None for name, text in texts.items()}


def write(path, rows):
    if path.suffix in (".jsonl", ".json"):
        rows = [json.dumps(row, default=str) for row in rows]
        text = "\n".join(rows) if path.suffix == ".jsonl" else f"[{','.join(rows)}]"
        path.write_text(text, "utf-8")
        return
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(rows)
