"""The tape: repeatable, editable, and its streams do not disturb each other."""

from __future__ import annotations

from holdfast.sim.tape import RESOLUTION, Tape


def draw(tape: Tape) -> list[object]:
    values: list[object] = []
    for turn in range(200):
        values += [tape.plan.choose(7), tape.plan.chance(0.3), tape.network.uniform(1.0, 2.0)]
        values += [tape.schedule.choose(turn + 1), tape.workload.log_uniform(0.01, 100.0), tape.pick("abc")]
    return values


def test_the_same_seed_gives_the_same_choices_and_another_gives_others() -> None:
    assert draw(Tape(5)) == draw(Tape(5))
    assert draw(Tape(5)) != draw(Tape(6))


def test_what_was_recorded_replays() -> None:
    first = Tape(5)
    drawn = draw(first)
    again = Tape(99, first.choices)
    assert draw(again) == drawn
    assert again.choices == first.choices


def test_streams_do_not_shift_each_other() -> None:
    quiet, busy = Tape(5), Tape(5)
    for _ in range(50):
        busy.network.choose(1000)
    assert [quiet.plan.choose(100) for _ in range(50)] == [busy.plan.choose(100) for _ in range(50)]


def test_only_the_named_stream_is_scripted() -> None:
    plain, scripted = Tape(5), Tape(5, {"plan": [3, 1]})
    assert [scripted.plan.choose(4) for _ in range(4)] == [3, 1, 0, 0]
    assert [plain.network.choose(9) for _ in range(20)] == [scripted.network.choose(9) for _ in range(20)]


def test_a_bare_script_is_the_plans() -> None:
    assert [Tape(5, [2]).choose(3), Tape(5, [2]).plan.choose(3)] == [2, 2]


def test_a_script_that_is_over_or_does_not_fit_goes_on_plainly() -> None:
    tape = Tape(5, {"plan": [9, 1]})
    assert tape.choose(4) == 0, "9 is none of the four"
    assert tape.chance(0.0001) is True, "a scripted yes"
    assert tape.chance(0.9999) is False
    assert tape.uniform(3.0, 4.0) == 3.0
    assert tape.log_uniform(0.5, 4.0) == 0.5
    assert tape.pick(["plain", "other"]) == "plain"
    assert list(tape.choices["plan"]) == [0, 1, 0, 0, 0, 0], "what was given, not what was asked for"


def test_values_stay_in_their_ranges() -> None:
    tape = Tape(1)
    for _ in range(2000):
        assert 0 <= tape.choose(3) < 3
        assert 2.0 <= tape.uniform(2.0, 3.0) < 3.0
        assert 0.001 <= tape.log_uniform(0.001, 10.0) < 10.0
    assert max(tape.given) < RESOLUTION


def test_log_uniform_gives_each_magnitude_its_share() -> None:
    tape = Tape(1)
    drawn = [tape.log_uniform(0.01, 100.0) for _ in range(4000)]
    shares = [sum(low <= value < low * 10 for value in drawn) / len(drawn) for low in (0.01, 0.1, 1.0, 10.0)]
    assert all(0.2 < share < 0.3 for share in shares), shares


def test_generators_for_production_code_follow_from_the_name() -> None:
    assert Tape(1).rng("a").random() == Tape(1).rng("a").random()
    assert Tape(1).rng("a").random() != Tape(1).rng("b").random()
    assert Tape(1).rng("a").random() != Tape(2).rng("a").random()


def test_an_explained_tape_says_what_each_choice_was_for() -> None:
    tape = Tape(1, explain=True)
    tape.choose(2, "who dies")
    tape.network.chance(0.5, "reset")
    assert tape.labels == ["who dies"]
    assert tape.network.labels == ["reset"]
