"""A W&B workspace as code: what the report shows of a context family, of the runs of a project.

It shows what `closing_metrics` and the driver log, and groups runs by `agent_name` and `context_family`, which
`build_tracker` adds to the config that W&B sees.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

GROUPS = ("context_family", "agent_name")  # of a run's config
SECTIONS = {  # of closing metrics, and of what the driver logs while it searches
    "Regret": ("held_out/loss_over_dense", "outside/loss_over_dense", "search/regret", "violations"),
    "Amortisation": ("cost/evaluations_per_context", "held_out/loss_over_dense", "best_reward"),
    "Cost": ("cost/tokens", "cost/measured_seconds", "cost/decision_milliseconds"),
    "Kept widths": ("kept/attention", "kept/mlp"),
}
IMAGE, TABLE = "kept_components", "summary"


def workspace(entity: str, project: str) -> "Workspace":
    """The workspace, which its `save` sends to the server.

    Args:
        entity: The user or team that the project belongs to.
        project: As `tracker.project` names it.
    """
    import wandb_workspaces.expr as expr  # here, so that nothing else needs them
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    agent = panels.Config(GROUPS[-1])

    def bars(name: str) -> Any:
        return panels.BarPlot(
            title=name,
            metrics=[panels.SummaryMetric(name)],
            groupby=agent,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )

    x, y, curve = SECTIONS["Amortisation"]
    of_sections = {name: [bars(metric) for metric in metrics] for name, metrics in SECTIONS.items()}
    of_sections["Amortisation"] = [
        panels.ScatterPlot(title=f"{y} against {x}", x=panels.SummaryMetric(x), y=panels.SummaryMetric(y), log_x=True),
        panels.LinePlot(title=curve, x="step", y=[curve], groupby=agent, groupby_aggfunc="mean"),
    ]
    of_sections["Kept widths"] += [
        panels.MediaBrowser(title=IMAGE, media_keys=[IMAGE]),
        panels.WeavePanelSummaryTable(table_name=TABLE),
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Context family",
        sections=[
            workspaces.Section(name=name, panels=of_section, is_open=True) for name, of_section in of_sections.items()
        ],
        runset_settings=workspaces.RunsetSettings(groupby=[expr.Config(name) for name in GROUPS]),
    )
