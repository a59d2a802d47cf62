"""What the reranker is learned from: read, split and drawn so that nothing of the report queries gets in."""

import pytest

from experiments.rerank_training.data import Collection, Document, load_collection, split_queries
from experiments.rerank_training.lists import ListSettings, TrainingLists
from experiments.rerank_training.pseudo import pseudo_queries
from experiments.rerank_training.recipe import only_queries
from experiments.rerank_training.rivals import Bm25


def lists_of(collection: Collection, **settings) -> TrainingLists:
    texts = {name: document.text for name, document in collection.documents.items()}
    return TrainingLists(collection, ListSettings(**settings), Bm25(texts))


def test_a_text_that_begins_with_its_title_is_cut_there(collection):
    document = collection.documents["d0"]
    assert document.title == "the lift of a wing ."
    assert document.body.startswith("a study of lift")
    assert document.text.count(document.title) == 1


def test_queries_without_a_relevant_document_are_left_out(collection):
    assert list(collection.queries) == [f"q{number}" for number in range(20)] == list(collection.grades)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("qrels.tsv", "q0\td0", r"qrels.tsv, line 42: .* got 'q0\\td0'"),
        ("qrels.tsv", "q0\tnowhere\t1", r"line 42: no such query or document"),
        ("corpus.jsonl", '{"_id": "x"}', r"corpus.jsonl, line 42: expected JSON with _id, title, text; got"),
        ("queries.jsonl", "no JSON", r"queries.jsonl, line 22: expected JSON with _id, text; got 'no JSON'"),
    ],
)
def test_a_line_of_another_form_is_named(folder, name, line, message):
    path = folder / name
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_collection(folder)


def test_no_query_is_in_two_parts_of_a_split_and_the_seed_decides_it():
    names = [f"q{number}" for number in range(20)]
    split = split_queries(names, n_validation=4, n_report=6, seed=0)
    assert (len(split.training), len(split.validation), len(split.report)) == (10, 4, 6)
    assert sorted(split.training + split.validation + split.report) == sorted(names)
    assert split == split_queries(names, 4, 6, seed=0) != split_queries(names, 4, 6, seed=1)


def test_a_split_that_leaves_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match=r"^expected more than 4 queries; got 4$"):
        split_queries(["a", "b", "c", "d"], n_validation=2, n_report=2, seed=0)


def test_lists_do_not_depend_on_queries_outside_the_training_split(collection):
    split = split_queries(list(collection.queries), n_validation=4, n_report=6, seed=0)
    unseen = (*split.validation, *split.report)
    others = Collection(
        collection.documents,
        collection.queries | dict.fromkeys(unseen, "something else"),
        collection.grades | {name: {"d39": 4} for name in unseen},
    )
    drawn, again = (lists_of(only_queries(each, split.training)) for each in (collection, others))
    assert [drawn[number] for number in range(100)] == [again[number] for number in range(100)]
    labelled = [drawn[number] for number in range(100) if drawn[number].source == "label"]
    assert labelled
    assert {each.query for each in labelled} <= {collection.queries[name] for name in split.training}


def test_a_labelled_list_begins_with_its_only_relevant_document(collection):
    lists = lists_of(collection, label_share=1.0)
    grades = {collection.queries[name]: grades for name, grades in collection.grades.items()}
    for number in range(50):
        drawn = lists[number]
        assert drawn.source == "label"
        assert len(set(drawn.names)) == 8 and "empty" not in drawn.names
        assert [name in grades[drawn.query] for name in drawn.names] == [True] + [False] * 7


def test_as_many_negatives_as_asked_for_are_among_the_best_of_bm25(collection):
    bm25 = Bm25({name: document.text for name, document in collection.documents.items()})
    lists = lists_of(collection, label_share=1.0, documents=5, random_documents=1, pool=6)
    for number in range(20):
        hard = lists[number].names[1:4]
        assert set(hard) <= set(bm25.best(lists[number].query, 6))


def test_lists_are_the_same_in_whatever_order_they_are_asked_for(collection):
    lists = lists_of(collection)
    backwards = [lists[number] for number in range(9, -1, -1)]
    assert backwards[::-1] == [lists[number] for number in range(10)]


def test_the_share_of_lists_with_labels_is_about_what_was_asked_for(collection):
    lists = lists_of(collection, label_share=0.25)
    labelled = sum(lists[number].source == "label" for number in range(400))
    assert 70 <= labelled <= 130  # 100 expected, standard deviation 8.7


def test_a_pseudo_query_is_not_in_what_is_left_of_its_document(collection):
    made = pseudo_queries(collection.documents, seed=0)
    assert {each.kind for each in made} == {"title", "sentence"}
    assert "empty" not in {each.source for each in made}
    for each in made:
        assert each.text not in each.rest
        assert each.text in collection.documents[each.source].text


def test_a_document_too_short_to_lose_a_text_makes_no_query():
    assert pseudo_queries({"a": Document("a title", "a few words")}, seed=0) == []


def test_a_title_asks_for_its_document_among_others_that_show_no_title_either(collection):
    lists = lists_of(collection, label_share=0.0)
    drawn = next(lists[number] for number in range(50) if lists[number].source == "title")
    assert drawn.query == collection.documents[drawn.names[0]].title
    assert drawn.texts == tuple(collection.documents[name].body for name in drawn.names)
