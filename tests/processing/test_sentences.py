"""Captions split into sentences, and tokens found in them."""

import pytest

from vitweave.processing.sentences import join_sentences, sentence_of_tokens, split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["One sentence without a stop"],
        ["First one.", "Second one!", "Third?", "4 is a number."],
        ["(a) A spring at rest.", "(b) The same spring, stretched.", "(c) Forces on it."],
        ["Reflecting telescopes:", "(a) a plane mirror;", "(b) a convex one."],
        ["The ribs, (a) sternum and (b) 12 pairs, as in (c)."],
        ["Chart (a) shows the rise.", "Chart (b) shows the fall."],
        ["Taken from Fig. 3 of Smith et al. (2020), e.g. with approx. 5 cells vs. 7."],
        ["Photo by J. Smith and Ada B. Jones in the U.S. Army."],
        ["A wire carries a current I.", "The field is B."],
        ["The value is 3.5 m at x=0.5.", "It rises."],
        ['He said "stop."', "Nobody did."],
        ["Was it (see above)?", "\u201cYes.\u201d", "(It was.)"],
    ],
)
def test_the_rule(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


def test_white_space_alone_is_lost():
    text = "  First.\n\n Second (a)  third.  (b) fourth; "
    assert " ".join(split_sentences(text)).split() == text.split()


def test_tokens_lie_where_their_last_character_lies():
    text, ends = join_sentences(["ab c.", "d e"], "x")
    assert text == "ab c. d e" and ends == [5, 9]
    offsets = [(0, 0), (0, 2), (2, 4), (4, 5), (5, 7), (5, 6), (8, 9), (8, 8), (0, 0)]
    special = [1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert sentence_of_tokens(offsets, special, ends) == [-1, 0, 0, 0, 1, 1, 1, 1, -1]


@pytest.mark.parametrize("caption", ["", "  \n", [], ["", " "]])
def test_an_empty_caption_names_its_record(caption):
    with pytest.raises(ValueError, match="caption of figure_12 is empty"):
        join_sentences(caption, "figure_12")
