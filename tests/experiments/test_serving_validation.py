"""The live service and the simulated one play the same episode."""

import pytest

from experiments.report.serving_validation import serving_validation_table
from experiments.serving_table import even_ladder
from experiments.serving_validation import play_live, play_simulated
from rap_env.envs.serving import ServingEnv
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import load_llm
from rap_env.serving.episodes import Episode, Setting
from rap_env.serving.memory_traces import MemoryTrace
from rap_env.serving.timing import measure_table
from rap_env.serving.traces import Arrival


def test_an_episode_is_played_both_ways():
    llm = load_llm("tiny", granularity="group")
    model, ladder = LiveModel(llm), even_ladder(llm, (1.0, 0.5), (0.0, 1.0), "made up")
    env = ServingEnv(measure_table(model, ladder, max_batch=4, read_tokens=64, repeats=1), Setting(whole_tokens=128))
    arrivals = tuple(Arrival(0.1 * number, 20, 5) for number in range(6))
    memory = MemoryTrace((0.0, 0.5), (1.0, env.table.needed_bytes(1, 100) / env.whole_bytes))
    episode = Episode(arrivals, memory, 1.0)
    live = play_live(model, ladder.masks, env.table, episode, env.whole_bytes, env.targets)
    simulated = play_simulated(env, episode)
    for played in (live, simulated):
        assert (played["arrived"], played["served"], played["refused"]) == (6, 6, 0)
        assert played["generated_tokens"] == 30 and played["in_time"] == 6
        assert 0.4 < played["kept_share"] < 1.0
    assert llm.mask == ladder.masks[0]
    rows = serving_validation_table({"results": {"episodes": [{"live": live, "simulated": simulated}] * 2}}).rows
    assert rows[-1][:4] == ["all", "12", "12 / 12", "12 / 12"] and len(rows) == 3
    assert live["kept_share"] == pytest.approx(simulated["kept_share"], abs=0.3)
