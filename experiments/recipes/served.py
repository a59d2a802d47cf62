"""Which model is served, and who decides on its masks."""

from pathlib import Path

from rap_env.errors import InvalidConfig
from rap_env.llm.loading import load_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.policies import OrderPolicy, even_order, load_policy
from rap_env.serving.controller import Decider


def model_and_deciders(
    run: Path | None, policy: Path | None, name: str, dtype: str, granularity: str
) -> tuple[SwitchableLLM, dict[str, Decider]]:
    """The model, and its deciders in the order in which they are asked; the last one needs no preparation.

    Args:
        run: Folder of a finished run, which says which model and which policy.
        policy: Without one, folder of a policy for the model; None for none.
        name: Without a run, the model, as the next two as `load_llm` takes them.
        dtype: See above.
        granularity: See above.

    Raises:
        InvalidConfig: Both a run and a policy are given, or the policy is for another model or order of parts.
        RapError: As `recorded_policy`, `load_policy` and `load_llm`.
    """
    if run and policy:
        raise InvalidConfig("run says which policy: leave policy out")
    if run:
        from experiments.recipes.recorded import recorded_policy  # here, for only runs need Hydra

        llm, saved = recorded_policy(run)
    else:
        llm, saved = load_llm(name, dtype, granularity=granularity), load_policy(policy) if policy else None
    even = {"even": OrderPolicy(llm.shape, even_order(llm.shape))}
    if saved is None:
        return llm, even
    if saved.shape != llm.shape:
        raise InvalidConfig(f"expected a policy for this model and its order of parts; {policy or run} is not")
    return llm, {"policy": saved, **even}
