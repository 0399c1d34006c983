"""Captions as lists of sentences, and which sentence each token belongs to."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

# A full stop after these does not end a sentence.
ABBREVIATIONS = frozenset(
    [
        "al",
        "approx",
        "ca",
        "cf",
        "chap",
        "dept",
        "dr",
        "e.g",
        "eq",
        "eqs",
        "et",
        "etc",
        "ex",
        "fig",
        "figs",
        "i.e",
        "jr",
        "max",
        "min",
        "mr",
        "mrs",
        "no",
        "nos",
        "prof",
        "ref",
        "refs",
        "resp",
        "sec",
        "sect",
        "sr",
        "st",
        "tab",
        "vol",
        "vs",
    ]
)
SENTENCE_END = re.compile(r"[.!?][\"\'\u2019\u201d)\]]*(?=\s)")
PANEL_MARK = re.compile(r"(?<=[.;:!?\)\]\"\u201d])\s+(?=\((?:[a-zA-Z]|[ivx]{1,4})\)\s)")
OPENING = "\"'(\u2018\u201c[\u201e"


def ends_sentence(text: str, stop: re.Match) -> bool:
    """Whether this full stop, with what follows, ends a sentence."""
    rest = text[stop.end() :].lstrip()
    opener = rest.lstrip(OPENING)[:1]
    if opener.islower() and not PANEL_MARK.match(text, stop.end()):
        return False
    if text[stop.start()] != ".":
        return True
    words = text[: stop.start()].split()
    word = words[-1].lstrip(OPENING) if words else ""
    named = len(words) > 1 and (words[-2] == "by" or words[-2][:1].isupper())
    initial = named and len(word) == 1 and word.isalpha() and word.isupper()
    dotted = re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", word) is not None  # U.S, i.e
    return not (dotted or initial or word.lower() in ABBREVIATIONS)


def split_sentences(text: str) -> list[str]:
    """A caption as sentences, by a rule that can be told in a few lines.

    1. `.`, `!` or `?` ends a sentence if white space and no lower-case letter follow, and the word before is neither
       a known abbreviation (Fig., et al., vs., U.S.) nor an initial in a name (by J. Smith).
    2. A panel mark - `(a)`, `(B)`, `(iv)` - opens one behind `.`, `;`, `:`, `!` or `?`; within a clause, as in
       "see (a) and (b)", it does not.
    """
    cuts = {stop.end() for stop in SENTENCE_END.finditer(text) if ends_sentence(text, stop)}
    cuts |= {mark.start() for mark in PANEL_MARK.finditer(text)}
    edges = [0, *sorted(cuts), len(text)]
    parts = (text[start:stop].strip() for start, stop in pairwise(edges))
    return [part for part in parts if part]


def join_sentences(caption: str | Sequence[str], name: str) -> tuple[str, list[int]]:
    """A caption as one text, and the position behind each of its sentences.

    Args:
        caption: one text, split by `split_sentences`, or its sentences.
        name: what messages call the record.
    """
    sentences = split_sentences(caption) if isinstance(caption, str) else [str(part).strip() for part in caption]
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise ValueError(f"the caption of {name} is empty; give it a text, or leave the record out")
    ends, position = [], -1
    for sentence in sentences:
        position += 1 + len(sentence)
        ends.append(position)
    return " ".join(sentences), ends


def sentence_of_tokens(offsets: Sequence[tuple[int, int]], special: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The sentence each token belongs to, -1 for special tokens and padding.

    A token belongs where its last character lies, for some tokenizers count the space before a word to it.

    Args:
        offsets: first and one past the last character of each token.
        special: 1 for tokens that stand for no text.
        ends: position behind each sentence.
    """
    return [
        -1 if skip else min(bisect_right(ends, max(start, stop - 1)), len(ends) - 1)
        for (start, stop), skip in zip(offsets, special, strict=True)
    ]
