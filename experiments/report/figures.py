"""The figures of a comparison."""

import numpy as np
from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

from experiments.report.comparison import SEARCH, Comparison
from experiments.report.drawing import GUIDE, PageFigure, error_bars, finite, is_far_off, served, style, workloads
from experiments.report.kept import attention_share, kept_figures
from experiments.report.metrics import SPREAD, loss_over_dense, regret, scenario_means, with_spread
from experiments.report.tables import loss_name


def figures(comparison: Comparison) -> list[PageFigure]:
    """Every figure, in the order of the page."""
    return [
        *(_score_against_budget(comparison, evaluator) for evaluator in comparison.evaluators),
        _regret(comparison),
        attention_share(comparison),
        *kept_figures(comparison),
        _anytime(comparison),
        _quality_against_tokens(comparison),
        *_learning(comparison),
    ]


def _score_against_budget(comparison: Comparison, evaluator: str) -> PageFigure:
    of_workload = workloads(comparison)
    figure = make_subplots(
        1, len(of_workload), subplot_titles=list(of_workload), shared_yaxes=True, horizontal_spacing=0.02
    )
    lowest = np.inf
    for number, agent in enumerate(comparison.agents):
        value, low, high = with_spread(loss_over_dense(comparison, agent, evaluator), scenario_means)
        if not np.isfinite(value).any():
            continue  # it violates every budget
        lowest = min(lowest, value.min(), low.min())
        for column, chosen in enumerate(of_workload.values(), 1):
            aside = 0.4 * (number - (len(comparison.agents) - 1) / 2)  # so that bars don't hide each other
            budgets = [100 * comparison.scenarios[position][1] + aside for position in chosen]
            bars = error_bars(value[chosen], low[chosen], high[chosen])
            trace = Scatter(x=budgets, y=finite(value[chosen]), error_y=bars, mode="lines+markers")
            figure.add_trace(trace.update(showlegend=column == 1, **style(comparison, agent)), 1, column)
    figure.update_xaxes(title="budget, % of dense")
    unit = " (nats)" if comparison.is_text[evaluator] else ""
    figure.update_yaxes(title=loss_name(comparison, evaluator) + unit, col=1)
    if comparison.is_text[evaluator] and lowest > 0:
        figure.update_yaxes(type="log")
    figure.update_layout(height=460)
    caption = (
        "How much worse than the unpruned model each policy's masks are on the report half, lower is better. Points are"
        f" means over seeds, bars {SPREAD}. A gap is a budget that was violated."
        " Click on a faint name to see an agent that is far off."
    )
    return PageFigure(f"score_{evaluator}", f"Report against budget: {evaluator}", caption, figure)


def _regret(comparison: Comparison) -> PageFigure:
    halves = [SEARCH, *comparison.evaluators]
    figure = make_subplots(1, len(halves), subplot_titles=halves, horizontal_spacing=0.14)
    for column, half in enumerate(halves, 1):
        for agent in reversed(served(comparison, regret, half)):
            if is_far_off(comparison, agent):
                continue
            value, low, high = with_spread(regret(comparison, agent, half))
            of_agent = style(comparison, agent, without="line") | {"mode": "markers", "showlegend": False}
            trace = Scatter(x=finite(value), y=[agent], error_x=error_bars(value, low, high), **of_agent)
            figure.add_trace(trace, 1, column)
    figure.update_xaxes(title="regret", rangemode="tozero")
    figure.update_yaxes(ticklabelstandoff=8)
    figure.update_layout(height=160 + 34 * len(comparison.agents))
    caption = (
        "Best known score of a scenario minus the score reached: interquartile mean over scenarios and seeds,"
        f" bars {SPREAD}. Best known is the best mask of any agent here that fits; on the search half"
        " also any that a search only evaluated. Left out: who violates more than a quarter of the budgets, and who"
        " loses more than half as much again as the best; the table has them."
    )
    return PageFigure("regret", "Regret", caption, figure)


def _anytime(comparison: Comparison) -> PageFigure:
    figure = Figure()
    for agent in comparison.agents:
        curves, of_agent = comparison.curves(agent), style(comparison, agent, without="marker")
        steps = sorted({tokens for curve in curves for tokens, _score in curve})
        steps = [step for step in steps if np.isfinite(comparison.best_after(agent, step))]
        if not steps:
            continue  # its policy violates a budget
        if not any(run["search"]["evaluations"] for run in comparison.runs(agent)):
            of_agent["line"] |= {"dash": "dash"}
            steps.append(comparison.token_budget)
        means = [comparison.best_after(agent, step) for step in steps]
        figure.add_trace(Scatter(x=steps, y=means, mode="lines", line_shape="hv", **of_agent))
    figure.update_xaxes(title="tokens spent", rangemode="tozero")
    figure.update_yaxes(title="best search score so far")
    figure.update_layout(height=460)
    caption = (
        "After so many forwarded tokens, the best mask evaluated so far that fits, mean over the scenarios and seeds;"
        " it begins when every scenario has one. Dashed: agents that evaluate no mask, at their policy's score, from"
        " what their ranking cost on."
    )
    return PageFigure("anytime", "Search score against tokens", caption, figure)


def _quality_against_tokens(comparison: Comparison) -> PageFigure:
    main, figure = comparison.evaluators[0], Figure()
    for agent in served(comparison, loss_over_dense, main):
        value, low, high = with_spread(loss_over_dense(comparison, agent, main))
        spent, bars = comparison.mean_search(agent, "tokens"), error_bars(value, low, high)
        trace = Scatter(x=[spent], y=finite(value), error_y=bars, mode="markers", **style(comparison, agent))
        figure.add_trace(trace)
    figure.update_xaxes(title="tokens spent", rangemode="nonnegative", zeroline=False)
    figure.update_yaxes(title=loss_name(comparison, main))
    figure.update_layout(height=420, showlegend=True)
    caption = f"Interquartile mean over scenarios and seeds on {main}, lower is better; bars {SPREAD}."
    return PageFigure("quality", "Quality against tokens spent", caption, figure)


def _learning(comparison: Comparison) -> list[PageFigure]:
    """One figure if there are agents that learn by episodes: the gains over the greedy order."""
    figure = Figure()
    for agent in comparison.agents:
        curves = [run["search"]["details"].get("learning_curve") for run in comparison.runs(agent)]
        if all(curves):
            steps, gains = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0).T.tolist()
            figure.add_trace(Scatter(x=steps, y=gains, mode="lines", **style(comparison, agent, without="marker")))
    if not figure.data:
        return []
    figure.add_hline(y=0, line=GUIDE)
    figure.update_xaxes(title="environment steps")
    figure.update_yaxes(title="reward minus the greedy order's")
    figure.update_layout(height=420, showlegend=True)
    caption = (
        "Means over hundredths of the training and over seeds. Above zero the agent beats the order. After the token"
        " budget is used up, rewards of masks that were never evaluated are those of the nearest evaluated ones."
    )
    return [PageFigure("learning", "Learning curves", caption, figure)]
