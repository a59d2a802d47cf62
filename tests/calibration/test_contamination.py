import pytest

from rap_env.calibration import Corpus, Overlap, find_overlaps, refuse_contamination
from rap_env.errors import ContaminationFound

PASSAGE = "The mid-1990s lobster, as it's known, weighs 1,000 g; it lives off Norway and is blue until cooked."
NORMALISED = "the mid 1990s lobster as it s known weighs 1 000 g it lives off norway and is blue until cooked"
WORDS = NORMALISED.split()
# as WikiText would print the passage: other case, spaced punctuation, `@-@` and `@,@`
IN_WIKITEXT = PASSAGE.upper().replace("-", " @-@ ").replace(",", " @,@ ").replace("'", " '").replace(".", " .")


def test_thirteen_shared_words_are_found_whatever_case_spacing_and_punctuation():
    items = {"other": ["nothing of the kind"], "boolq": ["an unrelated passage", PASSAGE]}
    documents = ["A clean document.", f"Two words {IN_WIKITEXT} and a rest"]
    assert find_overlaps(documents, items) == [Overlap(1, 2, "boolq", 1, tuple(WORDS[:13]))]


def test_twelve_shared_words_pass_and_thirteen_do_not():
    items = {"boolq": [PASSAGE]}
    assert find_overlaps([" ".join(["x", *WORDS[3:15], "x"])], items) == []
    assert find_overlaps([" ".join(["x", *WORDS[3:16], "x"])], items) == [Overlap(0, 1, "boolq", 0, tuple(WORDS[3:16]))]


def test_words_at_the_very_end_of_document_and_item_are_compared():
    assert [overlap.word for overlap in find_overlaps([" ".join(["x", *WORDS[-13:]])], {"boolq": [PASSAGE]})] == [1]


def test_an_item_of_eight_to_twelve_words_counts_only_as_a_whole():
    items = {"arc": ["Which gas do green plants take in mostly?"]}
    whole = ["Ask: which gas do green plants take in mostly today"]
    assert find_overlaps(whole, items) == [Overlap(0, 1, "arc", 0, tuple(whole[0].lower().split()[1:9]))]
    assert find_overlaps(["which gas do green plants take in summer"], items) == []


def test_an_item_of_fewer_than_eight_words_is_not_checked():
    assert find_overlaps(["predators eat other animals and it is so"], {"arc": ["Predators eat other animals"]}) == []


def test_words_do_not_run_on_from_one_document_into_the_next():
    assert find_overlaps([" ".join(WORDS[:10]), " ".join(WORDS[10:])], {"boolq": [PASSAGE]}) == []


def test_each_pair_of_document_and_item_is_reported_once_in_the_order_of_the_text():
    other = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    items = {"boolq": [PASSAGE, PASSAGE], "piqa": ["one two three four five six seven eight", other]}
    documents = [f"{other} {PASSAGE} {other}", PASSAGE]
    assert [(found.document, found.word, found.task, found.item) for found in find_overlaps(documents, items)] == [
        (0, 0, "piqa", 0),
        (0, 0, "piqa", 1),
        (0, 14, "boolq", 0),
        (0, 14, "boolq", 1),
        (1, 0, "boolq", 0),
        (1, 0, "boolq", 1),
    ]


def test_a_contaminated_corpus_is_refused_with_the_place_and_the_words():
    corpus = Corpus("notes", ("clean", f"see {PASSAGE}"))
    message = f"'notes' overlaps with 1 .*document 1 at word 1 and boolq item 0: '{' '.join(WORDS[:13])}'"
    with pytest.raises(ContaminationFound, match=message):
        refuse_contamination(corpus, {"boolq": [PASSAGE]})


def test_only_three_overlaps_are_shown_and_the_others_counted():
    corpus = Corpus("notes", (PASSAGE,))
    with pytest.raises(ContaminationFound, match=r"overlaps with 5 .*item 2: '.*'; and 2 more\. Calibrate on another"):
        refuse_contamination(corpus, {"boolq": [PASSAGE] * 5})


def test_clean_text_passes():
    refuse_contamination(Corpus("notes", ("A text about something else entirely.",)), {"boolq": [PASSAGE]})
