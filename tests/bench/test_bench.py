"""The benchmark's plumbing, with injected clocks and invented rows: no test measures a time."""

import json
import os
import socket

import pytest
import torch

from pefttutor.bench import Row
from pefttutor.bench.__main__ import main
from pefttutor.bench.memory import kept_bytes, state_bytes
from pefttutor.bench.protocol import Ratio, difference, disturbed_rounds, paired_ratio, time_rounds
from pefttutor.bench.report import table, to_json
from pefttutor.bench.run import Result, judge, run
from pefttutor.memory.allocator import resident_growth_here, transient_bytes


class Clock:
    """A clock that only the steps move, each by its next duration."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def step(self, name, durations):
        durations = iter(durations)

        def work():
            self.order.append(name)
            self.now += next(durations)
            return {"y": torch.ones(1)}

        return work

    def __call__(self):
        return self.now


def row(ours=1.0, peer=1.0, **settings):
    """A row whose sides return the given numbers."""
    values = {"ours": ours, "peer": peer, "bound": 0.0}
    settings = {"name": "fake", "work": "nothing", "peer": "nobody", "rounds": 3} | settings
    return Row(build=lambda side, seed, device: lambda: {"y": torch.tensor([1.0, values[side]])}, **settings)


def result(**settings):
    usual = {
        "name": "r",
        "work": "w",
        "peer": "p",
        "bound": None,
        "goals": {},
        "tolerance": 1e-4,
        "difference": 0.0,
    }
    return Result(**(usual | settings))


def test_rounds_interleave_rotate_and_are_timed_one_by_one():
    clock = Clock()
    steps = {"ours": clock.step("ours", [9, 1, 2, 3]), "peer": clock.step("peer", [9, 2, 4, 4])}
    seconds = time_rounds(steps, 3, warmup=1, clock=clock)
    assert clock.order[2:] == ["ours", "peer", "peer", "ours", "ours", "peer"]  # after the warm-up
    assert seconds == {"ours": [1, 2, 3], "peer": [2, 4, 4]}


def test_every_side_starts_equally_often():
    clock = Clock()
    time_rounds({name: clock.step(name, [1] * 9) for name in "abc"}, 6, warmup=0, clock=clock)
    assert clock.order[::3] == ["a", "b", "c", "a", "b", "c"]


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds is 0"):
        time_rounds({}, 0)


def test_ratio_is_the_median_of_paired_ratios_not_the_ratio_of_medians():
    ours, peer = [1.0, 20.0, 3.0, 8.0, 5.0], [2.0, 10.0, 30.0, 8.0, 4.0]
    # paired: .5, 2, .1, 1, 1.25; the medians' ratio would be 5 / 8
    assert paired_ratio(ours, peer) == Ratio(1.0, 0.5, 1.25)
    assert paired_ratio([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)


def test_a_round_is_disturbed_when_any_side_took_too_long():
    seconds = {"ours": [1.0, 1.0, 1.3, 1.0, 1.0], "peer": [2.0, 2.4, 2.6, 2.6, 2.0]}  # medians 1 and 2.4
    assert disturbed_rounds(seconds) == 1
    assert disturbed_rounds(seconds | {"peer": [2.0, 2.0, 2.0, 2.6, 2.0]}) == 2


@pytest.mark.parametrize(
    ("ours", "worst", "where"),
    [
        ({"a": [1.0, 4.0], "b": [2.0]}, 0.0, "a"),
        ({"a": [1.0, 5.0], "b": [2.1]}, 0.25, "a"),
        ({"a": [1.0, 4.0], "b": [3.0]}, 0.5, "b"),
        ({"a": [1.0, 4.0]}, float("inf"), "names differ: ['b']"),
        ({"a": [1.0], "b": [2.0]}, float("inf"), "a: shapes (1,) and (2,)"),
        ({"a": [1.0, float("nan")], "b": [2.0]}, float("inf"), "a: a value is not finite"),
    ],
)
def test_difference_is_the_worst_of_all_tensors(ours, worst, where):
    peer = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0])}
    found, name = difference({key: torch.tensor(value) for key, value in ours.items()}, peer)
    assert found == pytest.approx(worst)
    assert name == where


def test_nothing_to_compare_is_infinitely_different():
    assert difference({}, {})[0] == float("inf")
    assert difference({"a": torch.ones(1)}, {"a": torch.zeros(1)})[0] == float("inf")


def test_a_row_whose_results_differ_is_not_a_measurement():
    measured = run(row(ours=1.0, peer=1.01, goals={"time": 100.0}))
    assert measured.verdict.startswith("not a measurement: results differ by 9.9e-03 (y)")
    assert measured.time is None
    assert measured.seconds == {}
    assert "not a measurement" in table(measured)


def test_a_row_whose_results_agree_is_measured_and_judged():
    measured = run(row(goals={"time": 1e9}, bound="nothing at all"))
    assert measured.verdict == "met"
    assert {side: len(times) for side, times in measured.seconds.items()} == {
        "ours": 3,
        "peer": 3,
        "bound": 3,
    }
    assert measured.time == paired_ratio(measured.seconds["ours"], measured.seconds["peer"])
    assert measured.bound_time == paired_ratio(measured.seconds["bound"], measured.seconds["peer"])


def test_a_missing_peer_is_named():
    def build(side, seed, device):
        raise ModuleNotFoundError("No module named 'peft'")

    measured = run(Row(name="r", work="w", peer="p", build=build))
    assert measured.verdict == "not measured: No module named 'peft'; install the extra `bench`"


def test_the_verdict_names_each_missed_goal():
    half = result(goals={"time": 0.7, "transient": 0.4}, time=Ratio(0.75, 0.7, 0.8))
    assert judge(half) == "missed: time 0.750 > 0.7, transient not measured"
    half.bytes["transient"] = {"ours": 4, "peer": 10}
    assert judge(half) == "missed: time 0.750 > 0.7"
    half.goals["time"] = 0.75
    assert judge(half) == "met"
    assert judge(result()) == "no goal"


def test_unknown_goals_are_refused():
    with pytest.raises(ValueError, match=r"\['memory'\] are unknown"):
        row(goals={"memory": 0.5})


def test_transient_bytes_are_the_peak_and_not_the_sum():
    def step():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(250)
        return second, third

    assert transient_bytes(step) == 6000


def test_kept_bytes_count_each_storage_once_and_no_parameter():
    x, weight = torch.randn(10, 4, requires_grad=True), torch.nn.Parameter(torch.randn(4, 4))
    # `@` keeps x and the weight's view, exp keeps its result (10 × 4), which `*` keeps twice more
    assert kept_bytes(lambda: (x @ weight.t()).exp().square() * 2) == 2 * 10 * 4 * 4


def updating(optimizer, *weights):
    def step():
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return {"y": torch.ones(1)}

    step.optimizer = optimizer
    return step


def test_state_bytes_are_what_the_optimizer_keeps():
    weights = [
        torch.zeros(10, 4, requires_grad=True),
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
    ]
    adamw = updating(torch.optim.AdamW(weights), *weights)
    assert state_bytes(adamw) == state_bytes(adamw) == 2 * (40 * 4 + 3 * 8)
    assert state_bytes(updating(torch.optim.SGD(weights, momentum=0.9), *weights)) == 40 * 4 + 3 * 8
    with pytest.raises(ValueError, match="SGD has no tensor"):
        state_bytes(updating(torch.optim.SGD(weights), *weights))
    with pytest.raises(ValueError, match="has no attribute `optimizer`"):
        state_bytes(lambda: None)


def test_a_goal_of_state_is_measured_and_judged():
    def build(side, seed, device):
        weight = torch.zeros(100 if side == "peer" else 25, requires_grad=True)
        return updating(torch.optim.AdamW([weight]), weight)

    measured = run(Row(name="r", work="w", peer="p", build=build, goals={"state": 0.25}, rounds=1))
    assert measured.bytes == {"state": {"ours": 200, "peer": 800}}
    assert measured.verdict == "met"
    assert "state      0.250   goal ≤ 0.25" in table(measured)
    measured.goals["state"] = 0.005
    assert judge(measured) == "missed: state 0.250 > 0.005"


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from Linux's /proc"
)
def test_resident_growth_sees_what_a_step_touches():
    growth = resident_growth_here(lambda: torch.ones(16 * 2**20), steps=1)  # 64 MiB
    assert 60 * 2**20 < growth < 100 * 2**20


def test_json_has_every_figure_and_says_nothing_about_whose_machine_it_is():
    results = [run(row(goals={"time": 1e9, "transient": 1e9})), run(row(ours=2.0))]
    results[1].difference = float("inf")
    data = json.loads(to_json(results, seed=7), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["format"] == 1
    assert data["seed"] == 7
    assert (
        data["versions"]["torch"] == torch.__version__.split("+")[0]
        or torch.__version__ == data["versions"]["torch"]
    )
    assert set(data["machine"]) == {
        "system",
        "architecture",
        "processor",
        "instructions",
        "cores",
        "threads",
        "device",
    }
    first, second = data["rows"]
    assert len(first["seconds"]["ours"]) == first["rounds"] == 3
    assert set(first["ratios"]) == {"time", "transient"}
    assert first["verdict"] == "met"
    assert second["difference"] is None
    text = json.dumps(data)
    for private in (socket.gethostname(), os.getcwd(), os.path.expanduser("~")):
        assert private not in text or len(private) < 3


def test_command_line(monkeypatch, capsys, tmp_path):
    rows = {"good": row(name="good"), "bad": row(name="bad", ours=2.0)}
    monkeypatch.setattr("pefttutor.bench.__main__.discover", lambda: rows)
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.count("peer: nobody") == 2
    assert main(["go", "--rounds", "2", "--json", str(tmp_path / "out.json")]) == 0
    assert [r["name"] for r in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["good"]
    assert main([]) == 1  # one of them is not a measurement
    for wrong, says in (
        (["nope"], "no row begins with nope; there are: good, bad"),
        (["--rounds", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert says in capsys.readouterr().err


def test_cuda_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "finds no CUDA device here; leave --device out" in capsys.readouterr().err


def test_the_clock_waits_for_the_device_before_and_after_each_step():
    events = []
    steps = {name: (lambda name=name: events.append(name)) for name in ("ours", "peer")}
    time_rounds(
        steps, 1, warmup=0, clock=lambda: events.append("clock") or 0.0, wait=lambda: events.append("wait")
    )
    once = ["wait", "clock", "ours", "wait", "clock"]
    assert events == [*once, *("peer" if event == "ours" else event for event in once)]


def test_on_cuda_its_allocator_is_asked_and_other_goals_hold(monkeypatch):
    """CUDA in name only: the steps are on the CPU."""
    counts = {"memory_allocated": 100, "max_memory_allocated": 350}
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda count=count: count)
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    measured = run(row(goals={"resident": 0.1}, cuda_goals={"transient": 1.0, "time": 1e9}), device="cuda")
    assert measured.bytes == {"transient": {"ours": 250, "peer": 250}}
    assert measured.verdict == "met"
    assert len(waits) >= 2 * 2 * 3  # around every step of every round
    assert "on: cuda" in table(measured)


def test_a_row_has_its_own_number_of_threads(set_threads):
    set_threads(3)
    seen = []

    def build(side, seed, device):
        return lambda: seen.append(torch.get_num_threads()) or {"y": torch.ones(1)}

    run(Row(name="r", work="w", peer="p", build=build, threads=2, rounds=1))
    assert set(seen) == {2}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("wrong", [0, -1])
def test_rounds_are_taken_as_given(wrong):
    with pytest.raises(ValueError, match=f"rounds is {wrong}, expected at least 1"):
        run(row(), rounds=wrong)
    assert run(row(), rounds=2).rounds == 2
    assert run(row()).rounds == 3
