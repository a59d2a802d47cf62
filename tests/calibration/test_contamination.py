import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rap_env.calibration import Corpus, Overlap, count_unchecked, find_overlaps, refuse_contamination
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


# 13 words of two characters each, and one more character
CHINESE = "中国的首都是北京这座城市有三千多年的历史并且是世界上人"


def test_chinese_is_compared_by_characters_26_of_them_in_a_row():
    assert len(CHINESE) == 27
    items = {"ceval": [CHINESE]}
    assert find_overlaps([f"前言。{CHINESE[1:]}口"], items) == [Overlap(0, 2, "ceval", 0, tuple(CHINESE[1:]))]
    assert find_overlaps([f"前言。{CHINESE[2:]}口"], items) == []
    with pytest.raises(ContaminationFound, match="ceval item 0"):
        refuse_contamination(Corpus("zh", (f"前言。{CHINESE}。",)), items)


def test_a_chinese_item_of_16_to_25_characters_counts_only_as_a_whole():
    items = {"ceval": [CHINESE[:16]]}
    assert [found.word for found in find_overlaps(["问" + CHINESE], items)] == [1]
    assert find_overlaps([CHINESE[:15] + "问"], items) == []


@pytest.mark.parametrize(
    "item",
    [
        "日本の首都は東京であり、世界で最も人口の多い都市の一つである",  # Japanese
        "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย",  # Thai
        "ວຽງຈັນເປັນນະຄອນຫຼວງແລະເມືອງທີ່ໃຫຍ່ທີ່ສຸດຂອງປະເທດລາວ",  # Lao
        "ရန်ကုန်မြို့သည်မြန်မာနိုင်ငံ၏အကြီးဆုံးမြို့တော်ဖြစ်ပြီးစီးပွားရေးမြို့ဖြစ်သည်",  # Burmese
        "ភ្នំពេញគឺជារាជធានីនិងជាទីក្រុងធំជាងគេបំផុតនៅក្នុងប្រទេសកម្ពុជា",  # Khmer
        "ꆈꌠꉙꌋꆀꊿꌺꁱꂷꀉꑌꋍꃅꋊꇬꄉꆈꌠꁱꂷꌠꅇꂷꄮꉈꀐꌠꉬꄷꅐꇁꏭꀋꉬ",  # Yi
        "ꦱꦧꦼꦤ꧀ꦮꦺꦴꦁꦏꦭꦲꦶꦂꦲꦏꦺꦏꦤ꧀ꦛꦶꦩꦂꦢꦶꦏꦭꦤ꧀ꦢꦂꦧꦺꦩꦂꦠꦧꦠ꧀ꦭꦤ꧀ꦲꦏ꧀ꦲꦏ꧀ꦏꦁꦥꦝ",  # Javanese
        "ᬧᬜ᭄ᬚᬂᬢᬶᬢᬶᬓ᭄ᬧᬢ᭄ᬢᬶᬓᬸᬫ᭄ᬧᬸᬮᬦ᭄ᬓᬢ᭄ᬢᬓᬢ᭄ᬢᬩᬮᬶᬧᬢ᭄ᬢᬶ",  # Balinese
        "ᨠᩣᩴᨾᩮᩬᩥᨦᨸᩮ᩠ᨶᨽᩣᩈᩣᨡᩬᨦᨤ᩠ᨶᨾᩮᩬᩥᨦᨲᩦ᩵ᩋᩣᩈᩱᨿᩪ᩵ᨶᩱᨽᩣ᩠ᨠᩉ᩠ᨶᩮᩬᩥᩋᨡᩬᨦᨷᩕᨴᩮ᩠ᩈᨴᩱ᩠ᨿ",  # Tai Tham
    ],
)
def test_other_scripts_without_spaces_are_checked_too(item):
    assert len(find_overlaps([f"abc {item} def"], {"task": [item]})) == 1
    assert count_unchecked({"task": [item]}) == 0


def test_tibetan_is_compared_by_syllables():
    item = "བོད་ཀྱི་རྒྱལ་ས་ནི་ལྷ་ས་ཡིན་ཞིང་དེ་ནི་འཛམ་གླིང་གི་ས་མཐོ་ཤོས་ཀྱི་གྲོང་ཁྱེར་ཞིག་རེད"
    assert len(find_overlaps([f"abc {item} def"], {"task": [item]})) == 1


def test_letters_that_are_compatible_with_capitals_are_equal_to_small_ones():
    bold = "".join(chr(0x1D400 + ord(c) - ord("A")) if c.isupper() else c for c in PASSAGE.upper())
    assert bold != PASSAGE.upper() and len(find_overlaps([bold], {"boolq": [PASSAGE]})) == 1
    item = "Press the lever to call 411 and hear a \u2121 tone from LEGO\u2122 bricks"  # signs for TEL and TM
    assert len(find_overlaps([item.lower()], {"task": [item.upper()]})) == 1
    assert len(find_overlaps([item.replace("\u2121", "tel").replace("\u2122", "TM")], {"task": [item]})) == 1


def test_words_and_characters_of_mixed_text_add_up():
    # 9 words and 8 characters are worth 13 words
    mixed = "In 2024 the city of 北京 was home to 三千多万人口 people"
    assert len(find_overlaps([f"x {mixed} y"], {"task": [f"{mixed} and so on for ever and ever"]})) == 1
    assert find_overlaps([f"x {mixed[:-7]} y"], {"task": [f"{mixed} and so on for ever and ever"]}) == []


def test_a_common_long_name_is_no_overlap():
    name = "中华人民共和国全国人民代表大会常务委员会"
    assert find_overlaps([f"根据{name}的决定"], {"task": [f"下列关于{name}职权的说法中。哪一项是正确的。"]}) == []


def test_composed_accents_full_width_forms_and_invisible_characters_are_equal():
    item = "El corazón del niño late más rápido que el de un adulto según él"
    decomposed = (
        "El corazo\u0301n del nin\u0303o la\u00adte ma\u0301s ra\u0301pido que el de un adulto segu\u0301n e\u0301l"
    )
    assert len(find_overlaps([decomposed], {"task": [item]})) == 1
    assert len(find_overlaps(["\uff34\uff28\uff25" + PASSAGE[3:]], {"task": [PASSAGE]})) == 1
    hindi = "दिल्ली भारत की राजधानी है"  # 5 words, whatever its vowel signs
    assert count_unchecked({"task": [hindi]}) == 1 and find_overlaps([hindi], {"task": [hindi]}) == []


def test_items_that_are_too_short_to_be_checked_are_counted():
    seven, fifteen = "one two three four five six seven", CHINESE[:15]
    items = {
        "a": [seven, f"{seven} eight"],
        "b": [fifteen, CHINESE[:16], "", f"seven words are not enough {fifteen[:4]}"],
    }
    assert json.dumps(count_unchecked(items)) == "4"  # records are JSON


ITEMS = {
    "English": PASSAGE,
    "German": "Die Straße in München heißt „Große Allee“ und führt über acht Brücken bis zum Südufer der Isar.",
    "Russian": "Самый большой остров мира, Гренландия, на три четверти покрыт льдом и почти не заселён людьми сегодня.",
    "Greek": "Κάποτε αυτός έσπρωχνε τον βράχο ως την κορυφή και κάθε φορά αυτός κυλούσε πάλι κάτω στους πρόποδες.",
    "Arabic": "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها من حيث عدد السكان والمساحة في الشرق الأوسط",
    "Hindi": "दिल्ली भारत की राजधानी है और यह यमुना नदी के किनारे बसा हुआ एक बहुत पुराना शहर है",
    "Korean": "서울은 대한민국의 수도이자 최대 도시로서 한강을 끼고 있으며 인구가 약 천만 명에 이르는 도시이다",
    "Vietnamese": "Hà Nội là thủ đô của nước Cộng hòa Xã hội chủ nghĩa Việt Nam và là thành phố lớn thứ hai",
    "Chinese": CHINESE,
    "Japanese": "日本の首都は東京であり、ガラパゴス諸島は世界で最も人口の多い都市の一つではない",
    "Thai": "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย",
    "mixed": "In 2024 the city of 北京 was home to 三千多万人口 people",
}
SPACELESS = ("Chinese", "Japanese", "Thai")


DISGUISES = {
    "NFC": lambda text: unicodedata.normalize("NFC", text),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "NFKC": lambda text: unicodedata.normalize("NFKC", text),
    "NFKD": lambda text: unicodedata.normalize("NFKD", text),
    "capitals": str.upper,
    "small": str.lower,
    "zero-width spaces": lambda text: text.replace(" ", " \u200b"),
    "soft hyphens": lambda text: "\u00ad".join(text),
    "zero-width joiners": lambda text: "\u200d".join(text),
    "byte order marks": lambda text: "\ufeff" + text,
    "line breaks": lambda text: text.replace(" ", "\r\n"),
    "other spaces": lambda text: text.replace(" ", "\u00a0\u3000\u2028"),
    "punctuation": lambda text: text.replace(" ", " \u2014 ").replace(".", "?!").replace("'", "\u2019"),
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
}


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(
    language=st.sampled_from(sorted(ITEMS)),
    disguises=st.lists(st.sampled_from(sorted(DISGUISES)), max_size=3),
    line=st.integers(1, 40),
)
def test_no_other_way_to_write_the_same_words_hides_them(language, disguises, line):
    item = document = ITEMS[language]
    if language in SPACELESS:  # lines may end everywhere
        document = "\n".join(document[start : start + line] for start in range(0, len(document), line))
    for disguise in disguises:
        document = DISGUISES[disguise](document)
    for text, other in ((document, item), (item, document)):
        assert len(find_overlaps([f"ahead {text} behind"], {"task": [other]})) == 1
        assert count_unchecked({"task": [other]}) == 0
