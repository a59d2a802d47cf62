"""Whatever is read is read, or refused in our words: nothing else is raised, nothing runs, nothing is changed.

Some cases of each reader; `python -m scripts.fuzz` has as many as one likes.
"""

import gzip
import io
import pickle
import zipfile

import numpy as np
import pytest

from experiments.records import read_records
from rap_env import reading
from rap_env.errors import EvaluationFailed, InvalidTable, PolicyUnreadable, RecordUnreadable, StoreDamaged
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.table import load_tables
from rap_env.evaluation.task_loading import load_tasks
from rap_env.policies import load_policy, save_policy
from tests.hardening.fuzzing import Subject, fuzz
from tests.hardening.model_subjects import MODELS
from tests.hardening.mutations import Bomb
from tests.hardening.subjects import DATA
from tests.policies.cases import MAKERS

N_CASES = 8


@pytest.mark.parametrize("subject", [*DATA, *MODELS], ids=lambda subject: subject.name)
def test_damaged_and_hostile_files_are_refused_or_read(subject, tmp_path):
    findings = fuzz(subject, tmp_path, N_CASES)
    assert findings.faults == [] and findings.counts.total() >= N_CASES // 2


def test_the_fuzzer_sees_every_kind_of_fault(tmp_path):
    def read(folder):
        pickle.loads((folder / "a.pkl").read_bytes())

    def rewrite(folder):
        (folder / "a.pkl").write_bytes(b"")

    def write(folder):
        (folder / "a.pkl").write_bytes(pickle.dumps([1, 2]))

    faults = {fault["fault"] for fault in fuzz(Subject("pickles", write, read, "*.pkl"), tmp_path / "read", 60).faults}
    assert faults == {"foreign error", "executed"}
    with pytest.raises(AssertionError, match="changed its input"):
        fuzz(Subject("rewriting", write, rewrite), tmp_path / "rewritten", 1)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_UNPACKED_BYTES", 10_000)
    (tmp_path / "table.jsonl.gz").write_bytes(gzip.compress(b" " * 20_000))
    with pytest.raises(RecordUnreadable, match=r"table\.jsonl\.gz: .*at most 10,000 bytes"):
        read_records(tmp_path / "table.jsonl.gz")
    np.savez_compressed(tmp_path / "bomb.npz", about=np.zeros(20_000))
    with pytest.raises(InvalidTable, match=r"bomb\.npz: .*at most 10,000 bytes; it says 160,128"):
        load_tables(str(tmp_path / "bomb.npz"))
    with zipfile.ZipFile(tmp_path / "says.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
        archive.writestr("about.npy", header.getvalue())
    with pytest.raises(InvalidTable, match="it says 8,000,000,000,000,000"):
        load_tables(str(tmp_path / "says.npz"))


def test_a_policy_that_says_a_size_beyond_all_memory_is_refused_before_it_is_made(tiny_llm, tmp_path):
    folder = save_policy(MAKERS["one_step_network"](tiny_llm.shape), tmp_path)
    text = (folder / "policy.json").read_text()
    (folder / "policy.json").write_text(text.replace('"width": 16', '"width": 10000000'))
    with pytest.raises(PolicyUnreadable, match="size mismatch"):
        load_policy(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname", "..", "gone.safetensors"])
def test_a_policy_reads_no_file_outside_its_folder(tiny_llm, tmp_path, name):
    folder = save_policy(MAKERS["one_step_network"](tiny_llm.shape), tmp_path / "policy")
    (tensors,) = folder.glob("*.safetensors")
    tensors.rename(tmp_path / "other.safetensors")
    text = (folder / "policy.json").read_text()
    (folder / "policy.json").write_text(text.replace(tensors.name, name))
    with pytest.raises(PolicyUnreadable, match="not a policy of this version"):
        load_policy(folder)


def test_yaml_that_would_end_the_process_is_refused(tmp_path):
    (tmp_path / "deep.yaml").write_text("task: " + "[" * 100_000)
    with pytest.raises(EvaluationFailed, match=r"deep\.yaml: not a task's YAML: expected at most 50 levels"):
        load_tasks(["deep"], tmp_path)


def test_a_store_with_rows_of_another_kind_says_so(tmp_path):
    identity, path = {"model": "toy"}, tmp_path / "results.db"
    with ResultStore(path) as store:
        store.put(identity, {"score": 1})
        store.claim([{"model": "other"}])
        for statement, use in (
            ("UPDATE evaluations SET result = '[1]'", lambda: store.get(identity)),
            ("UPDATE evaluations SET identity = '3'", lambda: list(store.evaluations(""))),
            ("UPDATE claims SET owner = '{}'", lambda: store.claim([{"model": "other"}])),
        ):
            with store._database.connection() as connection:
                connection.exec_driver_sql(statement)
            with pytest.raises(StoreDamaged, match=r"results\.db holds (no JSON|a claim of nobody)"):
                use()


def test_the_payload_would_have_run(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()
