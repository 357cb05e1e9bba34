"""What a log line says of a run that goes wrong, and what to try. Thresholds are reconstructed: no paper gives them.

    chosen log-prob falls   likelihood displacement (Razin et al. 2024, 2410.08847): the margin grows although both
                            responses lose. reward/chosen is below -FALLEN, and by more than the margin it bought.
    KL explodes             a response is more than KL_NATS from the reference (reinforcement).
    reward collapses        the score, standardised by the untrained model's, is SCORE_DROP deviations below theirs.
"""

from collections.abc import Mapping

FALLEN = 2.0  # of reward/chosen: beta times nats
KL_NATS = 30.0
SCORE_DROP = 1.0


def signs(line: Mapping[str, float]) -> dict[str, str]:
    """What goes wrong -> one sentence with its numbers and what to try.

    Args:
        line: metrics of an interval, of a loss that compares with the reference.
    """
    found = {}
    chosen, margin = line.get("reward/chosen", 0.0), line.get("margin", 0.0)
    if chosen < -max(FALLEN, margin):
        found["chosen"] = (f"the chosen responses lose probability (reward/chosen {chosen:.3g}, margin {margin:.3g}):"
                           " try a lower --lr, a larger --beta, or --anchor 1, the term of mdpo that holds them")
    if (kl := line.get("kl", 0.0)) > KL_NATS:
        found["kl"] = (f"the policy is {kl:.3g} nats a response from the reference: try a larger --kl-coef or a lower"
                       " --lr")
    if (score := line.get("score", 0.0)) < -SCORE_DROP:
        found["score"] = (f"the score is {-score:.3g} deviations below the untrained model's: try a lower --lr,"
                          " fewer --inner-epochs or a smaller --clip")
    return found
