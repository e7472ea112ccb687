"""Special tokens inside a row's own words: `<|im_end|>` in a question is text that somebody wrote, not the end of it.

A chat template writes words and special tokens into one text, where they can't be told apart any more. So words are
rendered with stand-ins for the names of special tokens, and the tokenizer gets each part of the text as what it is.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bapo_plugin.blocks import WordsPolicy
from bapo_plugin.rows.ends import special_texts
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.oddities import RESERVED, check_characters

# four of them are the id of a token
_STAND_IN = re.compile(f"[{RESERVED}]{{4}}")
_ESCAPED = re.compile(r"\\+u(fd[de][0-9a-f])")
# templates look for them in answers
_THOUGHTS = re.compile(r"[<\[]/?think(ing)?[>\]]", re.IGNORECASE)
# of one that a quotation cut
_PART = re.compile(f"[{RESERVED}]+")


class Words:
    """Takes special tokens out of words, and writes them as text.

    Args:
        tokenizer: whose special tokens they are.
        policy: "text": they are hidden, to become text. "refuse": a row with them can't be used. "tokens": they stay what
            the tokenizer makes of them. Marks of thoughts, such as <think>, always do.
        ends: ids of tokens that end an answer, in case that the tokenizer doesn't call them special.
    """

    def __init__(self, tokenizer: Any, policy: WordsPolicy = "text", ends: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._policy = policy
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if getattr(token, "special", True)}
        special |= {*tokenizer.all_special_ids, *ends}
        self._names = special_texts(tokenizer)
        self._ids = {
            name: i
            for i, name in self._names.items()
            if i in special and not _THOUGHTS.fullmatch(name)
        }
        # the longest first, as tokenizers read them
        pattern = "|".join(re.escape(n) for n in sorted(self._ids, key=len, reverse=True))
        self._name = re.compile(pattern) if pattern else None

    def notice(self, texts: Iterable[str]) -> str:
        """What is to be said of texts with stand-ins; "" where none has any."""
        found = {self.show(digits) for text in texts for digits in _STAND_IN.findall(text)}
        if self._policy == "tokens" or not found:
            return ""
        return f"special tokens stand in the words and become text ({', '.join(sorted(found))})"

    def hide(self, value: Any, name: str, own: Callable[[str], str] = str) -> Any:
        """A value (text, or messages) with stand-ins for special tokens in its strings; roles stay.

        Args:
            name: of the value, for messages.
            own: text -> the beginning of it that is words; the rest stays as it is.

        Raises:
            RowError: the text holds what stand-ins are made of.
        """
        if self._policy == "tokens":
            return value
        if isinstance(value, str):
            words = own(value)
            return self._hide(words, name) + value[len(words) :]
        if isinstance(value, Mapping):
            return {
                k: v if k in ("role", "from") else self.hide_below(v, name, own)
                for k, v in value.items()
            }
        return [self.hide(v, name, own) for v in value] if isinstance(value, list) else value

    def hide_below(self, value: Any, name: str, own: Callable[[str], str] = str) -> Any:
        """As `hide`, for what is below a message or beside messages, such as tools: any key may be there, and hold words."""
        if isinstance(value, Mapping) and self._policy != "tokens":
            return {
                self._hide(k, name) if isinstance(k, str) else k: self.hide_below(v, name, own)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [self.hide_below(v, name, own) for v in value]
        return self.hide(value, name, own)

    def _hide(self, text: str, name: str) -> str:
        check_characters(text, name)
        if self._name is None:
            return text
        return self._name.sub(lambda match: _stand_in(self._ids[match.group()]), text)

    def check(self, text: str, name: str) -> None:
        """Refuse a text with stand-ins, where that is the policy.

        Raises:
            RowError: it has some.
        """
        if self._policy == "refuse" and (found := _STAND_IN.search(text)):
            raise RowError(
                f"{name} has the special token {self.show(found.group())!r} in its words; mend them, or set "
                "bapo.special_tokens_in_words: text"
            )

    def show(self, text: str) -> str:
        """The text with the names of special tokens in place of their stand-ins."""
        return _STAND_IN.sub(
            lambda match: self._names.get(_number(match.group()), match.group()), text
        )

    def tell(self, message: str) -> str:
        """A message with the names of special tokens, also where it quotes with escapes."""
        shown = self.show(_ESCAPED.sub(lambda match: chr(int(match.group(1), 16)), message))
        return _PART.sub("…", shown)

    def encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """Ids of a text with stand-ins, which become text; None where there are none.

        Raises:
            RowError: this tokenizer can't write them as text.
        """
        if self._policy == "tokens" or not _STAND_IN.search(text):
            return None
        plain = _STAND_IN.sub("x", text)
        expected = self._tokenizer(plain, add_special_tokens=add_special_tokens)["input_ids"]
        parts, found = self._in_parts(plain), self._in_parts(text)
        before = expected[: max(0, len(expected) - len(parts))]  # such as BOS
        special = set(self._ids.values())
        if [*before, *parts] != expected or sum(i in special for i in found) != sum(
            i in special for i in parts
        ):
            names = [self._names[_number(digits)] for digits in _STAND_IN.findall(text)]
            raise RowError(
                f"the words hold {names[0]!r}, a special token that this tokenizer can't write as text; mend the words, or "
                "set bapo.special_tokens_in_words: tokens"
            )
        return [*before, *found]

    def _in_parts(self, text: str) -> list[int]:
        """Ids of a text whose special tokens are those of the template; all else is text."""
        found, place = [], 0
        for match in self._name.finditer(text):
            found += [*self._text(text[place : match.start()]), self._ids[match.group()]]
            place = match.end()
        return found + self._text(text[place:])

    def _text(self, text: str) -> list[int]:
        if not text:
            return []
        return self._tokenizer(
            self.show(text), add_special_tokens=False, split_special_tokens=True
        )["input_ids"]


def _stand_in(number: int) -> str:
    return "".join(RESERVED[number >> shift & 31] for shift in (15, 10, 5, 0))


def _number(stand_in: str) -> int:
    number = 0
    for digit in stand_in:
        number = number << 5 | RESERVED.index(digit)
    return number
