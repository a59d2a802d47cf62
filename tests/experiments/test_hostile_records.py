"""A record that somebody else wrote makes nothing run but what models and their text are built with."""

import pytest

from experiments.recipes.recorded import recorded_model, recorded_policy
from experiments.records import read_record, write_record
from rap_env.errors import RunUnreadable
from rap_env.policies import DensePolicy, save_policy
from tests.hardening.model_subjects import tiny_run

HOSTILE = [
    ({"_target_": "os.system", "command": "touch {trap}"}, "model._target_ .* would call os.system"),
    ({"_target_": "rap_env.files.os.system", "command": "touch {trap}"}, "would call rap_env.files.os.system"),
    ({"_target_": "rap_env.files.write_over", "path": "{trap}", "content": ""}, "would call rap_env.files.write_over"),
    ({"_target_": "experiments.tracking.JsonlTracker", "folder": "{trap}"}, "would call experiments.tracking"),
    ({"name": {"_target_": "os.system", "_args_": ["touch {trap}"]}}, r"model\.name\._target_ .* would call os.system"),
    ({"trust_remote_code": True}, r"model\.trust_remote_code .* asks for code"),
    ({"name": "${{oc.env:HOME}}"}, r"model\.name .* to be looked up"),
]


def filled(value, trap):
    if isinstance(value, dict):
        return {key: filled(each, trap) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, trap) for each in value]
    return value.format(trap=trap) if isinstance(value, str) else value


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_a_record_that_would_call_anything_else_is_refused(changes, message, tmp_path, tiny_llm):
    trap = tmp_path / "trap"
    tiny_run(tmp_path / "made")
    record = read_record(tmp_path / "made" / "record.json")
    record["config"]["model"] |= filled(changes, trap)
    folder = write_record(tmp_path / "run" / "record.json", record).parent
    save_policy(DensePolicy(tiny_llm.shape), folder / "policy")
    for read in (lambda: recorded_model(folder, 1), lambda: recorded_policy(folder)):
        with pytest.raises(RunUnreadable, match=message):
            read()
    assert not trap.exists()


def test_what_runs_themselves_record_is_read(tmp_path):
    tiny_run(tmp_path)
    llm, mask = recorded_model(tmp_path, 1)
    assert [component.name for component in mask.dropped] == ["layer0.mlp"] and llm.name == "random-llama"
