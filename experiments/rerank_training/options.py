"""A recipe from the command line."""

import argparse

from experiments.rerank_training.lists import ListSettings
from experiments.rerank_training.recipe import Recipe
from experiments.rerank_training.teacher import TeacherWeights
from experiments.rerank_training.training import TrainingSettings

_NUMBERS = {
    "steps": (400, "of training"),
    "learning_rate": (5e-4, "at its highest"),
    "first_layer": (10, "layers before it stay as they are"),
    "document_tokens": (128, "where documents are cut at the end"),
    "first_document_tokens": (32, "where they are cut at the start"),
    "likelihood": (2.0, "weight of the query's likelihoods in what is learned"),
    "bm25": (0.0, "weight of BM25 in it"),
    "encoder": (0.0, "weight of the sentence encoder in it"),
    "first": (2.0, "weight of the label in it"),
    "random_documents": (3, "of a list's 8; the others are among BM25's best"),
    "lists_seed": (0, "of the lists that are drawn"),
    "early_weight": (0.0, "of each of early_layers in the loss"),
    "label_share": (0.4, "share of lists from labelled queries"),
    "candidates": (30, "BM25's best, which are reranked"),
    "validation_queries": (20, "for weights of fused scores"),
    "report_queries": (50, "that nothing is learned from or chosen on"),
}


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `chosen_recipe` reads."""
    for name, (default, text) in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument(
        "--early_layers", type=_numbers, default=(), help="after so many layers scores are to be those after the last"
    )
    parser.add_argument("--report", choices=("report", "validation"), default="report", help="which queries")
    parser.add_argument(
        "--plain_model", choices=("yes", "no"), default="yes", help="whether it is scored untrained too"
    )


def chosen_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that was asked for."""
    training = TrainingSettings(
        steps=options.steps,
        learning_rate=options.learning_rate,
        first_layer=options.first_layer,
        max_document_tokens=options.document_tokens,
        first_document_tokens=options.first_document_tokens,
        early_layers=options.early_layers,
        early_weight=options.early_weight,
        teacher=TeacherWeights(options.likelihood, options.bm25, options.encoder, options.first),
    )
    lists = ListSettings(
        random_documents=options.random_documents, label_share=options.label_share, seed=options.lists_seed
    )
    return Recipe(
        training,
        lists,
        validation_queries=options.validation_queries,
        report_queries=options.report_queries,
        candidates=options.candidates,
        report=options.report,
        plain_model=options.plain_model == "yes",
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
