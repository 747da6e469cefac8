"""What a split costs: like is compared with like."""

import disaggregated


def test_a_store_that_costs_nothing_costs_nothing() -> None:
    """A draft of 10 s and a target of 1 s a conversation, four steps and a held-out round: of its
    own conversations a trainer does all but the first step's, a worker does all."""
    own = {"trainer_cpu_s": 10.0 + 3 * 8 + 8}
    away = {"trainer_cpu_s": 10.0, "worker_cpu_s": 40.0, "store_cpu_s": 0.0, "ray_cpu_s": 9.0}
    away["worker_conversations"] = 40
    assert disaggregated.overhead(own, away, 4) == 0.0
    away["trainer_cpu_s"] += 3.2
    assert disaggregated.overhead(own, away, 4) == 0.1
